"""The process of a flow run, killed, hard, in its named steps: once per step and request."""

import functools
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flows.retrain
from flows import promotion

FLOW_STEPS = ("claimed", "trained", "reference_written", "alias_moved")
# What a run imports as it goes. In a process that was forked it is there already.
PRELOADED = (
    "flows.retrain",
    "mlflow.pyfunc",
    "mlflow.sklearn",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "pandas",
    "skops.io",
)


class FlowDoom:
    """
    Remembers in files which deaths were died; whoever comes next goes on to the next.

    Mostly a run goes on in another process, as a cluster starts the container of a job again. One death
    in four of each step ends the run with its process, and the daemon sees to it; never two of one
    request, which has failed then.
    """

    def __init__(self, deaths: Path, most: int) -> None:
        self._deaths = deaths
        self._most = most
        self.request = ""

    def at(self, step: str) -> None:
        died = self._deaths / f"{self.request}.{step}"
        before = len(list(self._deaths.glob(f"*.{step}")))
        if died.exists() or before >= self._most:
            return
        over = before % len(FLOW_STEPS) == FLOW_STEPS.index(step) and not self._was_over()
        died.write_text(os.environ["PREFECT__FLOW_RUN_ID"] if over else "")
        os.kill(os.getpid(), signal.SIGKILL)

    def _was_over(self) -> bool:
        return any(one.read_text() for one in self._deaths.glob(f"{self.request}.*"))


def main(environment: Mapping[str, str], folder: str, deaths: str, most: int, output: str) -> None:
    """Be Prefect's engine for one run, as the worker would have started it."""
    from prefect.context import refresh_global_settings_context

    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    refresh_global_settings_context()
    _arm(FlowDoom(Path(deaths), most))
    sys.argv[1:] = []
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


def _arm(doom: FlowDoom) -> None:
    """Put a death after each of the steps that change something."""
    from mlflow import MlflowClient

    claim = flows.retrain._claim

    @functools.wraps(claim)
    def claimed(job: flows.retrain.Job) -> Any:
        found = claim(job)
        if found.run == job.run and found.outcome is None:
            doom.request = job.request_id
            doom.at("claimed")
        return found

    flows.retrain._claim = claimed
    flows.retrain._train = _dying(doom, "trained", flows.retrain._train)
    promotion.write_reference = _dying(doom, "reference_written", promotion.write_reference)
    moved = _dying(doom, "alias_moved", MlflowClient.set_registered_model_alias)
    MlflowClient.set_registered_model_alias = moved


def _dying(doom: FlowDoom, step: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """The same work, and then the end."""

    @functools.wraps(work)
    def doomed(*args: Any, **kwargs: Any) -> Any:
        result = work(*args, **kwargs)
        doom.at(step)
        return result

    return doomed
