"""A world to play the scene in: topics, a Prefect server with a worker, a registry and a ledger."""

import contextlib
import functools
import itertools
import json
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Self

import doomed_run
import doomed_start
import msgspec
import pandas as pd
from patience import Patience
from scene import MODELS, PARTITIONS, SETTINGS, Scene
from stable import Stable

from daemon.config import Config, load
from daemon.ledger import Ledger
from daemon.wire.kafka_client import ensure_topics
from daemon.wire.local_kafka import free_port
from daemon.wire.local_prefect import LocalPrefectFailed, LocalPrefectServer, LocalPrefectWorker
from daemon.wire.names import full_deployment_name
from daemon.wire.prefect import PrefectApi
from flows.deploy import deploy
from flows.registry import bootstrap_champion
from flows.steps import patiently
from monitors.settings import KafkaSettings

# How often the ledger is asked; the death of a process is seen at once.
POLL_SECONDS = 0.5
# A machine that is busy enough lets a server come up only at another try.
SERVER_STARTS = 5


class Doomed:
    """A daemon, and the step that it died in."""

    def __init__(self, process: ForkServerProcess, note: Path) -> None:
        self._process = process
        self._note = note

    @property
    def alive(self) -> bool:
        """Whether it has not died yet."""
        return self._process.is_alive()

    def wait(self, seconds: float) -> None:
        """Return after so long, or as soon as it is dead."""
        self._process.join(seconds)

    def end(self) -> str:
        """The step that it died in, by its own note; empty if it had to be killed from here."""
        self._process.kill()
        self._process.join()
        if self._process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"a daemon that was to be killed ended with code {self._process.exitcode}")
        return self._note.read_text() if self._note.exists() else ""


