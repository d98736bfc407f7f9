"""The dead-letter topic: records that could not be read, as they were, with the reason."""

from typing import Any

import msgspec
import structlog
from kafka import errors as kafka_errors

from daemon.wire.kafka_client import (
    CLOSE_SECONDS,
    MAX_REQUEST_BYTES,
    KafkaRefused,
    KafkaUnreachable,
    ensure_topics,
    forbidden,
    make_producer,
)
from monitors.records import InvalidRecord, RawRecord
from monitors.settings import KafkaSettings

log = structlog.get_logger()

PREFIX = "retrain-daemon."
FLUSH_SECONDS = 30.0
# Kept in memory at most before the topic has to have them.
MAX_PENDING_BYTES = 16 * 1024 * 1024
# A letter fits with its key and headers into what one request may carry, and a cut one into any topic.
WHOLE_BYTES = MAX_REQUEST_BYTES - 150_000
KEY_BYTES = 50_000
HEADER_BYTES = 50_000
CUT_BYTES = 1_000


class _Letter(msgspec.Struct):
    """One dead letter on its way: what was read, why it is here, and whether Kafka has it."""

    raw: RawRecord
    error: InvalidRecord
    sent: Any
    limit: int


class KafkaDeadLetters:
    """
    The port `DeadLetters` on a Kafka topic, which is created if it is not there.

    The value is the record's own, cut only where it is larger than Kafka takes; headers
    `retrain-daemon.code`, `.detail`, `.topic`, `.partition`, `.offset`, `.timestamp` and `.truncated`
    say the rest. The Kafka timestamp is the time of writing: the record's own may be what is wrong.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        ensure_topics(settings, {settings.dead_letter_topic: 1}, needs="Write")
        # An idempotent producer of kafka-python takes nothing more once one record was too large for the
        # topic. A letter may be stored twice instead, as it is after a crash; one at a time keeps the order.
        self._producer = make_producer(
            settings, enable_idempotence=False, max_in_flight_requests_per_connection=1
        )
        self._letters: list[_Letter] = []
        self._pending_bytes = 0

    def put(self, raw: RawRecord, error: InvalidRecord) -> None:
        letter = _Letter(raw, error, None, WHOLE_BYTES)
        self._letters.append(letter)
        self._send(letter)
        self._pending_bytes += len(raw.value or b"") + len(raw.key or b"")
        if self._pending_bytes > MAX_PENDING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Return once Kafka has every letter; what it does not take is kept for the next flush."""
        if not self._letters:
            return
        for letter in self._letters:
            if letter.sent.failed():
                self._send(letter)
        failure = self._settle()
        if failure is not None and _too_large(failure):
            self._cut()
            failure = self._settle()
        if failure is not None:
            raise self._explained(failure) from failure
        self._pending_bytes = 0

    def close(self) -> None:
        self._producer.close(timeout=CLOSE_SECONDS)

    def _settle(self) -> Exception | None:
        """Wait for all letters, forget those that are stored, and return why one is not."""
        try:
            self._producer.flush(timeout=FLUSH_SECONDS)
        except kafka_errors.KafkaTimeoutError as error:
            late: Exception = error
            return late
        self._letters = [letter for letter in self._letters if not letter.sent.succeeded()]
        failures: list[Exception] = [one.sent.exception for one in self._letters if one.sent.failed()]
        if self._letters and not failures:
            failures = [kafka_errors.KafkaTimeoutError(f"not done after {FLUSH_SECONDS:.0f} s")]
        return failures[0] if failures else None

    def _send(self, letter: _Letter) -> None:
        raw = letter.raw
        key = raw.key[:KEY_BYTES] if raw.key is not None else None
        # kafka-python refuses a record with neither key nor value, which others can well write.
        value = raw.value[: letter.limit] if raw.value is not None else (b"" if key is None else None)
        try:
            letter.sent = self._producer.send(
                self._settings.dead_letter_topic,
                value=value,
                key=key,
                headers=_headers(letter, len(value or b"")),
            )
        except kafka_errors.KafkaError as error:
            raise self._explained(error) from error

    def _cut(self) -> None:
        """Send those again that this topic finds too large, as little of them as any topic takes."""
        for letter in self._letters:
            if letter.sent.failed() and _too_large(letter.sent.exception):
                letter.limit = CUT_BYTES
                self._send(letter)

    def _explained(self, failure: Exception) -> KafkaRefused | KafkaUnreachable:
        where = f"topic {self._settings.dead_letter_topic!r} at {self._settings.bootstrap_servers}"
        why = f"{type(failure).__name__}: {failure}"
        what = f"{len(self._letters)} dead letters are not stored in {where}: {why}"
        if isinstance(failure, kafka_errors.TopicAuthorizationFailedError):
            refusal = forbidden(self._settings, "Write", "topic", (self._settings.dead_letter_topic,))
            return KafkaRefused(f"{len(self._letters)} dead letters are not stored: {refusal}")
        return KafkaUnreachable(
            f"{what}; check that the broker runs and that the topic exists"
            ", then start again: everything since the last checkpoint is read once more"
        )


def _headers(letter: _Letter, kept: int) -> list[tuple[str, bytes]]:
    raw = letter.raw
    fields = {
        "code": letter.error.code,
        "detail": letter.error.detail[:1_000],
        "topic": raw.partition.topic,
        "partition": raw.partition.index,
        "offset": raw.offset,
        "timestamp": raw.timestamp_ms,
    }
    if kept < len(raw.value or b""):
        fields["truncated"] = f"{kept} of {len(raw.value or b'')} bytes"
    ours = [(PREFIX + name, str(value).encode()) for name, value in fields.items()]
    theirs = [(name, value or b"") for name, value in raw.headers]
    size = sum(len(name) + len(value) for name, value in theirs)
    return ours + (theirs if size <= HEADER_BYTES and letter.limit != CUT_BYTES else [])


def _too_large(error: Exception) -> bool:
    return isinstance(error, kafka_errors.MessageSizeTooLargeError | kafka_errors.RecordListTooLargeError)
