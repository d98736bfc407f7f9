"""The automation that tells of a dead daemon: a real process, killed, on a real Prefect server."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from daemon.wire.local_prefect import LocalPrefectServer
from daemon.wire.prefect import PrefectApi
from flows.automations import DAEMON_SILENT, SHORTEST_SILENCE_SECONDS, automation_name
from flows.deploy import deploy
from monitors.events import RESOURCE_PREFIX, Kind
from monitors.settings import FlowSettings, LimitSettings, ModelSettings, PrefectSettings, RegistrySettings

pytestmark = [pytest.mark.kafka, pytest.mark.prefect, pytest.mark.slow]

HEARTBEAT_SECONDS = 1.0


class Watched:
    """A deployed model, the daemon that watches it, and what Prefect noticed of that."""

    def __init__(self, kafka: Any, server: LocalPrefectServer, api: PrefectApi, folder: Path) -> None:
        self.model = f"silent-{uuid.uuid4().hex[:8]}"
        self.kind = kafka.kind
        self._api = api
        self._folder = folder
        self._environment = os.environ | server.environment
        self._process: subprocess.Popen[bytes] | None = None
        topic, letters = kafka.topic(), kafka.topic()
        settings = kafka.settings(topic=topic, dead_letter_topic=letters, session_timeout_seconds=2.0)
        prefect = PrefectSettings(work_pool=f"pool-{self.model}", heartbeat_seconds=HEARTBEAT_SECONDS)
        flow = FlowSettings(
            model=self.model,
            settings=ModelSettings(),
            kafka=settings,
            fields={},
            limits=LimitSettings(),
            registry=RegistrySettings(),
        )
        deploy([flow], prefect)
        (automation,) = api.automations(automation_name(self.model, DAEMON_SILENT))
        self._automation = f"prefect.automation.{automation['id']}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._config = folder / "retrain-daemon.toml"
        self._config.write_text(
            f"""
            [kafka]
            bootstrap_servers = "{settings.bootstrap_servers}"
            topic = "{topic}"
            dead_letter_topic = "{letters}"
            group = "{settings.group}"
            start = "earliest"
            session_timeout_seconds = 2.0
            [prefect]
            api_url = "{server.url}"
            heartbeat_seconds = {HEARTBEAT_SECONDS}
            [http]
            port = {self._port}
            [models.{self.model}]
            """
        )
        self.produce = lambda values: kafka.produce(topic, values)

    def start(self) -> None:
        """Start the daemon and wait until it reads."""
        with (self._folder / "daemon.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "daemon.cli", "start", "--config", str(self._config)],
                env=self._environment,
                stdout=log,
                stderr=log,
            )
        eventually(lambda: self._page("/readyz") == "ready: owner\n", 180.0, self._last_words)

    def kill(self) -> None:
        """End the daemon as a power cut would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(60)
            self._process = None

    def heartbeats(self) -> int:
        return self._count(str(Kind.HEARTBEAT), f"{RESOURCE_PREFIX}{self.model}")

    def fired(self) -> int:
        """How often the automation did, as the event feed has it."""
        return self._count("prefect.automation.triggered", self._automation)

    def metric(self, name: str) -> list[float]:
        return [
            sample.value
            for family in text_string_to_metric_families(self._page("/metrics"))
            for sample in family.samples
            if sample.name == f"retrain_daemon_{name}"
        ]

    def _count(self, event: str, resource: str) -> int:
        return len(self._api.events({"event": {"name": [event]}, "resource": {"id": [resource]}}))

    def _page(self, path: str) -> str:
        try:
            with urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:  # refused, or not answered in time
            return ""

    def _last_words(self) -> str:
        return (self._folder / "daemon.log").read_text()[-2_000:]


def eventually(what: Callable[[], Any], seconds: float, why: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, why() or "it did not happen in time"
        time.sleep(0.2)


@pytest.fixture
def watched(
    kafka: Any, prefect_server: LocalPrefectServer, prefect_api: PrefectApi, tmp_path: Path
) -> Iterator[Watched]:
    made = Watched(kafka, prefect_server, prefect_api, tmp_path)
    yield made
    made.kill()


def test_a_killed_daemon_is_told_of_once_and_the_next_one_is_watched_again(watched: Watched) -> None:
    patience = SHORTEST_SILENCE_SECONDS + 120.0

    watched.start()
    eventually(lambda: watched.heartbeats() >= 2, 120.0)
    watched.produce([b"garbage"])
    eventually(lambda: watched.metric("records_read_total") == [1.0], 120.0)
    eventually(lambda: watched.metric("kafka_lag_records") == [0.0], 120.0)
    for name in ("kafka_reachable", "prefect_reachable", "ledger_readable"):
        assert watched.metric(name) == [1.0], name
    assert watched.fired() == 0, "a daemon that is well is not told of"
    watched.kill()
    eventually(lambda: watched.fired() == 1, patience)

    beats = watched.heartbeats()
    watched.start()
    eventually(lambda: watched.heartbeats() > beats, 120.0)
    watched.kill()
    eventually(lambda: watched.fired() == 2, patience)

    time.sleep(SHORTEST_SILENCE_SECONDS + 3.0)
    assert watched.fired() == 2, "told of once, however long the silence lasts"
