"""Why a connection failed, said within the time it was given."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.wire.kafka import KafkaRefused, KafkaSource, KafkaUnreachable, log_bounds
from daemon.wire.local_kafka import LocalKafka, free_port, java_and_maven
from monitors.settings import KafkaSettings

pytestmark = pytest.mark.kafka


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalKafka]:
    """A real broker that wants a name and a password."""
    if not java_and_maven():
        pytest.skip("needs Java and Maven")
    login = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    overrides = {
        "listeners": "SASL_PLAINTEXT://{client},CONTROLLER://{controller}",
        "advertised.listeners": "SASL_PLAINTEXT://{client},CONTROLLER://{controller}",
        "listener.security.protocol.map": "SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "SASL_PLAINTEXT",
        "sasl.enabled.mechanisms": "PLAIN",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "listener.name.sasl_plaintext.plain.sasl.jaas.config": (
            f'{login} username="broker" password="b" user_broker="b" user_daemon="right";'
        ),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:broker;User:ANONYMOUS",
        "allow.everyone.if.no.acl.found": "false",
    }
    with LocalKafka(tmp_path_factory.mktemp("guarded"), overrides=overrides) as broker:
        yield broker


def knock(**fields: object) -> tuple[str, float]:
    """Try to connect; return what the error says and how long it took."""
    settings = KafkaSettings(**({"connect_timeout_seconds": 3.0} | fields))  # type: ignore[arg-type]
    began = time.monotonic()
    with pytest.raises((KafkaUnreachable, KafkaRefused)) as caught:
        log_bounds(settings, "predictions")
    return str(caught.value), time.monotonic() - began


def test_refused() -> None:
    said, took = knock(bootstrap_servers=f"127.0.0.1:{free_port()}")
    assert "ECONNREFUSED" in said
    assert "check kafka.bootstrap_servers" in said
    assert took < 5


def test_an_unknown_host() -> None:
    said, took = knock(bootstrap_servers="no-such-host.invalid:9092")
    assert "DNS" in said
    assert "host names in kafka.bootstrap_servers" in said
    assert took < 5


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL"])
def test_a_peer_that_never_answers_is_given_up(protocol: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        said, took = knock(
            bootstrap_servers=f"127.0.0.1:{silent.getsockname()[1]}", security_protocol=protocol
        )
    assert protocol in said
    assert took < 5


def test_a_missing_ca_file() -> None:
    said, _ = knock(
        bootstrap_servers=f"127.0.0.1:{free_port()}", security_protocol="SSL", ssl_cafile="/no/such/ca"
    )
    assert "ca" in said.lower()


def test_failed_connections_leave_no_threads_behind() -> None:
    before = {thread.name for thread in threading.enumerate()}
    knock(bootstrap_servers=f"127.0.0.1:{free_port()}", connect_timeout_seconds=1.0)
    deadline = time.monotonic() + 60
    while {thread.name for thread in threading.enumerate()} - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert {thread.name for thread in threading.enumerate()} <= before


def sasl(broker: LocalKafka, **fields: object) -> dict[str, object]:
    return {
        "bootstrap_servers": broker.bootstrap_servers,
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "PLAIN",
        "sasl_username": "daemon",
        "connect_timeout_seconds": 10.0,
    } | fields


def test_a_wrong_password_is_said_to_be_one(guarded: LocalKafka) -> None:
    said, took = knock(**sasl(guarded, sasl_password="wrong"))
    assert "Authentication failed: Invalid username or password" in said
    assert "check kafka.sasl_username and the password" in said
    assert "wrong" not in said
    assert took < 12


def test_the_password_may_be_in_a_file(guarded: LocalKafka, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("right\n")
    said, _ = knock(**sasl(guarded, sasl_password_file=str(secret)))
    # In it is; without a permission to see topics, though.
    assert "--add --allow-principal User:daemon --operation Read --topic predictions" in said


def test_what_is_forbidden_is_said_to_be(guarded: LocalKafka) -> None:
    with pytest.raises(KafkaRefused, match="does not allow Read on topic 'predictions' to User:daemon"):
        KafkaSource(KafkaSettings(**sasl(guarded, sasl_password="right")))  # type: ignore[arg-type]


def test_an_unreadable_password_file_is_named() -> None:
    said, _ = knock(sasl_mechanism="PLAIN", sasl_password_file="/no/such/secret")
    assert "kafka.sasl_password_file" in said
