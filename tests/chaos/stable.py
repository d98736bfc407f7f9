"""The stable: where the processes of flow runs are forked, and forked again after they were killed."""

import contextlib
import json
import signal
import socketserver
import threading
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Self

import doomed_run


class Stable:
    """
    Runs the engine of each run that an errand asks for.

    A run's process imports for seconds before it does anything; one that is forked does not. `most` is
    how often runs die in each of their steps.
    """

    def __init__(self, folder: Path, context: ForkServerContext, most: int) -> None:
        self.deaths = folder / "deaths"
        self.deaths.mkdir()
        self.address = str(folder / "stable")
        self._log = str(folder / "runs.log")
        self._context = context
        self._most = most
        self._running: set[ForkServerProcess] = set()
        stable = self

        class Errand(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                asked = json.loads(self.rfile.readline())
                code = stable.run(asked["environment"], asked["folder"])
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(f"{code}\n".encode())

        self._server = socketserver.ThreadingUnixStreamServer(self.address, Errand)
        self._server.daemon_threads = True

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for process in set(self._running):
            process.kill()

    def run(self, environment: dict[str, str], folder: str) -> int:
        """The exit code of a run's process; one that was killed is followed by the next of the same run."""
        while True:
            arguments = (environment, folder, str(self.deaths), self._most, self._log)
            process = self._context.Process(target=doomed_run.main, args=arguments, daemon=True)
            process.start()
            self._running.add(process)
            process.join()
            self._running.discard(process)
            over = environment["PREFECT__FLOW_RUN_ID"] in {one.read_text() for one in self.deaths.iterdir()}
            if process.exitcode != -signal.SIGKILL or over:
                return process.exitcode or 0

    def counts(self) -> dict[str, int]:
        """How often the process of a run was killed, by step."""
        counts = dict.fromkeys(doomed_run.FLOW_STEPS, 0)
        for path in self.deaths.iterdir():
            counts[path.suffix.removeprefix(".")] += 1
        return counts
