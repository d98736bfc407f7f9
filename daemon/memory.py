"""The ports without a world: a log, its readers and its dead letters in memory."""

import threading
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence

from daemon.ports import NO_LOGS, Assignment, OffsetLoss
from daemon.wire.sharing import Claim, share
from monitors.events import OffsetRange
from monitors.records import InvalidRecord, Partition, RawRecord
from monitors.settings import KafkaSettings

MAX_POLL_RECORDS = 5_000


class MemoryLog:
    """Topics, partitions and the members that read them: what a broker keeps."""

    def __init__(self) -> None:
        self.cluster_id = uuid.uuid4().hex
        self.changed = threading.Condition()
        self.members: dict[str, list[object]] = {}
        self.committed: dict[tuple[str, Partition], int] = {}
        self.shares: dict[str, tuple[list[object], dict[int, tuple[int, ...]]]] = {}
        self._records: dict[Partition, list[RawRecord]] = {}
        self._first: dict[Partition, int] = {}
        self._ids: dict[str, str] = {}

    def create(self, topic: str, partitions: int = 1) -> None:
        """Make the topic, empty; one of the same name is gone with all it held."""
        with self.changed:
            for partition in self.partitions((topic,)):
                del self._records[partition]
            self._ids[topic] = uuid.uuid4().hex
            for index in range(partitions):
                self._records[Partition(topic, index)] = []
                self._first[Partition(topic, index)] = 0

    def append(
        self,
        partition: Partition,
        value: bytes | None,
        *,
        key: bytes | None = None,
        timestamp_ms: int = 0,
        headers: tuple[tuple[str, bytes | None], ...] = (),
    ) -> int:
        """Add a record and return its offset."""
        with self.changed:
            offset = self.bounds(partition)[1]
            self._records[partition].append(RawRecord(partition, offset, timestamp_ms, key, value, headers))
            self.changed.notify_all()
            return offset

    def expire(self, partition: Partition, before: int) -> None:
        """Delete what is in front of an offset, as retention does."""
        with self.changed:
            first, end = self.bounds(partition)
            keep = min(max(before, first), end)
            del self._records[partition][: keep - first]
            self._first[partition] = keep

    def partitions(self, topics: Sequence[str]) -> tuple[Partition, ...]:
        """The partitions of these topics, in order."""
        return tuple(sorted(one for one in self._records if one.topic in topics))

    def bounds(self, partition: Partition) -> tuple[int, int]:
        """The first offset left and the next to be written."""
        first = self._first[partition]
        return first, first + len(self._records[partition])

    def id_of(self, topic: str) -> str:
        """What only this log is called: one of the same name that is made later is another."""
        return self._ids[topic]

    def read(self, partition: Partition, start: int, most: int) -> Sequence[RawRecord]:
        """Up to so many records from an offset on, which must be there."""
        at = start - self._first[partition]
        return self._records[partition][at : at + most]


