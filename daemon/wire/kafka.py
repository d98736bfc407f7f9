"""Reading from Kafka as a member of a group."""

import contextlib
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import structlog
from kafka import ConsumerRebalanceListener, OffsetAndMetadata, TopicPartition
from kafka import errors as kafka_errors

from daemon.ports import IDLE_SECONDS, NO_LOGS, Assignment, OffsetLoss
from daemon.wire.kafka_assignor import StickyAssignor, make_assignor
from daemon.wire.kafka_client import (
    CLOSE_SECONDS,
    REQUEST_SECONDS,
    KafkaUnreachable,
    admin,
    describe,
    make_consumer,
    translated,
)
from daemon.wire.kafka_client import KafkaRefused as KafkaRefused
from daemon.wire.kafka_client import UnknownTopic as UnknownTopic
from daemon.wire.kafka_client import ensure_topics as ensure_topics
from daemon.wire.kafka_client import log_bounds as log_bounds
from daemon.wire.kafka_client import make_producer as make_producer
from daemon.wire.kafka_dead_letters import KafkaDeadLetters as KafkaDeadLetters
from daemon.wire.kafka_membership import Membership
from daemon.wire.kafka_ranges import MAX_POLL_RECORDS, raw_record
from daemon.wire.kafka_ranges import read_ranges as read_ranges
from daemon.wire.kafka_topics import Topics
from monitors.records import Partition, RawRecord
from monitors.settings import KafkaSettings

log = structlog.get_logger()

COMMIT_SECONDS = 3.0
END_CHECK_SECONDS = 2.0
# How long a broker may hold a fetch that it has no records for. It answers nothing else on that connection
# meanwhile, not even where the log ends, which windows wait for.
FETCH_WAIT_MILLISECONDS = 100
# Asking is most of what idling costs: once idle, both are asked less often.
IDLE_FETCH_WAIT_MILLISECONDS = 1_000
IDLE_END_CHECK_SECONDS = 5.0
PROBE_SECONDS = 5.0


class _Owned:
    """What the group last said we own. Written on kafka-python's thread, read on ours."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now: frozenset[TopicPartition] | None = None
        self._news = False
        self._placed = True

    def change(self, partitions: frozenset[TopicPartition]) -> bool:
        """Note what we own from now on; false if that is what we had."""
        with self._lock:
            if partitions == self._now:
                return False
            self._now, self._news, self._placed = partitions, True, not partitions
            return True

    def take_news(self) -> frozenset[TopicPartition] | None:
        """What we own, if that changed since this was last asked for."""
        with self._lock:
            news, self._news = self._news, False
            return self._now if news else None

    def place(self) -> None:
        """Note that each of these partitions was told where to go on from."""
        with self._lock:
            self._placed = True

    @property
    def placed(self) -> bool:
        with self._lock:
            return self._placed


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]
    """Keeps kafka-python from choosing where newly owned partitions go on from."""

    def __init__(self, consumer: Any, assignor: StickyAssignor, owned: _Owned) -> None:
        self._consumer = consumer
        self._assignor = assignor
        self._owned = owned

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Nothing: whoever is there when the group settles keeps its partitions and its place."""

    def on_partitions_lost(self, lost: set[TopicPartition]) -> None:
        self._assignor.forget()
        self._owned.change(frozenset())
        log.warning("partitions_lost", partitions=len(lost))

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        if not self._owned.change(frozenset(assigned)):
            return
        for partition in assigned:
            # A position, any: without one the consumer asks Kafka for the committed offset, and ours is
            # the ledger's. Not paused: kafka-python may never fetch a partition again that was.
            self._consumer.seek(partition, 0)


