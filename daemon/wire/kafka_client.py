"""Connecting to Kafka: with which options, how long, and why it did not work."""

import logging
import os
import re
import shlex
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import structlog
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors
from kafka.admin import OffsetSpec
from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport

from daemon.errors import RetrainDaemonError, UsageError
from monitors.records import Partition
from monitors.settings import KafkaSettings

log = structlog.get_logger()

REQUEST_SECONDS = 10.0
CLOSE_SECONDS = 5.0
# Never larger than a broker with default settings takes, headers included.
MAX_REQUEST_BYTES = 1_000_000
# Where a process whose settings came from elsewhere, as a worker's do, finds who it is.
USERNAME_VARIABLE = "RETRAIN_DAEMON_KAFKA__SASL_USERNAME"
PASSWORD_VARIABLE = "RETRAIN_DAEMON_KAFKA__SASL_PASSWORD"

Operation = Literal["Read", "Write", "Describe"]

# What kafka-python logs while connecting, what it means and what to do. Those marked decisive will not
# go away by trying again. The order matters: the first that was said is the reason.
_REASONS: tuple[tuple[str, bool, str], ...] = (
    ("SaslAuthenticationFailed", True, "check kafka.sasl_username and the password"),
    ("UnsupportedSaslMechanism", True, "set kafka.sasl_mechanism to one that the broker offers"),
    ("IllegalSaslState", True, "this listener wants no SASL: check kafka.security_protocol and the port"),
    (
        "certificate is not valid for",
        True,
        "name the broker in kafka.bootstrap_servers as its certificate does, or have it name this host",
    ),
    ("certificate has expired", True, "the broker needs a new one"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        True,
        "set kafka.ssl_cafile to the CA that signed the broker's certificate",
    ),
    *(
        (
            alert,
            True,
            "the broker wants a client certificate that it knows: set kafka.ssl_certfile and "
            "kafka.ssl_keyfile to one of a CA in its truststore",
        )
        # Which of them is said is up to the TLS version and to the JVM.
        for alert in ("CERTIFICATE_REQUIRED", "BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN", "UNKNOWN_CA")
    ),
    ("[SSL", False, "the port may not speak TLS: check kafka.security_protocol"),
    ("Invalid frame length", False, "the port may want TLS: check kafka.security_protocol"),
    ("DNS", False, "check the host names in kafka.bootstrap_servers"),
    ("ECONNREFUSED", False, "nobody listens there: check kafka.bootstrap_servers and that the broker runs"),
    (
        "socket disconnected",
        False,
        "the broker hung up: check kafka.sasl_username and the password if it wants them, "
        "kafka.security_protocol, kafka.sasl_mechanism and the port",
    ),
    (
        "timed out",
        False,
        "the broker does not answer: check the address, the firewall and that the broker runs",
    ),
)
_NO_REASON = "check kafka.bootstrap_servers, kafka.security_protocol and that the broker runs"


class KafkaUnreachable(RetrainDaemonError):
    """Kafka did not answer, or not as it should; trying again later may help."""


class KafkaRefused(UsageError):
    """Kafka answered and said no: what we were told to use does not work there."""


class UnknownTopic(UsageError):
    """A topic that is to be read or written does not exist."""


