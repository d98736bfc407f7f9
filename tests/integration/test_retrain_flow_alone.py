"""A retraining's steps in one process, without a server: gate, re-entry after each death, rollback."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from daemon.wire.prefect import PrefectUnavailable
from daemon.wire.references import ReferenceStore
from flows import promotion
from flows.announcements import outcome_event
from flows.audit import ChampionMoved, NoEarlierChampion
from flows.claims import Claims, FolderVariables
from flows.data import extract
from flows.evaluation import evaluate
from flows.registry import (
    Registry,
    bootstrap_champion,
    champion_version,
    load_champion,
    open_registry,
    rollback,
)
from flows.retrain import Job, act, run_now
from flows.training import refit
from monitors.events import Kind, OffsetRange, Outcome, RetrainRequest
from monitors.reference import Reference
from monitors.seasons import Season
from monitors.settings import (
    DataSettings,
    FlowSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    RegistrySettings,
    TrainingSettings,
)

START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def registry_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture
def settings(registry_folder: Path, tmp_path: Path) -> FlowSettings:
    """A model of the test's own, on a registry that all share because making one takes seconds."""
    return FlowSettings(
        model=f"fraud-{uuid.uuid4().hex[:8]}",
        settings=ModelSettings(
            reference_rows=300,
            data=DataSettings(source="folder", path=str(tmp_path / "rows.csv")),
            training=TrainingSettings(parameters={"max_iter": 15}),
        ),
        kafka=KafkaSettings(),
        fields={},
        limits=LimitSettings(),
        registry=RegistrySettings(
            tracking_uri=f"sqlite:///{registry_folder}/mlflow.db",
            references_url=str(registry_folder / "refs"),
        ),
    )


def world(rows: int, turned: bool, seed: int, start: float = 0.0) -> pd.DataFrame:
    """Payments one minute apart; in the turned world the label means the opposite."""
    random = np.random.default_rng(seed)
    amount = random.normal(size=rows)
    country = random.choice(["de", "fr"], rows)
    noise = random.random(rows) < 0.05
    label = ((amount + 0.5 * (country == "de") > 0) ^ turned ^ noise).astype(int)
    times = [START.timestamp() + 60 * (start + index) for index in range(rows)]
    return pd.DataFrame(
        {
            "event_time": pd.to_datetime(times, unit="s", utc=True),
            "amount": amount,
            "country": country,
            "label": label,
        }
    )


