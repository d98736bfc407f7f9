"""Secrets: all pieces run at debug level with passwords one can recognise; what they wrote is searched."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pytest

from daemon.ledger import Ledger
from daemon.wire.local_prefect import LocalPrefectServer, LocalPrefectWorker
from daemon.wire.names import full_deployment_name
from daemon.wire.prefect import PrefectApi

pytestmark = [pytest.mark.kafka, pytest.mark.prefect, pytest.mark.slow]

START = datetime(2026, 1, 1, tzinfo=UTC)
ROWS = 160
PATIENCE_SECONDS = 90.0


class Scene:
    """One secured broker, one Prefect server, the daemon and a worker; and what they left behind."""

    def __init__(self, secured: Any, server: LocalPrefectServer, api: PrefectApi, folder: Path) -> None:
        self.kind = secured.kind
        self.folder = folder
        self.model = f"hushed-{uuid.uuid4().hex[:8]}"
        self.pages: dict[str, bytes] = {}
        self._server, self._api = server, api
        self.secrets = {
            "Kafka's password": secured.settings("daemon").sasl_password,
            "the webhook's address": f"http://127.0.0.1:1/{uuid.uuid4().hex}",
            "Prefect's auth string": f"somebody:{uuid.uuid4().hex}",
            "the ledger's password": uuid.uuid4().hex,
            "a wrong password": f"wrong-{uuid.uuid4().hex}",
            "the content of a record": uuid.uuid4().hex,
        }
        self._secured = secured
        self._topic, self._letters = secured.topic("predictions"), secured.topic("dead")
        self._group = secured.name("group")
        for operation, kind, name in (
            ("read", "topic", self._topic),
            ("write", "topic", self._letters),
            ("read", "group", self._group),
        ):
            secured.grant("daemon", operation, kind, name)
        self._written = folder / "written"
        self._written.mkdir()
        self._configure()

    def _configure(self) -> None:
        kept = self.folder / "secrets"
        kept.mkdir()
        (kept / "kafka").write_text(self.secrets["Kafka's password"] + "\n")
        (kept / "webhook").write_text(self.secrets["the webhook's address"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        kafka = self._secured.settings("daemon")
        self._config = self._written / "retrain-daemon.toml"
        self._config.write_text(
            f"""
            mode = "retrain"
            [kafka]
            bootstrap_servers = "{kafka.bootstrap_servers}"
            topic = "{self._topic}"
            dead_letter_topic = "{self._letters}"
            group = "{self._group}"
            start = "earliest"
            security_protocol = "SASL_SSL"
            sasl_mechanism = "SCRAM-SHA-512"
            sasl_username = "daemon"
            sasl_password_file = "{kept / "kafka"}"
            ssl_cafile = "{kafka.ssl_cafile}"
            [prefect]
            api_url = "{self._server.url}"
            work_pool = "pool-{self.model}"
            webhook_url_file = "{kept / "webhook"}"
            webhook_allow_private = true
            [ledger]
            checkpoint_seconds = 0.5
            [http]
            port = {self._port}
            [models.{self.model}]
            serving_version = "1"
            reference_rows = 40
            window = {{ seconds = 40, grace_seconds = 0, min_rows = 10 }}
            policy = {{ for_windows = 1 }}
            data = {{ min_rows = {10 * ROWS} }}
            """
        )
        self._environment = {
            **os.environ,
            **self._server.environment,
            "PREFECT_API_AUTH_STRING": self.secrets["Prefect's auth string"],
        }

    def play(self) -> None:
        """Deploy, drift, retrain (which is refused: too few rows), stop; and some commands that fail."""
        assert self.command("deploy").returncode == 0
        self._secured.produce(
            self._topic, [self.secrets["the content of a record"].encode(), *map(self._record, range(ROWS))]
        )
        worker = LocalPrefectWorker(
            self._written,
            pool=f"pool-{self.model}",
            environment={
                **self._environment,
                "RETRAIN_DAEMON_KAFKA__SASL_PASSWORD": self.secrets["Kafka's password"],
                "PREFECT_LOGGING_LEVEL": "DEBUG",
                "PREFECT_LOGGING_ROOT_LEVEL": "DEBUG",
            },
            poll_seconds=0.5,
        )
        with worker, (self._written / "daemon.log").open("wb") as log:
            command = [sys.executable, "-P", "-m", "daemon.cli", "start", "--log-level", "debug"]
            daemon = subprocess.Popen(
                [*command, "--config", str(self._config)], env=self._environment, stdout=log, stderr=log
            )
            try:
                self._until(lambda: '"action":"refused"' in self._page("/status"))
                self._until(lambda: any((self._written / "retrain-daemon/reports").glob("*.html")))
                self._page("/metrics"), self._page("/readyz")
            finally:
                daemon.terminate()
                daemon.wait(30)
        self.command("status", "--json")
        password = self.secrets["the ledger's password"]
        self.command("status", RETRAIN_DAEMON_LEDGER__URL=f"postgresql://us:{password}@127.0.0.1:1/ledger")
        wrong = self.folder / "secrets" / "wrong"
        wrong.write_text(self.secrets["a wrong password"])
        failed = self.command("start", RETRAIN_DAEMON_KAFKA__SASL_PASSWORD_FILE=str(wrong))
        assert failed.returncode != 0
        assert b"SaslAuthenticationFailed" in failed.stderr

    def command(self, name: str, *more: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        """One command at debug level, its output kept."""
        command = [sys.executable, "-P", "-m", "daemon.cli", name, *more, "--config", str(self._config)]
        done = subprocess.run(
            [*command, "--log-level", "debug"],
            env=self._environment | environment,
            capture_output=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        (self._written / f"{name}-{time.monotonic_ns()}.out").write_bytes(done.stdout + done.stderr)
        return done

    def written(self) -> Iterator[tuple[str, bytes]]:
        """All files and pages, all that Prefect has of us, and its whole database."""
        for root in (self._written, self._server.home, self._server.log.parent):
            for file in (one for one in root.rglob("*") if one.is_file()):
                yield str(file.relative_to(root.parent)), self._of_ours(file.read_bytes())
        yield from self.pages.items()
        deployment = self._api.deployment(full_deployment_name(self.model))
        yield "Prefect's deployment", json.dumps(deployment).encode()
        yield "Prefect's events", json.dumps(self.events()).encode()

    @staticmethod
    def _of_ours(data: bytes) -> bytes:
        """Without what the library tells that Prefect sends its own auth string by, where all is debugged."""
        if b"websockets.client" not in data:
            return data
        return b"".join(line for line in data.splitlines(True) if b"| websockets.client -" not in line)

    def events(self) -> list[dict[str, Any]]:
        resource = f"retrain-daemon.model.{self.model}"
        return list(self._api.events({"resource": {"id": [resource]}}))

    def ledger(self) -> Ledger:
        return Ledger(f"sqlite:///{self._written / 'retrain-daemon' / 'ledger.db'}")

    def _record(self, number: int) -> bytes:
        record = {
            "model": self.model,
            "model_version": "1",
            "id": f"r{number}",
            "event_time": (START + timedelta(seconds=number)).isoformat(),
            "features": {"x": number * 7 % 40 + (100 if number >= 80 else 0)},
            "prediction": number % 2,
            "label": number % 2,
        }
        return json.dumps(record).encode()

    def _page(self, path: str) -> str:
        try:
            with urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=5) as answer:
                self.pages[path] = answer.read()
                return self.pages[path].decode()
        except OSError:  # refused, or not answered in time
            return ""

    def _until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not reached():
            said = (self._written / "daemon.log").read_text()[-3_000:]
            assert time.monotonic() < deadline, f"{self.pages}\n{said}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def scene(
    secured: Any, prefect_server: LocalPrefectServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    with PrefectApi() as api:
        made = Scene(secured, prefect_server, api, tmp_path_factory.mktemp("hushed"))
        made.play()
        yield made


def forms(secret: str) -> set[bytes]:
    """How a secret may have been written: as it is, and as Python, JSON, a URL or HTTP would show it."""
    shown = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe="")}
    shown |= {json.dumps(one)[1:-1] for one in shown}
    encoded = {base64.b64encode(secret.encode()).rstrip(b"=")}
    return {one.encode() for one in shown} | encoded


def test_no_secret_is_in_anything_that_was_written(scene: Scene) -> None:
    found = [
        (place, name)
        for place, data in scene.written()
        for name, secret in scene.secrets.items()
        if any(form in data for form in forms(secret))
    ]
    assert found == []


def test_everything_that_could_have_told_was_there_to_tell(scene: Scene) -> None:
    """So that the search is known to have had something to look through."""
    written = dict(scene.written())
    telling = {
        "written/daemon.log": (
            b"window_evaluated",
            b"record_rejected",
            b"SaslAuthenticateRequest",
            b"KafkaAdminClient",
        ),
        "written/prefect-worker.log": (b"rows_extracted", b"SaslAuthenticateRequest", b"KafkaAdminClient"),
        "written/retrain-daemon/ledger.db": (scene.model.encode(),),
        "Prefect's deployment": (b"sasl_password", b"sasl_username"),
        "Prefect's events": (b"retrain-daemon.retrain.requested", b"retrain-daemon.challenger.refused"),
        "/status": (b"refused",),
        "/metrics": (b"retrain_daemon_",),
    }
    for place, words in telling.items():
        for word in words:
            assert word in written[place], (place, word)
    assert any(place.endswith(".html") for place in written)
    assert any("status-" in place and b"127.0.0.1" in data for place, data in written.items())
    assert any(scene.model.encode() in data for place, data in written.items() if "prefect.db" in place)
