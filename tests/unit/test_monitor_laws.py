"""Laws of the monitor: interleavings, kills and restores never change what is decided."""

import random
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from daemon.ledger import Checkpoint, Ledger, Position
from monitors.drift import DriftEngine, DriftReport, DriftScore, SegmentShift
from monitors.episodes import Circumstances, Judged, ModelState
from monitors.events import Kind, Outcome, RetrainRequest
from monitors.monitor import Monitor, Result
from monitors.reading import Reading
from monitors.records import InvalidRecord, LabelRecord, Partition, PredictionRecord
from monitors.settings import LimitSettings, ModelSettings, PolicySettings, WindowSettings
from monitors.shifts import Shift
from monitors.steps import Closed, Heard, Taken
from monitors.windows import ClosedWindow

START = datetime(2026, 1, 1, tzinfo=UTC)
LABELS = Partition("labels", 0)


class MeanEngine:
    """Drift is a mean that moved by more than 1: the least engine that can tell windows apart."""

    baseline = None

    def __init__(self, rows: Sequence[PredictionRecord]) -> None:
        self._mean, self._rows = self._mean_of(rows), len(rows)

    def judge(self, records: Sequence[PredictionRecord]) -> DriftReport:
        mean, rows = self._mean_of(records), len(records)
        distance = abs(mean - self._mean)
        score = DriftScore("x", "mean", distance, 1.0, ">=", distance >= 1.0, 1, rows, "test/mean")
        shift = Shift("x", "location", mean / 10, rows, self._mean / 10, self._rows, 0.02, 0.02)
        return DriftReport((score,), shifts=(shift,))

    def locate(self, records: Sequence[PredictionRecord], columns: Sequence[str]) -> tuple[SegmentShift, ...]:
        return ()

    @staticmethod
    def _mean_of(rows: Sequence[PredictionRecord]) -> float:
        values = [row.features["x"] for row in rows]
        return sum(value for value in values if isinstance(value, float)) / len(values)


