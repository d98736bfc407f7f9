"""A real process worker: which code it runs, and what is left when it is stopped."""

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.wire.local_prefect import LocalPrefectServer, LocalPrefectWorker
from daemon.wire.names import full_deployment_name
from daemon.wire.prefect import PrefectApi
from flows.deploy import deploy
from monitors.settings import (
    FieldSettings,
    FlowSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    PrefectSettings,
    RegistrySettings,
)

pytestmark = pytest.mark.prefect

SLEEPER = """
import os, time, pathlib
from prefect import flow

@flow
def sleep(settings, request=None):
    pathlib.Path(settings["pid_file"]).write_text(str(os.getpid()))
    time.sleep(300)
"""


@pytest.fixture(scope="module")
def pool(
    prefect_server: LocalPrefectServer, patient_api: Callable[..., PrefectApi], hostile_folder: Path
) -> str:
    """A pool that starts runs in a folder whose packages have our packages' names."""
    name = f"pool-{uuid.uuid4()}"
    deploy([], PrefectSettings(work_pool=name))
    with patient_api() as api:
        template = api.call("GET", f"/work_pools/{name}")["base_job_template"]
        template["variables"]["properties"]["working_dir"]["default"] = str(hostile_folder)
        api.call("PATCH", f"/work_pools/{name}", {"base_job_template": template})
    return name


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for package in ("daemon", "flows", "monitors", "docker"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    return folder


@pytest.fixture(scope="module")
def worker(
    prefect_server: LocalPrefectServer,
    pool: str,
    hostile_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalPrefectWorker]:
    """A worker that was started in that folder, too."""
    worker = LocalPrefectWorker(
        tmp_path_factory.mktemp("worker"),
        pool=pool,
        environment=prefect_server.environment,
        cwd=hostile_folder,
        poll_seconds=0.5,
    )
    with worker:
        yield worker


@pytest.fixture
def deployment_id(prefect_api: PrefectApi, pool: str) -> str:
    flow = FlowSettings(
        model=f"fraud-{uuid.uuid4()}",
        settings=ModelSettings(),
        kafka=KafkaSettings(),
        fields={"predictions": FieldSettings()},
        limits=LimitSettings(),
        registry=RegistrySettings(),
    )
    deploy([flow], PrefectSettings(work_pool=pool))
    deployment = prefect_api.deployment(full_deployment_name(flow.model))
    assert deployment
    return str(deployment["id"])


def test_a_worker_runs_our_flow_whatever_lies_in_its_folder(
    prefect_api: PrefectApi, worker: LocalPrefectWorker, deployment_id: str
) -> None:
    # Parameters that our flow, and nobody else's, refuses with this sentence.
    run = prefect_api.create_run(deployment_id, {"settings": {"model": "incomplete"}}, "one")
    ended = state_of(prefect_api, run["id"], {"COMPLETED", "FAILED", "CRASHED"})
    assert "the run's parameters are not those of a retraining" in ended["message"], worker.log.read_text()
    assert ended["type"] == "FAILED"


def test_runs_queue_and_send_heartbeats_and_end_with_their_worker(
    prefect_api: PrefectApi,
    worker: LocalPrefectWorker,
    deployment_id: str,
    tmp_path: Path,
    ends: Callable[..., bool],
) -> None:
    sleeper, pid_file = tmp_path / "sleeper.py", tmp_path / "pid"
    sleeper.write_text(SLEEPER)
    prefect_api.call("PATCH", f"/deployments/{deployment_id}", {"entrypoint": f"{sleeper}:sleep"})
    parameters = {"settings": {"pid_file": str(pid_file)}}
    first = prefect_api.create_run(deployment_id, parameters, "first")
    state_of(prefect_api, first["id"], {"RUNNING"})
    second = prefect_api.create_run(deployment_id, parameters, "second")
    waiting = state_of(prefect_api, second["id"], {"SCHEDULED"}, name="AwaitingConcurrencySlot")
    assert waiting["name"] == "AwaitingConcurrencySlot"
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    pid = int(pid_file.read_text())
    assert not ends(pid, seconds=0.0)
    heartbeats = {
        "event": {"name": ["prefect.flow-run.heartbeat"]},
        "resource": {"id": [f"prefect.flow-run.{first['id']}"]},
        "related": {"id": [f"prefect.deployment.{deployment_id}"]},
    }
    wait_until(lambda: bool(prefect_api.events(heartbeats)))
    worker.stop()
    assert ends(pid)


def state_of(
    api: PrefectApi, run_id: str, types: set[str], name: str = "", seconds: float = 240.0
) -> dict[str, str]:
    deadline = time.monotonic() + seconds
    while True:
        run = api.run(run_id)
        assert run
        if run["state_type"] in types and (not name or run["state_name"] == name):
            message = run["state"]["message"] or ""
            return {"type": run["state_type"], "name": run["state_name"], "message": message}
        assert time.monotonic() < deadline, f"run is {run['state_name']}: {run['state']['message']}"
        time.sleep(0.2)


def wait_until(reached: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)
