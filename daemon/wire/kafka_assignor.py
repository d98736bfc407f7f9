"""Who reads: how the members of a group share out its partitions."""

import struct
from collections.abc import Iterable, Sequence
from typing import Any

from kafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from kafka.protocol.consumer.metadata import ConsumerProtocolAssignment, ConsumerProtocolSubscription

from daemon.wire.kafka_client import KafkaRefused
from daemon.wire.sharing import NEVER, Claim, share, uneven
from monitors.records import Partition
from monitors.settings import KafkaSettings

VERSION = 0
_CLAIM = struct.Struct(">i")


class StickyAssignor(AbstractPartitionAssignor):  # type: ignore[misc]
    """
    Gives partitions to those that already have them, as long as they are there.

    Each member tells what it was given last, and in which generation of the group. The latest claim
    wins, so that neither a newcomer nor a member that was away takes over from one that reads.
    """

    def __init__(self, known: Iterable[Partition] = ()) -> None:
        self._claim = Claim()
        self._known: dict[str, list[int]] = {}
        for partition in known:
            self._known.setdefault(partition.topic, []).append(partition.index)

    def forget(self) -> None:
        """Claim nothing any more: the group went on without us."""
        self._claim = Claim()

    def metadata(self, topics: Sequence[str]) -> Any:
        return ConsumerProtocolSubscription(VERSION, sorted(topics), self._told())

    def on_assignment(self, assignment: Any, generation: int) -> None:
        indexes = frozenset(one.partition for one in assignment.partitions())
        self._claim = Claim(generation, indexes) if indexes else Claim()

    def assign(self, cluster: Any, members: Sequence[Any]) -> dict[str, Any]:
        """What each member is to read of the topics that it subscribed to."""
        partitions = {member.member_id: self._partitions(cluster, member) for member in members}
        indexes = {index for topics in partitions.values() for _, found in topics for index in found}
        shares = self._shares(indexes, {one.member_id: _claim_of(one.metadata) for one in members})
        return {
            member: ConsumerProtocolAssignment(VERSION, _only(partitions[member], shares[member]), b"")
            for member in partitions
        }

    def _told(self) -> bytes:
        raise NotImplementedError

    def _shares(self, indexes: set[int], claims: dict[str, Claim]) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def _partitions(self, cluster: Any, member: Any) -> list[tuple[str, list[int]]]:
        """
        Every partition of the member's topics.

        A consumer may join before it has heard of any topic, and would then give out nothing; what was
        known when it was made stands in until then.
        """
        found = []
        for topic in sorted(member.metadata.topics):
            indexes = cluster.partitions_for_topic(topic)
            if indexes:
                self._known.pop(topic, None)
            found.append((topic, sorted(indexes or self._known.get(topic, ()))))
        return found


class ActiveStandbyAssignor(StickyAssignor):
    """Gives everything to one member; the others stand by."""

    name = "retrain-daemon-active-standby"

    def _told(self) -> bytes:
        return _CLAIM.pack(self._claim.generation)

    def _shares(self, indexes: set[int], claims: dict[str, Claim]) -> dict[str, tuple[int, ...]]:
        active = max(claims, key=lambda member: (claims[member].generation, member))
        return {member: tuple(indexes) if member == active else () for member in claims}


class ByModelAssignor(StickyAssignor):
    """
    Shares out partition indexes: index p of every topic goes to the same member.

    A model's predictions and its labels have the same key and so the same index, if all topics have the
    same number of partitions.
    """

    name = "retrain-daemon-by-model"

    def _told(self) -> bytes:
        return b"".join(_CLAIM.pack(one) for one in (self._claim.generation, *sorted(self._claim.indexes)))

    def _shares(self, indexes: set[int], claims: dict[str, Claim]) -> dict[str, tuple[int, ...]]:
        return share(indexes, claims)


def make_assignor(settings: KafkaSettings, known: Iterable[Partition]) -> StickyAssignor:
    """The assignor that `kafka.sharing` asks for; `KafkaRefused` where the topics do not allow it."""
    known = tuple(known)
    if settings.sharing == "by-model" and (problem := uneven(known)):
        raise KafkaRefused(
            f'Kafka at {settings.bootstrap_servers}: {problem}, and kafka.sharing = "by-model" needs as '
            "many in each, so that a model has one index in all of them: read topics that have, or set "
            'kafka.sharing = "one-active"'
        )
    return (ByModelAssignor if settings.sharing == "by-model" else ActiveStandbyAssignor)(known)


def _only(topics: list[tuple[str, list[int]]], indexes: tuple[int, ...]) -> list[tuple[str, list[int]]]:
    chosen = [(topic, [index for index in found if index in indexes]) for topic, found in topics]
    return [(topic, found) for topic, found in chosen if found]


def _claim_of(metadata: Any) -> Claim:
    data = bytes(metadata.user_data or b"")
    if not data or len(data) % _CLAIM.size:
        return Claim()
    generation, *indexes = (one[0] for one in _CLAIM.iter_unpack(data))
    return Claim(generation, frozenset(indexes)) if generation != NEVER else Claim()
