"""Who reads: one member of the group has every partition, the others stand by."""

import struct
from collections.abc import Iterable, Sequence
from typing import Any

from kafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from kafka.protocol.consumer.metadata import ConsumerProtocolAssignment, ConsumerProtocolSubscription

from monitors.records import Partition

VERSION = 0
NEVER = -1
_CLAIM = struct.Struct(">i")


class ActiveStandbyAssignor(AbstractPartitionAssignor):  # type: ignore[misc]
    """
    Gives everything to the member that already has it, as long as it is there.

    Each member tells the generation in which it was last given partitions. The latest claim wins, so
    that neither a newcomer nor a member that was away takes over from the one that reads.
    """

    name = "retrain-daemon-active-standby"

    def __init__(self, known: Iterable[Partition] = ()) -> None:
        self._claim = NEVER
        self._known: dict[str, list[int]] = {}
        for partition in known:
            self._known.setdefault(partition.topic, []).append(partition.index)

    def forget(self) -> None:
        """Claim nothing any more: the group went on without us."""
        self._claim = NEVER

    def metadata(self, topics: Sequence[str]) -> Any:
        return ConsumerProtocolSubscription(VERSION, sorted(topics), _CLAIM.pack(self._claim))

    def on_assignment(self, assignment: Any, generation: int) -> None:
        self._claim = generation if assignment.partitions() else NEVER

    def assign(self, cluster: Any, members: Sequence[Any]) -> dict[str, Any]:
        """Everything the chosen member subscribed to, for it; nothing for the others."""
        active = max(members, key=lambda member: (_claim_of(member.metadata), member.member_id)).member_id
        return {
            member.member_id: ConsumerProtocolAssignment(
                VERSION, self._partitions(cluster, member) if member.member_id == active else [], b""
            )
            for member in members
        }

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


def _claim_of(metadata: Any) -> int:
    data = bytes(metadata.user_data or b"")
    claim: int = _CLAIM.unpack(data)[0] if len(data) == _CLAIM.size else NEVER
    return claim