def features(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[["amount", "country"]]


def keep(settings: FlowSettings, *frames: pd.DataFrame) -> None:
    pd.concat(frames, ignore_index=True).to_csv(settings.settings.data.path, index=False)


def drifted(settings: FlowSettings) -> None:
    """A champion of the old world, and rows in which the world turned after the 600th."""
    old = world(800, False, seed=1)
    bootstrap_champion(settings, features(old), old["label"])
    keep(settings, world(600, False, seed=2), world(900, True, seed=3, start=600))


def asked(settings: FlowSettings) -> RetrainRequest:
    since = datetime.fromtimestamp(START.timestamp() + 60 * 600, UTC)
    return RetrainRequest(
        request=str(uuid.uuid4()),
        episode=str(uuid.uuid4()),
        episode_number=3,
        attempt=1,
        model=settings.model,
        model_version="1",
        reason="2 of 2 columns drifted",
        suspected_since=since,
        window_start=since,
        window_end=since,
        offsets=(OffsetRange("predictions", 0, 0, 10),),
        drift_share=1.0,
        drifted_columns=("amount",),
    )


def job(settings: FlowSettings, folder: Path, request: RetrainRequest, **more: Any) -> Job:
    return Job(
        settings=settings,
        request=request,
        request_id=request.request,
        run=more.pop("run", str(uuid.uuid4())),
        registry=more.pop("registry", open_registry(settings)),
        variables=FolderVariables(folder / "claims"),
        open_variables=lambda: FolderVariables(folder / "claims"),
        **more,
    )


def versions(settings: FlowSettings) -> list[str]:
    """The numbers of all versions that exist, lowest first."""
    registry = open_registry(settings)
    return [str(number) for number in range(1, 10) if registry.find(str(number))]


def test_after_a_drift_the_challenger_is_promoted_with_its_reference(
    settings: FlowSettings, tmp_path: Path
) -> None:
    drifted(settings)
    cards: list[str] = []
    outcome = act(job(settings, tmp_path, asked(settings), run="run-a", publish=cards.append))
    assert (outcome.action, outcome.registry_version, outcome.model_version) == ("promoted", "2", "2")
    assert (outcome.champion_before, outcome.metric) == ("1", "accuracy")
    assert outcome.challenger_score is not None and outcome.champion_score is not None
    assert outcome.challenger_score > 0.85 > 0.3 > outcome.champion_score
    assert f"{outcome.challenger_score:.3f} against {outcome.champion_score:.3f}, CI +." in outcome.sentence
    champion = load_champion(settings)
    assert champion is not None and (champion.version, champion.model_version) == ("2", "2")
    stored = ReferenceStore(settings.registry.references_url).read(settings.model, "2")
    made = open_registry(settings).find("2")
    assert stored is not None and made is not None
    data, digest = stored
    reference = Reference.from_bytes(data)
    assert (digest, reference.rows) == (made.tags["reference_digest"], 300)
    assert [column.name for column in reference.columns] == ["amount", "country"]
    assert set(reference.predictions.values()) == {0, 1}
    slots = reference.slots(Season(604_800.0, 168))
    assert slots is not None and slots.size == 300
    assert made.tags["span"] in ("rows since the change", "recent rows")
    recorded = {
        "git_commit",
        "constraints_digest",
        "parameters",
        "data_fingerprint",
        "offsets",
        "request",
        "run",
    }
    assert recorded <= made.tags.keys() and made.tags["run"] == "run-a"
    assert cards[0].splitlines()[2] == "| Verdict | Gate | Challenger | Champion before |"


def test_without_a_change_the_champion_stays(settings: FlowSettings, tmp_path: Path) -> None:
    old = world(3000, False, seed=1)
    bootstrap_champion(settings, features(old), old["label"])
    keep(settings, world(600, False, seed=2), world(900, False, seed=3, start=600))
    outcome = act(job(settings, tmp_path, asked(settings)))
    assert (outcome.action, outcome.registry_version, outcome.model_version) == ("refused", "2", "")
    assert champion_version(settings) == "1"
    made = open_registry(settings).find("2")
    assert made is not None and (made.tags["verdict"], made.tags["sentence"]) == ("refused", outcome.sentence)


def test_without_a_champion_the_logged_predictions_are_to_beat(
    settings: FlowSettings, tmp_path: Path
) -> None:
    table = world(1500, False, seed=4)
    perfect = table.assign(prediction=table["label"])
    keep(settings, perfect)
    request = asked(settings)
    outcome = act(job(settings, tmp_path, request))
    assert (outcome.action, outcome.champion_score, champion_version(settings)) == ("refused", 1.0, "")
    keep(settings, table.assign(prediction=1 - table["label"]))
    outcome = act(job(settings, tmp_path, asked(settings)))
    assert (outcome.action, outcome.champion_score) == ("promoted", 0.0)


def test_too_few_rows_refuse_without_a_version(settings: FlowSettings, tmp_path: Path) -> None:
    keep(settings, world(120, False, seed=1))
    outcome = act(job(settings, tmp_path, asked(settings)))
    assert (outcome.action, outcome.sentence) == ("refused", "only 120 labelled rows, 200 needed")
    assert versions(settings) == []


def test_a_champion_that_cannot_be_loaded_keeps_its_place(
    settings: FlowSettings, tmp_path: Path, registry_folder: Path
) -> None:
    drifted(settings)
    (skops,) = (registry_folder / "mlflow-artifacts" / settings.model).rglob("model.skops")
    skops.write_bytes(skops.read_bytes() + b"x")
    outcome = act(job(settings, tmp_path, asked(settings)))
    assert outcome.action == "refused"
    assert outcome.sentence.startswith("the champion can't be loaded, and is kept")
    assert champion_version(settings) == "1"


def test_a_second_run_of_the_request_is_a_duplicate(settings: FlowSettings, tmp_path: Path) -> None:
    drifted(settings)
    request = asked(settings)
    act(job(settings, tmp_path, request, run="run-a"))
    outcome = act(job(settings, tmp_path, request, run="run-b"))
    assert outcome.action == "duplicate"
    assert outcome.sentence == f"run run-a acts on request {request.request}"
    assert versions(settings) == ["1", "2"]


TRAINER = """
def broken(features, labels, settings):
    raise RuntimeError("the disk is full")
"""


def test_a_trainer_that_raises_fails_the_run_and_a_retry_may_succeed(
    settings: FlowSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_broken_trainer.py").write_text(TRAINER)
    monkeypatch.chdir(tmp_path)
    drifted(settings)
    request = asked(settings)
    training = TrainingSettings(callable="their_broken_trainer:broken")
    model = msgspec.structs.replace(settings.settings, training=training)
    outcome = act(job(msgspec.structs.replace(settings, settings=model), tmp_path, request, run="run-a"))
    assert (outcome.action, outcome.sentence) == ("failed", "RuntimeError: the disk is full")
    held = Claims(FolderVariables(tmp_path / "claims")).holder(request.request)
    assert held is not None and held.outcome == outcome
    assert act(job(settings, tmp_path, request, run="run-a")).action == "promoted"


class Died(BaseException):
    """What a kill looks like from inside: nothing of ours catches it."""


def dying(at: str) -> Callable[..., Any]:
    """Carry out steps, and die at the end of one of them."""

    def step(work: Callable[..., Any], *args: Any) -> Any:
        result = work(*args)
        if work.__name__ == at:
            raise Died
        return result

    return step


STEPS = ("_claim", "_extract", "_train", "_evaluate", "_promote", "_announce", "_finish")


@pytest.mark.parametrize(
    ("at", "entering"),
    [*((step, "run-b") for step in STEPS), ("_train", "run-a"), ("_promote", "run-a"), ("_finish", "run-a")],
)
def test_wherever_a_run_dies_the_request_is_promoted_once(
    settings: FlowSettings, tmp_path: Path, at: str, entering: str
) -> None:
    drifted(settings)
    request = asked(settings)
    with pytest.raises(Died):
        act(job(settings, tmp_path, request, run="run-a", step=dying(at)))
    outcome = act(job(settings, tmp_path, request, run=entering))
    finished = at == "_finish"
    assert outcome.action == ("duplicate" if finished and entering == "run-b" else "promoted")
    assert champion_version(settings) == "2"
    assert versions(settings) == ["1", "2"]
    moves = [record for record in open_registry(settings).audit() if record.move.request == request.request]
    assert len(moves) == 1
    held = Claims(FolderVariables(tmp_path / "claims")).holder(request.request)
    assert held is not None and held.outcome is not None
    assert (held.outcome.action, held.outcome.registry_version) == ("promoted", "2")
    assert held.fence == (2 if entering == "run-b" and not finished else 1)


def test_a_run_that_was_taken_over_while_it_trained_moves_nothing(
    settings: FlowSettings, tmp_path: Path
) -> None:
    drifted(settings)
    request = asked(settings)

    def slow(work: Callable[..., Any], *args: Any) -> Any:
        result = work(*args)
        if work.__name__ == "_evaluate":
            # Meanwhile our heartbeat was given up, and run-b took over.
            Claims(FolderVariables(tmp_path / "claims")).claim(request.request, "run-b")
        return result

    outcome = act(job(settings, tmp_path, request, run="run-a", step=slow))
    assert (outcome.action, outcome.sentence) == ("duplicate", f"run run-b acts on request {request.request}")
    assert champion_version(settings) == "1"
    # It was at the very alias that it was stopped: the reference was already there.
    assert ReferenceStore(settings.registry.references_url).read(settings.model, "2") is not None


def test_a_champion_that_changed_meanwhile_is_judged_against_anew(
    settings: FlowSettings, tmp_path: Path
) -> None:
    drifted(settings)
    request = asked(settings)
    judged: list[str] = []

    def raced(work: Callable[..., Any], *args: Any) -> Any:
        result = work(*args)
        if work.__name__ == "_evaluate":
            judged.append(result.champion)
            if len(judged) == 1:
                assert run_elsewhere(settings).action == "promoted"
        return result

    outcome = act(job(settings, tmp_path, request, step=raced))
    # The other's training leaves no row that both have not seen: nothing is judged a second time.
    assert judged == ["1"]
    assert (outcome.action, outcome.champion_before, champion_version(settings)) == ("refused", "2", "2")


def run_elsewhere(settings: FlowSettings) -> Outcome:
    """The same rows, retrained and promoted by hand, as another process would."""
    registry: Registry = open_registry(settings)
    rows = extract(settings, None)
    request = str(uuid.uuid4())
    since = asked(settings).suspected_since
    evaluation = evaluate(settings, registry, rows, since)
    challenger = refit(settings.settings, rows, evaluation.span, since)
    made = promotion.register(settings, registry, challenger, rows, request, "elsewhere", evaluation)
    promotion.promote(settings, registry, made, rows, evaluation, request, "elsewhere", lambda: None)
    return Outcome(action="promoted", sentence=evaluation.verdict.sentence)


def test_rollback_restores_the_champion_of_before(
    settings: FlowSettings, tmp_path: Path, without_a_server: None
) -> None:
    drifted(settings)
    with pytest.raises(NoEarlierChampion, match="first champion"):
        rollback(settings, "for no reason")
    act(job(settings, tmp_path, asked(settings)))
    undone = rollback(settings, "complaints")
    assert (undone.action, undone.registry_version, undone.champion_before) == ("rolled-back", "1", "2")
    assert champion_version(settings) == "1"
    last = open_registry(settings).audit()[-1]
    assert (last.move.action, last.move.reason, last.move.expected) == ("rolled-back", "complaints", "2")
    with pytest.raises(NoEarlierChampion, match="first champion"):
        rollback(settings, "once more")


@pytest.fixture
def without_a_server(tmp_path: Path) -> Iterator[None]:
    """No Prefect server is configured, for as long as the test takes: Prefect remembers what it read."""
    from prefect.context import refresh_global_settings_context

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
        patch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "prefect" / "profiles.toml"))
        refresh_global_settings_context()
        yield
    refresh_global_settings_context()


