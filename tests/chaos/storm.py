"""The storm: plays the scene in a world, and kills what is in it, step by step."""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess

from doomed_start import DAEMON_STEPS
from scene import MODELS
from world import World

SERVER, ELSEWHERE = "prefect_server", "elsewhere"
READING = ("read", "scored", "before_commit", "after_commit")


class Storm:
    """
    One play of the scene; `kills` says how many of each daemon step and of the server there are to be.

    A process that dies before its second commit leaves the same work to the next, so those steps can be
    had as often as wanted.
    """

    def __init__(
        self, world: World, stages: int, kills: Mapping[str, int], tell: Callable[[str], None]
    ) -> None:
        self._world = world
        self._stages = stages
        self._kills = kills
        self._tell = tell
        self._chance = random.Random(7)
        self.counts: Counter[str] = Counter(dict.fromkeys((*DAEMON_STEPS, SERVER), 0))

    def play(self) -> None:
        """All stages, each from its first record until its requests have ended."""
        world = self._world
        for stage in range(1, self._stages + 1):
            for drifted in (False, True):
                world.scene.write_part(stage, drifted, world.serving())
                self._part(stage, drifted)
            self._tell(f"stage {stage} of {self._stages}, killed so far: {self.kills_by_step()}")

    def kills_by_step(self) -> dict[str, int]:
        """How often each was killed, the runs included."""
        return {**self.counts, **self._world.stable.counts()}

    def _part(self, stage: int, drifted: bool) -> None:
        requests = (stage if drifted else stage - 1) * len(MODELS)
        part = 2 * stage - 1 + drifted
        reading = [step for step in READING for _ in range(self._due(step, part, 2 * self._stages))]
        self._chance.shuffle(reading)
        for step in reading:
            # The first commit says who owns the ledger now; the second would be of what was read.
            self._kill(step, 1 if step == "after_commit" else self._countdown(step), self._world.has_read)
        if self._kills and part > 1:
            self._kill("after_commit", 2, self._world.has_read)
            # Before a run of this part has begun, in the first event or after the first request: a run
            # that loses its server twice has failed, and its request with it.
            for _ in range(min(2 if drifted else 1, self._due(SERVER, part, 2 * self._stages))):
                self._kill_server()
        if drifted and self._kills:
            self._outbox_and_runs(stage, requests)
        self._finish(stage, requests)

    def _countdown(self, step: str) -> int:
        return self._chance.randint(1, 2) if step == "before_commit" else 1

    def _outbox_and_runs(self, stage: int, requests: int) -> None:
        for _ in range(self._due("posted", stage, self._stages)):
            self._kill("posted", 1, lambda: self._world.has_ended(requests))
        for _ in range(self._due("confirmed", stage, self._stages)):
            self._kill("confirmed", 1, lambda: self._world.has_confirmed(requests))

    def _due(self, step: str, part: int, parts: int) -> int:
        """What is to be caught up with in this part, so that the last has had all that was asked for."""
        return max(0, self._kills.get(step, 0) * part // parts - self.counts[step])

    def _kill(self, step: str, countdown: int, too_late: Callable[[], bool]) -> None:
        """Have a daemon die in a step; one that no longer comes to it dies wherever it is."""
        daemon = self._world.daemon(step, countdown)
        self._world.wait_until(lambda: not daemon.is_alive() or too_late(), f"a daemon that dies {step}")
        if daemon.is_alive():
            self._end(daemon)
            return
        daemon.join()
        if daemon.exitcode != -9:
            raise RuntimeError(f"a daemon that was to die {step} ended with code {daemon.exitcode}")
        self.counts[step] += 1

    def _kill_server(self) -> None:
        """Prefect dies as soon as it has acknowledged one event; the daemon notices, and dies too."""
        daemon = self._world.daemon(server=self._world.server.process_group)
        self._world.wait_until(lambda: not self._world.server.alive, "a server that dies")
        self.counts[SERVER] += 1
        self._world.restart_server()
        self._end(daemon)

    def _finish(self, stage: int, requests: int) -> None:
        world, daemon = self._world, self._world.daemon()
        try:
            world.wait_until(
                lambda: (world.has_read() and world.has_ended(requests)) or not daemon.is_alive(),
                f"the end of stage {stage}",
            )
            if not daemon.is_alive():
                raise RuntimeError(f"the daemon ended with code {daemon.exitcode}; see {world.folder}")
        finally:
            self._end(daemon)

    def _end(self, daemon: ForkServerProcess) -> None:
        daemon.kill()
        daemon.join()
        if self._kills:
            self.counts[ELSEWHERE] += 1
