"""Claims: which run acts on a retraining request, so that one does and no other."""

import contextvars
import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog

from daemon.wire.names import CLAIM_PREFIX, claim_variable
from daemon.wire.prefect import PrefectError
from flows.errors import Fenced, FlowError
from monitors.events import Outcome

log = structlog.get_logger()

HEARTBEAT_SECONDS = 15.0
LAPSE = timedelta(seconds=180)
# A variable has room for 5,000 characters, and a foreign error message can be any length.
_SENTENCE = 800
_TERMINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})


class AlreadyRetraining(FlowError):
    """Another process of this host is retraining the model."""


class Variables(Protocol):
    """Named values of which a second creation is refused; Prefect's, or files of one host."""

    def create_variable(self, name: str, value: Any) -> bool: ...
    def read_variable(self, name: str) -> Any | None: ...
    def update_variable(self, name: str, value: Any) -> None: ...
    def variables(self, prefix: str) -> dict[str, Any]: ...
    def run(self, run_id: str) -> Mapping[str, Any] | None: ...


class Claim(msgspec.Struct, frozen=True):
    """A run's right to act on a request, for as long as no higher fence exists."""

    request: str
    run: str
    fence: int
    heartbeat: datetime
    outcome: Outcome | None = None

    @property
    def name(self) -> str:
        """The variable that it is kept in."""
        return claim_variable(self.request, self.fence)


class Claims:
    """
    Claims over any variables.

    Creating the variable of fence 1 is the claim. The same run enters again. Another run takes over,
    with the next fence, only from one that is over without an outcome or whose heartbeat lapsed.
    """

    def __init__(self, variables: Variables, clock: Callable[[], datetime] | None = None) -> None:
        self._variables = variables
        self._now = clock or (lambda: datetime.now(UTC))

    def claim(self, request: str, run: str) -> Claim:
        """The valid claim on the request: ours if its run is `run`, else the one that stands in the way."""
        while True:
            holder = self.holder(request)
            if holder is not None and (holder.run == run or not self._is_over(holder)):
                return holder
            mine = Claim(request, run, holder.fence + 1 if holder else 1, self._now())
            if self._variables.create_variable(mine.name, _encoded(mine)):
                return mine
            # Somebody was faster, or it was us and the answer got lost: look who it was.

    def holder(self, request: str) -> Claim | None:
        """The claim with the highest fence, or None if nobody has claimed."""
        found = self._variables.variables(f"{CLAIM_PREFIX}{request}-")
        claims = [msgspec.convert(value, Claim) for value in found.values()]
        return max(claims, key=lambda claim: claim.fence, default=None)

    def require(self, claim: Claim) -> None:
        """Raise `Fenced` if another run has taken the request over."""
        holder = self.holder(claim.request)
        if holder is not None and holder.fence > claim.fence:
            raise Fenced(f"run {holder.run} has taken the request over (fence {holder.fence})")

    def beat(self, claim: Claim) -> Claim:
        """Say that the run is alive."""
        return self._updated(msgspec.structs.replace(claim, heartbeat=self._now()))

    def finish(self, claim: Claim, outcome: Outcome) -> Claim:
        """Keep how it ended; from then on no other run may act on the request."""
        sentence = outcome.sentence[:_SENTENCE]
        kept = msgspec.structs.replace(outcome, sentence=sentence)
        return self._updated(msgspec.structs.replace(claim, heartbeat=self._now(), outcome=kept))

    def _updated(self, claim: Claim) -> Claim:
        self._variables.update_variable(claim.name, _encoded(claim))
        return claim

    def _is_over(self, holder: Claim) -> bool:
        if holder.outcome is not None:
            return False
        run = self._variables.run(holder.run)
        state = (run or {}).get("state") or {}
        return state.get("type") in _TERMINAL or self._now() - holder.heartbeat > LAPSE


@contextmanager
def beating(claim: Claim, open_variables: Callable[[], Any]) -> Iterator[None]:
    """
    Keep the claim alive from a thread of its own, with a connection of its own.

    The thread has ended when the block has: a late beat never overwrites an outcome.
    """
    stop = threading.Event()

    def beat() -> None:
        try:
            with open_variables() as variables:
                claims = Claims(variables)
                while not stop.wait(HEARTBEAT_SECONDS):
                    _beat_once(claims, claim)
        except PrefectError as error:
            log.warning("heartbeat_stopped", request=claim.request, reason=str(error))

    # Prefect keeps its settings in the context, which a thread doesn't inherit.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(beat,), name="claim-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _beat_once(claims: Claims, claim: Claim) -> None:
    try:
        claims.beat(claim)
    except (PrefectError, OSError) as error:
        log.warning("heartbeat_missed", request=claim.request, reason=str(error))


class FolderVariables:
    """Variables as files, for one host without a Prefect server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "FolderVariables":
        return self

    def __exit__(self, *raised: object) -> None:
        """There is nothing to give back."""

    def create_variable(self, name: str, value: Any) -> bool:
        """Create the file, complete; False if it exists already."""
        draft = self._draft(name, value)
        try:
            os.link(draft, self._path(name))
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def read_variable(self, name: str) -> Any | None:
        """Its value, or None if there is none."""
        path = self._path(name)
        return msgspec.json.decode(path.read_bytes()) if path.exists() else None

    def update_variable(self, name: str, value: Any) -> None:
        """Overwrite a variable in one step."""
        self._draft(name, value).replace(self._path(name))

    def variables(self, prefix: str) -> dict[str, Any]:
        """Names and values of all whose name begins so."""
        names = sorted(path.stem for path in self._folder.glob("*.json"))
        return {name: self.read_variable(name) for name in names if name.startswith(prefix)}

    def run(self, run_id: str) -> Mapping[str, Any] | None:
        """
        Any run but the one that asks is over: it would hold `only_run_here`, which the asker holds.
        """
        return {"id": run_id, "state": {"type": "CRASHED"}}

    @contextmanager
    def only_run_here(self, model: str) -> Iterator[None]:
        """Hold the model's lock, which the kernel frees when the process dies."""
        with (self._folder / f"{model.replace('/', '-')}.lock").open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise AlreadyRetraining(
                    f"{model} is being retrained by another process of this host: wait for it"
                ) from error
            yield

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _draft(self, name: str, value: Any) -> Path:
        draft = self._folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
        draft.write_bytes(msgspec.json.encode(value))
        return draft


def _encoded(claim: Claim) -> Any:
    return msgspec.to_builtins(claim)
