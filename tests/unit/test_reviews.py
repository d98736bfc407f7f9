"""Reviews and engines: Evidently has the last word, and both engines decide the same on the same log."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from daemon.engines import StoredEngines
from daemon.evidently_worker import EvidentlyWorker
from daemon.ledger import Checkpoint, Ledger
from daemon.loop import ScoresDisputed
from daemon.reviews import EvidentlyReviews, report_name
from daemon.wire.references import ReferenceStore
from monitors.drift import DriftReport, WindowRows
from monitors.episodes import Circumstances, Judged
from monitors.events import Event
from monitors.monitor import Monitor, Result
from monitors.reading import Reading
from monitors.records import Partition, PredictionRecord
from monitors.settings import LimitSettings, ModelSettings, PolicySettings, WindowSettings

START = datetime(2026, 1, 1, tzinfo=UTC)
P0 = Partition("predictions", 0)
MODEL = ModelSettings(
    reference_rows=1_200,
    window=WindowSettings(rows=300, min_rows=10),
    policy=PolicySettings(method="thresholds", for_windows=2),
)


@pytest.fixture(scope="module")
def worker() -> Iterator[EvidentlyWorker]:
    made = EvidentlyWorker()
    yield made
    made.close()


def records(count: int) -> list[PredictionRecord]:
    """Numbers and categories; the last third has drifted, and some values are null or strange."""
    chance = random.Random(4)
    made = []
    for number in range(count):
        drifted = number >= 2 * count // 3
        features: dict[str, Any] = {
            "amount": chance.gauss(3.0 if drifted else 0.0, 1.0),
            "visits": chance.randrange(4) + (2 if drifted else 0),
            "plan": chance.choice("abd" if drifted else "aabc"),
            "age": None if chance.random() < 0.05 else chance.randrange(18, 90),
        }
        if number % 397 == 0:
            features["amount"] = float("inf")
        time_ = START + timedelta(seconds=number)
        made.append(PredictionRecord("fraud", "1", f"r{number}", time_, features, number % 2, P0, number))
    return made


def engines(
    folder: Path, worker: EvidentlyWorker, engine: Literal["compiled", "evidently"] = "compiled"
) -> StoredEngines:
    return StoredEngines(ReferenceStore(str(folder / "references")), {"fraud": MODEL}, engine, worker)


def decide(stored: StoredEngines, log: Sequence[PredictionRecord]) -> Result:
    """Everything that is decided about this log."""
    monitor = Monitor({"fraud": MODEL}, stored, LimitSettings())
    results = []
    for record in log:
        monitor.observe(record)
        monitor.note(Reading([P0], []))
        results.append(monitor.close(lambda *_: Circumstances("c|g", "retrain")))
    judged = tuple(one for result in results for one in result.judged)
    rows = tuple(one for result in results for one in result.rows)
    events = tuple(one for result in results for one in result.events)
    return Result(judged, rows, events)


def test_both_engines_decide_the_same_on_the_same_log(tmp_path: Path, worker: EvidentlyWorker) -> None:
    log = records(3_000)
    ours = decide(engines(tmp_path / "a", worker), log)
    theirs = decide(engines(tmp_path / "b", worker, "evidently"), log)
    assert [one.decision for one in ours.judged] == [one.decision for one in theirs.judged]
    assert [told(one) for one in ours.events] == [told(one) for one in theirs.events]
    assert len(ours.events) == 2, "a drift was detected and a retraining asked for"
    engines_used = {score.engine for one in theirs.judged for score in one.report.scores}
    assert engines_used == {"evidently"}


def told(event: Event) -> tuple[object, ...]:
    return event.id, event.kind, event.payload["drift_share"], event.payload.get("drifted_columns")


class Reviewing:
    """A thread that reviews, and what it says."""

    def __init__(self, folder: Path, worker: EvidentlyWorker) -> None:
        self.stored = engines(folder, worker)
        self.result = decide(self.stored, records(3_000))
        self.folder = folder / "reports"
        self.ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
        self.ledger.take_over("g", "m")
        self.said: list[ScoresDisputed] = []
        self.reviews = EvidentlyReviews(
            self.stored, self.ledger, self.folder, "http://x/reports", self.said.append, self.reread
        )

    def reread(self, judged: Judged) -> WindowRows:
        """As the log would give them."""
        return self.result.rows[self.result.judged.index(judged)]


@pytest.fixture
def reviewing(tmp_path: Path, worker: EvidentlyWorker) -> Iterator[Reviewing]:
    made = Reviewing(tmp_path, worker)
    yield made
    made.reviews.close()
    made.ledger.close()


def eventually(what: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_what_was_told_of_gets_a_report_where_its_link_says(reviewing: Reviewing) -> None:
    judged, rows = reviewing.result.judged[-1], reviewing.result.rows[-1]
    reviewing.reviews.start()
    reviewing.reviews.offer(judged, rows, wanted=True)
    name = report_name("fraud", "1", judged.key)
    eventually(lambda: (reviewing.folder / f"{name}.html").exists())
    assert reviewing.reviews.url_of("fraud", "1", judged.key) == f"http://x/reports/{name}.html"
    assert (reviewing.folder / f"{name}.json").exists()
    assert reviewing.said == []


def test_a_score_that_evidently_does_not_confirm_is_disputed_and_replaced(reviewing: Reviewing) -> None:
    judged, rows = reviewing.result.judged[-1], reviewing.result.rows[-1]
    first, *others = judged.report.scores
    wrong = msgspec.structs.replace(first, score=first.score + 1e-3)
    report = DriftReport((wrong, *others), judged.report.findings, judged.report.prediction)
    reviewing.reviews.start()
    reviewing.reviews.offer(msgspec.structs.replace(judged, report=report), rows, wanted=True)
    eventually(lambda: reviewing.said)
    (disputed,) = reviewing.said
    assert disputed.columns == (first.column,)
    assert f"{first.score:.9f}" in disputed.details[0], "it says what Evidently found instead"
    reviewing.stored.distrust("fraud", "1", disputed.columns)
    trusted = reviewing.stored._made["fraud", "1"].judge(rows.records)
    assert {score.column: score.engine for score in trusted.scores} == {
        score.column: "evidently" if score.column == first.column else "compiled"
        for score in judged.report.scores
    }


def test_a_report_that_a_crash_kept_from_being_drawn_is_drawn_after_the_next_start(
    reviewing: Reviewing,
) -> None:
    judged = reviewing.result.judged[-1]
    reviewing.ledger.checkpoint(Checkpoint(positions={}, models={}, judged=[(judged, "http://x/r.html")]))
    reviewing.reviews.start()
    name = report_name("fraud", "1", judged.key)
    eventually(lambda: (reviewing.folder / f"{name}.html").exists())


def test_windows_nobody_was_told_of_are_reviewed_now_and_then(reviewing: Reviewing) -> None:
    judged, rows = reviewing.result.judged[-1], reviewing.result.rows[-1]
    taken = 0
    for key in range(400):
        before = reviewing.reviews._queue.qsize()
        reviewing.reviews.offer(msgspec.structs.replace(judged, key=key), rows, wanted=False)
        if reviewing.reviews._queue.qsize() > before:
            taken += 1
            reviewing.reviews._queue.get_nowait()
    assert 8 <= taken <= 35, "about one in twenty"
