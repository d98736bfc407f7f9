"""`explain` with Prefect and the registry at hand: from the offsets to the run and the alias."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from daemon.cli import main
from daemon.config import Config, load
from daemon.ledger import Checkpoint, Ledger
from daemon.wire.prefect import PrefectApi
from flows.audit import Move
from flows.deploy import deploy
from flows.registry import bootstrap_champion, open_registry
from monitors.drift import DriftReport, DriftScore
from monitors.episodes import Circumstances, Judged, ModelState, on_outcome, on_window
from monitors.events import OffsetRange, Outcome
from monitors.monitor import ModelChanges
from monitors.performance import LabelChanges
from monitors.policy import Decision, Phase, Verdict
from monitors.settings import PolicySettings

if TYPE_CHECKING:
    from daemon.wire.local_prefect import LocalPrefectServer

pytestmark = pytest.mark.prefect

START = datetime(2026, 1, 1, tzinfo=UTC)
SCORE = DriftScore("amount", "wasserstein", 0.7, 0.1, ">=", True, 500, 100, "evidently-0.7.23/wasserstein")


def window(key: int) -> Judged:
    start = START + timedelta(hours=key)
    return Judged(
        model="fraud",
        version="1",
        key=key,
        start=start,
        end=start + timedelta(hours=1),
        seen=100,
        sampled=100,
        spans=(OffsetRange("predictions", 0, 100 * key, 100 * key + 100),),
        report=DriftReport((SCORE,)),
        decision=Decision(Verdict.DRIFTED, Phase.FIRING, "drift share 1.000 >= 0.5", start),
    )


def kept(ledger: Ledger, state: ModelState, events: Any, judged: Judged | None, ended: Any = ()) -> None:
    changes = ModelChanges(state, {}, LabelChanges((), {}, (), (), 0, 0))
    windows = [(judged, "http://reports/fraud-1.html")] if judged else []
    ledger.checkpoint(
        Checkpoint(positions={}, models={"fraud": changes}, judged=windows, events=events, ended=ended)
    )


@pytest.fixture
def config(tmp_path: Path, prefect_server: "LocalPrefectServer") -> Config:
    path = tmp_path / "retrain-daemon.toml"
    path.write_text(
        'mode = "retrain"\n[prefect]\nwork_pool = "explained"\n'
        '[models.fraud.policy]\nmethod = "thresholds"\nfor_windows = 1\n'
    )
    return load(path, {})


def test_it_goes_from_the_offsets_to_the_run_and_the_alias(
    config: Config, tmp_path: Path, prefect_api: PrefectApi, capsys: pytest.CaptureFixture[str]
) -> None:
    import pandas as pd

    deploy([config.flow_settings("fraud")], config.prefect)
    deployment = prefect_api.deployment("retrain-daemon/fraud")
    assert deployment is not None
    run = prefect_api.create_run(deployment["id"], {"request": None}, "explained")["id"]
    # One that waits is called late as soon as the server finds the time.
    ended = {"state": {"type": "COMPLETED", "name": "Promoted"}, "force": True}
    prefect_api.call("POST", f"/flow_runs/{run}/set_state", ended)

    ledger = Ledger(config.ledger.url)
    ledger.take_over("g", "m")
    around = Circumstances("cluster|g", "retrain")
    state, events = on_window(around, PolicySettings(method="thresholds"), ModelState(), window(1))
    kept(ledger, state, events, window(1))
    (request,) = ledger.requests()
    ledger.mark_posted(next(row for row in ledger.waiting_events() if row.request))
    ledger.confirm(request.id, run, "automation")
    outcome = Outcome(
        action="promoted", sentence="0.9 against 0.5", run=run, registry_version="1", model_version="2"
    )
    state, events = on_outcome(PolicySettings(method="thresholds"), state, request.id, outcome)
    kept(ledger, state, events, None, [(request.id, outcome)])
    ledger.close()

    frame = pd.DataFrame({"amount": [float(number % 10) for number in range(400)]})
    flow = config.flow_settings("fraud")
    version = bootstrap_champion(flow, frame, frame["amount"].gt(5).astype(int))
    move = Move(
        action="promoted", version=version, expected=version, reason="better", at=START, request=request.id
    )
    open_registry(flow).move(move, lambda: None)

    capsys.readouterr()
    assert main(["explain", "fraud:1", "--json", "--config", str(tmp_path / "retrain-daemon.toml")]) == 0
    told = json.loads(capsys.readouterr().out)
    (asked,) = told["windows"]
    assert asked["offsets"] == list(msgspec.to_builtins(window(1).spans))
    assert asked["scores"][0]["column"] == "amount" and asked["clause"] == "drift share 1.000 >= 0.5"
    assert asked["report_url"] == "http://reports/fraud-1.html" and asked["request"] == request.id
    (one,) = told["requests"]
    assert one["run"]["url"] == f"{prefect_api.ui_url}/runs/flow-run/{run}"
    assert one["run"]["state"] == "Promoted" and one["created_by"] == "automation"
    assert one["gate"]["sentence"] == "0.9 against 0.5"
    assert told["deployment"]["url"].endswith(deployment["id"])
    assert told["alias"]["champion"] == version
    assert [found["request"] for found in told["alias"]["moves"]] == [request.id], "not the first champion's"

    assert main(["explain", told["episode"]["id"], "--config", str(tmp_path / "retrain-daemon.toml")]) == 0
    text = capsys.readouterr().out
    for part in ("predictions/0:100-200", "wasserstein 0.7 >= 0.1", one["run"]["url"], "champion is version"):
        assert part in text
