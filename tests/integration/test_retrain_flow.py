"""The flow on a real Prefect server, its rows from real topics: what people and the daemon get to see."""

import contextlib
import io
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from daemon.wire.local_prefect import LocalPrefectServer
from daemon.wire.names import champion_variable, claim_variable
from daemon.wire.prefect import PrefectApi
from flows.claims import Claims
from flows.data import extract
from flows.registry import bootstrap_champion, champion_version, open_registry, rollback
from flows.retrain import artifact_key, retrain, run_now
from monitors.events import Event, Kind, OffsetRange, RetrainRequest
from monitors.settings import (
    DataSettings,
    FieldSettings,
    FlowSettings,
    LimitSettings,
    ModelSettings,
    RegistrySettings,
    TrainingSettings,
)

pytestmark = [pytest.mark.kafka, pytest.mark.prefect]
START = datetime(2026, 1, 1, tzinfo=UTC)
CHANGE, ROWS = 600, 1500


def world(rows: int, change_at: int, seed: int) -> pd.DataFrame:
    """Payments; from `change_at` on the label means the opposite. A twentieth of the labels is wrong."""
    random = np.random.default_rng(seed)
    amount = random.normal(size=rows)
    country = random.choice(["de", "fr"], rows)
    wrong = random.random(rows) < 0.05
    turned = np.arange(rows) >= change_at
    label = ((amount + 0.5 * (country == "de") > 0) ^ turned ^ wrong).astype(int)
    return pd.DataFrame({"amount": amount, "country": country, "label": label})


def moment(index: int) -> datetime:
    return START + timedelta(minutes=index)


def log_stream(kafka: Any, predictions: str, labels: str, model: str, frame: pd.DataFrame) -> None:
    """Predictions over two partitions among another model's and rubbish, and the labels later."""
    for partition in (0, 1):
        rows = range(partition, len(frame), 2)
        told = [
            {
                "model": name,
                "model_version": "1",
                "id": f"{name}-{index}",
                "event_time": moment(index).isoformat(),
                "features": {"amount": frame["amount"][index], "country": frame["country"][index]},
                "prediction": 0,
            }
            for index in rows
            for name in (model, "another")
        ]
        values = [json.dumps(value).encode() for value in told]
        kafka.produce(predictions, [b"rubbish", *values], partition)
    truths = [
        {
            "model": model,
            "id": f"{model}-{index}",
            "label": int(label),
            "event_time": moment(index + 60).isoformat(),
        }
        for index, label in enumerate(frame["label"])
    ]
    kafka.produce(labels, [json.dumps(value).encode() for value in truths])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def settings(kafka: Any, folder: Path) -> FlowSettings:
    """The topics of a world that turned."""
    model = f"fraud-{uuid.uuid4().hex[:8]}"
    predictions, labels = kafka.topic(2), kafka.topic()
    log_stream(kafka, predictions, labels, model, world(ROWS, CHANGE, seed=2))
    return FlowSettings(
        model=model,
        settings=ModelSettings(
            data=DataSettings(source="topics"), training=TrainingSettings(parameters={"max_iter": 15})
        ),
        kafka=kafka.settings(topic=predictions, labels_topic=labels),
        fields={predictions: FieldSettings(), labels: FieldSettings()},
        limits=LimitSettings(),
        registry=RegistrySettings(
            tracking_uri=f"sqlite:///{folder}/mlflow.db", references_url=str(folder / "refs")
        ),
    )


@pytest.fixture
def fresh(settings: FlowSettings, folder: Path, registry_database: Callable[[], str]) -> FlowSettings:
    """The same topics, with a registry of the test's own whose champion knows the old world."""
    registry = RegistrySettings(
        tracking_uri=registry_database(),
        references_url=str(folder / uuid.uuid4().hex),
    )
    own = msgspec.structs.replace(settings, registry=registry)
    old = world(800, 800, seed=1)
    bootstrap_champion(own, old[["amount", "country"]], old["label"])
    return own


def asked(settings: FlowSettings, since: int = CHANGE) -> RetrainRequest:
    topic = settings.kafka.topics[0]
    return RetrainRequest(
        request=str(uuid.uuid4()),
        episode=str(uuid.uuid4()),
        episode_number=3,
        attempt=1,
        model=settings.model,
        model_version="1",
        reason="2 of 2 columns drifted",
        suspected_since=moment(since),
        window_start=moment(since),
        window_end=moment(ROWS),
        offsets=(OffsetRange(topic, 0, 0, 10),),
        drift_share=1.0,
        drifted_columns=("amount",),
        report_url="http://127.0.0.1:8321/reports/one.html",
    )


def carried_out(settings: FlowSettings, request: RetrainRequest | None) -> Any:
    """The flow with parameters as a deployment has them: JSON and nothing else."""
    parameters = json.loads(msgspec.json.encode({"settings": settings, "request": request}))
    return retrain(**parameters, return_state=True)


