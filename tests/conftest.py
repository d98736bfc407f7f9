"""Servers for the whole session, and the count of what really ran against what."""

import contextlib
import itertools
import logging
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
import structlog

from daemon.logs import _CHATTY
from daemon.wire.local_kafka import LocalKafka, free_port, java_and_maven
from daemon.wire.local_prefect import LocalPrefectServer
from daemon.wire.prefect import PrefectApi
from monitors.records import Partition
from monitors.settings import KafkaSettings

if TYPE_CHECKING:
    from daemon.dev_broker import DevBroker

KINDS = ("real Apache Kafka", "development broker")
CHOICE = os.environ.get("RETRAIN_DAEMON_TEST_BROKER", "real" if java_and_maven() else "dev")


class Kafka:
    """A running broker, with names that no other test uses."""

    _numbers = itertools.count(1)

    def __init__(self, broker: "LocalKafka | DevBroker") -> None:
        self.broker = broker
        self.kind = broker.kind
        self.bootstrap_servers = broker.bootstrap_servers
        self._producer: Any = None

    def settings(self, **fields: Any) -> KafkaSettings:
        """Settings that reach this broker, in a group of the test's own."""
        own = {"bootstrap_servers": self.bootstrap_servers, "group": self.name("group"), "start": "earliest"}
        return KafkaSettings(**(own | {"session_timeout_seconds": 6.0} | fields))

    def name(self, stem: str = "test") -> str:
        return f"{stem}-{next(self._numbers)}-{uuid.uuid4().hex[:6]}"

    def topic(self, partitions: int = 1, **configs: str) -> str:
        """A new topic; `retention_ms="1"` is its configuration `retention.ms`."""
        from daemon.wire.kafka_client import ensure_topics

        name = self.name("topic")
        dotted = {key.replace("_", "."): value for key, value in configs.items()}
        ensure_topics(self.settings(), {name: partitions}, dotted)
        return name

    def produce(self, topic: str, values: Sequence[bytes | None], partition: int = 0, **fields: Any) -> None:
        """Write these values in order, and return when they are stored."""
        from daemon.wire.kafka_client import make_producer

        if self._producer is None:
            self._producer = make_producer(self.settings())
        sent = [self._producer.send(topic, value=one, partition=partition, **fields) for one in values]
        self._producer.flush(timeout=30)
        for one in sent:
            one.get(timeout=30)

    def delete_before(self, partition: Partition, offset: int) -> None:
        from kafka import TopicPartition

        from daemon.wire.kafka_client import admin

        with admin(self.settings()) as client:
            client.delete_records({TopicPartition(partition.topic, partition.index): offset})

    def recreate(self, topic: str, partitions: int = 1) -> None:
        from daemon.wire.kafka_client import admin, ensure_topics

        with admin(self.settings()) as client:
            client.delete_topics([topic])
        ensure_topics(self.settings(), {topic: partitions})

    def configure(self, topic: str, configs: Mapping[str, str]) -> None:
        from kafka.admin import ConfigResource, ConfigResourceType

        from daemon.wire.kafka_client import admin

        with admin(self.settings()) as client:
            client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs=dict(configs))])

    def close(self) -> None:
        if self._producer is not None:
            self._producer.close(timeout=5)
        # At the session's end: nobody needs what a peaceful one would write down.
        self.broker.kill()