def test_run_now_needs_no_server(settings: FlowSettings, tmp_path: Path, without_a_server: None) -> None:
    old = world(800, False, seed=1)
    bootstrap_champion(settings, features(old), old["label"])
    keep(settings, world(1500, True, seed=3))
    outcome = run_now(settings)
    assert (outcome.action, champion_version(settings)) == ("promoted", "2")


def test_bootstrapping_twice_with_the_same_rows_changes_nothing(settings: FlowSettings) -> None:
    old = world(400, False, seed=1)
    first = bootstrap_champion(settings, features(old), old["label"], "2026-01")
    assert bootstrap_champion(settings, features(old), old["label"], "2026-01") == first
    stored = ReferenceStore(settings.registry.references_url).read(settings.model, "2026-01")
    assert stored is not None
    # Rows of a frame have no event times, only an order.
    assert Reference.from_bytes(stored[0]).slots(Season(604_800.0, 168)) is None
    other = world(400, False, seed=2)
    with pytest.raises(ChampionMoved):
        bootstrap_champion(settings, features(other), other["label"])


class Away(FolderVariables):
    """Files that a server would hold, which is away for so many calls once the run has claimed."""

    calls = 8

    def update_variable(self, name: str, value: Any) -> None:
        if self.calls > 0:
            self.calls -= 1
            raise PrefectUnavailable("the server is away")
        super().update_variable(name, value)


