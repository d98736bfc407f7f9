"""
A secured broker: TLS by a certificate authority of our own, SASL, client certificates and ACLs.
A gate that shuts a server off, and a site: one model's loop in real processes.
"""

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from daemon.config import load
from daemon.ledger import Ledger, RequestRow
from daemon.wire.kafka_client import admin, ensure_topics, make_producer
from daemon.wire.local_kafka import LocalKafka, free_port, java_and_maven
from daemon.wire.local_prefect import LocalPrefectServer, LocalPrefectWorker
from monitors.events import Kind
from monitors.settings import KafkaSettings, RegistrySettings

_LOGIN = "org.apache.kafka.common.security"
# Values that nothing else is called, so that a search for them finds them or nothing.
PASSWORDS = {
    "root": "root-pw",
    "daemon": "s3cr3t'Daemon\\pass",
    "worker": "s3cr3t-Worker-pass",
    "operator": "s3cr3t-Operator-pass",
    "plain": "plain-pw",
}


class Authority:
    """A certificate authority in a folder, by openssl, and the certificates that it signs."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self.certificate = folder / f"{name}.crt"
        self._key = folder / f"{name}.key"
        self._openssl("req", "-x509", *self._new(self._key), "-out", self.certificate, "-subj", f"/CN={name}")

    def issue(self, name: str, alternative: str = "", days: int = 2) -> tuple[Path, Path]:
        """The certificate and the key of one who is called so, as PEM files."""
        key, request, certificate = (self._folder / f"{name}.{kind}" for kind in ("key", "csr", "crt"))
        self._openssl("req", *self._new(key), "-out", request, "-subj", f"/CN={name}")
        extensions = self._folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternative}\n" if alternative else "")
        signing = ("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial", "-days", days)
        self._openssl("x509", "-req", "-in", request, "-out", certificate, *signing, "-extfile", extensions)
        return certificate, key

    @staticmethod
    def _new(key: Path) -> tuple[object, ...]:
        return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key)

    @staticmethod
    def _openssl(*arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class SecuredKafka:
    """
    A real broker where nothing is allowed that was not granted.

    `root` may do everything; `daemon`, `worker` and `operator` come by SCRAM-SHA-512, `plain` by PLAIN, and
    a client certificate opens the listener `ssl_servers`. The certificate names 127.0.0.1, and not localhost.
    """

    kind = LocalKafka.kind

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder, "our-authority")
        self.stranger = Authority(folder, "another-authority")
        certificate, key = self.authority.issue("broker", "IP:127.0.0.1")
        (folder / "broker.pem").write_text(key.read_text() + certificate.read_text())
        self.client_certificate, self.client_key = self.authority.issue("a-client")
        self._ssl_port = free_port()
        self.broker = LocalKafka(
            folder / "kafka",
            overrides=self._overrides(folder),
            format_arguments=[
                argument
                for user in ("daemon", "worker", "operator")
                for argument in ("--add-scram", f"SCRAM-SHA-512=[name={user},password={PASSWORDS[user]}]")
            ],
        )

    def _overrides(self, folder: Path) -> dict[str, str]:
        listeners = f"SASL_SSL://{{client}},SSL://127.0.0.1:{self._ssl_port},CONTROLLER://{{controller}}"
        users = " ".join(f'user_{name}="{PASSWORDS[name]}"' for name in ("root", "plain"))
        return {
            "listeners": listeners,
            "advertised.listeners": listeners,
            "listener.security.protocol.map": "SASL_SSL:SASL_SSL,SSL:SSL,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "SASL_SSL",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512,PLAIN",
            "sasl.mechanism.inter.broker.protocol": "PLAIN",
            "listener.name.sasl_ssl.plain.sasl.jaas.config": (
                f"{_LOGIN}.plain.PlainLoginModule required "
                f'username="root" password="{PASSWORDS["root"]}" {users};'
            ),
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": (
                f"{_LOGIN}.scram.ScramLoginModule required;"
            ),
            "listener.name.ssl.ssl.client.auth": "required",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(folder / "broker.pem"),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.authority.certificate),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:root;User:ANONYMOUS;User:CN=a-client",
            "allow.everyone.if.no.acl.found": "false",
        }

    @property
    def ssl_servers(self) -> str:
        return f"127.0.0.1:{self._ssl_port}"

    def settings(self, user: str = "root", **fields: Any) -> KafkaSettings:
        """How this user comes in."""
        own = {
            "bootstrap_servers": self.broker.bootstrap_servers,
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "PLAIN" if user in ("root", "plain") else "SCRAM-SHA-512",
            "sasl_username": user,
            "sasl_password": PASSWORDS[user],
            "ssl_cafile": str(self.authority.certificate),
            "start": "earliest",
            "session_timeout_seconds": 6.0,
        }
        return KafkaSettings(**(own | fields))

    def name(self, stem: str) -> str:
        return f"{stem}-{uuid.uuid4().hex[:8]}"

    def topic(self, stem: str = "topic") -> str:
        name = self.name(stem)
        ensure_topics(self.settings(), {name: 1})
        return name

    def produce(self, topic: str, values: list[bytes]) -> None:
        producer = make_producer(self.settings())
        for value in values:
            producer.send(topic, value=value, partition=0)
        producer.flush(timeout=30)
        producer.close(timeout=5)

    def grant(self, user: str, operation: str, kind: str, name: str) -> None:
        """Let the user do this with this topic or group."""
        with admin(self.settings()) as client:
            granted = client.create_acls([self._acl(user, operation, kind, name)])
        assert not granted["failed"]

    def revoke(self, user: str, operation: str, kind: str, name: str) -> None:
        from kafka.admin import ACLFilter

        acl = self._acl(user, operation, kind, name)
        pattern = acl.resource_pattern
        chosen = ACLFilter(acl.principal, acl.host, acl.operation, acl.permission_type, pattern)
        with admin(self.settings()) as client:
            ((_, gone, _),) = client.delete_acls([chosen])
        assert gone

    @staticmethod
    def _acl(user: str, operation: str, kind: str, name: str) -> Any:
        from kafka.admin import ACL, ACLOperation, ACLPermissionType, ResourcePattern, ResourceType

        pattern = ResourcePattern(ResourceType[kind.upper()], name)
        return ACL(f"User:{user}", "*", ACLOperation[operation.upper()], ACLPermissionType.ALLOW, pattern)


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    """The secured broker for the session."""
    if not java_and_maven():
        pytest.skip("needs Java and Maven")
    kafka = SecuredKafka(tmp_path_factory.mktemp("secured"))
    with kafka.broker:
        yield kafka


# --- a server that can be out of reach, and a loop that is followed from the log to the acting run ----


class Gate:
    """
    The way to a server: open, shut (connections are refused), or lossy.

    `drop` names what a request may hold so that its answer is lost, once: it reached the server.
    """

    def __init__(self, server_url: str) -> None:
        self._target = (urlsplit(server_url).hostname, urlsplit(server_url).port)
        self.port = free_port()
        self.url = urlsplit(server_url)._replace(netloc=f"127.0.0.1:{self.port}").geturl()
        self._drop = b""
        self._on_drop: Callable[[], None] = lambda: None
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        """From now on nobody gets through, and whoever was in the middle of it is cut off."""
        if self._listener is not None:
            # Closing alone does not wake the thread that waits in `accept`.
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def drop(self, part_of_a_request: bytes, then: Callable[[], None] = lambda: None) -> None:
        """Lose the answer to the next request that holds this; `then` is called as soon as it is there."""
        self._on_drop = then
        self._drop = part_of_a_request

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                server = socket.create_connection(self._target)
            except OSError:
                return
            with server:
                self._open |= {client, server}
                self._forward(client, server)
                self._open -= {client, server}

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        asked = b""
        while True:
            for one in select.select([client, server], [], [])[0]:
                try:
                    data = one.recv(65_536)
                except OSError:
                    data = b""
                if not data:
                    return
                if one is client:
                    # A body may come apart from its headers; what is looked for is short.
                    asked = asked[-200_000:] + data
                elif self._drop and self._drop in asked:
                    self._drop = b""
                    self._on_drop()
                    return
                else:
                    asked = b""
                try:
                    (server if one is client else client).sendall(data)
                except OSError:
                    return


ACTING = '''
import json, os, time
from pathlib import Path

import pandas as pd

FOLDER = Path({folder!r})

def rows(settings, request):
    """Two labelled rows, too few to retrain on; that they were asked for is what it means to act."""
    with (FOLDER / "acted").open("a") as file:
        file.write(json.dumps([request.request if request else None, os.getpid()]) + "\\n")
    while (FOLDER / "wait").exists():
        time.sleep(0.1)
    return pd.DataFrame({{"event_time": ["2026-01-01T00:00:00Z"] * 2, "x": [0.0, 1.0], "label": [0, 1]}})
'''


@pytest.fixture(scope="session")
def registry_database(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """Makes registries that nothing is in, as copies of one: MLflow takes seconds to set up a database."""
    from flows.mlflow_registry import MlflowRegistry

    folder = tmp_path_factory.mktemp("registries")
    first = folder / "mlflow.db"
    assert (
        MlflowRegistry(RegistrySettings(tracking_uri=f"sqlite:///{first}"), "none").champion_version() == ""
    )

    def make() -> str:
        own = folder / uuid.uuid4().hex
        own.mkdir()
        shutil.copy(first, own)
        return f"sqlite:///{own / first.name}"

    return make


@pytest.fixture(scope="session")
def no_evidently(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """
    The environment of a daemon whose Evidently ends where it would begin: its reviews fail at once.

    For tests that don't look at reports and confirmations: to import it takes each daemon seven seconds
    of CPU, in the middle of what is tested, and a daemon that is stopped waits for it.
    """
    folder = tmp_path_factory.mktemp("no-evidently")
    (folder / "evidently.py").write_text("raise SystemExit\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))}


class Site:
    """
    One model from end to end: topics, deployment, a worker, and a daemon that can be started and killed.

    A run acts if it asks for training rows; `acted` are the requests for which that was done.
    """

    def __init__(
        self,
        kafka: Any,
        folder: Path,
        server: LocalPrefectServer,
        environment: Mapping[str, str],
        **prefect: Any,
    ) -> None:
        self.kafka, self.folder, self.server = kafka, folder, server
        self._environment = os.environ | server.environment | dict(environment)
        self.kind = kafka.kind
        self.model = f"site-{uuid.uuid4().hex[:8]}"
        self.topic, self.letters = kafka.topic(), kafka.topic()
        self.settings = kafka.settings(
            topic=self.topic, dead_letter_topic=self.letters, session_timeout_seconds=3.0
        )
        self.pool = f"pool-{self.model}"
        self.prefect = {"api_url": server.url, "start_deadline_seconds": 20.0} | prefect
        self.http_port = free_port()
        self._rows = 0
        self._daemon: subprocess.Popen[bytes] | None = None
        self._worker: LocalPrefectWorker | None = None
        (folder / f"{self._module}.py").write_text(ACTING.format(folder=str(folder)))
        self.config_file = folder / "retrain-daemon.toml"
        self.config_file.write_text(self._configuration())

    @property
    def _module(self) -> str:
        return f"acting_{self.model.replace('-', '_')}"

    @property
    def ledger_file(self) -> Path:
        return self.folder / "ledger.db"

    # --- the parts --------------------------------------------------------------------------------

    def deploy(self) -> None:
        from flows.deploy import deploy

        config = load(self.config_file, {})
        with mock_environment(self.server.environment):
            prefect = msgspec.structs.replace(config.prefect, api_url=self.server.url)
            deploy([config.flow_settings(self.model)], prefect)

    def start_worker(self) -> None:
        folder = self.folder / "worker"
        environment = self.server.environment | {"PYTHONPATH": str(self.folder)}
        self._worker = LocalPrefectWorker(
            folder, pool=self.pool, environment=environment, cwd=self.folder, poll_seconds=1.0
        ).start()

    def start_daemon(self, *before: str, **settings: str) -> "subprocess.Popen[bytes]":
        """Start it, by way of a command `before` it, with settings by the names of the environment."""
        command = [sys.executable, "-P", "-m", "daemon.cli", "start", "--config", str(self.config_file)]
        ours = {f"RETRAIN_DAEMON_{name}": value for name, value in settings.items()}
        self._daemon = subprocess.Popen(
            [*before, *command],
            env=self._environment | ours,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        # Not into a file: what limits the daemon's files is not to limit what it says.
        self._words = threading.Thread(target=self._keep_words, args=(self._daemon.stdout,), daemon=True)
        self._words.start()
        return self._daemon

    def _keep_words(self, said: Any) -> None:
        with said, (self.folder / "daemon.log").open("ab", buffering=0) as log:
            for line in said:
                log.write(line)

    def exit_code(self) -> int:
        """Wait for the daemon to end; all that it said is in its log then."""
        assert self._daemon is not None
        code = self._daemon.wait(180)
        self._words.join(60)
        self._daemon = None
        return code

    def kill_daemon(self) -> None:
        """End it as a power cut would."""
        if self._daemon is not None:
            self._daemon.kill()
            self.exit_code()

    def close(self) -> None:
        self.kill_daemon()
        if self._worker is not None:
            self._worker.stop()

    # --- the log ----------------------------------------------------------------------------------

    def predict(self, windows: int, shift: float = 0.0, broken: bool = False) -> None:
        """So many windows of twenty records, drifted by `shift`, or with text where numbers were."""
        values = []
        for _ in range(windows * 20):
            number, self._rows = self._rows, self._rows + 1
            features = {"x": number * 7 % 50 + shift, "y": number * 3 % 40 + shift}
            body = {
                "model": self.model,
                "model_version": "1",
                "id": f"r{number}",
                "event_time": (_START + timedelta(seconds=number)).isoformat(),
                "features": dict.fromkeys(features, "text") if broken else features,
                "prediction": number % 2,
            }
            values.append(json.dumps(body).encode())
        self.kafka.produce(self.topic, values)

    # --- what came of it --------------------------------------------------------------------------

    def acted(self) -> list[str]:
        """The requests that runs acted on, in order; one that stands there twice was acted on twice."""
        file = self.folder / "acted"
        return [json.loads(line)[0] for line in file.read_text().splitlines()] if file.exists() else []

    def hold_runs(self) -> None:
        """Runs that act wait in the middle of it, until they are let go."""
        (self.folder / "wait").touch()

    def let_runs_go(self) -> None:
        (self.folder / "wait").unlink()

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """The daemon's ledger, to be read."""
        ledger = Ledger(f"sqlite:///{self.ledger_file}")
        yield ledger
        ledger.close()

    def windows(self) -> int:
        with self.ledger() as ledger:
            return ledger.window_count(self.model)

    def requests(self) -> list[RequestRow]:
        with self.ledger() as ledger:
            return ledger.requests(self.model)

    def told(self) -> list[dict[str, Any]]:
        """What the ledger says was to be told: kind, id and the body, as Prefect is to get it."""
        with self.ledger() as ledger:
            return [
                {"kind": row["kind"], "posted": row["posted_at"] is not None}
                | msgspec.json.decode(row["body"])
                for row in ledger.events()
            ]

    def unconfirmed(self) -> list[str]:
        """What was done about requests that no run had claimed in time."""
        kind = str(Kind.RETRAIN_UNCONFIRMED)
        return [one["payload"]["action"] for one in self.told() if one["kind"] == kind]

    def page(self, path: str) -> str:
        """One of the daemon's pages, or nothing while there is none."""
        try:
            with urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=10) as answer:
                return str(answer.read().decode())
        except (URLError, ConnectionError, TimeoutError):
            return ""

    def metric(self, name: str) -> float | None:
        """The sum of a metric's samples; None while the daemon tells none."""
        found = [
            sample.value
            for family in text_string_to_metric_families(self.page("/metrics"))
            for sample in family.samples
            if sample.name == f"retrain_daemon_{name}"
        ]
        return sum(found) if found else None

    def eventually(self, what: Callable[[], Any], seconds: float = 180.0) -> Any:
        """Wait for it; the daemon's last words are the message if it does not come."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, self.last_words()
            time.sleep(0.2)
        return found

    def logged(self, event: str) -> list[dict[str, Any]]:
        """What the daemon logged under this name."""
        lines = (self.folder / "daemon.log").read_text().splitlines()
        said = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [one for one in said if one.get("event") == event]

    def last_words(self) -> str:
        logs = (self.folder / "daemon.log", self.folder / "worker" / "prefect-worker.log", self.server.log)
        return "\n".join(f"{log}\n{log.read_text()[-4_000:]}" for log in logs if log.exists())

    def _configuration(self) -> str:
        prefect = "\n".join(f"{name} = {json.dumps(value)}" for name, value in self.prefect.items())
        return f"""
