"""Evidently's worker: a process of its own, so that its imports, memory and crashes are not the daemon's."""

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import structlog

from daemon.errors import RetrainDaemonError
from daemon.evidently_child import (
    REPLIES,
    Draw,
    Drawn,
    Failed,
    Forgotten,
    Judge,
    Judged,
    Learn,
    Learned,
    Reply,
    Request,
    Terms,
    read_frame,
    write_frame,
)
from monitors.baseline import Baseline
from monitors.drift import DriftReport, SegmentShift
from monitors.drift_engine import CompiledReference, compile_reference
from monitors.records import PredictionRecord
from monitors.reference import Reference
from monitors.settings import DriftSettings, QualitySettings

_CLOSE_SECONDS = 5.0
_SECRETS = ("RETRAIN_DAEMON_", "PREFECT_", "MLFLOW_", "AWS_")

log = structlog.get_logger()


class EvidentlyFailed(RetrainDaemonError):
    """Evidently could not judge or draw this window; the compiled engine's word stands."""


class _ChildLost(Exception):
    """The child ended, or its pipe broke, before it replied."""


class EvidentlyWorker:
    """The parent's end: starts the child when it is needed, and once more if a request was lost with it."""

    def __init__(self, timeout_seconds: float = 300.0, idle_seconds: float = 600.0) -> None:
        self._timeout_seconds = timeout_seconds
        self._idle_seconds = idle_seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._known: set[str] = set()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def judge(self, key: str, terms: Terms, records: Sequence[PredictionRecord]) -> DriftReport:
        """Evidently's report of these records, or `EvidentlyFailed`."""
        reply = self._ask(key, terms, Judge(key, _portable(records)))
        if isinstance(reply, Judged):
            return reply.report
        raise _failure(reply)

    def draw(
        self, key: str, terms: Terms, records: Sequence[PredictionRecord], folder: Path, name: str
    ) -> Drawn:
        """Writes Evidently's HTML and JSON report into the folder, each whole or not at all."""
        if Path(name).name != name:
            raise ValueError(f"report name {name!r} is not a plain file name")
        request = Draw(key, _portable(records), str(folder.absolute()), name)
        reply = self._ask(key, terms, request)
        if isinstance(reply, Drawn):
            return reply
        raise _failure(reply)

    def close(self) -> None:
        """Ends the child for good; a request in another thread has a few seconds to finish."""
        self._closed = True
        if not self._lock.acquire(timeout=_CLOSE_SECONDS):
            if (child := self._child) is not None:
                child.kill()
            self._lock.acquire()
        try:
            self._discard()
        finally:
            self._lock.release()

    def _ask(self, key: str, terms: Terms, request: Judge | Draw) -> Reply:
        with self._lock:
            try:
                return self._exchange(key, terms, request)
            except _ChildLost:
                log.warning("evidently_restarted", **self._discard())
            try:
                return self._exchange(key, terms, request)
            except _ChildLost as error:
                facts = self._discard()
                log.error("evidently_lost", **facts)
                raise EvidentlyFailed(
                    f"Evidently's process ended twice on one request (exit code {facts['exit_code']}); "
                    'is there memory for another 300 MB? drift.engine = "compiled" works without it'
                ) from error

    def _exchange(self, key: str, terms: Terms, request: Judge | Draw) -> Reply:
        if self._closed:
            raise EvidentlyFailed("Evidently's process was closed")
        child = self._running()
        if key not in self._known:
            self._teach(child, key, terms)
        reply = self._send(child, request)
        if isinstance(reply, Forgotten):
            self._teach(child, key, terms)
            reply = self._send(child, request)
        return reply

    def _teach(self, child: "subprocess.Popen[bytes]", key: str, terms: Terms) -> None:
        reply = self._send(child, Learn(key, terms))
        if not isinstance(reply, Learned):
            raise _failure(reply)
        self._known.add(key)

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._discard()
        self._child = _start(self._idle_seconds)
        log.info("evidently_started", pid=self._child.pid)
        return self._child

    def _send(self, child: "subprocess.Popen[bytes]", request: Request) -> Reply:
        """One request, one reply; a child that takes too long is killed, which ends the waiting."""
        overdue = threading.Event()

        def kill() -> None:
            overdue.set()
            child.kill()

        watchdog = threading.Timer(self._timeout_seconds, kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            assert child.stdin is not None and child.stdout is not None
            write_frame(child.stdin, msgspec.msgpack.encode(request))
            data = read_frame(child.stdout)
        except OSError:
            data = None
        finally:
            watchdog.cancel()
        if data is not None:
            return REPLIES.decode(data)
        if overdue.is_set():
            log.error("evidently_timed_out", **self._discard(), timeout_seconds=self._timeout_seconds)
            raise EvidentlyFailed(f"Evidently took longer than {self._timeout_seconds:g} s and was stopped")
        raise _ChildLost

    def _discard(self) -> dict[str, int | None]:
        """Closes the pipe, which the child takes for the end, and waits; then kills."""
        child, self._child, self._known = self._child, None, set()
        if child is None:
            return {"exit_code": None}
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(OSError):
            child.stdin.close()
        try:
            child.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()
        return {"exit_code": child.returncode}


class EvidentlyEngine:
    """The `DriftEngine` of which every score is Evidently's own: `drift.engine = "evidently"`."""

    def __init__(
        self,
        worker: EvidentlyWorker,
        reference: bytes,
        drift: DriftSettings,
        quality: QualitySettings,
        kind: str,
    ) -> None:
        self._worker = worker
        self._terms = Terms(reference, drift, quality, kind)
        self._key = key_of(self._terms)

    @property
    def baseline(self) -> Baseline | None:
        """As the reference has it."""
        return Reference.from_bytes(self._terms.reference).baseline

    def judge(self, records: Sequence[PredictionRecord]) -> DriftReport:
        """Blocks for about a second, and ten when the child has to start."""
        return self._worker.judge(self._key, self._terms, records)

    def locate(self, records: Sequence[PredictionRecord], columns: Sequence[str]) -> tuple[SegmentShift, ...]:
        """As the compiled engine: Evidently knows no segments."""
        return self._compiled.locate(records, columns)

    @cached_property
    def _compiled(self) -> CompiledReference:
        terms = self._terms
        reference = Reference.from_bytes(terms.reference)
        return compile_reference(reference, terms.drift, terms.quality, terms.kind)

    def draw(self, records: Sequence[PredictionRecord], folder: Path, name: str) -> Drawn:
        """Writes Evidently's report of the window."""
        return self._worker.draw(self._key, self._terms, records, folder, name)


def key_of(terms: Terms) -> str:
    """Equal terms have equal keys."""
    return hashlib.sha256(msgspec.msgpack.encode(terms, order="deterministic")).hexdigest()


def _failure(reply: Reply) -> EvidentlyFailed:
    reason = reply.reason if isinstance(reply, Failed) else f"unexpected reply {type(reply).__name__}"
    return EvidentlyFailed(f"Evidently failed in its own process: {reason}")


def _portable(records: Sequence[PredictionRecord]) -> tuple[PredictionRecord, ...]:
    """MessagePack has no integers beyond 64 bits; every engine takes those for floats."""
    return tuple(
        msgspec.structs.replace(
            record,
            features={name: _narrow(value) for name, value in record.features.items()},
            prediction=_narrow(record.prediction),
            label=None,
        )
        for record in records
    )


def _narrow(value: Any) -> Any:
    if type(value) is not int or -(2**63) <= value < 2**64:
        return value
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _start(idle_seconds: float) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "daemon.evidently_child", repr(idle_seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # What a library prints may quote values; what went wrong comes back as a reply.
        stderr=subprocess.DEVNULL,
        env=_environment(os.environ),
        bufsize=0,
        # Ctrl-C on the terminal is the parent's to handle.
        start_new_session=True,
    )


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """
    No telemetry, and no secret that the child has no use for.

    Evidently sums over sets: one seed for all, so that its scores are the same in every process.
    """
    kept = {name: value for name, value in environ.items() if not name.startswith(_SECRETS)}
    return kept | {"DO_NOT_TRACK": "true", "PYTHONHASHSEED": "0"}