class MemorySource:
    """The port `Source` on a `MemoryLog`: the group's oldest member reads, or all share by index."""

    def __init__(self, memory: MemoryLog, settings: KafkaSettings) -> None:
        self._log = memory
        self._settings = settings
        self._topics = settings.topics + ((settings.labels_topic,) if settings.labels_topic else ())
        self._members = memory.members.setdefault(settings.group, [])
        self._members.append(self)
        self._told: tuple[Partition, ...] | None = None
        self._news = False
        self._next: dict[Partition, int] = {}
        self._logs: dict[Partition, str] = {}
        self._held: frozenset[Partition] = frozenset()
        self._losses: list[OffsetLoss] = []

    def poll(self, timeout_seconds: float) -> Sequence[RawRecord]:
        with self._log.changed:
            self._hear_group()
            records = self._read()
            if not records and self._log.changed.wait(timeout_seconds):
                records = self._read()
            return records

    def assignment(self) -> Assignment | None:
        if not self._news:
            return None
        self._news = False
        self._next = {}
        return Assignment(self._told or ())

    def rejoin(self) -> None:
        self._told, self._next, self._news = None, {}, False

    def seek(
        self, offsets: Mapping[Partition, int], logs: Mapping[Partition, str] = NO_LOGS
    ) -> Mapping[Partition, int]:
        self._logs = dict(logs)
        for partition in self._told or ():
            first, end = self._log.bounds(partition)
            begin = first if self._settings.start == "earliest" else end
            self._next[partition] = self._available(partition, offsets.get(partition, begin))
        return dict(self._next)

    def losses(self) -> Sequence[OffsetLoss]:
        found, self._losses = self._losses, []
        return found

    def drained(self, fresh: bool = False) -> frozenset[Partition]:
        return frozenset(one for one, at in self._next.items() if at >= self._log.bounds(one)[1])

    def ends(self) -> Mapping[Partition, int]:
        return {one: self._log.bounds(one)[1] for one in self._next}

    def reachable(self) -> bool:
        return True

    def hold(self, partitions: Collection[Partition]) -> None:
        self._held = frozenset(partitions)

    def cluster_id(self) -> str:
        return self._log.cluster_id

    def log_id(self, partition: Partition) -> str:
        return self._log.id_of(partition.topic)

    def commit(self, offsets: Mapping[Partition, int]) -> None:
        for partition, offset in offsets.items():
            self._log.committed[self._settings.group, partition] = offset

    def close(self) -> None:
        if self in self._members:
            self._members.remove(self)

    def _hear_group(self) -> None:
        partitions = self._log.partitions(self._topics)
        if self._settings.sharing == "by-model":
            indexes = self._shared({one.index for one in partitions}).get(id(self), ())
            owned = tuple(one for one in partitions if one.index in indexes)
        else:
            active = bool(self._members) and self._members[0] is self
            owned = partitions if active else ()
        if owned != self._told:
            self._told, self._news = owned, True
            self._next = {}

    def _shared(self, indexes: set[int]) -> dict[int, tuple[int, ...]]:
        """Who has which indexes: shared out anew when a member came or went."""
        members, shares = self._log.shares.get(self._settings.group, ([], {}))
        if members != self._members:
            claims = {
                str(id(member)): Claim(1, frozenset(shares.get(id(member), ()))) for member in self._members
            }
            shares = (
                {int(member): given for member, given in share(indexes, claims).items()} if claims else {}
            )
            self._log.shares[self._settings.group] = (list(self._members), shares)
        return shares

    def _read(self) -> list[RawRecord]:
        records: list[RawRecord] = []
        for partition, offset in self._next.items():
            if partition in self._held:
                continue
            start = self._available(partition, offset)
            records += self._log.read(partition, start, MAX_POLL_RECORDS - len(records))
            last = records[-1] if records and records[-1].partition == partition else None
            self._next[partition] = last.offset + 1 if last else start
        return records

    def _available(self, partition: Partition, wanted: int) -> int:
        first, end = self._log.bounds(partition)
        now = self.log_id(partition)
        renewed = self._logs.get(partition, now) != now
        self._logs[partition] = now
        if first <= wanted <= end and not (renewed and wanted > first):
            return wanted
        self._losses.append(OffsetLoss(partition, wanted, first))
        return first


class MemoryReader:
    """The port `Log` on a `MemoryLog`."""

    def __init__(self, memory: MemoryLog) -> None:
        self._log = memory

    def read(self, ranges: Sequence[OffsetRange]) -> Iterator[RawRecord]:
        for span in ranges:
            partition = Partition(span.topic, span.partition)
            first, end = self._log.bounds(partition)
            start = max(span.start, first)
            yield from self._log.read(partition, start, max(0, min(span.end, end) - start))

    def bounds(self, topic: str) -> Mapping[Partition, tuple[int, int]]:
        return {one: self._log.bounds(one) for one in self._log.partitions((topic,))}

    def cluster_id(self) -> str:
        return self._log.cluster_id


class MemoryDeadLetters:
    """The port `DeadLetters` in memory: `stored` holds what was flushed."""

    def __init__(self) -> None:
        self.stored: list[tuple[RawRecord, InvalidRecord]] = []
        self._pending: list[tuple[RawRecord, InvalidRecord]] = []

    def put(self, raw: RawRecord, error: InvalidRecord) -> None:
        self._pending.append((raw, error))

    def flush(self) -> None:
        self.stored += self._pending
        self._pending = []

    def close(self) -> None:
        """Nothing is held."""