mode = "retrain"
[kafka]
bootstrap_servers = "{self.settings.bootstrap_servers}"
topic = "{self.topic}"
dead_letter_topic = "{self.letters}"
group = "{self.settings.group}"
start = "earliest"
session_timeout_seconds = {self.settings.session_timeout_seconds}
[prefect]
work_pool = "{self.pool}"
poll_seconds = 0.5
heartbeat_seconds = 1.0
{prefect}
[registry]
tracking_uri = "sqlite:///{self.folder}/mlflow.db"
references_url = "{self.folder}/references"
[ledger]
url = "sqlite:///{self.ledger_file}"
checkpoint_seconds = 0.5
[reports]
folder = "{self.folder}/reports"
[http]
port = {self.http_port}
[log]
format = "json"
[models.{self.model}]
reference_rows = 100
[models.{self.model}.window]
rows = 20
min_rows = 10
[models.{self.model}.policy]
method = "thresholds"
for_windows = 2
keep_firing_windows = 1
backoff_windows = 1
[models.{self.model}.data]
source = "callable"
callable = "{self._module}:rows"
"""


_START = datetime(2026, 1, 1, tzinfo=UTC)


@contextmanager
def mock_environment(environment: Mapping[str, str]) -> Iterator[None]:
    """This process's Prefect settings are those of another server meanwhile."""
    from prefect.context import refresh_global_settings_context

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        refresh_global_settings_context()
        yield
    refresh_global_settings_context()


@pytest.fixture
def gate_to() -> Iterator[Callable[[str], Gate]]:
    """Makes gates to servers; all are shut at the end."""
    made: list[Gate] = []

    def make(server_url: str) -> Gate:
        made.append(Gate(server_url))
        made[-1].open()
        return made[-1]

    yield make
    for gate in made:
        gate.shut()


@pytest.fixture
def site_of(kafka: Any, tmp_path: Path, no_evidently: dict[str, str]) -> Iterator[Callable[..., Site]]:
    """Makes sites; what they started is ended."""
    made: list[Site] = []

    def make(server: LocalPrefectServer, **prefect: Any) -> Site:
        made.append(Site(kafka, tmp_path, server, no_evidently, **prefect))
        return made[-1]

    yield make
    for site in made:
        site.close()
