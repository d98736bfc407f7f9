"""Logs: who sees what, in which form, and what nobody sees."""

import io
import json
import logging
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog

from daemon.config import LogSettings
from daemon.logs import HIDDEN, configure


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def logged(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def json_log(level: Any = "info", secrets: tuple[str, ...] = ()) -> io.StringIO:
    stream = io.StringIO()
    configure(LogSettings(level=level), secrets, stream)
    return stream


def test_elsewhere_than_on_a_terminal_each_event_is_one_json_line() -> None:
    stream = json_log()
    structlog.get_logger().info("window_evaluated", model="fraud", records=3)
    (line,) = logged(stream)
    assert datetime.fromisoformat(line.pop("timestamp")).utcoffset() is not None
    assert line == {"event": "window_evaluated", "level": "info", "model": "fraud", "records": 3}


def test_a_terminal_gets_it_pretty_and_the_setting_overrules() -> None:
    cases: tuple[tuple[Any, io.StringIO, bool], ...] = (
        ("auto", Terminal(), False),
        ("json", Terminal(), True),
        ("pretty", io.StringIO(), False),
    )
    for format_, stream, is_json in cases:
        configure(LogSettings(format=format_), (), stream)
        structlog.get_logger().info("window_evaluated", records=3)
        assert stream.getvalue().startswith("{") == is_json
        assert "window_evaluated" in stream.getvalue()


def test_libraries_log_the_same_way() -> None:
    stream = json_log()
    logging.getLogger("some.library").warning("lost %s", "it")
    (line,) = logged(stream)
    assert (line["event"], line["logger"], line["level"]) == ("lost it", "some.library", "warning")


def test_a_secret_is_hidden_however_python_shows_it() -> None:
    secret = "it's\\pässword"
    stream = json_log("debug", (secret,))
    for shown in (secret, {"password_of": secret}, [secret.encode()], f"{secret!r}"):
        structlog.get_logger().info("tried", what=shown)
    assert [line["what"].count(HIDDEN) for line in logged(stream)] == [1, 1, 1, 1]
    assert "pässword" not in stream.getvalue() and "ssword'" not in stream.getvalue()


def test_a_library_that_tells_auth_strings_is_never_at_debug() -> None:
    stream = json_log("debug")
    logging.getLogger("websockets.client").debug("> Authorization: Basic c2VjcmV0")
    logging.getLogger("kafka").debug("heard")
    assert [line["event"] for line in logged(stream)] == ["heard"]


def test_levels_hold_for_both_and_chatter_is_only_for_debugging() -> None:
    stream = json_log("info")
    structlog.get_logger().debug("unseen")
    logging.getLogger("httpx").info("GET ...")
    assert stream.getvalue() == ""
    stream = json_log("debug")
    structlog.get_logger().debug("seen")
    logging.getLogger("httpx").info("GET ...")
    assert [line["event"] for line in logged(stream)] == ["seen", "GET ..."]


def test_secrets_are_hidden_wherever_they_turn_up() -> None:
    stream = json_log(secrets=("hunter-two", ""))
    structlog.get_logger().info(
        "kafka_connected",
        sasl_password="any",
        url="postgresql://u:pg-pass@h/d",
        error=RuntimeError("refused hunter-two"),
        options={"password": "hunter-two"},
        partitions=[1, 2],
    )
    logging.getLogger("lib").error("hunter-two is wrong for https://a:b-secret@c/")
    try:
        raise ValueError("hunter-two")
    except ValueError:
        structlog.get_logger().exception("cycle_failed")
    said = stream.getvalue()
    for secret in ("hunter-two", "pg-pass", "b-secret", '"any"'):
        assert secret not in said
    assert logged(stream)[0]["sasl_password"] == HIDDEN
    assert logged(stream)[0]["partitions"] == [1, 2]


@pytest.mark.parametrize("format_", ["json", "pretty"])
def test_tracebacks_show_no_local_variables(format_: Any) -> None:
    stream = io.StringIO()
    configure(LogSettings(format=format_), (), stream)
    amount = "feature-value" + "-17"
    try:
        raise ValueError(len(amount))
    except ValueError:
        structlog.get_logger().exception("cycle_failed")
    assert "ValueError" in stream.getvalue()
    assert "feature-value-17" not in stream.getvalue()


def test_what_json_does_not_know_is_logged_all_the_same() -> None:
    stream = json_log()
    structlog.get_logger().info(
        "odd", a=object, b=float("inf"), c="\ud800", d={1: datetime.fromtimestamp(0, UTC)}, e=b"\xff"
    )
    assert len(stream.getvalue().splitlines()) == 1
