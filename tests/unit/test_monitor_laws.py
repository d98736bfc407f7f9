"""Laws of the monitor: interleavings, kills and restores never change what is decided."""

import random
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
from monitors.episodes import Circumstances, Judged
from monitors.events import Kind
from monitors.monitor import Monitor, Result
from monitors.performance import Performance
from monitors.records import InvalidRecord, LabelRecord, Partition, PredictionRecord
from monitors.settings import LimitSettings, ModelSettings, PolicySettings, WindowSettings
from monitors.windows import ClosedWindow

START = datetime(2026, 1, 1, tzinfo=UTC)
LABELS = Partition("labels", 0)


class MeanEngine:
    """Drift is a mean that moved by more than 1: the least engine that can tell windows apart."""

    def __init__(self, rows: Sequence[PredictionRecord]) -> None:
        self._mean = self._mean_of(rows)

    def judge(self, records: Sequence[PredictionRecord]) -> DriftReport:
        distance = abs(self._mean_of(records) - self._mean)
        score = DriftScore("x", "mean", distance, 1.0, ">=", distance >= 1.0, 1, len(records), "test/mean")
        return DriftReport((score,))

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


class Killed(Exception):
    """The process is gone after it decided and before it wrote that down."""


class Member:
    """One process after the other, reading up to `reach` records at once, killed now and then."""

    def __init__(
        self, log: Log, ledger: Ledger, shelf: Shelf, chance: random.Random, reach: int = 12
    ) -> None:
        self._log, self._ledger, self._shelf, self._chance = log, ledger, shelf, chance
        self._reach = reach
        self.performances: dict[tuple[str, int], Performance] = {}

    def live(self, cycles: int | None) -> bool:
        """Start from the ledger and run; after that many cycles the process is simply gone."""
        self._ledger.take_over("group", "member")
        restored = self._ledger.restore()
        monitor = Monitor({"fraud": MODEL}, self._shelf, LimitSettings(), restored.models)
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
            take = self._chance.randrange(0, self._reach)
            for record in self._log[partition][positions[partition] : positions[partition] + take]:
                if isinstance(record, LabelRecord) and monitor.ahead(record):
                    break
                monitor.observe(record)
                positions[partition] += 1
        if monitor.met:
            self._save(monitor, positions, Result())
        predictions = [p for p in self._log if p != LABELS]
        result = monitor.close(self._around, predictions, [LABELS])
        killed_before_the_checkpoint = may_die and self._chance.random() < 0.5
        if killed_before_the_checkpoint:
            raise Killed
        if result.judged or result.performances or self._chance.random() < 0.4:
            self._save(monitor, positions, result)

    def _is_all_taken(self, monitor: Monitor, positions: dict[Partition, int]) -> bool:
        """Whether nothing is left but labels of a time whose windows never close."""
        left = [records[positions[p]] for p, records in self._log.items() if positions[p] < len(records)]
        return all(isinstance(record, LabelRecord) and monitor.ahead(record) for record in left)

    def _save(self, monitor: Monitor, positions: dict[Partition, int], result: Result) -> None:
        for model, performance in result.performances:
            self.performances[model, performance.key] = performance
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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
    with TemporaryDirectory() as folder:
        judged, events, scores = run(log, Path(folder), seed, [], 12)
        judged_again, events_again, scores_again = run(log, Path(folder), seed + 1, [*kills, 3], reach)
    event(f"{len(events)} events, {len(kills) + 1} kills")
    assert judged_again == judged
    assert events_again == events
    assert scores_again == scores
    assert len(judged) > 10, "the law is about windows: there must be some"


def test_the_log_of_the_law_reaches_episodes() -> None:
    with TemporaryDirectory() as folder:
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

    with TemporaryDirectory() as folder:
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