def test_an_outcome_waits_for_a_server_that_is_away(
    settings: FlowSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More calls than a step is tried again: an outcome that was lost would cost another retraining."""
    monkeypatch.setattr("flows.steps.ASK_SECONDS", 0.01)
    keep(settings, world(120, False, seed=1))
    request, variables = asked(settings), Away(tmp_path / "claims")
    outcome = act(replace(job(settings, tmp_path, request), variables=variables))
    claim = Claims(variables).holder(request.request)
    assert claim is not None and claim.outcome == outcome
    assert (outcome.action, variables.calls) == ("refused", 0)


def test_telling_of_a_promotion_cannot_undo_it(settings: FlowSettings, tmp_path: Path) -> None:
    def fail(card: str) -> None:
        raise RuntimeError("whatever the client of a server that is away raises")

    drifted(settings)
    outcome = act(job(settings, tmp_path, asked(settings), publish=fail))
    assert (outcome.action, champion_version(settings)) == ("promoted", "2")


def on_probation(settings: FlowSettings, tmp_path: Path) -> RetrainRequest:
    """The champion of the turned world, and since then a world that is as it was before."""
    drifted(settings)
    promotion = asked(settings)
    assert act(job(settings, tmp_path, promotion)).action == "promoted"
    keep(settings, world(1500, True, seed=3), world(400, False, seed=5, start=1500))
    since = datetime.fromtimestamp(START.timestamp() + 60 * 1500, UTC)
    return msgspec.structs.replace(
        promotion,
        request=str(uuid.uuid4()),
        kind="probation",
        promotion=promotion.request,
        model_version="2",
        suspected_since=since,
    )


@pytest.mark.parametrize("at", ["_claim", "_extract", "_review", "_announce", "_finish", ""])
def test_a_champion_on_probation_is_rolled_back_once_wherever_a_run_dies(
    settings: FlowSettings, tmp_path: Path, at: str
) -> None:
    request = on_probation(settings, tmp_path)
    if at:
        with pytest.raises(Died):
            act(job(settings, tmp_path, request, run="run-a", step=dying(at)))
    cards: list[str] = []
    outcome = act(job(settings, tmp_path, request, run="run-a", publish=cards.append))
    assert (outcome.action, outcome.registry_version, outcome.champion_before) == ("rolled-back", "1", "2")
    assert "better than 2, 80% sure, on the 400 rows since: 0." in outcome.sentence
    assert champion_version(settings) == "1"
    moves = [record for record in open_registry(settings).audit() if record.move.request == request.request]
    assert [record.move.action for record in moves] == ["rolled-back"]
    assert at == "_finish" or cards[0].startswith(f"# {settings.model}: rolled-back\n")


def test_the_rollback_of_a_probation_and_its_end_are_events_with_numbers() -> None:
    outcome = Outcome(
        action="rolled-back",
        sentence="1 is surely better than 2",
        run="run-a",
        registry_version="1",
        model_version="1",
        champion_before="2",
        champion_score=0.1,
    )
    event = outcome_event("fraud", "request-1", None, outcome)
    assert (event.kind, event.version, event.payload["champion_score"]) == (Kind.MODEL_ROLLED_BACK, "1", 0.1)
    kept = outcome_event("fraud", "request-1", None, Outcome(action="kept", sentence="no worse"))
    assert (kept.kind, kept.payload["sentence"]) == (Kind.PROBATION_ENDED, "no worse")
