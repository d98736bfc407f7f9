"""Metrics: what an engineer on call needs to know, in the form that Prometheus reads."""

import platform
import time
from collections import Counter as Tally
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import get_args

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

from daemon.health import Health
from daemon.ledger import Checkpoint
from daemon.loop import Observer, Role
from daemon.reviews import ReviewResult
from monitors.decoding import CODES
from monitors.events import Kind
from monitors.records import InvalidRecord, Partition, RawRecord

ROLES: tuple[Role, ...] = get_args(Role)
REVIEWS: tuple[ReviewResult, ...] = get_args(ReviewResult)
# What the monitor says of an invalid record, beside what the decoder does.
MONITOR_CODES = ("too_many_versions", "second_partition")
# The others are told by flows, or are seen in the ledger.
COUNTED_KINDS = (
    Kind.DRIFT_DETECTED,
    Kind.DRIFT_RESOLVED,
    Kind.DRIFT_DISPUTED,
    Kind.RETRAIN_REQUESTED,
    Kind.DATA_BROKEN,
    Kind.DATA_MENDED,
    Kind.DATA_STALLED,
    Kind.DATA_LOST,
    Kind.EPISODE_FUTILE,
)
CHECKPOINT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics(Observer):
    """
    Counts what the loop does, in a registry of its own.

    Labels are bounded: topics, models and partitions are configured, codes and kinds are fixed, and of
    versions there are no more than the monitor holds. Known labels begin at 0: `increase()` does not
    see a counter that begins at 1.
    """

    def __init__(self, models: Collection[str], topics: Collection[str], health: Health) -> None:
        # A second series beside each counter, which says when it was made: nobody asked.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._health = health
        self._late_before: dict[tuple[str, str], int] = {}
        self._make_counters()
        self._make_gauges()
        self._begin(models, topics)
        ProcessCollector(registry=self.registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """All metrics as of now, and their content type, for an Accept header."""
        encode, kind = choose_encoder(accept)
        return encode(self.registry), kind

    # --- told by the loop ------------------------------------------------------------------------

    def polled(self, raws: Sequence[RawRecord]) -> None:
        for topic, count in Tally(raw.partition.topic for raw in raws).items():
            self._records.labels(topic).inc(count)

    def rejected(self, error: InvalidRecord) -> None:
        self._dead_letters.labels(error.code).inc()

    def kept(self, step: Checkpoint, seconds: float) -> None:
        self._checkpoint_seconds.observe(seconds)
        self._checkpoint_at.set(time.time())
        for partition, position in step.positions.items():
            if position.stream_time is not None:
                stream_time = position.stream_time.timestamp()
                self._stream_time.labels(partition.topic, partition.index).set(stream_time)
        for judged, _ in step.judged:
            self._windows.labels(judged.model, judged.version, str(judged.decision.verdict)).inc()
        for model, changes in step.models.items():
            for name, changed in changes.versions.items():
                self._count_late(model, name, changed.state.windows.late)
        for model, performance in step.performances:
            self._expired.labels(model).inc(performance.expired)
        for event in step.events:
            self._events.labels(event.model, str(event.kind)).inc()

    def cycled(self, role: Role, reachable: bool, lags: Mapping[Partition, int]) -> None:
        self._health.turned(role, reachable)
        self._cycle_at.set(time.time())
        self._kafka_reachable.set(reachable)
        for one in ROLES:
            self._role.labels(one).set(one == role)
        if role != "owner":
            # What the owner reads is the owner's to tell.
            self._lag.clear()
            self._stream_time.clear()
        for partition, lag in lags.items():
            self._lag.labels(partition.topic, partition.index).set(lag)

    # --- told by the reviews ---------------------------------------------------------------------

    def reviewed(self, model: str, result: ReviewResult) -> None:
        """Evidently looked at a window, or could not."""
        self._reviews.labels(model, result).inc()

    # --- inside ----------------------------------------------------------------------------------

    def _count_late(self, model: str, version: str, late: int) -> None:
        """The monitor's count goes on over a restart; so does this one."""
        before = self._late_before.get((model, version), 0)
        self._late.labels(model, version).inc(max(0, late - before))
        self._late_before[model, version] = late

    def _make_counters(self) -> None:
        self._records = self._counter("records_read", "Records read from Kafka.", "topic")
        self._dead_letters = self._counter("dead_letters", "Records that could not be read, by code.", "code")
        self._late = self._counter(
            "late_records", "Records that came after their window was closed.", "model", "version"
        )
        self._expired = self._counter(
            "predictions_expired", "Sampled predictions that waited for their label in vain.", "model"
        )
        self._windows = self._counter(
            "windows_judged", "Windows judged, by verdict.", "model", "version", "verdict"
        )
        self._events = self._counter(
            "events_recorded", "Events that the loop put in line for Prefect.", "model", "kind"
        )
        self._reviews = self._counter(
            "reviews", "Windows that Evidently itself was to confirm, by what came of it.", "model", "result"
        )

    def _make_gauges(self) -> None:
        self._role = self._gauge("role", "1 for what this member is in its consumer group.", "role")
        self._kafka_reachable = self._gauge("kafka_reachable", "Whether Kafka answered lately.")
        self._lag = self._gauge(
            "kafka_lag_records",
            "Records in the log that are not yet read; not counting labels that wait for their window's end.",
            "topic",
            "partition",
        )
        self._stream_time = self._gauge(
            "stream_time_timestamp_seconds",
            "The largest event time that was read; its distance from now is the lag in time.",
            "topic",
            "partition",
        )
        self._cycle_at = self._gauge("last_cycle_timestamp_seconds", "When the loop last finished a cycle.")
        self._checkpoint_at = self._gauge(
            "last_checkpoint_timestamp_seconds", "When the ledger last took a checkpoint."
        )
        self._checkpoint_seconds = Histogram(
            "retrain_daemon_checkpoint_duration_seconds",
            "How long a checkpoint took, dead letters included.",
            buckets=CHECKPOINT_SECONDS,
            registry=self.registry,
        )
        self._build = self._gauge("build_info", "What is running.", "version", "python")

    def _begin(self, models: Collection[str], topics: Collection[str]) -> None:
        self._build.labels(_version(), platform.python_version()).set(1)
        for topic in topics:
            self._records.labels(topic)
        for code in (*CODES, *MONITOR_CODES):
            self._dead_letters.labels(code)
        for role in ROLES:
            self._role.labels(role).set(role == "joining")
        for model in models:
            self._expired.labels(model)
            for kind in COUNTED_KINDS:
                self._events.labels(model, str(kind))
            for result in REVIEWS:
                self._reviews.labels(model, result)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"retrain_daemon_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"retrain_daemon_{name}", text, labels, registry=self.registry)


def _version() -> str:
    try:
        return version("retrain-daemon")
    except PackageNotFoundError:
        return "unknown"
