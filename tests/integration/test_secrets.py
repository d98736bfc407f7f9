"""
Secrets: all pieces run at debug level with passwords one can recognise; what they wrote is searched.

Kafka wants TLS, SCRAM and ACLs; Prefect wants an auth string and CSRF tokens, of the daemon and of the flow.
"""

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

from daemon.wire.local_prefect import LocalPrefectServer, LocalPrefectWorker
from daemon.wire.names import full_deployment_name
from daemon.wire.prefect import PrefectApi

pytestmark = [pytest.mark.kafka, pytest.mark.prefect, pytest.mark.slow]

START = datetime(2026, 1, 1, tzinfo=UTC)
ROWS = 600
PATIENCE_SECONDS = 240.0


class Scene:
    """One secured broker, one guarded Prefect server, the daemon and a worker; and what they left behind."""

    def __init__(self, secured: Any, folder: Path) -> None:
        self.kind = secured.kind
        self.folder = folder
        self.model = f"hushed-{uuid.uuid4().hex[:8]}"
        self.pages: dict[str, bytes] = {}
        self._of_prefect: dict[str, bytes] = {}
        self.secrets = {
            "Kafka's password": secured.settings("daemon").sasl_password,
            "the webhook's address": f"http://127.0.0.1:1/{uuid.uuid4().hex}",
            "Prefect's auth string": f"somebody:{uuid.uuid4().hex}",
            "the ledger's password": f"a/{uuid.uuid4().hex}",
            "a wrong password": f"wrong-{uuid.uuid4().hex}",
            "a wrong auth string": f"somebody:wrong-{uuid.uuid4().hex}",
            "the content of a record": uuid.uuid4().hex,
        }
        self.server = LocalPrefectServer(
            folder,
            environment={
                "PREFECT_SERVER_API_AUTH_STRING": self.secrets["Prefect's auth string"],
                "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
            },
        )
        self._secured = secured
        self._topic, self._letters = secured.topic("predictions"), secured.topic("dead")
        self._group = secured.name("group")
        for operation, kind, name in (
            ("read", "topic", self._topic),
            ("write", "topic", self._letters),
            ("read", "group", self._group),
            # For the operator's commands, which the same user runs here.
            ("read", "topic", self._letters),
        ):
            secured.grant("daemon", operation, kind, name)
        self._written = folder / "written"
        self._written.mkdir()
        self._configure()

    def _configure(self) -> None:
        kept = self.folder / "secrets"
        kept.mkdir()
        password = self.secrets["the ledger's password"]
        for name, secret in (
            ("kafka", self.secrets["Kafka's password"] + "\n"),
            ("webhook", self.secrets["the webhook's address"]),
            ("wrong", self.secrets["a wrong password"]),
            ("ledger", f"postgresql://us:{password}@127.0.0.1:1/ledger?connect_timeout=5"),
        ):
            (kept / name).write_text(secret)
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
            ssl_cafile = "{kafka.ssl_cafile}"
            [prefect]
            api_url = "{self.server.url}"
            work_pool = "pool-{self.model}"
            webhook_allow_private = true
            [ledger]
            checkpoint_seconds = 0.5
            [http]
            port = {self._port}
            [models.{self.model}]
            serving_version = "1"
            reference_rows = 40
            window = {{ seconds = 40, grace_seconds = 0, min_rows = 10 }}
            policy = {{ method = "thresholds", for_windows = 1 }}
            data = {{ min_rows = 100 }}
            gate = {{ min_holdout_rows = 20 }}
            training = {{ parameters = {{ max_iter = 15 }} }}
            """
        )
        self._client = {
            **os.environ,
            **self.server.environment,
            "PREFECT_API_AUTH_STRING": self.secrets["Prefect's auth string"],
        }
        # Two ways to hand a secret over: most commands get files, those of `by_environment` values.
        self._files = {
            "RETRAIN_DAEMON_KAFKA__SASL_PASSWORD_FILE": str(kept / "kafka"),
            "RETRAIN_DAEMON_PREFECT__WEBHOOK_URL_FILE": str(kept / "webhook"),
        }
        self.by_environment = {
            "RETRAIN_DAEMON_KAFKA__SASL_PASSWORD": self.secrets["Kafka's password"],
            "RETRAIN_DAEMON_PREFECT__WEBHOOK_URL": self.secrets["the webhook's address"],
        }

    def play(self) -> None:
        """Deploy, drift, retrain, stop; then look back, with the right secrets and with wrong ones."""
        assert self.command("deploy").returncode == 0
        self._secured.produce(
            self._topic, [self.secrets["the content of a record"].encode(), *map(self._record, range(ROWS))]
        )
        worker = LocalPrefectWorker(
            self._written,
            pool=f"pool-{self.model}",
            environment={
                **self._client,
                "RETRAIN_DAEMON_KAFKA__SASL_PASSWORD": self.secrets["Kafka's password"],
                "PREFECT_LOGGING_LEVEL": "DEBUG",
                "PREFECT_LOGGING_ROOT_LEVEL": "DEBUG",
            },
            poll_seconds=0.5,
        )
        with worker, (self._written / "daemon.log").open("wb") as log:
            daemon = subprocess.Popen(
                self._line("start"), env=self._client | self._files, stdout=log, stderr=log
            )
            try:
                self._until(lambda: '"action":"promoted"' in self._page("/status"))
                self._until(lambda: any((self._written / "retrain-daemon/reports").glob("*.html")))
                self._page("/metrics"), self._page("/readyz")
            finally:
                daemon.terminate()
                daemon.wait(PATIENCE_SECONDS)
        self._look_back()
        self._fail()

    def _look_back(self) -> None:
        """What people run afterwards, with secrets from the environment."""
        for words in (
            ("deploy",),
            ("status", "--json"),
            ("check", "--online"),
            ("doctor", "--json"),
            ("explain", f"{self.model}:1", "--json"),
            ("verify", "--json"),
            ("dlq", "list", "--json"),
        ):
            done = self.command(*words, secrets=self.by_environment)
            assert done.returncode == 0, done.stdout + done.stderr

    def _fail(self) -> None:
        """Each error that is about a secret, by each command that tells it; tracebacks included."""
        kept = self.folder / "secrets"
        password = {"RETRAIN_DAEMON_KAFKA__SASL_PASSWORD_FILE": str(kept / "wrong")}
        ledger = {"RETRAIN_DAEMON_LEDGER__URL_FILE": str(kept / "ledger")}
        auth = {"PREFECT_API_AUTH_STRING": self.secrets["a wrong auth string"]}
        for words, wrong, said in (
            (("check", "--online"), password, b"SaslAuthenticationFailed"),
            (("start",), password, b"SaslAuthenticationFailed"),
            (("doctor",), ledger, b"127.0.0.1"),
            (("start",), ledger, b"127.0.0.1"),
            (("check", "--online"), auth, b"PREFECT_API_AUTH_STRING"),
        ):
            failed = self.command(*words, secrets=self._files | wrong)
            assert failed.returncode != 0
            assert said in failed.stdout + failed.stderr, (words, failed.stdout + failed.stderr)

    def command(
        self, *words: str, secrets: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """One command at debug level, its output kept."""
        done = subprocess.run(
            self._line(*words),
            env=self._client | (self._files if secrets is None else secrets),
            capture_output=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        (self._written / f"{words[0]}-{time.monotonic_ns()}.out").write_bytes(done.stdout + done.stderr)
        return done

    def _line(self, *words: str) -> list[str]:
        more = ["--config", str(self._config), "--log-level", "debug"]
        return [sys.executable, "-P", "-m", "daemon.cli", *words, *more]

    def written(self) -> Iterator[tuple[str, bytes]]:
        """All files and pages, all that Prefect has of us, its log and its whole database."""
        for root in (self._written, self.server.home):
            for file in (one for one in root.rglob("*") if one.is_file()):
                yield str(file.relative_to(root.parent)), self._of_ours(file.read_bytes())
        yield "Prefect's log", self.server.log.read_bytes()
        yield from self.pages.items()
        yield from self._of_prefect.items()

    def ask_prefect(self) -> None:
        """What its API tells of us, while it runs."""
        from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

        resource = f"retrain-daemon.model.{self.model}"
        auth = {PREFECT_API_AUTH_STRING: self.secrets["Prefect's auth string"]}
        with temporary_settings(auth), PrefectApi(self.server.url) as api:
            told = {
                "deployment": api.deployment(full_deployment_name(self.model)),
                "events": api.events({"resource": {"id": [resource]}}),
                "variables": api.variables(""),
                "artifacts": list(api.pages("/artifacts/filter", {})),
                "logs": list(api.pages("/logs/filter", {})),
            }
        self._of_prefect = {f"Prefect's {name}": json.dumps(one).encode() for name, one in told.items()}

    @staticmethod
    def _of_ours(data: bytes) -> bytes:
        """Without what the library tells that Prefect sends its own auth string by, where all is debugged."""
        if b"websockets.client" not in data:
            return data
        return b"".join(line for line in data.splitlines(True) if b"| websockets.client -" not in line)

    def _record(self, number: int) -> bytes:
        record = {
            "model": self.model,
            "model_version": "1",
            "id": f"r{number}",
            "event_time": (START + timedelta(seconds=number)).isoformat(),
            "features": {"x": number * 7 % 40 + (100 if number >= 80 else 0)},
            "prediction": number % 2 if number < 80 else 0,
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
def scene(secured: Any, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    made = Scene(secured, tmp_path_factory.mktemp("hushed"))
    with made.server:
        made.play()
        made.ask_prefect()
    return made


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
        "Prefect's events": (b"retrain-daemon.retrain.requested", b"retrain-daemon.challenger.promoted"),
        "Prefect's variables": (scene.model.encode(),),
        "Prefect's logs": (b"flow_run_id",),
        "/status": (b"promoted",),
        "/metrics": (b"retrain_daemon_",),
    }
    for place, words in telling.items():
        for word in words:
            assert word in written[place], (place, word)
    assert any(place.endswith(".html") for place in written)
    for word in (b"Traceback", b"was answered with 401", b"SaslAuthenticationFailed"):
        assert any(place.endswith(".out") and word in data for place, data in written.items()), word
    assert any(scene.model.encode() in data for place, data in written.items() if "prefect.db" in place)