class KafkaSource:
    """The port `Source` on a Kafka consumer group whose members share as `kafka.sharing` says."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        topics = settings.topics + ((settings.labels_topic,) if settings.labels_topic else ())
        with admin(settings) as client:
            self._cluster_id = str(client.describe_cluster()["cluster_id"])
            known = describe(settings, client, topics)
        assignor = make_assignor(settings, known)
        self._witness = TopicPartition(known[0].topic, known[0].index)
        session = int(settings.session_timeout_seconds * 1000)
        self._consumer = make_consumer(
            settings,
            group_id=settings.group,
            partition_assignment_strategy=[assignor],
            max_poll_records=MAX_POLL_RECORDS,
            session_timeout_ms=session,
            heartbeat_interval_ms=min(3_000, session // 10),
        )
        self._membership = Membership(self._consumer)
        self._topics = Topics(settings, self._consumer, topics)
        self._owned = _Owned()
        self._partitions: dict[TopicPartition, Partition] = {}
        self._next: dict[TopicPartition, int] = {}
        self._ends: dict[TopicPartition, int] = {}
        self._ends_at = -IDLE_END_CHECK_SECONDS
        self._read_at = time.monotonic()
        self._answered = True
        self._losses: list[OffsetLoss] = []
        self._held: frozenset[TopicPartition] = frozenset()
        self._consumer.subscribe(topics, listener=_Listener(self._consumer, assignor, self._owned))
        # A consumer that joins before it has heard of its topics joins once more when it has.
        self._consumer.topics()

    def poll(self, timeout_seconds: float) -> Sequence[RawRecord]:
        """Whatever there is to read, in each partition's order; empty while standing by."""
        try:
            with translated(self._settings):
                if self._owned.placed:
                    return self._poll(timeout_seconds)
                self._membership.attend(timeout_seconds)
        except KafkaUnreachable as error:
            # The broker may come back, and this member keeps its place meanwhile.
            log.warning("poll_failed", error=str(error))
        return []

    def assignment(self) -> Assignment | None:
        news = self._owned.take_news()
        if news is None:
            return None
        self._partitions = {one: Partition(one.topic, one.partition) for one in news}
        self._next, self._ends, self._held = {}, {}, frozenset()
        return Assignment(tuple(sorted(self._partitions.values())))

    def rejoin(self) -> None:
        self._owned.change(frozenset())
        self._consumer._coordinator.request_rejoin()

    def seek(
        self, offsets: Mapping[Partition, int], logs: Mapping[Partition, str] = NO_LOGS
    ) -> Mapping[Partition, int]:
        with translated(self._settings):
            first, end = self._bounds(tuple(self._partitions))
            self._topics.renewed()  # known from here on
            for theirs, ours in self._partitions.items():
                begin = first[theirs] if self._settings.start == "earliest" else end[theirs]
                wanted, known, now = offsets.get(ours, begin), logs.get(ours, ""), self.log_id(ours)
                renewed = bool(known and now and known != now)
                self._go_on(theirs, self._available(theirs, wanted, first[theirs], end[theirs], renewed))
        self._tell_of_a_reset(offsets)
        self._owned.place()
        return {self._partitions[theirs]: offset for theirs, offset in self._next.items()}

    def losses(self) -> Sequence[OffsetLoss]:
        found, self._losses = self._losses, []
        return found

    def drained(self, fresh: bool = False) -> frozenset[Partition]:
        """
        The owned partitions with nothing left to read.

        None, where Kafka does not answer: a log that cannot be seen is not known to have ended.
        """
        if not self._next or not self._refresh_ends(fresh):
            return frozenset()
        read = (one for one in self._next if self._is_at(one, self._ends[one]))
        return frozenset(self._partitions[one] for one in read)

    def ends(self) -> Mapping[Partition, int]:
        return {ours: self._ends[one] for one, ours in self._partitions.items() if one in self._ends}

    def reachable(self) -> bool:
        if not self._next:
            self._refresh_ends()  # a standby asks for nothing else
        return self._answered

    def hold(self, partitions: Collection[Partition]) -> None:
        """
        Sent to the end of the log meanwhile, where there is little to fetch; what comes is dropped.

        Not paused: kafka-python may never fetch a partition again that was.
        """
        held = frozenset(theirs for theirs, ours in self._partitions.items() if ours in partitions)
        released, added = self._held - held, held - self._held
        for one in added:
            with contextlib.suppress(kafka_errors.KafkaError):
                self._consumer.seek(one, self._bounds((one,))[1][one])
        for one in released & self._next.keys():
            self._consumer.seek(one, self._next[one])
        self._held = held

    def cluster_id(self) -> str:
        return self._cluster_id

    def log_id(self, partition: Partition) -> str:
        return self._topics.id_of(partition.topic)

    def commit(self, offsets: Mapping[Partition, int]) -> None:
        if not offsets:
            return
        named = {
            TopicPartition(one.topic, one.index): OffsetAndMetadata(offset, "", -1)
            for one, offset in offsets.items()
        }
        try:
            self._consumer.commit(named, timeout_ms=int(COMMIT_SECONDS * 1000))
        except kafka_errors.KafkaError as error:
            log.warning("commit_failed", error=f"{type(error).__name__}: {error}", partitions=len(named))

    def close(self) -> None:
        """Leave the group, so that a standby takes over at once; bounded even if Kafka is gone."""
        self._consumer.close(autocommit=False, timeout_ms=int(CLOSE_SECONDS * 1000))

    # --- reading ---------------------------------------------------------------------------------

    def _poll(self, timeout_seconds: float) -> list[RawRecord]:
        patience = IDLE_FETCH_WAIT_MILLISECONDS if self._is_idle() else FETCH_WAIT_MILLISECONDS
        self._consumer._fetcher.config["fetch_max_wait_ms"] = patience
        try:
            polled = self._consumer.poll(timeout_ms=int(timeout_seconds * 1000))
        except kafka_errors.OffsetOutOfRangeError as error:
            self._recover(tuple(error.args[0]))
            return []
        except kafka_errors.LogTruncationError as error:
            self._recover(tuple(error.divergent_offsets))
            return []
        except (
            kafka_errors.CorruptRecordError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            OSError,
            EOFError,
            AssertionError,
        ) as error:
            # Content that kafka-python trips over, in whichever way. It must not poll again before it
            # was told to go elsewhere: it would spin without end.
            self._skip_unreadable(error)
            return []
        self._topics.require()
        if not self._owned.placed:
            return []  # what we own changed meanwhile
        if renewed := self._topics.renewed():
            self._recover([one for one in self._next if one.topic in renewed], renewed=True)
            return []
        return [raw for partition, records in polled.items() for raw in self._convert(partition, records)]

    def _convert(self, partition: TopicPartition, records: Sequence[Any]) -> list[RawRecord]:
        ours = self._partitions.get(partition)
        if ours is None or partition not in self._next or partition in self._held:
            return []
        first = records[0].offset
        if first < self._next[partition]:
            # kafka-python follows a truncated log without a word.
            self._lose(partition, self._next[partition], first, "truncated")
        self._next[partition] = records[-1].offset + 1
        self._read_at = time.monotonic()
        return [raw_record(ours, record) for record in records]

    def _is_idle(self) -> bool:
        return time.monotonic() - self._read_at >= IDLE_SECONDS

    def _go_on(self, partition: TopicPartition, offset: int) -> None:
        self._consumer.seek(partition, offset)
        self._next[partition] = offset

    def _is_at(self, partition: TopicPartition, end: int) -> bool:
        """Whether it was read to there; kafka-python is asked only where what was read does not tell."""
        return self._next[partition] >= end or self._position(partition) >= end

    def _position(self, partition: TopicPartition) -> int:
        if partition in self._held:
            return self._next[partition]
        try:
            at = self._consumer.position(partition, timeout_ms=int(REQUEST_SECONDS * 1000))
        except kafka_errors.KafkaError as error:
            # Truncated, taken away, no answer: the next poll hears it too, and knows what to do.
            log.debug("position_unknown", error=type(error).__name__)
            at = None
        # Beyond the last record there may be markers of transactions, which are read but never shown.
        return max(self._next[partition], at or 0)

    def _tell_of_a_reset(self, offsets: Mapping[Partition, int]) -> None:
        """Say that the group's offsets do not count, where somebody may have set them to be obeyed."""
        try:
            kept = self._membership.committed(self._partitions)
        except kafka_errors.KafkaError as error:
            log.debug("group_offsets_unknown", error=type(error).__name__)
            return
        for theirs, ours in self._partitions.items():
            if theirs in kept and kept[theirs] != offsets.get(ours):
                log.warning(
                    "group_offsets_differ",
                    topic=ours.topic,
                    partition=ours.index,
                    group=kept[theirs],
                    ledger=offsets.get(ours),
                    going_on=self._next[theirs],
                )

    # --- what is no longer there -----------------------------------------------------------------

    def _bounds(
        self, partitions: Sequence[TopicPartition]
    ) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
        milliseconds = int(REQUEST_SECONDS * 1000)
        first = self._consumer.beginning_offsets(partitions, timeout_ms=milliseconds) if partitions else {}
        end = self._consumer.end_offsets(partitions, timeout_ms=milliseconds) if partitions else {}
        self._ends.update(end)
        return first, end

    def _available(
        self, partition: TopicPartition, wanted: int, first: int, end: int, renewed: bool = False
    ) -> int:
        """The offset to go on from instead, where the wanted one is gone."""
        if wanted < first:
            self._lose(partition, wanted, first, "expired")
            return first
        if wanted > end or (renewed and wanted > first):
            # Another log under the same name, or one that was cut: offsets only ever grow.
            self._lose(partition, wanted, first, "recreated")
            return first
        return wanted

    def _lose(self, partition: TopicPartition, expected: int, available: int, why: str) -> None:
        ours = self._partitions[partition]
        log.error(
            "offsets_lost",
            topic=ours.topic,
            partition=ours.index,
            expected=expected,
            available=available,
            why=why,
        )
        self._losses.append(OffsetLoss(ours, expected, available))

    def _recover(self, partitions: Sequence[TopicPartition], renewed: bool = False) -> None:
        known = [one for one in partitions if one in self._next]
        first, end = self._bounds(known)
        for one in known:
            at = self._next[one] if renewed else self._position(one)
            self._go_on(one, self._available(one, at, first[one], end[one], renewed))

    def _refresh_ends(self, fresh: bool = False) -> bool:
        """Ask for the ends of the log, now or if that was a while ago; false where nobody answers."""
        wanted = self._next.keys() or {self._witness}
        patience = IDLE_END_CHECK_SECONDS if self._is_idle() else END_CHECK_SECONDS
        recent = time.monotonic() - self._ends_at < patience
        if recent and not fresh and self._ends.keys() >= wanted:
            return True
        try:
            ends = self._consumer.end_offsets(list(wanted), timeout_ms=int(END_CHECK_SECONDS * 1000))
        except kafka_errors.KafkaError:
            self._answered = False
            return False
        self._ends, self._ends_at, self._answered = ends, time.monotonic(), True
        return self._ends.keys() >= wanted

    # --- what cannot be read ---------------------------------------------------------------------

    def _skip_unreadable(self, error: Exception) -> None:
        """Find the partition that made poll fail, one by one, and go to its next readable batch."""
        log.error("batch_unreadable", error=f"{type(error).__name__}: {error}")
        places = {one: self._position(one) for one in self._next}
        _, end = self._bounds(tuple(places))
        self._shake_off(places)
        # A consumer of its own: this one's place in the group, and what it holds, stay as they are.
        probe = make_consumer(self._settings)
        try:
            for one, at in places.items():
                probe.assign([one])
                readable = _next_readable(probe, one, at, end[one])
                if readable != at:
                    self._lose(one, at, readable, "unreadable")
                    self._go_on(one, readable)
        finally:
            probe.close(autocommit=False, timeout_ms=int(CLOSE_SECONDS * 1000))

    def _shake_off(self, places: Mapping[TopicPartition, int]) -> None:
        """
        Have kafka-python drop what it holds of the failed fetch.

        It would try to take more from it, for ever, as long as the position is where that fetch failed.
        """
        for one, at in places.items():
            self._consumer.seek(one, at + 1)
        try:
            self._consumer.poll(timeout_ms=0, max_records=1)
        except Exception as error:  # noqa: BLE001 - the same bytes, once more; the next seek moves on
            log.debug("fetch_dropped", error=type(error).__name__)
        for one, at in places.items():
            self._consumer.seek(one, at)


