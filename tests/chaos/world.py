"""A world to play the scene in: topics, a Prefect server with a worker, a registry and a ledger."""

import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Self

import doomed_run
import doomed_start
import msgspec
import pandas as pd
from scene import MODELS, PARTITIONS, SETTINGS, Scene
from stable import Stable

from daemon.config import Config, load
from daemon.ledger import Ledger
from daemon.wire.kafka_client import ensure_topics
from daemon.wire.local_kafka import free_port
from daemon.wire.local_prefect import LocalPrefectServer, LocalPrefectWorker
from daemon.wire.names import full_deployment_name
from daemon.wire.prefect import PrefectApi
from flows.deploy import deploy
from flows.registry import bootstrap_champion
from monitors.settings import KafkaSettings

# What keeps a loaded machine from being taken for a broken one.
PATIENCE_SECONDS = 600.0
POLL_SECONDS = 0.1


class World:
    """Everything but the broker is its own; `flow_kills` is how often a run dies in each of its steps."""

    def __init__(self, folder: Path, bootstrap_servers: str, flow_kills: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.kafka = KafkaSettings(
            bootstrap_servers=bootstrap_servers,
            topic=f"{folder.name}-predictions",
            labels_topic=f"{folder.name}-labels",
            dead_letter_topic=f"{folder.name}-dead-letters",
            group=f"{folder.name}-group",
            start="earliest",
            session_timeout_seconds=1.5,
        )
        self.scene = Scene(self.kafka)
        self.server = LocalPrefectServer(folder)
        self._port = free_port()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*doomed_start.PRELOADED, *doomed_run.PRELOADED])
        self.stable = Stable(folder, self._context, flow_kills)
        environment = {**self.server.environment, "CHAOS_STABLE": self.stable.address}
        self._worker = LocalPrefectWorker(
            folder, pool="retrain-daemon", environment=environment, poll_seconds=0.5
        )
        self.config_path = folder / "retrain-daemon.toml"
        self.ledger: Ledger

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        topics = dict.fromkeys(self.kafka.topics, PARTITIONS)
        ensure_topics(self.kafka, topics | {self.kafka.labels_topic: 1, self.kafka.dead_letter_topic: 1})
        stack.enter_context(self.server)
        self.config_path.write_text(self._toml())
        rows = self.scene.reference()
        for model in MODELS:
            frame, labels = pd.DataFrame([row for row, _ in rows]), pd.Series([label for _, label in rows])
            bootstrap_champion(self.config.flow_settings(model), frame, labels, "1")
        deploy([self.config.flow_settings(model) for model in MODELS], self.config.prefect)
        with PrefectApi(self.server.url) as api:
            for model in MODELS:
                self._run_by(api, model)
        stack.enter_context(self.stable)
        stack.enter_context(self._worker)
        self.ledger = Ledger(self.config.ledger.url)
        stack.callback(self.ledger.close)

    @property
    def config(self) -> Config:
        """As the daemon reads it."""
        return load(self.config_path, {})

    def daemon(self, step: str = "none", countdown: int = 0, server: int = 0) -> ForkServerProcess:
        """A new daemon, forked from a process that has imported it all; it dies in that step."""
        output = str(self.folder / "daemon.log")
        arguments = (str(self.config_path), output, step, countdown, server)
        process = self._context.Process(target=doomed_start.main, args=arguments, daemon=True)
        process.start()
        return process

    def restart_server(self) -> None:
        """As an operator would, on the same address and database."""
        self.server.stop()
        self.server.start()

    def serving(self) -> dict[str, str]:
        """What each model's champion calls itself in the log, by the outcomes in the ledger."""
        versions = dict.fromkeys(MODELS, "1")
        for request in self.ledger.requests():
            if request.outcome is not None and request.outcome.action == "promoted":
                versions[request.model] = request.outcome.model_version
        return versions

    def has_read(self) -> bool:
        """Whether the ledger holds all predictions, and all labels but those of windows still open."""
        restored = self.ledger.restore().positions.items()
        found = {(one.topic, one.index): position.next_offset for one, position in restored}
        return found.items() >= self.scene.ends.items()

    def tend(self) -> None:
        """What an operator's supervisor does: a worker that gave its server up is started again."""
        if not self._worker.alive:
            self._worker.stop()
            self._worker.start()

    def wait_until(self, reached: Callable[[], bool], what: str) -> None:
        """Return once it is so. Raises `TimeoutError` with what it waited for."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not reached():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not after {PATIENCE_SECONDS:.0f} s; see {self.folder}")
            self.tend()
            time.sleep(POLL_SECONDS)

    def has_ended(self, requests: int) -> bool:
        """Whether so many requests were made, and all have their outcome."""
        states = [request.state for request in self.ledger.requests()]
        return len(states) >= requests and set(states) <= {"ended"}

    def has_confirmed(self, requests: int) -> bool:
        """Whether so many requests were made, and each has a run that acts."""
        states = [request.state for request in self.ledger.requests()]
        return len(states) >= requests and set(states) <= {"confirmed", "ended"}

    def _run_by(self, api: PrefectApi, model: str) -> None:
        """Have the worker send an errand for each run; nothing else of the deployment is changed."""
        deployment = api.deployment(full_deployment_name(model))
        assert deployment is not None
        program = Path(__file__).with_name("errand.py")
        variables = {**deployment["job_variables"], "command": f"{sys.executable} -P {program}"}
        api.call("PATCH", f"/deployments/{deployment['id']}", {"job_variables": variables})

    def _toml(self) -> str:
        sections: dict[str, dict[str, Any]] = {
            "kafka": msgspec.to_builtins(self.kafka),
            "prefect": {"api_url": self.server.url, "poll_seconds": 0.5, "start_deadline_seconds": 30.0},
            "registry": {
                "tracking_uri": f"sqlite:///{self.folder / 'mlflow.db'}",
                "references_url": str(self.folder / "references"),
            },
            "ledger": {"url": f"sqlite:///{self.folder / 'ledger.db'}", "checkpoint_seconds": 0.2},
            "reports": {"folder": str(self.folder / "reports"), "url": "http://127.0.0.1:1/reports"},
            "http": {"port": self._port},
            "log": {"format": "json"},
        }
        for model in MODELS:
            settings = msgspec.to_builtins(SETTINGS)
            sections[f"models.{model}"] = {
                key: value for key, value in settings.items() if not isinstance(value, dict)
            }
            for name, section in settings.items():
                if isinstance(section, dict):
                    sections[f"models.{model}.{name}"] = section
        lines = ['mode = "retrain"']
        for name, values in sections.items():
            lines += ["", f"[{name}]"]
            lines += [f"{key} = {_inline(value)}" for key, value in values.items() if value is not None]
        return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_inline(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)