class Shelf:
    """References in memory that outlive the process, as the reference store does."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], Sequence[PredictionRecord]] = {}

    def find(self, model: str, version: str) -> DriftEngine | None:
        rows = self._rows.get((model, version))
        return None if rows is None else MeanEngine(rows)

    def learn(self, model: str, version: str, rows: Sequence[PredictionRecord]) -> DriftEngine:
        self._rows[model, version] = tuple(rows)
        return MeanEngine(rows)


Log = dict[Partition, list[PredictionRecord | LabelRecord]]


# What is killed here are objects, not machines: a disk would cost time and prove nothing.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def make_log(seed: int, partitions: int, rows: int) -> Log:
    """Two drifts, jittered event times, some far behind; labels of most rows, in another order."""
    chance = random.Random(seed)
    log: Log = {Partition("predictions", index): [] for index in range(partitions)}
    labels: list[LabelRecord] = []
    for number in range(rows):
        partition = Partition("predictions", chance.randrange(partitions))
        jitter = -chance.expovariate(0.2) if chance.random() < 0.3 else 0.0
        drifted = rows // 3 <= number < rows // 2 or number >= 3 * rows // 4
        log[partition].append(
            PredictionRecord(
                model="fraud",
                model_version="1",
                id=f"r{number}",
                event_time=START + timedelta(seconds=max(0.0, number + jitter)),
                features={"x": chance.gauss(3.0 if drifted else 0.0, 0.1)},
                prediction=number % 2,
                partition=partition,
                offset=len(log[partition]),
            )
        )
        if chance.random() < 0.9:
            time = START + timedelta(seconds=number + 15)
            labels.append(LabelRecord("fraud", f"r{number}", 1, time, LABELS, len(labels)))
    log[LABELS] = list(labels)
    return log


MODEL = ModelSettings(
    reference_rows=20,
    label_horizon_seconds=30.0,
    window=WindowSettings(seconds=10.0, grace_seconds=2.0, min_rows=3, max_rows=6),
    policy=PolicySettings(method="thresholds", for_windows=2, keep_firing_windows=2),
)


# Requests end so long after the window that they were asked for: later than any label of it is heard.
ANSWERED_AFTER = timedelta(seconds=180)
BY_TIME = WindowSettings(seconds=10.0, grace_seconds=2.0, min_rows=3, max_rows=8)
BY_COUNT = WindowSettings(rows=10, min_rows=3)


def by_budget(window: WindowSettings, horizon: float = 60.0) -> ModelSettings:
    """The default policy, with windows of some ten rows."""
    return ModelSettings(
        reference_rows=20, label_horizon_seconds=horizon, max_pending_seconds=75.0, window=window
    )


Arrivals = dict[Partition, list[float]]


def make_labelled_log(
    seed: int, window: WindowSettings, partitions: int, label_partitions: int, rows: int = 700
) -> tuple[Log, Arrivals]:
    """
    A model that is wrong for a while, and inputs that move for a while; a tenth of the labels never come.

    Most labels come one by one; those of the middle third in heaps, many windows at once. Some are of the
    very time that the predictions have reached, and, where windows are times, some come after others of a
    later time. When each record was written goes with it.
    """
    chance = random.Random(seed)
    log: Log = {Partition("predictions", index): [] for index in range(partitions)}
    log |= {Partition("labels", index): [] for index in range(label_partitions)}
    arrivals: Arrivals = {partition: [] for partition in log}
    known: list[tuple[float, float, str, int]] = []
    reached: list[float] = [0.0]
    for number in range(rows):
        partition = Partition("predictions", chance.randrange(partitions))
        second = max(0.0, round(number - 3 * chance.random(), 3))
        reached.append(max(reached[-1], second))
        log[partition].append(
            PredictionRecord(
                model="fraud",
                model_version="1",
                id=f"r{number}",
                event_time=START + timedelta(seconds=second),
                features={"x": chance.gauss(3.0 if 450 <= number < 550 else 0.0, 0.1)},
                prediction=1,
                partition=partition,
                offset=len(log[partition]),
            )
        )
        arrivals[partition].append(number)
    for number in range(rows):
        heap = rows // 3 <= number < 2 * rows // 3
        at = (number // 70 + 1) * 70 + 0.5 if heap else number + chance.uniform(5.0, 25.0)
        if chance.random() < 0.3 and not heap:
            at = reached[min(int(at), rows)]
        wrong = 0.9 if 150 <= number < 330 else 0.05
        delay = chance.uniform(0.0, 8.0) if window.seconds and chance.random() < 0.1 else 0.0
        if chance.random() < 0.9:
            known.append((at + delay, at, f"r{number}", int(chance.random() >= wrong)))
    for arrival, at, name, label in sorted(known):
        where = Partition("labels", int(name[1:]) % label_partitions)
        time = START + timedelta(seconds=at)
        log[where].append(LabelRecord("fraud", name, label, time, where, len(log[where])))
        arrivals[where].append(arrival)
    return log, arrivals


class Killed(Exception):
    """The process is gone after it decided and before it wrote that down."""


class Member:
    """One process after the other, reading up to `reach` records at once, killed now and then."""

    def __init__(
        self,
        log: Log,
        ledger: Ledger,
        shelf: Shelf,
        chance: random.Random,
        reach: int = 12,
        settings: ModelSettings = MODEL,
        arrivals: Arrivals | None = None,
    ) -> None:
        self._log, self._ledger, self._shelf, self._chance = log, ledger, shelf, chance
        self._reach, self._settings = reach, settings
        # What is written by and by; None: all is there from the start.
        self._arrivals, self._clock = arrivals, 0.0
        self._lines: dict[Partition, deque[LabelRecord]] = {}
        self._asked: dict[str, datetime] = {}
        self.steps: list[Taken] = []
        self.state = ModelState()

    def live(self, cycles: int | None) -> bool:
        """Start from the ledger and run; after that many cycles the process is simply gone."""
        self._ledger.take_over("group", "member")
        restored = self._ledger.restore()
        monitor = Monitor({"fraud": self._settings}, self._shelf, LimitSettings(), restored.models)
        self._lines = {}
        positions = dict.fromkeys(self._log, 0)
        for partition, position in restored.positions.items():
            positions[partition] = position.next_offset
            if position.stream_time is not None:
                monitor.times.restore(partition, position.stream_time)
        done = False
        while not done:
            if cycles == 0:
                return False
            cycles = None if cycles is None else cycles - 1
            try:
                self._cycle(monitor, positions, may_die=cycles == 0)
            except Killed:
                return False
            done = self._is_all_taken(monitor, positions)
        self._save(monitor, positions, Result())
        return True

    def _cycle(self, monitor: Monitor, positions: dict[Partition, int], may_die: bool) -> None:
        for partition in self._chance.sample(sorted(self._log), len(self._log)):
            line = self._lines.setdefault(partition, deque())
            if line:
                continue  # what stands in line is read no further
            start = positions[partition]
            end = min(start + self._chance.randrange(0, self._reach), self._end(partition))
            for record in self._log[partition][start:end]:
                if isinstance(record, LabelRecord):
                    line.append(record)
                else:
                    monitor.observe(record)
                    positions[partition] += 1
        if monitor.met:
            self._save(monitor, positions, Result())
        result = self._step(monitor, positions)
        killed_before_the_checkpoint = may_die and self._chance.random() < 0.5
        if killed_before_the_checkpoint:
            raise Killed
        if result.judged or result.performances or self._chance.random() < 0.4:
            self._save(monitor, positions, result)

    def _step(self, monitor: Monitor, positions: dict[Partition, int]) -> Result:
        result, moved = Result(), True
        while moved:
            monitor.note(self._reading(positions))
            moved = self._take_labels(monitor, positions)
            step = monitor.close(self._around)
            moved |= bool(step.judged)
            result = result.then(step).then(self._answered(monitor, step))
        return result

    def _reading(self, positions: dict[Partition, int]) -> Reading:
        at = {one: positions[one] + len(self._lines.get(one, ())) for one in self._log}
        return Reading(
            [one for one in self._log if one.topic == "predictions"],
            [one for one in self._log if one.topic == "labels"],
            [one for one in self._log if at[one] < self._end(one)],
            {one: line[0] for one, line in self._lines.items() if line},
        )

    def _take_labels(self, monitor: Monitor, positions: dict[Partition, int]) -> bool:
        taken = False
        for partition, line in self._lines.items():
            while line and not monitor.ahead(line[0]):
                monitor.observe(line.popleft())
                positions[partition] += 1
                taken = True
        return taken

    def _answered(self, monitor: Monitor, step: Result) -> Result:
        """Requests are refused a good while after they were asked for, by the time of the windows."""
        for told_of in step.events:
            if told_of.kind is Kind.RETRAIN_REQUESTED:
                self._asked[told_of.request] = msgspec.convert(told_of.payload, RetrainRequest).window_end
        model = monitor.models["fraud"]
        episode = model.state.episode
        if not step.judged or episode is None or not episode.request:
            return Result()
        if step.judged[-1].end < self._asked[episode.request] + ANSWERED_AFTER:
            return Result()
        return Result(events=model.outcome(episode.request, Outcome(action="refused", sentence="no")))

    def _is_all_taken(self, monitor: Monitor, positions: dict[Partition, int]) -> bool:
        """Whether nothing is left but labels of a time whose windows never close."""
        reading = self._reading(positions)
        monitor.note(reading)
        held = reading.heads.keys()
        rests = held >= set(reading.unread) and all(monitor.ahead(head) for head in reading.heads.values())
        if rests and any(self._end(one) < len(records) for one, records in self._log.items()):
            self._clock += self._chance.uniform(0.0, 40.0)
            return False
        return rests

    def _end(self, partition: Partition) -> int:
        """Up to where the log is written by now."""
        if self._arrivals is None:
            return len(self._log[partition])
        return bisect_right(self._arrivals[partition], self._clock)

    def _save(self, monitor: Monitor, positions: dict[Partition, int], result: Result) -> None:
        self.steps += [step for _, step in result.steps]
        self.state = monitor.models["fraud"].state
        self._ledger.checkpoint(
            Checkpoint(
                positions={p: Position(offset, monitor.times.of(p)) for p, offset in positions.items()},
                models={name: model.take_changes() for name, model in monitor.models.items()},
                judged=[(judged, "") for judged in result.judged],
                performances=result.performances,
                events=result.events,
            )
        )

    @staticmethod
    def _around(model: str, version: str, window: ClosedWindow) -> Circumstances:
        return Circumstances(origin="cluster|group", mode="retrain")


def told(ledger: Ledger) -> list[str]:
    return [row["id"] for row in ledger.events()]


def run(
    log: Log, folder: Path, seed: int, kills: Sequence[int], reach: int
) -> tuple[list[Judged], list[str], object]:
    ledger, shelf = Ledger(f"sqlite:///{folder / f'{seed}-{len(kills)}.db'}"), Shelf()
    member = Member(log, ledger, shelf, random.Random(seed), reach)
    for cycles in kills:
        member.live(cycles)
    while not member.live(None):
        pass
    found = ledger.evidence("fraud"), told(ledger), _scores(ledger)
    ledger.close()
    return found


def _scores(ledger: Ledger) -> list[tuple[object, ...]]:
    return [(row["key"], row["metric"], row["score"], row["labelled"]) for row in ledger.windows("fraud")]


class Story(msgspec.Struct, frozen=True):
    """Everything that one reading of a log has led to."""

    judged: list[Judged]
    events: list[str]
    kinds: list[str]
    steps: list[Taken]
    scores: list[tuple[object, ...]]
    state: ModelState


def story(
    log: Log,
    window: WindowSettings,
    seed: int,
    kills: Sequence[int],
    reach: int,
    arrivals: Arrivals | None = None,
    horizon: float = 60.0,
) -> Story:
    with TemporaryDirectory(dir=MEMORY) as folder:
        ledger, shelf = Ledger(f"sqlite:///{folder}/ledger.db"), Shelf()
        member = Member(log, ledger, shelf, random.Random(seed), reach, by_budget(window, horizon), arrivals)
        for cycles in kills:
            member.live(cycles)
        while not member.live(None):
            pass
        kinds = [row["kind"].removeprefix("retrain-daemon.") for row in ledger.events()]
        found = ledger.evidence("fraud"), told(ledger), kinds, member.steps, _scores(ledger)
        ledger.close()
    return Story(*found, member.state)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    window=st.sampled_from((BY_TIME, BY_COUNT)),
    partitions=st.integers(1, 3),
    label_partitions=st.integers(1, 3),
    kills=st.lists(st.integers(0, 8), max_size=5),
    reach=st.sampled_from((12, 60, 900)),
    at_the_head=st.booleans(),
)
def test_what_labels_lead_to_depends_on_the_log_alone(
    seed: int,
    window: WindowSettings,
    partitions: int,
    label_partitions: int,
    kills: list[int],
    reach: int,
    at_the_head: bool,
) -> None:
    """
    Under the default policy, with labels in a topic of their own, however fast either is read.

    Whether all was there when reading began, or was read as it was written.
    """
    log, arrivals = make_labelled_log(seed, window, 1 if window.rows else partitions, label_partitions)
    once = story(log, window, seed, [], 12)
    again = story(log, window, seed + 1, [*kills, 3], reach, arrivals if at_the_head else None)
    event(f"{once.kinds.count('retrain.requested')} requests")
    assert again == once
    assert "retrain.requested" in once.kinds, "the law is about requests: there must be some"


def test_labels_of_the_newest_window_wait_for_those_of_earlier_partitions() -> None:
    """The first may still be written to, and would come before; until the next window is due."""
    monitor = Monitor({"fraud": by_budget(BY_TIME)}, Shelf(), LimitSettings())
    first, second = Partition("labels", 0), Partition("labels", 1)
    label = LabelRecord("fraud", "r1", 1, START + timedelta(seconds=5), second, 0)

    def waits(seconds: float, heads: dict[Partition, LabelRecord]) -> bool:
        row = make_log(1, 1, 1)[Partition("predictions", 0)][0]
        monitor.observe(msgspec.structs.replace(row, event_time=START + timedelta(seconds=seconds)))
        result = True
        while result:
            monitor.note(Reading([row.partition], [first, second], (), heads))
            if not monitor.ahead(label):
                return False
            result = bool(monitor.close(Member._around).judged)
        return True

    assert waits(1.0, {second: label}), "its window is open"
    assert waits(12.0, {second: label}), "its window has closed, and nothing else is due"
    assert not waits(22.0, {second: label}), "the next window is due"


def test_labels_of_one_time_count_whichever_partition_they_are_in() -> None:
    """One partition is past the horizon of a window, and the other has a label of it that is in time."""
    log, _ = make_labelled_log(1, BY_TIME, 1, 2, rows=200)
    for index, (name, at) in enumerate([("r75", 96.0), ("r25", 94.0)]):
        where = Partition("labels", index)
        log[where] = [LabelRecord("fraud", name, 1, START + timedelta(seconds=at), where, 0)]
    found = {row[0]: row[3] for row in story(log, BY_TIME, 1, [], 900, horizon=65.0).scores}
    assert found[int((START + timedelta(seconds=20)).timestamp() * 1_000_000)] == 1


@pytest.mark.parametrize("window", [BY_TIME, BY_COUNT], ids=["time", "count"])
@pytest.mark.parametrize("label_partitions", [1, 3])
def test_the_log_of_the_law_of_labels_reaches_what_it_is_about(
    window: WindowSettings, label_partitions: int
) -> None:
    log, _ = make_labelled_log(1, window, 1, label_partitions)
    once = story(log, window, 1, [], 12)
    assert once.kinds.count("retrain.requested") > 1, "requests that end, and others after them"
    kinds = "".join("w" if isinstance(step, Closed) else "p" for step in once.steps)
    assert kinds.count("pw") > len(once.judged) / 3, "second judgements come between the windows"
    assert "ppp" in kinds, "and some in heaps"
    judged = [step.performance for step in once.steps if isinstance(step, Heard)]
    assert any(one.unlabelled and not one.expired for one in judged), "some are judged at their horizon"
    assert any(one.expired for one in judged), "and some are given up"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    partitions=st.integers(1, 3),
    kills=st.lists(st.integers(0, 6), max_size=6),
    reach=st.sampled_from((12, 60, 500)),
)
def test_kills_and_interleavings_change_no_decision(
    seed: int, partitions: int, kills: list[int], reach: int
) -> None:
    log = make_log(seed, partitions, 240)
    with TemporaryDirectory(dir=MEMORY) as folder:
        judged, events, scores = run(log, Path(folder), seed, [], 12)
        judged_again, events_again, scores_again = run(log, Path(folder), seed + 1, [*kills, 3], reach)
    event(f"{len(events)} events, {len(kills) + 1} kills")
    assert judged_again == judged
    assert events_again == events
    assert scores_again == scores
    assert len(judged) > 10, "the law is about windows: there must be some"


def test_the_log_of_the_law_reaches_episodes() -> None:
    with TemporaryDirectory(dir=MEMORY) as folder:
        ledger, shelf = Ledger(f"sqlite:///{Path(folder) / 'l.db'}"), Shelf()
        Member(make_log(1, 2, 240), ledger, shelf, random.Random(1)).live(None)
        kinds = [row["kind"] for row in ledger.events()]
        ledger.close()
    assert kinds[:2] == [str(Kind.DRIFT_DETECTED), str(Kind.RETRAIN_REQUESTED)]


def test_evidence_survives_the_ledger_bit_for_bit() -> None:
    score = DriftScore("x", "mean", 0.1 + 0.2, 1e-300, ">=", True, 1, 1, "test/mean")
    assert msgspec.json.decode(msgspec.json.encode(score), type=DriftScore) == score


def test_the_partition_that_count_windows_are_made_of_outlives_the_process() -> None:
    settings = {"fraud": msgspec.structs.replace(MODEL, window=WindowSettings(rows=2, min_rows=1))}

    def read(monitor: Monitor, index: int) -> None:
        log = make_log(seed=1, partitions=index + 1, rows=20)
        monitor.observe(log[Partition("predictions", index)][0])

    with TemporaryDirectory(dir=MEMORY) as folder:
        ledger = Ledger(f"sqlite:///{folder}/ledger.db")
        ledger.take_over("group", "member")
        before = Monitor(settings, Shelf(), LimitSettings())
        read(before, 1)
        changes = {"fraud": before.models["fraud"].take_changes()}
        ledger.checkpoint(Checkpoint(positions={}, models=changes))
        after = Monitor(settings, Shelf(), LimitSettings(), ledger.restore().models)
        ledger.close()
    read(after, 1)
    with pytest.raises(InvalidRecord, match=r"second_partition.* in predictions/1"):
        read(after, 0)
