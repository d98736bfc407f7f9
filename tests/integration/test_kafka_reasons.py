"""Why a connection to a secured broker failed: the true reason, in time, whoever is asked for it."""

import logging
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from daemon import checks
from daemon.app import Daemon
from daemon.cli import main
from daemon.config import Config, load
from daemon.wire.kafka import KafkaRefused, KafkaUnreachable, log_bounds, read_ranges
from monitors.events import OffsetRange
from monitors.settings import KafkaSettings

pytestmark = pytest.mark.kafka

# What must have been said by then, the time to try included.
SAID_SECONDS = 15.0


def knock(settings: KafkaSettings) -> str:
    """Try to come in with the default patience; what the error says, which must not take long."""
    began = time.monotonic()
    with pytest.raises((KafkaUnreachable, KafkaRefused)) as caught:
        log_bounds(settings, "predictions")
    assert time.monotonic() - began < SAID_SECONDS
    return str(caught.value)


@pytest.mark.parametrize("user", ["daemon", "plain"])
def test_a_wrong_password_is_said_to_be_one(secured: Any, user: str) -> None:
    said = knock(secured.settings(user, sasl_password="not-the-password"))
    assert "SaslAuthenticationFailed" in said
    assert "check kafka.sasl_username and the password" in said
    assert "not-the-password" not in said


def test_plain_gets_in_with_the_right_one(secured: Any) -> None:
    # In it is; without a permission, though.
    assert "does not allow Read on topic 'predictions' to User:plain" in knock(secured.settings("plain"))


def test_a_wrong_authority_is_said_to_be_one(secured: Any) -> None:
    for cafile in (str(secured.stranger.certificate), ""):
        said = knock(secured.settings("daemon", ssl_cafile=cafile))
        assert "CERTIFICATE_VERIFY_FAILED" in said
        assert "set kafka.ssl_cafile" in said


def test_a_wrong_host_name_is_said_to_be_one(secured: Any) -> None:
    port = secured.broker.bootstrap_servers.rpartition(":")[2]
    said = knock(secured.settings("daemon", bootstrap_servers=f"localhost:{port}"))
    assert "certificate is not valid for 'localhost'" in said
    assert "name the broker in kafka.bootstrap_servers as its certificate does" in said
    assert "ssl_cafile" not in said


def test_a_mechanism_that_is_not_offered_is_said_to_be_none(secured: Any) -> None:
    said = knock(secured.settings("daemon", sasl_mechanism="SCRAM-SHA-256"))
    assert "UnsupportedSaslMechanism" in said
    assert "set kafka.sasl_mechanism to one that the broker offers" in said


def test_a_listener_that_speaks_tls_is_said_to(secured: Any) -> None:
    said = knock(secured.settings("daemon", security_protocol="SASL_PLAINTEXT", connect_timeout_seconds=3.0))
    assert "the port may want TLS" in said


