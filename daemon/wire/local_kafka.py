"""A real Apache Kafka on this machine: fetched once by Maven, started in seconds, gone when we are."""

import atexit
import base64
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from daemon.errors import RetrainDaemonError

KAFKA_VERSION = "4.1.1"
FETCH_SECONDS = 300.0
FORMAT_SECONDS = 60.0
START_SECONDS = 60.0
STOP_SECONDS = 30.0
START_ATTEMPTS = 3
TAIL_BYTES = 2_000
JVM_OPTIONS = ("-Xms128m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")

POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>local</groupId><artifactId>kafka-jars</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{KAFKA_VERSION}</version>
    </dependency>
    <!-- Kafka brings the logging interface, but nothing that writes. -->
    <dependency>
      <groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId>
      <version>2.24.3</version>
    </dependency>
    <dependency>
      <groupId>org.apache.logging.log4j</groupId><artifactId>log4j-core</artifactId>
      <version>2.24.3</version>
    </dependency>
  </dependencies>
</project>
"""

# One broker that is its own controller, sized for a laptop. Retention goes by the timestamp of a
# record: without log.retention.ms=-1 a replay of old records is deleted minutes after it was written.
DEFAULTS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "inter.broker.listener.name": "PLAINTEXT",
    "controller.listener.names": "CONTROLLER",
    "auto.create.topics.enable": "false",
    "num.partitions": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    # A broker for demos and tests may forget a killed member sooner than in six seconds.
    "group.min.session.timeout.ms": "1000",
    "num.network.threads": "1",
    "num.io.threads": "2",
    "log.cleaner.dedupe.buffer.size": "16777216",
    "log.retention.ms": "-1",
}


class LocalKafkaError(RetrainDaemonError):
    """Kafka could not be fetched or started here."""


def java_and_maven() -> bool:
    """Whether this machine can fetch and run Apache Kafka."""
    return shutil.which("java") is not None and shutil.which("mvn") is not None


def default_cache() -> Path:
    """Where the jars are kept between runs; a private temporary folder where there is no home."""
    named = os.environ.get("XDG_CACHE_HOME")
    home = os.environ.get("HOME")
    if named:
        base = Path(named)
    elif home:
        base = Path(home) / ".cache"
    else:
        base = Path(tempfile.gettempdir()) / f"retrain-daemon-cache-{os.getuid()}"
    return base / "retrain-daemon" / f"kafka-{KAFKA_VERSION}"


def fetch_kafka(cache: Path) -> Path:
    """Return the folder of Kafka's jars, fetching them first if this is the first time."""
    jars = cache / "lib"
    if jars.is_dir():
        return jars
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        if not jars.is_dir():  # another process may have fetched them while we waited
            _fetch_into(cache, jars)
    return jars


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch_into(cache: Path, jars: Path) -> None:
    half = cache / "lib.part"
    shutil.rmtree(half, ignore_errors=True)
    (cache / "pom.xml").write_text(POM)
    command = ["mvn", "-q", "-B", "-f", str(cache / "pom.xml"), "dependency:copy-dependencies"]
    command += ["-DincludeScope=runtime", f"-DoutputDirectory={half}"]
    _run(
        command,
        FETCH_SECONDS,
        f"Maven could not fetch Apache Kafka {KAFKA_VERSION} into {cache}",
        "check that Maven reaches its repository, or do without Java: the development broker then serves",
    )
    half.rename(jars)  # half a folder never looks like a whole one


def _run(command: Sequence[str], seconds: float, failure: str, remedy: str) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, check=False
        )
    except FileNotFoundError as error:
        raise LocalKafkaError(f"{failure}: {command[0]} is not installed; {remedy}") from error
    except subprocess.TimeoutExpired as error:
        raise LocalKafkaError(f"{failure}: not done after {seconds:.0f} s; {remedy}") from error
    if done.returncode:
        said = (done.stdout + done.stderr)[-TAIL_BYTES:].strip()
        raise LocalKafkaError(f"{failure} (exit {done.returncode}); {remedy}. It said:\n{said}")


