"""A daemon's loop on real Kafka that kills itself, hard, in a named step; for a process of its own."""

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from daemon.engines import StoredEngines
from daemon.evidently_worker import EvidentlyWorker
from daemon.ledger import Checkpoint, Ledger
from daemon.loop import Loop, LoopSettings
from daemon.wire.kafka import KafkaSource
from daemon.wire.kafka_dead_letters import KafkaDeadLetters
from daemon.wire.references import ReferenceStore
from monitors.decoding import make_decoder
from monitors.drift import WindowRows
from monitors.episodes import Judged
from monitors.monitor import Monitor, Result
from monitors.records import LabelRecord, RawRecord
from monitors.settings import FieldSettings, KafkaSettings, LimitSettings, ModelSettings


class Doom:
    """Counts a step down and then ends the process the way a power cut does."""

    def __init__(self, step: str, countdown: int) -> None:
        self._step = step
        self._left = countdown

    def at(self, step: str) -> None:
        if step != self._step:
            return
        self._left -= 1
        if self._left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


class DoomedSource(KafkaSource):
    """Dies with records in hand."""

    doom: Doom

    def poll(self, timeout_seconds: float) -> Sequence[RawRecord]:
        records = super().poll(timeout_seconds)
        if records:
            self.doom.at("read")
        return records


class DoomedLedger(Ledger):
    """Dies right before or right after the transaction."""

    doom: Doom

    def checkpoint(self, step: Checkpoint) -> None:
        self.doom.at("before_commit")
        super().checkpoint(step)
        self.doom.at("after_commit")


class DoomedLoop(Loop):
    """Dies with decisions in hand that nobody knows of yet."""

    doom: Doom

    def _close(self, monitor: Monitor) -> Result:
        result = super()._close(monitor)
        if result.judged:
            self.doom.at("scored")
        return result


class NoReviews:
    """Evidently has tests of its own."""

    def url_of(self, model: str, version: str, key: int) -> str:
        return f"{model}-{version}-{key}"

    def offer(self, judged: Judged, rows: WindowRows, wanted: bool) -> None: ...


class UntilAllIsTaken(threading.Event):
    """Stops once nothing is left but labels of a time whose windows the log never closes."""

    def __init__(self, loop: Loop, source: KafkaSource) -> None:
        super().__init__()
        self._loop = loop
        self._source = source

    def is_set(self) -> bool:
        monitor, drained = self._loop._monitor, self._source.drained()
        if monitor is None:
            return False
        for partition in self._loop._next:
            _, first = next(iter(self._loop._labels.get(partition, ())), (None, None))
            waits = isinstance(first, LabelRecord) and monitor.ahead(first)
            if not waits and (first is not None or partition not in drained):
                return False
        return True


def main(plan: Path, step: str, countdown: int) -> None:
    """Carry on from the plan's ledger; the step `none` runs to the end of the log."""
    told = json.loads(plan.read_text())
    kafka = msgspec.convert(told["kafka"], KafkaSettings)
    models = msgspec.convert(told["models"], dict[str, ModelSettings])
    DoomedSource.doom = DoomedLedger.doom = DoomedLoop.doom = Doom(step, countdown)
    source, ledger = DoomedSource(kafka), DoomedLedger(told["ledger"])
    fields = {topic: FieldSettings() for topic in (*kafka.topics, kafka.labels_topic)}
    loop = DoomedLoop(
        LoopSettings(
            group=kafka.group,
            member=str(os.getpid()),
            mode="retrain",
            models=models,
            limits=LimitSettings(),
            labels_topic=kafka.labels_topic,
            checkpoint_seconds=0.2,
        ),
        source,
        make_decoder(fields, kafka.labels_topic, list(models), LimitSettings()),
        KafkaDeadLetters(kafka),
        ledger,
        StoredEngines(ReferenceStore(told["references"]), models, "compiled", EvidentlyWorker()),
        NoReviews(),
    )
    loop.run(UntilAllIsTaken(loop, source))
    source.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
