"""Health: whether the loop still turns, and whether this member can be relied on."""

import time
from collections.abc import Callable

from daemon.loop import Role

# The longest that a cycle may take: above the ledger's and Kafka's own patience, which end in an error.
HUNG_SECONDS = 120.0

Answer = tuple[bool, str]


class Health:
    """
    Two answers, each with its reason. The loop says when it turned; a process that just started has.

    Alive is what to restart a process by: Kafka or Prefect being away is no reason. Ready also means
    that Kafka answers and that the group has said who reads; a standby is ready too.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._turned_at = clock()
        self._role: Role = "joining"
        self._reachable = False

    def turned(self, role: Role, reachable: bool) -> None:
        """The loop finished a cycle."""
        self._turned_at, self._role, self._reachable = self._clock(), role, reachable

    def alive(self) -> Answer:
        """Whether the loop finished a cycle lately."""
        silent = self._clock() - self._turned_at
        if silent > HUNG_SECONDS:
            return False, f"the loop has finished no cycle for {silent:.0f} seconds"
        return True, "ok"

    def ready(self) -> Answer:
        """Whether this member reads, or would at once if the one that does were gone."""
        alive, why = self.alive()
        if not alive:
            return False, why
        if self._role == "joining":
            return False, "not ready: the consumer group has not said yet who reads"
        if self._role == "waiting":
            return False, "not ready: the ledger does not answer"
        if not self._reachable:
            return False, "not ready: Kafka does not answer"
        return True, f"ready: {self._role}"
