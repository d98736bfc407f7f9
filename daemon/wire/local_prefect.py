"""A Prefect server and workers of our own: processes on loopback for the demo and the tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from daemon.wire.prefect import PrefectApi, PrefectError

START_SECONDS = 120.0
STOP_SECONDS = 15.0


class LocalPrefectFailed(Exception):
    """A process of ours did not start; the message ends with what its log said last."""

    exit_code = 1


class LocalPrefectServer:
    """
    One server with its own PREFECT_HOME: nothing of the user's own profile is read or written.

    `environment` is added to the server's, for tests of its security settings and the like.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        ui: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.home = folder / "prefect"
        self.log = folder / "prefect-server.log"
        self._port = port or _free_port()
        self._ui = ui
        self._environment = dict(environment or {})
        self._process: _Process | None = None

    @property
    def url(self) -> str:
        """The API's address, as PREFECT_API_URL takes it."""
        return f"http://127.0.0.1:{self._port}/api"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this server and nothing else."""
        return {
            "PREFECT_API_URL": self.url,
            "PREFECT_HOME": str(self.home),
            "PREFECT_PROFILES_PATH": str(self.home / "profiles.toml"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }

    @property
    def process_group(self) -> int:
        """The group of its processes while it is started, for whoever has to see it die."""
        assert self._process
        return self._process.group

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return bool(self._process and self._process.alive)

    def start(self) -> Self:
        """Start it and wait until it takes writes."""
        self.home.mkdir(parents=True, exist_ok=True)
        command = ["server", "start", "--host", "127.0.0.1", "--port", str(self._port)]
        environment = {
            **self.environment,
            "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "0.25",
            "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
            "PREFECT_LOGGING_LEVEL": "WARNING",
            **self._environment,
        }
        arguments = command if self._ui else [*command, "--no-ui"]
        self._process = _Process("Prefect server", arguments, environment, self.home, self.log)
        try:
            self._wait_until_writable()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the server and all that it started; harmless if it is down."""
        if self._process:
            self._process.stop()
            self._process = None

    def kill(self) -> None:
        """End the server and all that it started as a power cut would; `start` brings it back."""
        if self._process:
            self._process.kill()
            self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_writable(self) -> None:
        assert self._process
        deadline = time.monotonic() + START_SECONDS
        while not self._takes_writes():
            self._process.check(deadline)
            time.sleep(0.1)

    def _takes_writes(self) -> bool:
        """Health is not enough: the first writes of a healthy server may still meet a locked database."""
        import httpx

        try:
            if httpx.get(f"{self.url}/health", timeout=5).status_code != 200:
                return False
            return self._security() or self._writes()
        except (httpx.HTTPError, PrefectError):
            return False

    def _security(self) -> bool:
        """With auth or CSRF on, a write would need the tester's secrets: health has to do."""
        return any(name.startswith("PREFECT_SERVER_API_") for name in self._environment)

    def _writes(self) -> bool:
        with PrefectApi(self.url, retries=0) as api:
            api.set_variable("retrain-daemon-server-started", True)
            return api.delete_variable("retrain-daemon-server-started")


class LocalPrefectWorker:
    """One process worker on a pool; `cwd` is the folder that it is started in."""

    def __init__(
        self,
        folder: Path,
        *,
        pool: str,
        environment: Mapping[str, str],
        cwd: Path | None = None,
        poll_seconds: float = 1.0,
    ) -> None:
        self.log = folder / "prefect-worker.log"
        self._cwd = cwd or folder
        self._arguments = ["worker", "start", "--pool", pool, "--type", "process", "--name", "local"]
        self._environment = {
            "PREFECT_WORKER_QUERY_SECONDS": str(poll_seconds),
            "PREFECT_LOGGING_LEVEL": "INFO",
            **environment,
        }
        self._process: _Process | None = None

    def start(self) -> Self:
        """Start it; it takes up runs some seconds later."""
        self._process = _Process("Prefect worker", self._arguments, self._environment, self._cwd, self.log)
        return self

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return bool(self._process and self._process.alive)

    def stop(self) -> None:
        """Stop the worker and the runs that it started; harmless if it is down."""
        if self._process:
            self._process.stop()
            self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Process:
    """`prefect ...` in a process group of its own, writing to a log file."""

    def __init__(
        self, name: str, arguments: list[str], environment: Mapping[str, str], cwd: Path, log: Path
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._name = name
        self._log = log
        self._output: IO[bytes] = log.open("ab")
        self._popen = subprocess.Popen(
            # -P: the folder it is started in may have packages that hide real ones.
            [sys.executable, "-P", "-m", "prefect", *arguments],
            cwd=cwd,
            env=_clean_environment() | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    @property
    def group(self) -> int:
        return self._popen.pid

    def check(self, deadline: float) -> None:
        """Raise if the process has ended or its time is up."""
        if not self.alive:
            raise LocalPrefectFailed(
                f"the {self._name} ended with code {self._popen.returncode}; {self._last_words()}"
            )
        if time.monotonic() > deadline:
            raise LocalPrefectFailed(
                f"the {self._name} was not ready after {START_SECONDS:.0f} s; {self._last_words()}"
            )

    def stop(self) -> None:
        """Ask the group, wait, then kill what is left of it."""
        _signal_group(self._popen.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Kill the group without a word."""
        _signal_group(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._output.close()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-15:]
        return "\n".join([f"{self._log} ends with:", *lines])


def _clean_environment() -> dict[str, str]:
    """Ours without any Prefect setting: what the user's shell says is meant for another server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
