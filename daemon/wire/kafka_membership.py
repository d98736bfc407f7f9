"""This member's place in its group: a join that began is finished, whoever polls when it ends."""

import time
from collections.abc import Iterable
from typing import Any

from kafka import TopicPartition
from kafka.structs import MemberState

PAUSE_SECONDS = 0.05
COMMITTED_SECONDS = 5.0


class Membership:
    """
    Keeps kafka-python from forgetting a join that ended between two polls.

    It sees a join through only while it is polled, and sends no heartbeats until then. A join that
    ended meanwhile it begins once more, which upsets the whole group again; where the member leads and
    joined because metadata changed it never comes back to it at all, without a word. Nothing public
    helps, so what a join brought is kept here until the next poll takes it, and heartbeats go on.
    """

    def __init__(self, consumer: Any) -> None:
        self._coordinator = consumer._coordinator
        self._join = self._coordinator._do_join_and_sync_async
        self._complete = self._coordinator._on_join_complete_async
        self._ended: tuple[object, bytes] | None = None
        self._coordinator._do_join_and_sync_async = self._join_once
        self._coordinator._on_join_complete_async = self._take

    def attend(self, timeout_seconds: float) -> None:
        """
        Do what the group asks for, and read nothing.

        Until all its members have joined nobody in the group is told anything, for minutes.
        """
        began = time.monotonic()
        if self._coordinator.poll(timeout_ms=int(timeout_seconds * 1000)):
            left = timeout_seconds - (time.monotonic() - began)
            time.sleep(max(0.0, min(left, PAUSE_SECONDS)))

    def committed(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """The group's offsets, of those partitions that have one. Raises kafka-python's errors."""
        milliseconds = int(COMMITTED_SECONDS * 1000)
        found = self._coordinator.fetch_committed_offsets(set(partitions), timeout_ms=milliseconds)
        return {one: kept.offset for one, kept in found.items() if kept.offset >= 0}

    async def _join_once(self) -> bytes:
        coordinator = self._coordinator
        if self._ended is not None and self._ended[0] is coordinator._generation:
            return self._ended[1]
        self._ended = None
        coordinator.request_rejoin()
        assignment: bytes = await self._join()
        with coordinator._lock:
            self._ended = (coordinator._generation, assignment)
            coordinator.state = MemberState.STABLE
            coordinator._enable_heartbeat()
        return assignment

    async def _take(self, generation: int, member_id: str, protocol: str, assignment: bytes) -> None:
        self._ended = None
        await self._complete(generation, member_id, protocol, assignment)
