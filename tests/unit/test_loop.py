"""The loop over an in-memory log and a real ledger: order of effects, losses, outcomes, labels."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event

import msgspec
import pytest

import daemon.loop
from daemon.engines import StoredEngines
from daemon.evidently_worker import EvidentlyWorker
from daemon.ledger import Checkpoint, Ledger
from daemon.loop import (
    IDLE_POLL_SECONDS,
    POLL_SECONDS,
    ChampionMoved,
    Loop,
    LoopSettings,
    Observer,
    RequestEnded,
    Role,
)
from daemon.memory import MemoryDeadLetters, MemoryLog, MemorySource
from daemon.wire.references import ReferenceStore
from monitors.decoding import make_decoder
from monitors.drift import WindowRows
from monitors.episodes import Judged
from monitors.events import Outcome
from monitors.monitor import Result
from monitors.records import Partition, RawRecord
from monitors.settings import (
    FieldSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    PolicySettings,
    WindowSettings,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
MODEL = ModelSettings(
    reference_rows=100,
    label_horizon_seconds=1_000.0,
    window=WindowSettings(rows=50, min_rows=10, max_rows=50),
    policy=PolicySettings(method="thresholds", for_windows=2, backoff_windows=1),
)
P0, LABELS = Partition("predictions", 0), Partition("labels", 0)


class NoReviews:
    """Nobody asks Evidently; which windows would be drawn is remembered."""

    def __init__(self) -> None:
        self.wanted: list[int] = []

    def url_of(self, model: str, version: str, key: int) -> str:
        return f"http://reports/{model}-{version}-{key}.html"

    def offer(self, judged: Judged, rows: WindowRows, wanted: bool) -> None:
        assert len(rows.records) == judged.sampled
        if wanted:
            self.wanted.append(judged.key)


class Letters(MemoryDeadLetters):
    """A dead-letter topic that can be out of reach."""

    unreachable = False

    def flush(self) -> None:
        if self.unreachable:
            raise ConnectionError("the dead-letter topic is out of reach")
        super().flush()


class World:
    """What outlives a process: the log, the ledger's file, the references."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self.log = MemoryLog()
        self.log.create("predictions")
        self.log.create("labels")
        self.folder = folder
        self.letters = Letters()
        self.reviews = NoReviews()
        self.kafka = KafkaSettings(labels_topic="labels", start="earliest", group="g")
        self._rows = 0
        self._ledgers: list[Ledger] = []

    def process(self, labels_topic: str = "labels") -> Loop:
        """A new process on the same world."""
        ledger = Ledger(self.url)
        store = ReferenceStore(str(self.folder / "references"))
        models = {"fraud": MODEL}
        settings = LoopSettings(
            group="g",
            member="m",
            mode="retrain",
            models=models,
            limits=LimitSettings(),
            labels_topic=labels_topic,
            checkpoint_seconds=3_600.0,
        )
        fields = {"predictions": FieldSettings(), "labels": FieldSettings()}
        self.ledger = ledger
        self._ledgers.append(ledger)
        return Loop(
            settings,
            MemorySource(self.log, msgspec.structs.replace(self.kafka, labels_topic=labels_topic)),
            make_decoder(fields, labels_topic, ["fraud"], LimitSettings()),
            self.letters,
            ledger,
            StoredEngines(store, models, "compiled", EvidentlyWorker()),
            self.reviews,
        )

    def predict(self, count: int, shift: float = 0.0, version: str = "1") -> None:
        for _ in range(count):
            number, self._rows = self._rows, self._rows + 1
            time = START + timedelta(seconds=number)
            body = {
                "model": "fraud",
                "model_version": version,
                "id": f"r{number}",
                "event_time": time.isoformat(),
                "features": {"x": number * 7 % 50 + shift, "y": number * 3 % 40 + shift},
                "prediction": number % 2,
            }
            self.log.append(P0, json.dumps(body).encode(), timestamp_ms=int(time.timestamp() * 1000))

    def label(self, numbers: Sequence[int], at: int, label: int = 1) -> None:
        time = START + timedelta(seconds=at)
        for number in numbers:
            body = {"model": "fraud", "id": f"r{number}", "label": label, "event_time": time.isoformat()}
            self.log.append(LABELS, json.dumps(body).encode(), timestamp_ms=int(time.timestamp() * 1000))

    def garbage(self, value: bytes) -> None:
        self.log.append(P0, value, timestamp_ms=int(START.timestamp() * 1000))

    def close(self) -> None:
        for ledger in self._ledgers:
            ledger.close()

    def told(self) -> list[str]:
        return [row["kind"].removeprefix("retrain-daemon.") for row in self.ledger.events()]