class _Reason(logging.Handler):
    """Listens to kafka-python while it connects, since its errors only ever say that it did not."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        self.settled = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        self.said.append(said)
        if any(decisive and sign in said for sign, decisive, _ in _REASONS):
            self.settled.set()

    def explain(self) -> tuple[str, str]:
        """The most telling thing said, and what to do about it."""
        for sign, _, remedy in _REASONS:
            for said in self.said:
                if sign in said:
                    return _cause_of(said), remedy
        return (_cause_of(self.said[-1]) if self.said else "no answer"), _NO_REASON


# What a log line says about the connection, in front of the cause and after it.
_AROUND = re.compile(
    r"^.*?(?:Connection lost: |Connection failed: |SaslHandshake failed: |Bootstrap \w+ to \S+ failed: "
    r"|Abort \((?=.*\)$))"
    r"| \(backoff [^)]*\)$"
)


def _cause_of(said: str) -> str:
    cause = _AROUND.sub("", said)
    return cause.removesuffix(")") if "Abort (" in said else cause


# One at a time: what kafka-python says while connecting does not tell which client it is about.
_connecting = threading.Lock()


def connect(settings: KafkaSettings, client: Callable[..., Any], **options: Any) -> Any:
    """
    Return a connected kafka-python client, or raise `KafkaUnreachable` with the true reason.

    kafka-python waits without end for a TLS handshake with something that does not speak TLS, so it
    connects on a thread of its own, which is left behind if it does not come back.
    """
    milliseconds, told = int(settings.connect_timeout_seconds * 1000), client_options(settings)
    made: list[Any] = []
    failed: list[Exception] = []
    opened: list[Any] = []
    library = client.DEFAULT_CONFIG["kafka_client"]  # type: ignore[attr-defined]

    def open_client(**config: Any) -> Any:
        opened.append(library(**config))
        return opened[-1]

    def build() -> None:
        try:
            made.append(
                client(
                    **told,
                    bootstrap_timeout_ms=milliseconds,
                    kafka_client=open_client,
                    **options,
                )
            )
        except Exception as error:  # noqa: BLE001 - carried over to the caller's thread
            failed.append(error)
        finally:
            reason.settled.set()

    with _connecting, _listening() as reason:
        thread = threading.Thread(target=build, name="kafka-connect", daemon=True)
        thread.start()
        reason.settled.wait(settings.connect_timeout_seconds + 1.0)
        if not made and not failed:
            thread.join(0.05)  # it may have ended well just as somebody complained
    if made:
        return made[0]
    for half_open in opened:
        # A constructor that fails leaves its threads running; one that hangs may hang in close() too.
        threading.Thread(target=half_open.close, name="kafka-close", daemon=True).start()
    raise _unconnected(settings, reason, failed[0] if failed else None)


def _unconnected(
    settings: KafkaSettings, reason: _Reason, failure: Exception | None
) -> KafkaUnreachable | KafkaRefused:
    what = f"cannot connect to Kafka at {settings.bootstrap_servers} ({settings.security_protocol})"
    if failure is not None and not isinstance(failure, kafka_errors.KafkaTimeoutError):
        error: KafkaUnreachable | KafkaRefused = KafkaRefused(
            f"{what}: {_short(failure)}; check the settings of [kafka]"
        )
    else:
        cause, remedy = reason.explain()
        error = KafkaUnreachable(f"{what}: {cause}; {remedy}")
    error.__cause__ = failure
    return error


@contextmanager
def _listening() -> Iterator[_Reason]:
    reason, logger = _Reason(), logging.getLogger("kafka")
    level = logger.level
    if logger.getEffectiveLevel() > logging.WARNING:
        logger.setLevel(logging.WARNING)
    logger.addHandler(reason)
    try:
        yield reason
    finally:
        logger.removeHandler(reason)
        logger.setLevel(level)


def _hear_to_the_end(transport: Any) -> None:
    """
    Have kafka-python take in what came with the end of a connection, before it gives the connection up.

    It would drop that, and a broker that refuses somebody says why and hangs up in one breath.
    """
    receive = transport._sock_recv

    def receive_whole(self: Any) -> tuple[bytes, Exception | None]:
        data, error = receive(self)
        return (data, None) if data else (data, error)

    transport._sock_recv = receive_whole


_hear_to_the_end(KafkaTCPTransport)
_hear_to_the_end(KafkaSSLTransport)


class _Discretion(logging.Filter):
    """Takes passwords and the content of records out of kafka-python's debug log, whoever listens to it."""

    def filter(self, record: logging.LogRecord) -> bool:
        told = record.args
        if isinstance(told, Mapping):
            record.args = {name: "***" if "password" in name and told[name] else told[name] for name in told}
        elif isinstance(told, tuple):
            record.args = tuple(f"<{type(one).__name__}>" if _has_content(one) else one for one in told)
        return True


def _has_content(told: object) -> bool:
    """Whether this is bytes, a collection that may hold some, or a message to or from the broker."""
    return isinstance(told, bytes | bytearray | memoryview | list | dict) or hasattr(told, "API_KEY")


for _name in ("admin.client", "net.connection", "producer.kafka", "producer.sender", "protocol.parser"):
    logging.getLogger(f"kafka.{_name}").addFilter(_Discretion())


