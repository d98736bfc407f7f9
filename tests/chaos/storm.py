"""The storm: plays the scene in a world, and kills what is in it, step by step."""

import random
from collections import Counter
from collections.abc import Callable, Mapping

from doomed_start import DAEMON_STEPS, SERVER
from scene import MODELS
from world import Doomed, World

ELSEWHERE = "elsewhere"
READING = ("read", "scored", "before_commit", "after_commit")
# A run that loses its server twice has failed, and its request with it. So the server dies at the first
# event of a part, as often as wanted while its daemon dies too, and once more at the first request, before
# that request's run has begun.
OUTLIVED = 2


class Storm:
    """
    One play of the scene; `kills` says how many of each daemon step and of the server there are to be.

    A process that dies before its second commit leaves the same work to the next, and one that dies
    before an event is marked as posted leaves the event, so those steps can be had as often as wanted.
    Each request is confirmed once, and whoever confirms it dies.
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
                world.patience.begin(f"writing stage {stage}")
                world.scene.write_part(stage, drifted, world.serving())
                self._part(stage, drifted)
            self._tell(f"stage {stage} of {self._stages}, killed so far: {self.kills_by_step()}")

    def kills_by_step(self) -> dict[str, int]:
        """How often each was killed, the runs included."""
        return {**self.counts, **self._world.stable.counts()}

    def _part(self, stage: int, drifted: bool) -> None:
        requests = (stage if drifted else stage - 1) * len(MODELS)
        part = 2 * stage - 1 + drifted
        if self._kills:
            self._reading(part)
            if part > 1:
                self._die({"after_commit": 2, "posted": 1}, self._world.has_read)
            if drifted:
                self._server(stage)
                self._outbox_and_runs(stage, requests)
        self._finish(stage, requests)

    def _reading(self, part: int) -> None:
        steps = [step for step in READING for _ in range(self._due(step, part, 2 * self._stages))]
        self._chance.shuffle(steps)
        for step in steps:
            if self._world.has_read():
                # A version that is met is written down at once, and all that was read with it: the next
                # daemon may close the windows before it dies. Later parts catch up with what is missing.
                return
            # The first commit says who owns the ledger now; the second would be of what was read.
            countdown = self._chance.randint(1, 2) if step == "before_commit" else 1
            # What is decided all the same stays in line for what is to be killed later.
            self._die({step: countdown, "posted": 1}, self._world.has_read)

    def _server(self, stage: int) -> None:
        """Prefect dies as soon as it has acknowledged an event; its daemon before or after it notes that."""
        world = self._world
        for left in reversed(range(self._due(SERVER, stage, self._stages))):
            outlived = left < OUTLIVED
            daemon = world.daemon({} if outlived else {SERVER: 1}, world.server.process_group)
            world.wait_for(
                daemon,
                lambda: not world.server.alive or world.has_posted(),
                "a server that dies with an event that it took",
            )
            died_with_it = self._bury(daemon) == SERVER
            if world.server.alive and not died_with_it:
                return
            self.counts[SERVER] += outlived
            world.restart_server()

    def _outbox_and_runs(self, stage: int, requests: int) -> None:
        """Whoever is still to die with an event in hand, then one for each run that is confirmed."""
        for _ in range(self._due("posted", stage, self._stages)):
            self._die({"posted": 1, "confirmed": 1}, self._world.has_posted)
        while not self._world.has_confirmed(requests):
            self._die({"confirmed": 1}, lambda: self._world.has_confirmed(requests))

    def _due(self, step: str, part: int, parts: int) -> int:
        """What is to be caught up with in this part, so that the last has had all that was asked for."""
        return max(0, self._kills[step] * part // parts - self.counts[step])

    def _die(self, steps: Mapping[str, int], too_late: Callable[[], bool]) -> None:
        """Have a daemon die in one of these steps; one that no longer comes to it dies wherever it is."""
        daemon = self._world.daemon(steps)
        self._world.wait_for(daemon, too_late, f"a daemon that dies {' or '.join(steps)}")
        self._bury(daemon)

    def _bury(self, daemon: Doomed) -> str:
        step = daemon.end() or ELSEWHERE
        self.counts[step] += 1
        return step

    def _finish(self, stage: int, requests: int) -> None:
        world, daemon = self._world, self._world.daemon()
        world.wait_for(
            daemon, lambda: world.has_posted() and world.has_ended(requests), f"the end of stage {stage}"
        )
        alive = daemon.alive
        died_in = daemon.end()
        if not alive:
            raise RuntimeError(f"the daemon of stage {stage} ended by itself ({died_in}); see {world.folder}")
        if self._kills:
            self.counts[ELSEWHERE] += 1