def test_an_expired_certificate_is_said_to_be_one(secured: Any) -> None:
    certificate, key = secured.authority.issue("expired", "IP:127.0.0.1", days=-1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        threading.Thread(target=shake_hands, args=(listener, context), daemon=True).start()
        said = knock(secured.settings("daemon", bootstrap_servers=f"127.0.0.1:{port}"))
    assert "certificate has expired" in said
    assert said.endswith("; the broker needs a new one")


def shake_hands(listener: socket.socket, context: ssl.SSLContext) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        try:
            context.wrap_socket(connection, server_side=True).close()
        except OSError:
            connection.close()


@pytest.mark.parametrize("user", ["daemon", "plain"])
def test_the_debug_log_of_the_library_does_not_tell_the_password(
    secured: Any, user: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = secured.settings(user)
    with caplog.at_level(logging.DEBUG, "kafka"):
        knock(settings)
    assert "<SaslAuthenticateRequest>" in caplog.text
    assert "Starting KafkaAdminClient with configuration" in caplog.text
    for form in (settings.sasl_password, repr(settings.sasl_password)[1:-1]):
        assert form not in caplog.text


def test_the_debug_log_of_the_library_does_not_tell_what_is_in_records(
    secured: Any, caplog: pytest.LogCaptureFixture
) -> None:
    topic = secured.topic()
    with caplog.at_level(logging.DEBUG, "kafka"):
        secured.produce(topic, [b"hush-hush"])
        (record,) = read_ranges(secured.settings(), [OffsetRange(topic, 0, 0, 1)])
    assert record.value == b"hush-hush"
    assert "<ProduceRequest>" in caplog.text and "<FetchResponse>" in caplog.text
    assert "hush-hush" not in caplog.text


# --- and by every command ------------------------------------------------------------------------


def wrong(secured: Any, what: str) -> tuple[dict[str, str], str]:
    """Settings that are wrong in one way, and what is to be said of it."""
    port = secured.broker.bootstrap_servers.rpartition(":")[2]
    return {
        "password": ({"sasl_password": "not-the-password"}, "check kafka.sasl_username and the password"),
        "authority": ({"ssl_cafile": str(secured.stranger.certificate)}, "set kafka.ssl_cafile"),
        "host name": ({"bootstrap_servers": f"localhost:{port}"}, "as its certificate does"),
    }[what]


@pytest.fixture(params=["password", "authority", "host name"])
def misled(secured: Any, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Config, Path, str]:
    """A configuration with one thing wrong, its file, and what is to be said of it."""
    changes, said = wrong(secured, request.param)
    settings = secured.settings("daemon", **changes)
    names = ("bootstrap_servers", "security_protocol", "sasl_mechanism", "sasl_username", "sasl_password")
    kafka = "".join(f'{name} = "{getattr(settings, name)}"\n' for name in (*names, "ssl_cafile"))
    kafka = kafka.replace("\\", "\\\\")
    file = tmp_path / "retrain-daemon.toml"
    file.write_text(
        f'[kafka]\n{kafka}[prefect]\napi_url = "http://127.0.0.1:9/api"\n[http]\nport = 0\n[models.fraud]\n'
    )
    return load(file, {}), file, said


def test_check_says_it_in_time(misled: tuple[Config, Path, str]) -> None:
    config, _, said = misled
    began = time.monotonic()
    first = next(checks.online(config))
    assert time.monotonic() - began < SAID_SECONDS
    assert (first.subject, first.verdict) == ("kafka", "failed") and said in first.text


def test_start_says_it_in_time(misled: tuple[Config, Path, str]) -> None:
    config, _, said = misled
    began = time.monotonic()
    with pytest.raises((KafkaUnreachable, KafkaRefused)) as caught:
        Daemon(config)
    assert time.monotonic() - began < SAID_SECONDS
    assert said in str(caught.value)


@pytest.mark.parametrize("command", ["check --online", "doctor"])
def test_the_command_line_tells_it_and_no_password(
    misled: tuple[Config, Path, str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, file, said = misled
    capsys.readouterr()
    assert main([*command.split(), "--config", str(file)]) == 1
    told = "".join(capsys.readouterr())
    assert said in told and config.kafka.sasl_password not in told


# --- client certificates -------------------------------------------------------------------------


def certified(secured: Any, certificate: Path | str, key: Path | str) -> KafkaSettings:
    found: KafkaSettings = secured.settings(
        bootstrap_servers=secured.ssl_servers,
        security_protocol="SSL",
        sasl_mechanism="",
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
    )
    return found


def test_a_client_certificate_is_enough(secured: Any) -> None:
    topic = secured.topic()
    settings = certified(secured, secured.client_certificate, secured.client_key)
    assert list(log_bounds(settings, topic).values()) == [(0, 0)]


def test_a_missing_or_unknown_client_certificate_is_said_to_be(secured: Any) -> None:
    strange = secured.stranger.issue("strange-client")
    for certificate, key in (("", ""), strange):
        said = knock(certified(secured, certificate, key))
        assert "the broker wants a client certificate that it knows" in said
        assert "kafka.ssl_certfile" in said


def test_files_that_are_no_key_and_certificate_are_named(secured: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("nothing")
    (_, strange_key) = secured.stranger.issue("other-client")
    for key in (tmp_path / "absent.pem", broken, strange_key):
        said = knock(certified(secured, secured.client_certificate, key))
        assert said.startswith(
            f"kafka.ssl_certfile and ssl_keyfile: cannot use {secured.client_certificate} and {key}"
        )
    assert "kafka.ssl_cafile: cannot use" in knock(secured.settings("daemon", ssl_cafile=str(broken)))