class World:
    """Everything but the broker is its own; `flow_kills` is how often a run dies in each of its steps."""

    def __init__(self, folder: Path, bootstrap_servers: str, flow_kills: int, patience: Patience) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.patience = patience
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
        # One that looks for silent runs every second has time for little else on a busy machine.
        self.server = LocalPrefectServer(
            folder, environment={"PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT10S"}
        )
        self._port = free_port()
        self._notes = folder / "daemons"
        self._notes.mkdir()
        self._numbers = itertools.count(1)
        self._progress: object = None
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*doomed_start.PRELOADED, *doomed_run.PRELOADED])
        self.stable = Stable(folder, self._context, flow_kills)
        environment = {**self.server.environment, "CHAOS_STABLE": self.stable.address}
        self._worker = LocalPrefectWorker(
            folder, pool="retrain-daemon", environment=environment, poll_seconds=1.0
        )
        self.config_path = folder / "retrain-daemon.toml"
        self.ledger: Ledger

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.patience.begin(f"making the world of the {self.folder.name} play")
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.patience.begin(f"taking down the world of the {self.folder.name} play")
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        topics = dict.fromkeys(self.kafka.topics, PARTITIONS)
        ensure_topics(self.kafka, topics | {self.kafka.labels_topic: 1, self.kafka.dead_letter_topic: 1})
        stack.callback(self.server.stop)
        self._start_server()
        self.config_path.write_text(self._toml())
        rows = self.scene.reference()
        for model in MODELS:
            frame, labels = pd.DataFrame([row for row, _ in rows]), pd.Series([label for _, label in rows])
            bootstrap_champion(self.config.flow_settings(model), frame, labels, "1")
        flows = [self.config.flow_settings(model) for model in MODELS]
        patiently(lambda: deploy(flows, self.config.prefect))
        with PrefectApi(self.server.url) as api:
            for model in MODELS:
                patiently(functools.partial(self._run_by, api, model))
        stack.enter_context(self.stable)
        stack.enter_context(self._worker)
        self.ledger = Ledger(self.config.ledger.url)
        stack.callback(self.ledger.close)

    @property
    def config(self) -> Config:
        """As the daemon reads it."""
        return load(self.config_path, {})

    def daemon(self, steps: Mapping[str, int] | None = None, server: int = 0) -> Doomed:
        """A new daemon, forked from a process that has imported it all; it dies in one of these steps."""
        note = self._notes / str(next(self._numbers))
        arguments = (str(self.config_path), str(self.folder / "daemon.log"), steps or {}, str(note), server)
        process = self._context.Process(target=doomed_start.main, args=arguments, daemon=True)
        process.start()
        return Doomed(process, note)

    def restart_server(self) -> None:
        """As an operator would, on the same address and database."""
        self.server.stop()
        self._start_server()

    def _start_server(self) -> None:
        for left in reversed(range(SERVER_STARTS)):
            self.patience.begin("starting the Prefect server")
            try:
                self.server.start()
                return
            except LocalPrefectFailed:
                if not left:
                    raise

    def serving(self) -> dict[str, str]:
        """What each model's champion calls itself in the log, by the outcomes in the ledger."""
        versions = dict.fromkeys(MODELS, "1")
        for request in self.ledger.requests():
            if request.outcome is not None and request.outcome.action in ("promoted", "rolled-back"):
                versions[request.model] = request.outcome.model_version
        return versions

    def has_read(self) -> bool:
        """Whether the ledger holds all predictions, and all labels but those of windows still open."""
        restored = self.ledger.restore().positions.items()
        found = {(one.topic, one.index): position.next_offset for one, position in restored}
        return found.items() >= self.scene.ends.items()

    def _tend(self) -> None:
        """What an operator's supervisor does: a worker that gave its server up is started again."""
        if not self._worker.alive:
            self._worker.stop()
            self._worker.start()

    def wait_for(self, daemon: Doomed, reached: Callable[[], bool], what: str) -> None:
        """Return once the daemon is dead, or once it is so."""
        self.patience.begin(what)
        while daemon.alive and not reached():
            self._watch(what)
            daemon.wait(POLL_SECONDS)

    def _watch(self, what: str) -> None:
        """As long as anything gets further, however slowly, nothing hangs."""
        self._tend()
        requests = [(request.state, request.run, request.posts) for request in self.ledger.requests()]
        progress = (requests, self.ledger.waiting_count(), self.stable.counts())
        if progress != self._progress:
            self._progress = progress
            self.patience.begin(what)

    def has_posted(self) -> bool:
        """Whether all is read, and all that it led to was acknowledged by Prefect."""
        return self.has_read() and not self.ledger.waiting_count()

    def has_ended(self, requests: int) -> bool:
        """Whether so many requests were made, and all have their outcome."""
        states = [request.state for request in self.ledger.requests()]
        return len(states) >= requests and set(states) <= {"ended"}

    def has_confirmed(self, requests: int) -> bool:
        """Whether so many requests were made, and each has a run that acts."""
        states = [request.state for request in self.ledger.requests()]
        return len(states) >= requests and set(states) <= {"confirmed", "ended"}

    def state(self) -> Iterator[str]:
        """Where everything stands, for whoever has to find out what a play waited for."""
        yield f"in {self.folder}: server alive {self.server.alive}, worker alive {self._worker.alive}"
        positions = self.ledger.restore().positions.items()
        found = {(one.topic, one.index): position.next_offset for one, position in positions}
        yield f"read {found} of {self.scene.ends}; {self.ledger.waiting_count()} events are in line"
        for request in self.ledger.requests():
            held = f", held: {request.held}" if request.held else ""
            yield f"request {request.id} of {request.model}: {request.state}, run {request.run}{held}"
        with PrefectApi(self.server.url, timeout_seconds=5.0) as api:
            for run in api.pages("/flow_runs/filter", {"sort": "ID_DESC"}):
                asked = (run["parameters"].get("request") or {}).get("request")
                yield f"run {run['id']} of request {asked}: {run['state_name']}"

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
            "prefect": {"api_url": self.server.url, "poll_seconds": 1.0, "start_deadline_seconds": 30.0},
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
