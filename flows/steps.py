"""Steps: how one step of a run is carried out, as a Prefect task or plainly in this process."""

import time
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import structlog

from daemon.wire.kafka_client import KafkaUnreachable
from daemon.wire.prefect import PrefectUnavailable
from daemon.wire.references import ReferencesUnavailable
from flows.audit import ChampionMoved
from flows.errors import Fenced, NotRetrainable
from flows.registry import RegistryUnavailable

log = structlog.get_logger()
P = ParamSpec("P")
R = TypeVar("R")

_TRANSIENT = (
    KafkaUnreachable,
    PrefectUnavailable,
    ReferencesUnavailable,
    RegistryUnavailable,
    ConnectionError,
    TimeoutError,
)
# These are answers, and no reason to show a failed task.
_ANSWERS = (NotRetrainable, Fenced, ChampionMoved)
RETRY_DELAYS = [1.0, 5.0, 20.0]
# What is done is done: it waits so long for a server to be told of it, and asks so often.
OUTAGE_SECONDS = 900.0
ASK_SECONDS = 5.0


class Step(Protocol):
    """Carries out one step and returns what it returns."""

    def __call__(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R: ...


def in_process(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Just call it."""
    return work(*args, **kwargs)


def as_task(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run it as a Prefect task, which tries again what another time may work."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE

    def step() -> tuple[R | None, Exception | None]:
        try:
            return work(*args, **kwargs), None
        except _ANSWERS as answer:
            return None, answer

    name = getattr(work, "__name__", "step").strip("_")
    carried_out: Any = task(
        name=name,
        retries=len(RETRY_DELAYS),
        retry_delay_seconds=RETRY_DELAYS,
        retry_condition_fn=_is_transient,
        cache_policy=NO_CACHE,
        persist_result=False,
    )(step)
    result, answer = carried_out()
    if answer is not None:
        raise answer
    return result  # type: ignore[no-any-return]


def patiently(work: Callable[[], R], seconds: float = OUTAGE_SECONDS) -> R:
    """Carry it out once the Prefect server answers; `PrefectUnavailable` if it does not for so long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return work()
        except PrefectUnavailable as error:
            if time.monotonic() > deadline:
                raise
            log.warning("prefect_awaited", reason=str(error))
            time.sleep(ASK_SECONDS)


def _is_transient(task: Any, run: Any, state: Any) -> bool:
    try:
        state.result()
    except _TRANSIENT:
        return True
    except Exception:  # noqa: BLE001 - any other error of the step will come again
        return False
    return False