def client_options(settings: KafkaSettings) -> dict[str, Any]:
    """What every kafka-python client is told: where, who and how safely."""
    _check_certificates(settings)
    options: dict[str, Any] = {
        "bootstrap_servers": [server.strip() for server in settings.bootstrap_servers.split(",")],
        "client_id": settings.client_id,
        "security_protocol": settings.security_protocol,
        "ssl_cafile": settings.ssl_cafile or None,
        "ssl_certfile": settings.ssl_certfile or None,
        "ssl_keyfile": settings.ssl_keyfile or None,
        "request_timeout_ms": int(REQUEST_SECONDS * 1000),
        # kafka-python doubles the wait to half a minute, long after a broker may be back.
        "reconnect_backoff_max_ms": 2_000,
    }
    if settings.sasl_mechanism:
        options |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": _username(settings),
            "sasl_plain_password": _password(settings),
        }
    return options


def _username(settings: KafkaSettings) -> str:
    """A worker, whose settings hold no password, may come as somebody else than the daemon."""
    own = "" if settings.sasl_password else os.environ.get(USERNAME_VARIABLE, "")
    return own or settings.sasl_username


def _password(settings: KafkaSettings) -> str:
    """
    The password, which a worker's settings never hold.

    A file is read each time, so that a new password needs no restart of those who connect anew.
    """
    file = settings.sasl_password_file
    if settings.sasl_password and not file:
        return settings.sasl_password
    if password := os.environ.get(PASSWORD_VARIABLE):
        return password
    if not file:
        raise KafkaRefused(
            f"no password for {_username(settings)!r} of Kafka at {settings.bootstrap_servers}: set "
            f"{PASSWORD_VARIABLE} in the environment of this process, or kafka.sasl_password_file"
        )
    try:
        return Path(file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise KafkaRefused(
            f"kafka.sasl_password_file: cannot read {file}: {why}; name a readable file that holds the "
            f"password, or set {PASSWORD_VARIABLE}"
        ) from error


def _check_certificates(settings: KafkaSettings) -> None:
    """Read the PEM files once: kafka-python tries without end, and without a word, where it can't."""
    if settings.security_protocol not in ("SSL", "SASL_SSL"):
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with _readable_pem("ssl_cafile", settings.ssl_cafile):
        if settings.ssl_cafile:
            context.load_verify_locations(settings.ssl_cafile)
    with _readable_pem("ssl_certfile and ssl_keyfile", settings.ssl_certfile, settings.ssl_keyfile):
        if settings.ssl_certfile:
            # An empty password, lest openssl asks whoever sits at the terminal for one.
            context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile or None, password="")


