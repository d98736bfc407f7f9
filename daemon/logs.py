"""Logs: one line for one event, pretty for people and JSON for machines, without secrets."""

import json
import logging
import re
import sys
from collections.abc import Sequence
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from daemon.config import LogSettings
from monitors.passwords import HIDDEN as HIDDEN
from monitors.passwords import without_passwords

_SECRET_NAME = re.compile(
    r"passw(or)?d|secret|token|api_?key|authorization|credential|webhook_url$", re.IGNORECASE
)
# These say nothing in passing that the daemon doesn't say itself, and say it with every request.
_CHATTY = ("httpx", "httpcore", "kafka", "urllib3", "alembic", "websockets", "asyncio")
# Its debug log has every frame, and one of them is Prefect's auth string.
_INDISCREET = ("websockets",)


def configure(settings: LogSettings, secrets: Sequence[str] = (), stream: TextIO | None = None) -> None:
    """Send structlog's and the libraries' logs to `stream` (stderr), as the settings say."""
    out = stream if stream is not None else sys.stderr
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    pretty = settings.format == "pretty" or (settings.format == "auto" and out.isatty())
    handler = logging.StreamHandler(out)
    handler.setFormatter(_formatter(pretty, out.isatty(), secrets))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING) if level > logging.DEBUG else level)
    for name in _INDISCREET:
        logging.getLogger(name).setLevel(max(level, logging.INFO, logging.getLogger(name).level))
    structlog.configure(
        processors=[*_common(), structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


class Redaction:
    """Hides what is called like a secret, is one of the known secrets, or stands in a URL as one."""

    def __init__(self, secrets: Sequence[str]) -> None:
        # A short secret would blot out half of every line; the longest first, as one may hold another.
        forms = {form for secret in secrets if len(secret) > 3 for form in _forms(secret)}
        self._secrets = sorted(forms, key=len, reverse=True)

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        return {name: self._hidden(name, value) for name, value in event.items()}

    def _hidden(self, name: str, value: object) -> object:
        if name.startswith("_"):
            return value
        if _SECRET_NAME.search(name) and value:
            return HIDDEN
        if isinstance(value, bool | int | float) or value is None:
            return value
        text = value if isinstance(value, str) else repr(value)
        hidden = self._text(text)
        return value if hidden == text else hidden

    def _text(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return without_passwords(text)


def _forms(secret: str) -> tuple[str, ...]:
    """The secret as it may stand in a line: as it is, and as Python shows texts and bytes."""
    return secret, repr(secret)[1:-1], repr(secret.encode())[2:-1]


def _common() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _formatter(pretty: bool, colors: bool, secrets: Sequence[str]) -> logging.Formatter:
    render: Processor
    if pretty:
        # Tracebacks are text by then: structlog's own show local variables, which hold feature values.
        traceback = structlog.dev.plain_traceback
        render = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=traceback)
    else:
        render = structlog.processors.JSONRenderer(serializer=json.dumps)
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*_common(), structlog.stdlib.add_logger_name],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            Redaction(secrets),
            render,
        ],
    )
