"""The daemon of a demo: a process of its own, killed and restarted, and asked how far it is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

START_SECONDS = 90.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.1
LAST_LINES = 12


class DemoFailed(Exception):
    """The demo cannot go on; the message says what, where and what to do."""

    exit_code = 1


class Status:
    """One answer of the daemon's `/status`, for one model."""

    def __init__(self, body: Mapping[str, Any], model: str) -> None:
        self.state: str = body["state"]
        self.records: int = body["records"]
        self.dead_letters: int = body["dead_letters"]
        self.outbox_waiting: int = body["outbox_waiting"]
        of_model: Mapping[str, Any] = body["models"].get(model) or {}
        self.windows: int = of_model.get("windows", 0)
        self.episodes: int = of_model.get("episodes", 0)
        self.episode: Mapping[str, Any] | None = of_model.get("episode")
        self.requests: list[Mapping[str, Any]] = list(of_model.get("requests", ()))
        self.last_window: Mapping[str, Any] | None = of_model.get("last_window")

    @property
    def in_flight(self) -> Mapping[str, Any] | None:
        """The request that has not ended yet; there is at most one."""
        return next((request for request in self.requests if request["state"] != "ended"), None)


class DaemonProcess:
    """`retrain-daemon start` on one configuration file; its log is kept in `log`."""

    def __init__(self, config: Path, url: str, model: str, log: Path) -> None:
        self._config = config
        self._url = url
        self._model = model
        self._log = log
        self._popen: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def start(self) -> Self:
        """Start it and wait until it reads."""
        self._output = self._log.open("ab")
        self._popen = subprocess.Popen(
            # -P: it must not matter what lies in the folder that the demo is started from.
            [sys.executable, "-P", "-m", "daemon.cli", "start", "--config", str(self._config)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.wait_until(lambda status: status.state == "running", START_SECONDS, "to be ready")
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def status(self) -> Status | None:
        """What it says of itself; None while it does not answer."""
        import httpx

        try:
            answer = httpx.get(f"{self._url}/status", timeout=10.0)
        except httpx.TransportError:
            return None
        return Status(answer.json(), self._model) if answer.status_code == 200 else None

    def wait_until(
        self,
        reached: Callable[[Status], bool],
        seconds: float,
        what: str,
        tell: Callable[[Status], object] = id,
    ) -> Status:
        """Ask until the answer is as wanted; a daemon that ends or takes too long ends the demo."""
        deadline = time.monotonic() + seconds
        while True:
            status = self.status()
            if status is not None:
                if reached(status):
                    return status
                tell(status)
            self._check(deadline, seconds, what)
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        """End it as a power cut would: no handler runs, nothing is flushed."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to finish; kill it if it does not. Harmless if it is down."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        popen, self._popen = self._popen, None
        if popen is None:
            return
        end_group(popen, how)
        if self._output is not None:
            self._output.close()

    def _check(self, deadline: float, seconds: float, what: str) -> None:
        if self._popen is None or self._popen.poll() is not None:
            code = None if self._popen is None else self._popen.returncode
            raise DemoFailed(f"the daemon ended with code {code}; {last_words(self._log)}")
        if time.monotonic() > deadline:
            raise DemoFailed(f"the daemon took more than {seconds:.0f} s {what}; {last_words(self._log)}")


def end_group(popen: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Signal a process and its children, wait, and kill whatever is left of them."""
    for number, seconds in ((how, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        try:
            os.killpg(popen.pid, number)
        except ProcessLookupError:
            popen.wait(STOP_SECONDS)
            return
        try:
            popen.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


def last_words(log: Path) -> str:
    """The end of a log, as part of an error message."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    return "\n".join([f"its log {log} ends with:", *lines[-LAST_LINES:]])
