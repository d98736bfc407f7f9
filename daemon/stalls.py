"""Stalls: partitions that have records which do not come."""

import time
from collections.abc import Collection, Mapping

import msgspec

from monitors.records import Partition


class _Behind(msgspec.Struct, frozen=True):
    """Since when a partition is at an offset, and whether that was told."""

    offset: int
    since: float
    told: bool = False


class Stalls:
    """Remembers how long each partition has not moved; one stall is told of once."""

    def __init__(self) -> None:
        self._behind: dict[Partition, _Behind] = {}

    def notice(
        self, offsets: Mapping[Partition, int], done: Collection[Partition], seconds: float
    ) -> list[tuple[Partition, int]]:
        """
        The partitions, with their next offsets, that have not moved for so long and were not told of yet.

        Those that are `done` are not stalled, however long they stay where they are.
        """
        now = time.monotonic()
        found = []
        for partition, offset in offsets.items():
            behind = self._behind.get(partition)
            if behind is None or partition in done or behind.offset != offset:
                behind = _Behind(offset, now)
            elif not behind.told and now - behind.since > seconds:
                behind = _Behind(offset, behind.since, told=True)
                found.append((partition, offset))
            self._behind[partition] = behind
        return found
