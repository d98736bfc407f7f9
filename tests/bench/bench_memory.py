"""
Measures memory: the real loop and ledger over ten million records of 20 columns, from a log in memory.

Run as a script from the checkout; `RECORDS=2000000` makes it shorter. Beside good records there are dead
letters, late records, labels, windows that drift and versions that are refused: all that could pile up.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from daemon.config import LogSettings
from daemon.engines import StoredEngines
from daemon.evidently_worker import EvidentlyWorker
from daemon.health import Health
from daemon.ledger import Ledger, now
from daemon.logs import configure
from daemon.loop import Loop, LoopSettings
from daemon.memory import MemoryLog, MemorySource
from daemon.metrics import Metrics
from daemon.wire.references import ReferenceStore
from monitors.decoding import make_decoder
from monitors.drift import WindowRows
from monitors.episodes import Judged
from monitors.records import InvalidRecord, Partition, RawRecord
from monitors.settings import (
    FieldSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    WindowSettings,
)

RECORDS = int(os.environ.get("RECORDS", "10000000"))
EARLY = RECORDS // 10
BATCH = 5_000
COLUMNS = 20
BODIES = 4_999
# Ten records for each second of event time, so a window holds ten thousand.
PER_SECOND = 10
START = datetime(2026, 1, 1, tzinfo=UTC)
PREDICTIONS, LABELS = Partition("predictions", 0), Partition("labels", 0)
MODEL = ModelSettings(
    serving_version="1",
    reference_rows=5_000,
    label_horizon_seconds=3_600.0,
    window=WindowSettings(seconds=1_000.0, grace_seconds=60.0, max_rows=5_000),
)
KAFKA = KafkaSettings(labels_topic="labels", start="earliest")
RETENTION = timedelta(seconds=30)


class CountedLetters:
    """The port `DeadLetters`, which only counts: a topic would hold them elsewhere."""

    count = 0

    def put(self, raw: RawRecord, error: InvalidRecord) -> None:
        self.count += 1

    def flush(self) -> None: ...
    def close(self) -> None: ...


class NoReviews:
    """Evidently has a process of its own."""

    def url_of(self, model: str, version: str, key: int) -> str:
        return ""

    def offer(self, judged: Judged, rows: WindowRows, wanted: bool) -> None: ...


class Stream:
    """Records in order, made as they are needed: features come round again, ids and times do not."""

    def __init__(self) -> None:
        self.calm = [self._features(number, 0.0) for number in range(BODIES)]
        self.drifted = [self._features(number, 40.0) for number in range(BODIES)]

    @staticmethod
    def _features(number: int, shift: float) -> str:
        columns = {
            f"feature_{n}": (number * (n + 7) % 997) * 0.37 + shift if n % 5 else "abcdef"[number * 7 % 6]
            for n in range(COLUMNS)
        }
        return json.dumps(columns)

    def extend(self, log: MemoryLog, first: int) -> None:
        """The next batch of predictions, and the labels of the batch before."""
        window = first // (PER_SECOND * 1_000)
        bodies = self.drifted if window % 100 in (97, 98, 99) else self.calm
        for number in range(first, first + BATCH):
            log.append(
                PREDICTIONS,
                self._prediction(number, bodies[number % BODIES]),
                timestamp_ms=self._milliseconds(number),
            )
        for number in range(first - BATCH, first) if first else ():
            time = self._time(number + BATCH)
            label = f'{{"model":"fraud","id":"r{number}","label":{number % 2},"event_time":"{time}"}}'
            log.append(LABELS, label.encode(), timestamp_ms=self._milliseconds(number + BATCH))

    def _prediction(self, number: int, features: str) -> bytes:
        if number % 1_000 == 999:
            return b'{"model": "fraud", "garbage'
        version = f"made-up-{number}" if number % 10_000 == 5 else "1"
        time = self._time(number - 20_000 if number % 2_000 == 7 else number)
        return (
            f'{{"model":"fraud","model_version":"{version}","id":"r{number}","event_time":"{time}",'
            f'"features":{features},"prediction":{number % 2},"probability":0.5}}'
        ).encode()

    @staticmethod
    def _time(number: int) -> str:
        return (START + timedelta(seconds=max(0, number) / PER_SECOND)).isoformat()

    @staticmethod
    def _milliseconds(number: int) -> int:
        return int(START.timestamp() * 1_000) + number * 1_000 // PER_SECOND


def make_loop(log: MemoryLog, ledger: Ledger, letters: CountedLetters, folder: Path) -> Loop:
    """The loop as the daemon has it, but for Kafka and Evidently."""
    models, limits = {"fraud": MODEL}, LimitSettings()
    fields = {"predictions": FieldSettings(), "labels": FieldSettings()}
    settings = LoopSettings(
        group="bench",
        member="bench",
        mode="observe",
        models=models,
        limits=limits,
        labels_topic="labels",
        checkpoint_seconds=5.0,
    )
    return Loop(
        settings,
        MemorySource(log, KAFKA),
        make_decoder(fields, "labels", list(models), limits),
        letters,
        ledger,
        StoredEngines(ReferenceStore(str(folder / "references")), models, "compiled", EvidentlyWorker()),
        NoReviews(),
        Metrics(models, fields, Health()),
    )


def resident_megabytes() -> float:
    """What this process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def read_all(folder: Path) -> tuple[list[tuple[int, float]], dict[str, int]]:
    """Memory after each batch, as (records read, megabytes), and the ledger's counters."""
    log, letters, stream = MemoryLog(), CountedLetters(), Stream()
    log.create("predictions")
    log.create("labels")
    ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
    loop = make_loop(log, ledger, letters, folder)
    loop.run_once(0.0)
    held: list[tuple[int, float]] = []
    began = time.monotonic()
    for first in range(0, RECORDS, BATCH):
        stream.extend(log, first)
        for _ in range(2):
            loop.run_once(0.0)
        for partition, offset in loop._next.items():
            # Labels wait in the log until their window has closed.
            log.expire(partition, offset)
        held.append((first + BATCH, resident_megabytes()))
        if (first + BATCH) % (RECORDS // 20) == 0:
            ledger.prune(now() - RETENTION)
            rate = (first + BATCH) / (time.monotonic() - began)
            say(f"{first + BATCH:>11,} records  {held[-1][1]:7.1f} MB  {rate:9,.0f} records/s, made and read")
    counters = ledger.counters()
    ledger.close()
    assert letters.count > 0
    return held, counters


def around(held: Sequence[tuple[int, float]], records: int) -> float:
    """The median over the last records before so many: memory goes up and down with windows."""
    return statistics.median(size for read, size in held if records - EARLY // 2 < read <= records)


def main() -> None:
    configure(LogSettings(level="warning"))
    with tempfile.TemporaryDirectory() as folder:
        held, counters = read_all(Path(folder))
    early, late = around(held, EARLY), around(held, RECORDS)
    say(f"counters: {counters}")
    say(
        f"after {EARLY:,}: {early:.1f} MB, after {RECORDS:,}: {late:.1f} MB, ratio {late / early:.3f}, "
        f"peak {max(size for _, size in held):.1f} MB"
    )


if __name__ == "__main__":
    main()