@contextmanager
def _readable_pem(keys: str, *files: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        named = " and ".join(file for file in files if file)
        raise KafkaRefused(
            f"kafka.{keys}: cannot use {named}: {error}; name readable PEM files, a key without a passphrase"
        ) from error


@contextmanager
def admin(settings: KafkaSettings) -> Iterator[Any]:
    """An admin client, connected and closed again; its errors become ours."""
    client = connect(settings, KafkaAdminClient)
    try:
        with translated(settings):
            yield client
    finally:
        client.close()


@contextmanager
def translated(settings: KafkaSettings) -> Iterator[None]:
    """Turn kafka-python's errors into ours, which say what to do."""
    where = f"Kafka at {settings.bootstrap_servers}"
    try:
        yield
    except kafka_errors.UnsupportedCodecError as error:
        raise KafkaRefused(
            f"{where} holds records in a compression that cannot be read here: {error}; "
            "install retrain-daemon[compression]"
        ) from error
    except kafka_errors.TopicAuthorizationFailedError as error:
        raise forbidden(settings, "Read", "topic", _topics_of(error) or settings.topics) from error
    except kafka_errors.GroupAuthorizationFailedError as error:
        raise forbidden(settings, "Read", "group", (settings.group,)) from error
    except kafka_errors.InconsistentGroupProtocolError as error:
        raise KafkaRefused(
            f"{where} has members in group {settings.group!r} that share in another way; stop them, and give "
            "all members the same kafka.sharing, or this one another kafka.group"
        ) from error
    except kafka_errors.ClusterAuthorizationFailedError as error:
        raise KafkaRefused(
            f"{where} does not allow this to {_principal(settings)}: {_short(error)}; grant it the operation "
            "on the cluster"
        ) from error
    except kafka_errors.KafkaError as error:
        raise KafkaUnreachable(
            f"{where} did not do as asked: {_short(error)}; check that the broker is well, then try again"
        ) from error


def forbidden(
    settings: KafkaSettings, operation: Operation, kind: Literal["topic", "group"], names: Sequence[str]
) -> KafkaRefused:
    """The error that says which permission is missing, and the command that grants it."""
    who, servers = _principal(settings), settings.bootstrap_servers
    told = ", ".join(repr(name) for name in names)
    resources = " ".join(f"--{kind} {shlex.quote(name)}" for name in names)
    return KafkaRefused(
        f"Kafka at {servers} does not allow {operation} on {kind} {told} to {who}; grant it: kafka-acls.sh "
        f"--bootstrap-server {servers} --add --allow-principal {shlex.quote(who)} "
        f"--operation {operation} {resources}"
    )


def _principal(settings: KafkaSettings) -> str:
    """What an ACL calls us."""
    if settings.security_protocol.startswith("SASL"):
        return f"User:{_username(settings)}"
    return "User:NAME-IN-kafka.ssl_certfile" if settings.ssl_certfile else "User:ANONYMOUS"


def _topics_of(error: Exception) -> tuple[str, ...]:
    """The topics that an error of kafka-python is about: a set of names, or one."""
    said = error.args[0] if error.args else ()
    return (said,) if isinstance(said, str) else tuple(sorted(map(str, said)))


def _short(error: Exception) -> str:
    """The error's name and the start of what it says: kafka-python quotes whole requests."""
    return f"{type(error).__name__}: {str(error)[:300]}"


def make_producer(settings: KafkaSettings, **options: Any) -> Any:
    """A kafka-python producer that stores each record on every replica, once, before it is content."""
    defaults: dict[str, Any] = {
        "metrics_enabled": False,
        "acks": "all",
        "allow_auto_create_topics": False,
        "linger_ms": 5,
        "max_request_size": MAX_REQUEST_BYTES,
        "max_block_ms": int(REQUEST_SECONDS * 1000),
        "delivery_timeout_ms": 30_000,
    }
    return connect(settings, KafkaProducer, **(defaults | options))


def make_consumer(settings: KafkaSettings, **options: Any) -> Any:
    """
    A kafka-python consumer that does nothing behind our back.

    Bytes stay bytes: a deserialiser that raises makes kafka-python's poll spin without end. Offsets
    are never reset or committed on its own account. Aborted transactions are not to be seen.
    """
    defaults: dict[str, Any] = {
        "metrics_enabled": False,
        "enable_auto_commit": False,
        "auto_offset_reset": "none",
        "isolation_level": "read_committed",
        "allow_auto_create_topics": False,
        "fetch_max_bytes": 16 * 1024 * 1024,
        "metadata_max_age_ms": 10_000,
    }
    return connect(settings, KafkaConsumer, **(defaults | options))


def describe(
    settings: KafkaSettings, client: Any, topics: tuple[str, ...], needs: Operation = "Read"
) -> tuple[Partition, ...]:
    """The partitions of these topics; `UnknownTopic` names the ones that are not there."""
    found = {topic["name"]: topic for topic in client.describe_topics(list(topics))}
    _require(settings, [found[name] for name in topics if name in found], needs)
    missing = [name for name in topics if name not in found or found[name]["error_code"] == 3]
    if missing:
        names = ", ".join(repr(name) for name in missing)
        raise UnknownTopic(
            f"Kafka at {settings.bootstrap_servers} has no topic {names}; "
            "correct kafka.topic and kafka.labels_topic, or create it"
        )
    return tuple(
        sorted(
            Partition(name, partition["partition_index"])
            for name in topics
            for partition in found[name]["partitions"]
        )
    )


def _require(settings: KafkaSettings, found: Sequence[Mapping[str, Any]], needs: Operation) -> None:
    """Raise where one of these descriptions of topics says that we may not do what we need to."""
    lacking = [
        topic["name"]
        for topic in found
        if topic["error_code"] == 29 or (topic["error_code"] == 0 and not _may(topic, needs))
    ]
    if lacking:
        raise forbidden(settings, needs, "topic", lacking)


def _may(topic: Mapping[str, Any], needs: Operation) -> bool:
    """Whoever can describe a topic is told so; a broker that doesn't say that says nothing at all."""
    allowed = topic.get("authorized_operations") or ()
    return "DESCRIBE" not in allowed or needs.upper() in allowed


def bounds(client: Any, partitions: tuple[Partition, ...]) -> dict[Partition, tuple[int, int]]:
    """The first offset left and the next to be written, of each partition."""
    wanted = {TopicPartition(one.topic, one.index): one for one in partitions}
    milliseconds = int(REQUEST_SECONDS * 1000)
    first = client.list_partition_offsets(dict.fromkeys(wanted, OffsetSpec.EARLIEST), timeout_ms=milliseconds)
    end = client.list_partition_offsets(dict.fromkeys(wanted, OffsetSpec.LATEST), timeout_ms=milliseconds)
    return {ours: (first[theirs].offset, end[theirs].offset) for theirs, ours in wanted.items()}


def log_bounds(
    settings: KafkaSettings, topic: str, needs: Operation = "Read"
) -> dict[Partition, tuple[int, int]]:
    """The first offset left and the next to be written, of each partition of the topic."""
    with admin(settings) as client:
        return bounds(client, describe(settings, client, (topic,), needs))


def bounds_between(
    settings: KafkaSettings, topic: str, since: datetime | None, until: datetime | None
) -> dict[Partition, tuple[int, int]]:
    """
    The offsets whose Kafka timestamps lie in `since <= timestamp < until`; None: from, or to, where it ends.

    Kafka finds the first record that is not older: timestamps that fall within a partition are its affair.
    """
    with admin(settings) as client:
        found = bounds(client, describe(settings, client, (topic,), "Read"))
        first = _offsets_at(client, found, since)
        end = _offsets_at(client, found, until)
    return {one: (first.get(one, whole[0]), end.get(one, whole[1])) for one, whole in found.items()}


def _offsets_at(
    client: Any, found: Mapping[Partition, tuple[int, int]], moment: datetime | None
) -> dict[Partition, int]:
    if moment is None or not found:
        return {}
    wanted = {TopicPartition(one.topic, one.index): one for one in found}
    at = dict.fromkeys(wanted, round(moment.timestamp() * 1000))
    listed = client.list_partition_offsets(at, timeout_ms=int(REQUEST_SECONDS * 1000))
    # Kafka says -1 where every record is older.
    return {
        ours: listed[theirs].offset if listed[theirs].offset >= 0 else found[ours][1]
        for theirs, ours in wanted.items()
    }


def ensure_topics(
    settings: KafkaSettings,
    topics: Mapping[str, int],
    configs: Mapping[str, str] | None = None,
    needs: Operation = "Describe",
) -> tuple[str, ...]:
    """Create those of these topics (name to partitions) that are not there; return their names."""
    with admin(settings) as client:
        found = client.describe_topics(list(topics))
        _require(settings, found, needs)
        there = {topic["name"] for topic in found if topic["error_code"] == 0}
        missing = {name: count for name, count in topics.items() if name not in there}
        for name, count in missing.items():
            _create(settings, client, name, count, dict(configs or {}))
    return tuple(missing)


def _create(
    settings: KafkaSettings, client: Any, name: str, partitions: int, configs: dict[str, str]
) -> None:
    wanted = {name: {"num_partitions": partitions, "configs": configs}}
    try:
        client.create_topics(wanted, timeout_ms=int(REQUEST_SECONDS * 1000), wait_for_metadata=True)
    except kafka_errors.TopicAlreadyExistsError:
        return  # somebody else was faster
    except (
        kafka_errors.TopicAuthorizationFailedError,
        kafka_errors.ClusterAuthorizationFailedError,
    ) as error:
        raise KafkaRefused(
            f"topic {name!r} is not there and Kafka at {settings.bootstrap_servers} does not let us create "
            f"it; have it created: kafka-topics.sh --bootstrap-server {settings.bootstrap_servers} --create "
            f"--topic {name}"
        ) from error
    log.info("topic_created", topic=name, partitions=partitions)
