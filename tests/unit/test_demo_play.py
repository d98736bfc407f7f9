"""The demo's play: who waits for whom, when the daemon is killed, and what is noted."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from flows.demo.daemon_process import Status
from flows.demo.facts import Kill
from flows.demo.play import Play
from flows.demo.progress import Progress
from flows.demo.scoreboard import Scoreboard
from flows.demo.stream import Act, Row, Stream

ROWS = 10


class Service:
    """A service that sees, at its third look, the version that the script last promoted."""

    LOOKS = 3

    def __init__(self, board: Scoreboard) -> None:
        self.registry = self.version = "1"
        self.served: list[tuple[int, int, str]] = []
        self._board = board
        self._looks = 0

    def refresh(self) -> bool:
        if self.version == self.registry:
            return False
        self._looks += 1
        if self._looks % self.LOOKS:
            return False
        self.version = self.registry
        return True

    def serve(self, start: int, end: int) -> None:
        self.served.append((start, end, self.version))
        right = [1] * (end - start)
        self._board.add(self.version, labels=right, live=right, never=right)


class ScriptedDaemon:
    """
    Judges whatever was served; after the window that `asks` names, runs a request through its states.

    Each look at its status moves the request on by one state.
    """

    STATES = ("waiting", "posted", "posted", "confirmed", "ended")

    def __init__(self, service: Service, asks: dict[int, str], forgets: int = 0) -> None:
        self._service = service
        self._asks = asks
        self._looks: dict[int, int] = {}
        self._forgets = forgets
        self.kills: list[str] = []
        self.starts = 0

    def start(self) -> object:
        self.starts += 1
        return self

    def kill(self) -> None:
        self.kills.append(self._requests(self._windows())[-1]["state"])

    def status(self) -> Status | None:
        windows = self._windows()
        for window in self._asks:
            if window <= windows:
                self._looks[window] = self._looks.get(window, -1) + 1
        requests = self._requests(windows)
        for window, body in zip(self._asks, requests, strict=False):
            if body["state"] == "ended" and self._asks[window] == "promoted":
                self._service.registry = body["outcome"]["model_version"]
        body = {
            "state": "running",
            "records": 0,
            "dead_letters": 0,
            "outbox_waiting": 0,
            "models": {
                "m": {
                    "windows": windows - self._forgets,
                    "episodes": len(requests),
                    "requests": requests,
                }
            },
        }
        return Status(body, "m")

    def wait_until(
        self,
        reached: Callable[[Status], bool],
        seconds: float,
        what: str,
        tell: Callable[[Status], object] = id,
    ) -> Status:
        for _ in range(100):
            status = self.status()
            assert status is not None
            if reached(status):
                return status
        raise TimeoutError(what)

    def _windows(self) -> int:
        tally: dict[str, int] = {}
        for start, end, version in self._service.served:
            tally[version] = tally.get(version, 0) + end - start
        return sum(rows // ROWS for rows in tally.values())

    def _requests(self, windows: int) -> list[dict[str, Any]]:
        return [self._request(window, action) for window, action in self._asks.items() if window <= windows]

    def _request(self, window: int, action: str) -> dict[str, Any]:
        state = self.STATES[min(self._looks.get(window, 0), len(self.STATES) - 1)]
        outcome = {"action": action, "sentence": "", "model_version": f"after-{window}"}
        return {
            "request": f"r{window}",
            "episode": f"e{window}",
            "attempt": 1,
            "state": state,
            "run": "run",
            "created_by": "automation",
            "outcome": outcome if state == "ended" else None,
        }


def played(
    asks: dict[int, str], acts: Sequence[Act] = (), windows: int = 4
) -> tuple[Play, Service, ScriptedDaemon]:
    stream = Stream(
        model="m",
        source="",
        kind="classification",
        window_rows=ROWS,
        reference=(),
        live=(Row({}, 1),) * (windows * ROWS),
        acts=tuple(acts),
    )
    board = Scoreboard("accuracy")
    service = Service(board)
    daemon = ScriptedDaemon(service, asks)
    play = Play(stream, service, daemon, board, Progress(io.StringIO(), metric="accuracy"))
    play.run()
    return play, service, daemon


def test_no_row_is_served_by_the_old_champion_once_another_was_promoted() -> None:
    _, service, _ = played({2: "promoted"})
    assert [version for _, _, version in service.served] == ["1", "1", "after-2", "after-2"]


def test_a_refused_challenger_changes_nothing_for_the_service() -> None:
    play, service, _ = played({2: "refused"})
    assert {version for _, _, version in service.served} == {"1"}
    assert [(asked.row, asked.action) for asked in play.asked.values()] == [(20, "refused")]


def test_the_daemon_is_killed_once_and_only_with_a_posted_request_of_the_act_that_says_so() -> None:
    acts = [Act(1, "", "", 0, 20, "promoted"), Act(2, "", "", 20, 40, "killed")]
    play, _, daemon = played({1: "promoted", 3: "promoted", 4: "refused"}, acts)
    assert play.kills == [Kill(30, "r3")]
    assert daemon.kills == ["posted"]
    assert daemon.starts == 1


def test_without_such_an_act_the_daemon_lives() -> None:
    play, _, daemon = played({1: "promoted", 2: "refused"})
    assert not play.kills
    assert not daemon.kills


def test_a_daemon_that_does_not_judge_ends_the_play() -> None:
    board = Scoreboard("accuracy")
    service = Service(board)
    stream = Stream(
        model="m",
        source="",
        kind="classification",
        window_rows=ROWS,
        reference=(),
        live=(Row({}, 1),) * ROWS,
    )
    daemon = ScriptedDaemon(service, {}, forgets=1)
    play = Play(stream, service, daemon, board, Progress(io.StringIO(), metric="accuracy"))
    with pytest.raises(TimeoutError, match="window 1"):
        play.run()
