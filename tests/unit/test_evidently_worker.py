"""Evidently's process: one that crashes, hangs, idles or outlives its parent harms nobody."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from daemon.evidently_child import Desk, Failed, Forgotten, Judge, Learn, Learned, Terms
from daemon.evidently_worker import EvidentlyEngine, EvidentlyFailed, EvidentlyWorker
from monitors.records import Partition, PredictionRecord
from monitors.reference import Reference
from monitors.settings import DriftSettings, QualitySettings

AT = datetime(2026, 1, 1, tzinfo=UTC)


def window(size: int, start: float = 0.0) -> list[PredictionRecord]:
    return [
        PredictionRecord(
            "m",
            "1",
            str(i),
            AT,
            {"amount": start + i % 90, "plan": "abc"[i % 3]},
            i % 2,
            Partition("log", 0),
            i,
        )
        for i in range(size)
    ]


def reference() -> bytes:
    rows = window(1200)
    return Reference.from_rows(
        "m", "1", [one.features for one in rows], [one.prediction for one in rows], DriftSettings()
    ).to_bytes()


def engine(worker: EvidentlyWorker, thresholds: dict[str, float] | None = None) -> EvidentlyEngine:
    drift = DriftSettings(thresholds=thresholds or {})
    return EvidentlyEngine(worker, reference(), drift, QualitySettings(), "classification")


@pytest.fixture(scope="module")
def worker() -> Iterator[EvidentlyWorker]:
    worker = EvidentlyWorker(timeout_seconds=120.0)
    yield worker
    worker.close()


def test_it_starts_when_needed_and_restarts_once_lost(worker: EvidentlyWorker) -> None:
    judging = engine(worker)
    assert worker.pid is None
    with capture_logs() as logs:
        first = judging.judge(window(600, start=50.0))
        pid = worker.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert judging.judge(window(600, start=50.0)) == first
    assert first.drifted_columns == ("amount",)
    assert worker.pid not in (None, pid)
    assert [entry["event"] for entry in logs if entry["event"] == "evidently_started"] == [
        "evidently_started"
    ] * 2
    assert "50.0" not in str(logs)


def test_it_keeps_a_reference_for_each_of_its_terms(worker: EvidentlyWorker) -> None:
    strict, easy = engine(worker), engine(worker, thresholds={"amount": 100.0})
    now = window(600, start=50.0)
    assert strict.judge(now).drifted_columns == ("amount",)
    assert easy.judge(now).drifted_columns == ()
    assert strict.judge(now).drifted_columns == ("amount",)


def test_it_draws_whole_files_and_nothing_else(worker: EvidentlyWorker, tmp_path: Path) -> None:
    drawn = engine(worker).draw(window(600, start=50.0), tmp_path / "reports", "fraud-7")
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == ["fraud-7.html", "fraud-7.json"]
    html = (tmp_path / "reports" / drawn.html).read_text()
    assert html.lstrip().startswith("<") and "amount" in html and 'http-equiv="refresh"' not in html
    said = msgspec.json.decode((tmp_path / "reports" / drawn.json).read_bytes())
    assert {metric["config"].get("column") for metric in said["metrics"]} == {
        None,
        "amount",
        "plan",
        "prediction",
    }
    with pytest.raises(ValueError, match="plain file name"):
        engine(worker).draw(window(600), tmp_path, "../elsewhere")


def test_one_that_takes_too_long_is_stopped() -> None:
    worker = EvidentlyWorker(timeout_seconds=0.3)
    try:
        with capture_logs() as logs, pytest.raises(EvidentlyFailed, match=r"longer than 0\.3 s"):
            engine(worker).judge(window(600))
        assert [entry["event"] for entry in logs] == ["evidently_started", "evidently_timed_out"]
        assert worker.pid is None
    finally:
        worker.close()


def test_one_that_dies_on_every_request_is_an_error_not_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    # A child that cannot even start: its interpreter refuses.
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    worker = EvidentlyWorker()
    with (
        capture_logs() as logs,
        pytest.raises(EvidentlyFailed, match=r"ended twice on one request \(exit code 1\)"),
    ):
        engine(worker).judge(window(600))
    assert [entry["event"] for entry in logs] == [
        "evidently_started",
        "evidently_restarted",
        "evidently_started",
        "evidently_lost",
    ]
    worker.close()


def test_one_that_idles_ends_and_is_started_again(ends: Callable[[int], bool]) -> None:
    worker = EvidentlyWorker(idle_seconds=0.2)
    try:
        judging = engine(worker)
        # Nothing is scored of an empty window, so Evidently need not be imported.
        first = judging.judge([])
        pid = worker.pid
        assert pid is None or ends(pid)
        assert judging.judge([]) == first
    finally:
        worker.close()


def test_one_whose_parent_was_killed_ends(ends: Callable[[int], bool]) -> None:
    script = (
        "import os, signal, sys\nfrom daemon.evidently_worker import EvidentlyWorker\n"
        "worker = EvidentlyWorker()\nprint(worker._running().pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    parent = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert parent.returncode == -signal.SIGKILL
    assert ends(int(parent.stdout.splitlines()[-1]))


def test_a_closed_worker_starts_nothing() -> None:
    worker = EvidentlyWorker()
    worker.close()
    with pytest.raises(EvidentlyFailed, match="was closed"):
        engine(worker).judge(window(10))
    assert worker.pid is None


def test_a_reference_that_cannot_be_read_is_named_without_its_content(worker: EvidentlyWorker) -> None:
    damaged = EvidentlyEngine(worker, b"SECRET", DriftSettings(), QualitySettings(), "classification")
    with pytest.raises(EvidentlyFailed, match=r"InvalidReference in reference\.py") as caught:
        damaged.judge(window(10))
    assert "SECRET" not in str(caught.value)


def test_terms_that_made_room_for_others_are_told_again() -> None:
    desk = Desk()
    terms = Terms(reference(), DriftSettings(), QualitySettings(), "classification")
    assert all(desk.answer(Learn(str(number), terms)) == Learned() for number in range(17))
    assert desk.answer(Judge("0", ())) == Forgotten()
    assert not isinstance(desk.answer(Judge("16", ())), Forgotten | Failed)


def test_the_child_is_told_no_secret_and_reports_nothing_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETRAIN_DAEMON_KAFKA__SASL_PASSWORD", "hush")
    monkeypatch.setenv("PREFECT_API_KEY", "hush")
    worker = EvidentlyWorker()
    try:
        environment = Path(f"/proc/{worker._running().pid}/environ").read_bytes()
        assert b"hush" not in environment and b"DO_NOT_TRACK=true" in environment
    finally:
        worker.close()