def _next_readable(probe: Any, partition: TopicPartition, at: int, end: int) -> int:
    """The first offset from here on where kafka-python finds something to read, or the end."""
    if _readable(probe, partition, at, end):
        return at
    bad, step = at, 1
    while not _readable(probe, partition, min(at + step, end), end):
        bad, step = min(at + step, end), step * 2
    good = min(at + step, end)
    while good - bad > 1:
        middle = (bad + good) // 2
        bad, good = (bad, middle) if _readable(probe, partition, middle, end) else (middle, good)
    return good


def _readable(probe: Any, partition: TopicPartition, offset: int, end: int) -> bool:
    """Whether something can be read there; raises where Kafka gives no answer in time."""
    if offset >= end:
        return True
    probe.seek(partition, offset)
    deadline = time.monotonic() + PROBE_SECONDS
    while time.monotonic() < deadline:
        try:
            if probe.poll(timeout_ms=200, max_records=1):
                return True
        except kafka_errors.KafkaTimeoutError:
            continue
        except Exception as error:  # noqa: BLE001 - whatever it is, these bytes made it
            log.debug("offset_unreadable", offset=offset, error=type(error).__name__)
            return False
        if probe.position(partition, timeout_ms=int(REQUEST_SECONDS * 1000)) != offset:
            return True  # only markers there
    raise kafka_errors.KafkaTimeoutError(f"no answer about {partition} at {offset} in {PROBE_SECONDS:.0f} s")