def event(api: PrefectApi, kind: Kind, request: str) -> dict[str, Any]:
    """The request's event, as soon as the feed has it."""
    wanted = str(Event(kind=kind, model="any", subject=request, payload={}).id)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if found := api.events({"id": {"id": [wanted]}}):
            return found[0]
        time.sleep(0.25)
    raise AssertionError(f"no event {kind} of request {request} in the feed")


def artifact(api: PrefectApi, settings: FlowSettings) -> str:
    body = {"artifacts": {"key": {"any_": [artifact_key(settings.model)]}}, "sort": "CREATED_DESC"}
    found = api.call("POST", "/artifacts/filter", body)
    assert found, "the run left no artifact"
    return str(found[0]["data"])


def test_a_promotion_is_told_in_state_artifact_event_notice_and_claim(
    prefect_api: PrefectApi, fresh: FlowSettings
) -> None:
    request = asked(fresh)
    state = carried_out(fresh, request)
    run = prefect_api.run(str(state.state_details.flow_run_id))
    assert run is not None
    assert run["name"] == f"{fresh.model}: episode 3, attempt 1"
    assert (run["state"]["type"], run["state"]["name"]) == ("COMPLETED", "Promoted")
    bounds = r"CI \+\.\d+ to \+\.\d+"
    sentence = rf"0\.\d{{3}} against 0\.\d{{3}}, {bounds}, Brier \+\.\d+, {bounds}( \(.*\))?"
    assert re.fullmatch(sentence, run["state"]["message"])
    assert champion_version(fresh) == "2"

    claim = prefect_api.read_variable(claim_variable(request.request, 1))
    assert claim is not None
    assert (claim["run"], claim["fence"]) == (run["id"], 1)
    told = {key: claim["outcome"][key] for key in ("action", "sentence", "model_version", "champion_before")}
    assert told == {
        "action": "promoted",
        "sentence": run["state"]["message"],
        "model_version": "2",
        "champion_before": "1",
    }
    notice = prefect_api.read_variable(champion_variable(fresh.model))
    assert notice is not None
    assert (notice["model_version"], notice["previous_model_version"], notice["action"]) == (
        "2",
        "1",
        "promoted",
    )

    posted = event(prefect_api, Kind.CHALLENGER_PROMOTED, request.request)
    assert posted["event"] == "retrain-daemon.challenger.promoted"
    assert posted["resource"]["retrain-daemon.request"] == request.request
    assert posted["payload"]["sentence"] == run["state"]["message"]

    card = artifact(prefect_api, fresh)
    assert card.splitlines()[2] == "| Verdict | Gate | Challenger | Champion before |"
    assert f"/runs/flow-run/{run['id']}" in card and request.report_url in card
    made = open_registry(fresh).find("2")
    assert made is not None and made.tags["run"] == run["id"]
    ranges = msgspec.json.decode(made.tags["offsets"], type=list[OffsetRange])
    assert {(one.topic, one.partition): one.end for one in ranges} == {
        (fresh.kafka.topics[0], 0): ROWS + 1,
        (fresh.kafka.topics[0], 1): ROWS + 1,
        (fresh.kafka.labels_topic, 0): ROWS,
    }


def test_the_artifacts_snippet_loads_the_champion(prefect_api: PrefectApi, fresh: FlowSettings) -> None:
    carried_out(fresh, asked(fresh))
    (code,) = re.findall(r"```python\n(.*?)```", artifact(prefect_api, fresh), re.DOTALL)
    names: dict[str, Any] = {}
    with contextlib.redirect_stderr(io.StringIO()):
        exec(code, names)
    assert str(names["version"]) == "2"
    frame = pd.DataFrame({"amount": [3.0, -3.0], "country": ["fr", "fr"]})
    assert names["model"].predict(frame).tolist() == [0, 1]


def test_a_refusal_keeps_the_champion_and_says_why(prefect_api: PrefectApi, fresh: FlowSettings) -> None:
    carried_out(fresh, asked(fresh))
    request = asked(fresh, since=CHANGE)
    state = carried_out(fresh, request)
    assert (state.type.value, state.name) == ("COMPLETED", "Refused")
    assert "later than the champion's training" in (state.message or "")
    assert champion_version(fresh) == "2"
    posted = event(prefect_api, Kind.CHALLENGER_REFUSED, request.request)
    assert posted["payload"]["sentence"] == state.message
    notice = prefect_api.read_variable(champion_variable(fresh.model))
    assert notice is not None and notice["registry_version"] == "2"


