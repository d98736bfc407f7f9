"""The play: rows are served, the daemon is watched and once killed, and what happened is noted."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

from flows.demo.daemon_process import DemoFailed, Status
from flows.demo.facts import Kill
from flows.demo.progress import Progress
from flows.demo.scoreboard import Scoreboard
from flows.demo.stream import Act, Stream

JUDGE_SECONDS = 180.0
REQUEST_SECONDS = 600.0
CHAMPION_SECONDS = 60.0
# Without waiting, a window takes a second, in so many steps; a service's clock rather than a demo's.
FREE_STEPS = 10
FREE_STEP_SECONDS = 0.1

Pace = Literal["wait", "free"]


class Daemon(Protocol):
    """The daemon as it is seen from outside."""

    def start(self) -> object: ...
    def kill(self) -> None: ...
    def status(self) -> Status | None: ...
    def wait_until(
        self,
        reached: Callable[[Status], bool],
        seconds: float,
        what: str,
        tell: Callable[[Status], object] = ...,
    ) -> Status: ...


class Serving(Protocol):
    """The service whose predictions are watched."""

    @property
    def version(self) -> str:
        """What the serving model calls itself in the prediction log."""

    def refresh(self) -> bool:
        """Look at the registry; true if another champion serves from now on."""

    def serve(self, start: int, end: int) -> None:
        """Score rows `start` to `end`, log the predictions and the labels that are known by then."""


class Asked:
    """A request as the play came to know it."""

    def __init__(self, row: int, act: Act | None, body: Mapping[str, Any]) -> None:
        self.row = row
        self.act = act
        self.body = body

    @property
    def id(self) -> str:
        return str(self.body["request"])

    @property
    def outcome(self) -> Mapping[str, Any]:
        """How it ended, or nothing."""
        return self.body.get("outcome") or {}

    @property
    def action(self) -> str:
        """How it ended, or where it stands."""
        return str(self.outcome.get("action", self.body["state"]))

    @property
    def sentence(self) -> str:
        """What the gate said."""
        return str(self.outcome.get("sentence", ""))

    @property
    def model_version(self) -> str:
        """What the promoted model calls itself in the log."""
        return str(self.outcome.get("model_version", ""))

    @property
    def attempt(self) -> int:
        return int(self.body["attempt"])


class Play:
    """One pass over the live rows of a stream."""

    def __init__(
        self,
        stream: Stream,
        serving: Serving,
        daemon: Daemon,
        board: Scoreboard,
        progress: Progress,
        *,
        pace: Pace = "wait",
    ) -> None:
        self._stream = stream
        self._serving = serving
        self._daemon = daemon
        self._board = board
        self._progress = progress
        self._pace = pace
        self._rows_by_version: dict[str, int] = {}
        self._act: Act | None = None
        self._told: dict[str, str] = {}
        self._explained: set[str] = set()
        self._shown = 0
        self.records = 0
        self.asked: dict[str, Asked] = {}
        self.kills: list[Kill] = []
        self.status: Status | None = None

    def run(self) -> None:
        """Play it to its end; returns when the daemon has judged everything and nothing is in flight."""
        for start, end in self._steps():
            self._enter(start)
            self._serving.refresh()
            self._serving.serve(start, end)
            self._count(end - start)
            if self._pace == "wait":
                self._settle()
            else:
                self._glance()
        self._settle()
        self._progress.done()

    def _steps(self) -> Iterator[tuple[int, int]]:
        rows = self._stream.window_rows
        size = rows if self._pace == "wait" else max(1, rows // FREE_STEPS)
        live = len(self._stream.live)
        for start in range(0, live, size):
            yield start, min(start + size, live)

    def _enter(self, row: int) -> None:
        act = self._stream.act_at(row)
        if act is not None and act is not self._act:
            self._progress.done()
            self._progress.act(act)
        self._act = act

    def _count(self, rows: int) -> None:
        self.records += rows
        version = self._serving.version
        self._rows_by_version[version] = self._rows_by_version.get(version, 0) + rows

    @property
    def _full_windows(self) -> int:
        """How many windows the daemon can judge of what was sent; each version has its own."""
        return sum(rows // self._stream.window_rows for rows in self._rows_by_version.values())

    def _settle(self) -> None:
        """Let stream time stand still until everything that was sent is judged and decided."""
        expected = self._full_windows
        self.status = self._daemon.wait_until(
            lambda status: status.windows >= expected,
            JUDGE_SECONDS,
            f"to judge window {expected}",
            tell=lambda status: self._progress.waiting(f"judging window {status.windows + 1}"),
        )
        self._show_windows()
        self._see(self.status)
        deadline = time.monotonic() + REQUEST_SECONDS
        while (request := self._in_flight()) is not None:
            self._perhaps_kill(request)
            self._progress.waiting(_waiting_for(request))
            self._await_change(request, deadline)
        self._take_over()

    def _glance(self) -> None:
        time.sleep(FREE_STEP_SECONDS)
        self._show_windows()
        status = self._daemon.status()
        if status is not None:
            self._see(status)
        request = self._in_flight()
        if request is not None:
            self._perhaps_kill(request)

    def _in_flight(self) -> Mapping[str, Any] | None:
        return self.status.in_flight if self.status is not None else None

    def _await_change(self, request: Mapping[str, Any], deadline: float) -> None:
        before = (request["request"], request["state"])

        def changed(status: Status) -> bool:
            now = status.in_flight
            return now is None or (now["request"], now["state"]) != before

        seconds = max(1.0, deadline - time.monotonic())
        self._see(self._daemon.wait_until(changed, seconds, f"with request {before[0]}, {before[1]} so far"))

    def _see(self, status: Status) -> None:
        """Note what is new, and tell it."""
        self.status = status
        for body in status.requests:
            known = self.asked.get(body["request"])
            if known is None:
                known = self.asked[body["request"]] = Asked(self.records, self._act, body)
            known.body = body
            if self._told.get(known.id) != body["state"]:
                self._told[known.id] = body["state"]
                self._tell(known)

    def _tell(self, asked: Asked) -> None:
        state, run = asked.body["state"], str(asked.body["run"] or "")
        self._progress.done()
        if asked.id not in self._explained:
            self._explained.add(asked.id)
            compared = "a window lost too much: do champions of before do better?"
            reason = f"{self._reason()}: attempt {asked.attempt}" if asked.body["episode"] else compared
            self._progress.drift(reason)
        if state == "posted":
            self._progress.request("the event is posted; Prefect's automation is to start a run")
        elif state == "confirmed":
            self._progress.request(f"run {run[:8]} has started, created by {asked.body['created_by']}")
        elif state == "ended":
            self._progress.outcome(asked.action, asked.sentence, asked.model_version)

    def _reason(self) -> str:
        last = self.status.last_window if self.status is not None else None
        number = self.status.episodes if self.status is not None else 0
        return f"episode {number}, {last['clause']}" if last is not None else f"episode {number}"

    def _perhaps_kill(self, request: Mapping[str, Any]) -> None:
        staged = self._act is not None and self._act.expect == "killed"
        if not staged or self.kills or request["state"] != "posted":
            return
        self._progress.done()
        self._daemon.kill()
        self.kills.append(Kill(self.records, request["request"]))
        self._progress.kill("the daemon is dead: its event is posted, its run not yet confirmed")
        self._daemon.start()
        self._progress.kill("the daemon is back, from its ledger")

    def _take_over(self) -> None:
        """After a promotion or a rollback, the service has the champion before the next row."""
        last = list(self.asked.values())[-1:]
        if not last or last[0].action not in ("promoted", "rolled-back"):
            return
        wanted, deadline = last[0].model_version, time.monotonic() + CHAMPION_SECONDS
        while self._serving.version != wanted and not self._serving.refresh():
            if time.monotonic() > deadline:
                raise DemoFailed(
                    f"the registry's champion is not version {wanted}, {CHAMPION_SECONDS:.0f} s after its "
                    "move was told; see the run's log in the demo's folder"
                )
            time.sleep(0.1)

    def _show_windows(self) -> None:
        rows = self._stream.window_rows
        while (self._shown + 1) * rows <= len(self._board):
            self._shown += 1
            score = self._board.window(self._shown, (self._shown - 1) * rows, self._shown * rows)
            self._progress.done()
            self._progress.window(score, self._drift_words())

    def _drift_words(self) -> str:
        """What the daemon made of its last window; without waiting it may be an earlier one than ours."""
        if self.status is None or self._pace == "free":
            return ""
        words = []
        if self.status.last_window is not None:
            words.append(f"{self.status.last_window['drift_share']:.0%} of columns drifted")
        if self.status.episode is not None:
            words.append(f"episode {self.status.episode['number']} {self.status.episode['state']}")
        return ", ".join(words)


def _waiting_for(request: Mapping[str, Any]) -> str:
    words = {
        "waiting": "the event is to be posted",
        "posted": "the event is posted; waiting for a worker to start the run",
        "confirmed": "the run trains and judges a challenger",
    }
    return f"stream time waits: {words.get(request['state'], request['state'])}"