def _outliving_us_kill(group: int) -> subprocess.Popen[bytes]:
    """Start a shell that kills this process group once our end of its input is gone, however we ended."""
    return subprocess.Popen(
        ["sh", "-c", f"read -r _; kill -s KILL -- -{group}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class LocalKafka:
    """
    One Apache Kafka broker with its own ports and data folder.

    `overrides` are lines of server.properties that win over ours; `format_arguments` go to Kafka's
    storage tool, which is where SCRAM users are made. Stopped or killed, it can be started again on
    the same ports and data. However this process ends, Kafka ends with it.
    """

    kind = "real Apache Kafka"

    def __init__(
        self,
        folder: Path,
        *,
        overrides: Mapping[str, str] | None = None,
        format_arguments: Sequence[str] = (),
        cache: Path | None = None,
    ) -> None:
        self.folder = folder.absolute()
        self._overrides = dict(overrides or {})
        self._format_arguments = tuple(format_arguments)
        self._cache = cache or default_cache()
        self._ports = (free_port(), free_port())
        self._process: subprocess.Popen[bytes] | None = None
        self._heir: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def log_file(self) -> Path:
        return self.folder / "kafka.log"

    @property
    def data(self) -> Path:
        """Where the partitions are kept, each in a folder `TOPIC-INDEX`."""
        return self.folder / "data"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise LocalKafkaError(f"Kafka in {self.folder} is not running; call start() first")
        return self._process.pid

    def start(self) -> Self:
        """Fetch, format and start what is not yet, and return when Kafka answers."""
        if self._process is not None:
            return self
        if not java_and_maven():
            raise LocalKafkaError(
                "Apache Kafka needs `java` (17 or later) and `mvn` on the PATH; install both, "
                "or use the development broker (python -m daemon.dev_broker)"
            )
        jars = fetch_kafka(self._cache)
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = not (self.data / "meta.properties").exists()
        for attempt in range(START_ATTEMPTS):
            try:
                self._launch(jars)
                return self
            except LocalKafkaError:
                # Between choosing a free port and Kafka taking it, somebody else may have.
                if not fresh or attempt + 1 == START_ATTEMPTS or "Address already in use" not in self._tail():
                    raise
                self._ports = (free_port(), free_port())
                shutil.rmtree(self.data, ignore_errors=True)
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """Ask Kafka to close its log properly; kill it if it does not within half a minute."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End Kafka as a power cut would."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start on the same ports and data."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _launch(self, jars: Path) -> None:
        properties = self._write_properties()
        java = ["java", *JVM_OPTIONS, "-cp", f"{jars}/*"]
        if not (self.data / "meta.properties").exists():
            self._format(java, properties)
        with self.log_file.open("ab") as log:
            # A session of its own: Ctrl-C is for us, and we stop Kafka when we are done with it.
            self._process = subprocess.Popen(
                [*java, "kafka.Kafka", str(properties)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        self._heir = _outliving_us_kill(self._process.pid)
        atexit.register(self.kill)
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.kill()
            raise

    def _write_properties(self) -> Path:
        client, controller = (f"127.0.0.1:{port}" for port in self._ports)
        lines = DEFAULTS | {
            "listeners": f"PLAINTEXT://{client},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{client},CONTROLLER://{controller}",
            "controller.quorum.bootstrap.servers": controller,
            "log.dirs": str(self.data),
        }
        values = {"client": client, "controller": controller, "folder": str(self.folder)}
        lines |= {key: value.format_map(values) for key, value in self._overrides.items()}
        path = self.folder / "server.properties"
        path.write_text("".join(f"{key}={value}\n" for key, value in lines.items()))
        return path

    def _format(self, java: Sequence[str], properties: Path) -> None:
        # Kafka's ids are 16 bytes in URL-safe base64; making one here saves starting a JVM for it.
        cluster = "K" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")[1:]
        command = [*java, "kafka.tools.StorageTool", "format", "--standalone", "-t", cluster]
        _run(
            [*command, "-c", str(properties), *self._format_arguments],
            FORMAT_SECONDS,
            f"Kafka could not format its storage in {self.folder}",
            "free the folder or name another",
        )

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None:
                raise LocalKafkaError(
                    f"Kafka ended while starting (exit {self._process.returncode}); its log "
                    f"{self.log_file} ends:\n{self._tail()}"
                )
            if time.monotonic() > deadline:
                raise LocalKafkaError(
                    f"Kafka did not answer on {self.bootstrap_servers} in {START_SECONDS:.0f} s; "
                    f"free memory or processors and retry. Its log {self.log_file} ends:\n"
                    f"{self._tail()}"
                )
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._ports[0]), timeout=1):
                return True
        except OSError:
            return False

    def _tail(self) -> str:
        try:
            return self.log_file.read_bytes()[-TAIL_BYTES:].decode(errors="replace").strip()
        except FileNotFoundError:
            return "(no log was written)"

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        heir, self._heir = self._heir, None
        atexit.unregister(self.kill)
        if heir is not None:
            heir.kill()
            heir.wait()
            if heir.stdin is not None:
                heir.stdin.close()
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