def test_a_second_run_of_one_request_ends_as_duplicate(prefect_api: PrefectApi, fresh: FlowSettings) -> None:
    request = asked(fresh)
    first = carried_out(fresh, request)
    second = carried_out(fresh, request)
    assert (second.type.value, second.name) == ("COMPLETED", "Duplicate")
    assert second.message == f"run {first.state_details.flow_run_id} acts on request {request.request}"
    assert [record.move.version for record in open_registry(fresh).audit()] == ["1", "2"]


def test_a_run_that_crashed_before_its_outcome_is_taken_over(
    prefect_api: PrefectApi, fresh: FlowSettings
) -> None:
    """The row of the crashed run is one that Prefect itself has, and its heart still beats."""
    request = asked(fresh)
    crashed = str(carried_out(fresh, asked(fresh, since=1499)).state_details.flow_run_id)
    Claims(prefect_api).claim(request.request, crashed)
    body = {"state": {"type": "CRASHED", "name": "Crashed"}, "force": True}
    prefect_api.call("POST", f"/flow_runs/{crashed}/set_state", body)
    state = carried_out(fresh, request)
    holder = Claims(prefect_api).holder(request.request)
    assert holder is not None and holder.outcome is not None
    assert (holder.fence, holder.run) == (2, str(state.state_details.flow_run_id))
    assert state.name == holder.outcome.action.capitalize()


def test_a_failure_is_failed_with_its_reason_and_an_outcome(
    prefect_api: PrefectApi, fresh: FlowSettings
) -> None:
    training = TrainingSettings(callable="nowhere.at.all:fit")
    broken = msgspec.structs.replace(
        fresh, settings=msgspec.structs.replace(fresh.settings, training=training)
    )
    request = asked(fresh)
    state = carried_out(broken, request)
    assert state.type.value == "FAILED"
    assert (state.message or "").startswith("training.callable = 'nowhere.at.all:fit'")
    claim = prefect_api.read_variable(claim_variable(request.request, 1))
    assert claim is not None and claim["outcome"]["action"] == "failed"
    assert champion_version(fresh) == "1"


def test_run_now_is_a_manual_run_and_a_rollback_is_told(prefect_api: PrefectApi, fresh: FlowSettings) -> None:
    recent = DataSettings(source="topics", max_rows=ROWS - CHANGE)
    own = msgspec.structs.replace(fresh, settings=msgspec.structs.replace(fresh.settings, data=recent))
    outcome = run_now(own)
    assert outcome.action == "promoted"
    run = prefect_api.run(outcome.run)
    assert run is not None and run["name"] == f"{own.model}: manual"
    rollback(own, "complaints")
    notice = prefect_api.read_variable(champion_variable(own.model))
    assert notice is not None
    assert (notice["action"], notice["model_version"], notice["previous_model_version"]) == (
        "rolled-back",
        "1",
        "2",
    )


def test_parameters_that_are_no_retraining_fail_clearly(prefect_server: LocalPrefectServer) -> None:
    state = retrain({"model": "fraud"}, return_state=True)
    assert state.type.value == "FAILED"
    assert "deploy again" in (state.message or "")


# Extraction


def test_the_newest_labelled_rows_are_read_backwards_and_in_order(settings: FlowSettings) -> None:
    few = msgspec.structs.replace(
        settings, settings=msgspec.structs.replace(settings.settings, data=DataSettings(max_rows=300))
    )
    rows = extract(few, None)
    expected = world(ROWS, CHANGE, seed=2)[-300:]
    assert rows.labels.tolist() == expected["label"].tolist()
    assert rows.features["amount"].tolist() == expected["amount"].tolist()
    assert rows.predictions.tolist() == [0] * 300
    assert (rows.event_times[0], rows.event_times[-1]) == (
        moment(ROWS - 300).timestamp(),
        moment(ROWS - 1).timestamp(),
    )
    assert all(one.start > 0 for one in rows.offsets)


@pytest.fixture
def labelled(kafka: Any, settings: FlowSettings) -> Iterator[FlowSettings]:
    """A topic with the label in the record, where a shadow model writes beside the serving one."""
    topic = kafka.topic()
    values = [
        {
            "model": settings.model,
            "model_version": version,
            "id": f"id-{index}",
            "event_time": moment(index).isoformat(),
            "features": {"amount": float(index)},
            "prediction": version,
            "label": index % 2,
            "segment": f"{version}-{index % 5}",
        }
        for index in range(250)
        for version in ("1", "shadow")
    ]
    kafka.produce(topic, [json.dumps(value).encode() for value in values])
    yield msgspec.structs.replace(
        settings,
        kafka=kafka.settings(topic=topic),
        fields={topic: FieldSettings()},
    )


def test_a_shadow_models_record_is_no_second_row(labelled: FlowSettings) -> None:
    rows = extract(labelled, asked(labelled))
    assert len(rows) == 250
    assert set(rows.predictions) == {"1"}
    assert set(rows.segments) == {f"1-{number}" for number in range(5)}
