"""`retrain-daemon start` that is killed, hard, in a named step. The product's own process but for that."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from doomed_daemon import Doom, DoomedLedger, DoomedLoop, DoomedSource, NoReviews

import daemon.app
import daemon.delivery
import daemon.wire.kafka
from daemon.config import load
from daemon.logs import configure
from daemon.wire.prefect import PrefectApi
from monitors.events import Kind

DAEMON_STEPS = ("read", "scored", "before_commit", "after_commit", "posted", "confirmed")
SERVER = "prefect_server"


class NotedDoom(Doom):
    """The first of several steps, each with its countdown; a note tells which one it was."""

    def __init__(self, steps: Mapping[str, int], note: Path) -> None:
        self._steps = dict(steps)
        self._note = note
        self._only_one = threading.Lock()

    def at(self, step: str) -> None:
        if step not in self._steps:
            return
        self._steps[step] -= 1
        if self._steps[step] <= 0:
            self._die(step)

    def _die(self, step: str) -> NoReturn:
        # Never released: another thread must not spoil the note while this one ends it all.
        self._only_one.acquire()
        self._note.write_text(step)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("a process outlived its SIGKILL")


class ChaosLedger(DoomedLedger):
    """Dies also once a run was proved to act."""

    def confirm(self, request: str, run: str, created_by: str) -> None:
        super().confirm(request, run, created_by)
        self.doom.at("confirmed")


class ChaosApi(PrefectApi):
    """Dies, or has the server die, between the acknowledgement of an event and the note of it."""

    doom: Doom
    server = 0

    def post_event(self, event: dict[str, Any]) -> None:
        super().post_event(event)
        if event["event"] == str(Kind.HEARTBEAT):
            return
        if self.server:
            os.killpg(self.server, signal.SIGKILL)
            type(self).server = 0
            self.doom.at(SERVER)
        self.doom.at("posted")


class Unreviewed(NoReviews):
    """In the place of `EvidentlyReviews`, which costs seconds of a process that lives for two."""

    def __init__(self, *_: object) -> None: ...
    def start(self) -> None: ...
    def close(self) -> None: ...


def main(config: str, output: str, steps: Mapping[str, int], note: str, server: int) -> None:
    """
    Be the daemon until killed.

    `server` is a process group to kill once it has taken an event; with the step `prefect_server` the
    daemon dies just after it.
    """
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    doom = NotedDoom(steps, Path(note))
    DoomedSource.doom = ChaosLedger.doom = DoomedLoop.doom = ChaosApi.doom = doom
    ChaosApi.server = server
    daemon.wire.kafka.KafkaSource = DoomedSource
    daemon.app.Ledger = ChaosLedger
    daemon.app.Loop = DoomedLoop
    daemon.app.EvidentlyReviews = Unreviewed
    daemon.delivery.PrefectApi = ChaosApi
    settings = load(Path(config), {})
    configure(settings.log)
    logging.getLogger("kafka").setLevel(logging.ERROR)
    os._exit(daemon.app.run(settings))


# Imported once, before any process is forked; a daemon that lives for a second must not import for three.
PRELOADED = (
    "daemon.app",
    "daemon.wire.kafka",
    "daemon.wire.kafka_dead_letters",
    "prefect.client.orchestration",
)