def cycles(loop: Loop, count: int = 6) -> None:
    for _ in range(count):
        loop.run_once(timeout_seconds=0.01)


def polled(loop: Loop, cycles: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the source was given for each cycle of a run."""
    stop, given, poll = Event(), list[float](), loop._source.poll

    def noted(timeout_seconds: float) -> Sequence[RawRecord]:
        given.append(timeout_seconds)
        if len(given) == cycles:
            stop.set()
        return poll(0.01)

    monkeypatch.setattr(loop._source, "poll", noted)
    loop.run(stop)
    return given


@pytest.fixture
def world(tmp_path: Path, ledger_url: str) -> Iterator[World]:
    made = World(tmp_path, ledger_url)
    yield made
    made.close()


def verdicts(world: World) -> list[str]:
    return [str(judged.decision.verdict) for judged in world.ledger.evidence("fraud")]


def test_it_learns_stays_quiet_and_then_asks(world: World) -> None:
    loop = world.process()
    world.predict(200)
    world.predict(100, shift=60.0)
    cycles(loop)
    assert verdicts(world) == ["learning", "learning", "calm", "calm", "drifted", "drifted"]
    assert world.told() == ["drift.detected", "retrain.requested"]
    assert [row.state for row in world.ledger.requests("fraud")] == ["waiting"]
    assert world.reviews.wanted == [5], "the window that asked gets its report"


def test_an_event_occurred_when_it_was_first_written_and_not_when_its_window_was(world: World) -> None:
    began = datetime.now(UTC)
    loop = world.process()
    world.predict(200)
    world.predict(100, shift=60.0)
    cycles(loop)
    bodies = [json.loads(row["body"]) for row in world.ledger.events()]
    assert len(bodies) == 2
    for body in bodies:
        assert began <= datetime.fromisoformat(body["occurred"]) <= datetime.now(UTC)
        assert datetime.fromisoformat(body["payload"]["window_end"]) < began


def test_a_killed_process_is_carried_on_by_the_next(world: World) -> None:
    loop = world.process()
    world.predict(130)
    cycles(loop)
    world.log.members.clear()  # kill -9: nothing is closed, nothing is said
    loop = world.process()
    world.predict(70)
    world.predict(100, shift=60.0)
    cycles(loop)
    assert verdicts(world) == ["learning", "learning", "calm", "calm", "drifted", "drifted"]
    assert [judged.seen for judged in world.ledger.evidence("fraud")] == [50] * 6


def test_a_reference_that_a_killed_process_learned_is_learned_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = world.process()
    world.predict(200)
    checkpoint = world.ledger.checkpoint

    def die(step: Checkpoint) -> None:
        if step.judged:
            raise KeyboardInterrupt("killed with the windows judged and the reference stored")
        checkpoint(step)

    monkeypatch.setattr(world.ledger, "checkpoint", die)
    with pytest.raises(KeyboardInterrupt):
        cycles(loop)
    world.log.members.clear()
    world.ledger.close()
    cycles(world.process())
    assert verdicts(world) == ["learning", "learning", "calm", "calm"]


def test_bad_records_become_dead_letters_and_leave_the_windows_alone(world: World) -> None:
    loop = world.process()
    for number in range(4):
        world.predict(50)
        world.garbage(b"\xff\x00 not json" if number % 2 else b'{"model": "other"}')
    cycles(loop)
    assert [judged.seen for judged in world.ledger.evidence("fraud")] == [50] * 4
    assert [error.code for _, error in world.letters.stored].count("invalid_json") == 2
    assert world.ledger.counters() == {"records": 204, "dead_letters": 4}


def test_an_outcome_ends_the_request_and_the_next_is_another(world: World) -> None:
    loop = world.process()
    world.predict(200)
    world.predict(100, shift=60.0)
    cycles(loop)
    (first,) = world.ledger.requests("fraud")
    loop.news.put(RequestEnded("fraud", first.id, Outcome(action="refused", sentence="no")))
    cycles(loop)
    world.predict(100, shift=60.0)
    cycles(loop)
    ended, second = world.ledger.requests("fraud")
    assert (ended.state, second.state, second.attempt) == ("ended", "waiting", 2)


def test_a_promoted_version_is_what_counts_from_then_on(world: World) -> None:
    loop = world.process()
    world.predict(200)
    world.predict(100, shift=60.0)
    cycles(loop)
    (request,) = world.ledger.requests("fraud")
    outcome = Outcome(action="promoted", sentence="yes", model_version="2")
    loop.news.put(RequestEnded("fraud", request.id, outcome))
    world.predict(150, shift=60.0, version="2")
    cycles(loop)
    assert world.told() == ["drift.detected", "retrain.requested", "drift.resolved"]


def test_a_champion_moved_by_hand_is_followed(world: World) -> None:
    loop = world.process()
    world.predict(200)
    cycles(loop)
    loop.news.put(ChampionMoved("fraud", "2", "promoted"))
    world.predict(100, shift=60.0)
    cycles(loop)
    assert world.told() == [], "version 1 drifts, and nobody serves it any more"


def test_labels_give_a_window_its_score(world: World) -> None:
    loop = world.process()
    world.predict(100)
    world.label(range(100), at=80)
    cycles(loop)
    assert [(row["score"], row["labelled"]) for row in world.ledger.windows("fraud")] == [
        (0.5, 50),
        (0.5, 50),
    ]


def test_predictions_wait_for_nothing_where_no_labels_come(world: World) -> None:
    loop = world.process(labels_topic="")
    world.predict(1_200)
    cycles(loop)
    assert [row["labelled"] for row in world.ledger.windows("fraud")] == [0] * 24


def test_labels_ahead_of_their_predictions_wait(world: World) -> None:
    loop = world.process()
    world.label(range(100), at=99)
    cycles(loop)
    world.predict(60)
    cycles(loop)
    assert world.ledger.counters()["records"] == 60, "the labels are of a time that is not there yet"
    world.predict(40)
    cycles(loop)
    assert [row["labelled"] for row in world.ledger.windows("fraud")] == [50, 50]


def test_labels_that_wait_are_no_lag(world: World) -> None:
    lags: list[Mapping[Partition, int]] = []

    class Watching(Observer):
        def cycled(self, role: Role, reachable: bool, lags_now: Mapping[Partition, int]) -> None:
            lags.append(lags_now)

    loop = world.process()
    loop._observer = Watching()
    world.predict(60)
    world.label(range(100), at=99)
    loop.run(_StopAfter(3))  # type: ignore[arg-type]
    assert lags[-1] == {P0: 0, LABELS: 0}
    assert world.ledger.counters()["records"] == 60


def test_labels_read_at_once_with_their_predictions_all_find_them(world: World) -> None:
    loop = world.process()
    world.predict(1_000)
    world.label(range(1_000), at=999)
    cycles(loop)
    assert [row["labelled"] for row in world.ledger.windows("fraud")] == [50] * 20


def test_a_label_corrected_after_the_last_one_came_changes_nothing(world: World) -> None:
    loop = world.process()
    world.predict(60)
    cycles(loop)
    world.label(range(50), at=50)
    world.label([0], at=50, label=0)
    cycles(loop)
    assert [row["score"] for row in world.ledger.windows("fraud")] == [0.5], "as if it had been judged before"


def test_a_bad_label_that_stood_in_line_at_a_restart_is_a_dead_letter_once(world: World) -> None:
    loop = world.process()
    world.predict(10)
    world.label([150], at=150)
    world.log.append(LABELS, b"garbage", timestamp_ms=int(START.timestamp() * 1000))
    cycles(loop)
    loop._checkpoint(Result())
    world.log.members.clear()
    loop = world.process()
    world.predict(190)
    cycles(loop)
    loop._checkpoint(Result())
    assert [raw.value for raw, _ in world.letters.stored] == [b"garbage"]
    assert world.ledger.counters() == {"records": 202, "dead_letters": 1}


def test_lost_offsets_are_told(world: World) -> None:
    loop = world.process()
    world.predict(60)
    cycles(loop)
    world.log.members.clear()
    world.predict(100)
    world.log.expire(P0, 90)
    loop = world.process()
    cycles(loop)
    assert world.told() == ["data.lost"]
    payload = json.loads(world.ledger.events()[0]["body"])["payload"]
    assert (payload["expected"], payload["available"]) == (60, 90)


def test_a_stale_owner_writes_nothing_more(world: World) -> None:
    loop = world.process()
    world.predict(60)
    cycles(loop)
    before = world.ledger.evidence("fraud")
    other = Ledger(world.url)
    other.take_over("g", "other")
    world.predict(60)
    loop.run_once(timeout_seconds=0.01)
    assert other.evidence("fraud") == before
    assert not loop.owner.is_set()
    other.close()


def test_a_member_that_was_fenced_asks_its_group_anew_and_goes_on(world: World) -> None:
    loop = world.process()
    world.predict(130)
    cycles(loop)
    other = Ledger(world.url)
    other.take_over("g", "a member that came too late")
    other.close()
    world.predict(70)
    world.predict(100, shift=60.0)
    cycles(loop)
    assert loop.owner.is_set(), "the group says that it is still the one that reads"
    assert verdicts(world) == ["learning", "learning", "calm", "calm", "drifted", "drifted"]
    assert [judged.seen for judged in world.ledger.evidence("fraud")] == [50] * 6


def test_a_member_that_is_stopped_when_it_was_fenced_leaves_in_peace(world: World) -> None:
    loop = world.process()
    world.predict(60)
    cycles(loop)
    other = Ledger(world.url)
    other.take_over("g", "other")
    loop.run(_StopAfter(0))  # type: ignore[arg-type]
    other.close()


def test_nothing_is_acknowledged_before_the_dead_letters_are(world: World) -> None:
    loop = world.process()
    cycles(loop, 1)
    world.garbage(b"{")
    world.letters.unreachable = True
    with pytest.raises(ConnectionError):
        loop.run(_StopAfter(1))  # type: ignore[arg-type]
    assert world.ledger.counters() == {}


def test_kafka_is_told_of_nothing_that_the_ledger_does_not_have(world: World) -> None:
    loop = world.process()
    world.predict(60)
    cycles(loop)
    loop._checkpoint(Result())
    assert world.log.committed["g", P0] == 60
    other = Ledger(world.url)
    other.take_over("g", "other")
    world.predict(60)
    loop.run_once(timeout_seconds=0.01)
    assert not loop.owner.is_set() and world.log.committed["g", P0] == 60
    other.close()


class _StopAfter:
    """Asks the loop to stop after so many cycles."""

    def __init__(self, cycles: int) -> None:
        self._left = cycles

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


def test_a_partition_whose_records_do_not_come_is_told_of_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = world.process()
    world.predict(10)
    cycles(loop)
    world.predict(10)
    loop._source.hold([P0])
    monkeypatch.setattr("daemon.loop.STALL_SECONDS", -1.0)
    cycles(loop, 3)
    assert world.told() == ["data.stalled"]
    assert json.loads(world.ledger.events()[0]["body"])["payload"]["next_offset"] == 10


def test_it_polls_with_more_patience_once_nothing_came_for_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = world.process()
    cycles(loop)
    world.predict(10)
    assert polled(loop, 3, monkeypatch) == [POLL_SECONDS] * 3
    monkeypatch.setattr(daemon.loop, "IDLE_SECONDS", 0.0)
    assert polled(loop, 3, monkeypatch) == [IDLE_POLL_SECONDS] * 3