@pytest.fixture(autouse=True)
def unchanged_logs() -> Iterator[None]:
    """Give the logs back as they were: a command that a test runs configures them for its process."""
    loggers = [logging.getLogger(name) for name in (None, *_CHATTY)]
    levels = [logger.level for logger in loggers]
    handlers = loggers[0].handlers[:]
    yield
    loggers[0].handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def ends() -> Callable[[int], bool]:
    """
    Waits for a process that is no child of ours to end, and says whether it did.

    One that ended is there until it is reaped, by whoever took it over, whenever that is.
    """

    def ended(pid: int) -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        return state == "Z"

    def wait(pid: int, seconds: float = 60.0) -> bool:
        deadline = time.monotonic() + seconds
        while not ended(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        return ended(pid)

    return wait


@pytest.fixture(scope="session")
def real_kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A real Apache Kafka for the session, where Java and Maven are."""
    if not java_and_maven() or CHOICE == "dev":
        pytest.skip("needs Java and Maven (and RETRAIN_DAEMON_TEST_BROKER not set to dev)")
    kafka = Kafka(LocalKafka(tmp_path_factory.mktemp("kafka")).start())
    yield kafka
    kafka.close()


@pytest.fixture(scope="session")
def dev_kafka() -> Iterator[Kafka]:
    """The development broker for the session."""
    from daemon.dev_broker import DevBroker

    kafka = Kafka(DevBroker().start())
    yield kafka
    kafka.close()


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> Kafka:
    """The best broker there is: a real one where Java and Maven are."""
    broker: Kafka = request.getfixturevalue("real_kafka" if CHOICE == "real" else "dev_kafka")
    return broker


# --- a Prefect server, which takes ten seconds to start ---------------------------------------------


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPrefectServer]:
    """The server, with this process's own Prefect settings pointing at it until the session ends."""
    from prefect.context import refresh_global_settings_context

    with pytest.MonkeyPatch.context() as patch:
        server = LocalPrefectServer(tmp_path_factory.mktemp("prefect"))
        for name, value in server.environment.items():
            patch.setenv(name, value)
        # Prefect read the environment when it was imported, which another test may have done long ago.
        refresh_global_settings_context()
        with server:
            yield server
            server.kill()
    refresh_global_settings_context()


@pytest.fixture(scope="session")
def patient_api() -> Callable[..., PrefectApi]:
    """
    Makes connections that ask again for a minute, where the daemon would look again later.

    A server on SQLite undoes a write that met another one, and answers 503 to have it sent again: it
    says nothing of what a test is about, and a busy machine makes it likely.
    """
    return partial(PrefectApi, retries=5)


@pytest.fixture
def prefect_api(
    prefect_server: LocalPrefectServer, patient_api: Callable[..., PrefectApi]
) -> Iterator[PrefectApi]:
    """A connection of the test's own."""
    with patient_api() as api:
        yield api


# --- a Postgres, for ledgers that several members share -----------------------------------------------


def _postgres_binaries() -> Path | None:
    """Where `initdb` and `postgres` are; Debian keeps them out of the search path."""
    found = shutil.which("postgres")
    places = [Path(found).parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((one for one in places if (one / "initdb").exists()), None)


class LocalPostgres:
    """A Postgres on loopback, in a folder of its own, that a test may kill and start again."""

    START_SECONDS = 60.0

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._folder = Path(tempfile.mkdtemp(prefix="retrain-daemon-postgres-"))
        self._owner = self._not_root()
        self.port = free_port()
        self._log = self._folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "LocalPostgres":
        data = self._folder / "data"
        if not data.exists():
            choices = ("--auth=trust", "--username=tester", "--encoding=UTF8", "--locale=C", "--no-sync")
            made = self._run("initdb", "-D", str(data), *choices)
            assert made.wait(self.START_SECONDS) == 0, self._log.read_text()
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self._folder),
            "fsync": "off",  # a killed process loses nothing by it
        }
        chosen = [f"--{name}={value}" for name, value in settings.items()]
        self._process = self._run("postgres", "-D", str(data), "-p", str(self.port), *chosen)
        self._wait()
        return self

    def kill(self) -> None:
        """End it at once, all connections with it, and nothing written down in peace."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(self.START_SECONDS)
            self._process = None

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://tester@127.0.0.1:{self.port}/{database}"

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{uuid.uuid4().hex[:8]}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, statement: str, database: str = "postgres") -> None:
        engine = sa.create_engine(self.url(database), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.execute(sa.text(statement))

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [str(self._binaries / program), *arguments],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
                start_new_session=True,
                **self._owner,
            )

    def _not_root(self) -> dict[str, Any]:
        """Postgres refuses to be run by root: then it is run by the user of Debian's package, or nobody."""
        if os.geteuid() != 0:
            return {}
        users = {user.pw_name: user for user in pwd.getpwall()}
        user = users.get("postgres") or users["nobody"]
        os.chown(self._folder, user.pw_uid, user.pw_gid)
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def _wait(self) -> None:
        deadline = time.monotonic() + self.START_SECONDS
        while True:
            assert self._process is not None and self._process.poll() is None, self._log.read_text()
            with contextlib.suppress(sa.exc.OperationalError):
                self.execute("SELECT 1")
                return
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[LocalPostgres]:
    """A real Postgres for the session, where its programs are."""
    if (binaries := _postgres_binaries()) is None:
        pytest.skip("needs Postgres (Debian: apt-get install postgresql)")
    server = LocalPostgres(binaries)
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def own_postgres() -> Iterator[LocalPostgres]:
    """One that the test may kill."""
    if (binaries := _postgres_binaries()) is None:
        pytest.skip("needs Postgres (Debian: apt-get install postgresql)")
    server = LocalPostgres(binaries)
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture(params=["sqlite", "postgres"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new ledger's URL, on each database that one may be on."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    server: LocalPostgres = request.getfixturevalue("postgres")
    return server.database()


# --- what ran against what ---------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    if CHOICE not in ("real", "dev"):
        raise pytest.UsageError(f"RETRAIN_DAEMON_TEST_BROKER is {CHOICE!r}; it may be `real` or `dev`")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Note which broker the test had in hand."""
    marker = item.get_closest_marker("kafka")
    if marker is not None:
        used = getattr(item, "funcargs", {}).values()
        kinds = {getattr(value, "kind", None) for value in used} & set(KINDS)
        # A test that starts a broker of its own starts a real one, or says so: kafka(broker=...).
        own = marker.kwargs.get("broker", KINDS[0])
        item.user_properties.append(("broker", next(iter(kinds), own)))
    if item.get_closest_marker("prefect") is not None:
        item.user_properties.append(("prefect", "real"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    ran = [
        dict(report.user_properties)
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        if report.when == "call"
    ]
    skipped = [report for report in terminalreporter.stats.get("skipped", ()) if "kafka" in report.keywords]
    counts = [f"{sum(one.get('broker') == kind for one in ran)} on {kind}" for kind in KINDS]
    prefect = sum("prefect" in one for one in ran)
    terminalreporter.write_line(f"Kafka tests: {', '.join(counts)}, {len(skipped)} skipped")
    terminalreporter.write_line(f"Prefect tests: {prefect} on a real Prefect server")
