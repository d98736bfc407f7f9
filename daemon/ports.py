"""What the loop needs from the world. Each port has a real and an in-memory form, and one test suite."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import msgspec

from monitors.records import InvalidRecord, Partition, RawRecord

# Where nothing was read for so long, loop and source rest for longer.
IDLE_SECONDS = 10.0
NO_LOGS: Mapping[Partition, str] = MappingProxyType({})


class Assignment(msgspec.Struct, frozen=True):
    """The partitions this member now owns; the loop answers with the offsets to go on from."""

    partitions: tuple[Partition, ...]


class OffsetLoss(msgspec.Struct, frozen=True):
    """Offsets that were to be read and are gone: `expected` was next, `available` is the first left."""

    partition: Partition
    expected: int
    available: int


class Source(Protocol):
    """
    Where records come from: a consumer group of which one member at a time reads everything, or
    whose members share by partition index (`kafka.sharing`): one index of all topics to one member.

    `poll` returns raw records, each partition's in offset order, and never raises for their
    content. `assignment` is a new value each time ownership changed since it was last asked for,
    else None (no partitions: standby); no record is returned before `seek` answered a new one.
    """

    def poll(self, timeout_seconds: float) -> Sequence[RawRecord]: ...
    def assignment(self) -> Assignment | None: ...
    def rejoin(self) -> None:
        """Own nothing until the group has said anew what is ours; `assignment` tells it, whatever it is."""

    def seek(
        self, offsets: Mapping[Partition, int], logs: Mapping[Partition, str] = NO_LOGS
    ) -> Mapping[Partition, int]:
        """
        Go on from these next offsets; owned partitions not named start where `kafka.start` says.

        `logs` are the ids of the logs that these offsets are of: where it is another by now, all of it is
        to be read. Returns the next offset of every owned partition, as it really is.
        """

    def log_id(self, partition: Partition) -> str:
        """What only the log behind this partition is called; empty where the broker does not tell."""

    def losses(self) -> Sequence[OffsetLoss]:
        """The offsets found gone, by `seek` or while reading, since this was last asked for."""

    def drained(self, fresh: bool = False) -> frozenset[Partition]:
        """The owned partitions whose next offset is the end of the log as last seen, or (`fresh`) now."""

    def ends(self) -> Mapping[Partition, int]:
        """The ends of the log as last seen, of the owned partitions that were looked at."""

    def reachable(self) -> bool:
        """Whether Kafka answered when it was last asked for the ends; a standby asks too."""

    def hold(self, partitions: Collection[Partition]) -> None:
        """Return no records of these, and of these only, until told otherwise; stay in the group."""

    def cluster_id(self) -> str: ...
    def commit(self, offsets: Mapping[Partition, int]) -> None:
        """Tell Kafka the next offsets, for lag tools only; a failure is logged, never raised."""

    def close(self) -> None: ...


class DeadLetters(Protocol):
    """Where records go that cannot be read. `flush` returns once all of them are stored, or raises."""

    def put(self, raw: RawRecord, error: InvalidRecord) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class SendAnswer(msgspec.Struct, frozen=True):
    """What became of one record; a `problem` that is not `certain` may have been none."""

    problem: str = ""
    certain: bool = True


class Sender(Protocol):
    """Who puts raw records back into the log; returns once there is an answer for each."""

    def send(self, records: Sequence[RawRecord]) -> list[SendAnswer]: ...
