"""Sending records back: to the partition that they came from, under the time that they had."""

import contextlib
from collections.abc import Sequence
from typing import Any

from kafka import errors as kafka_errors

from daemon.ports import SendAnswer
from daemon.wire.kafka_client import CLOSE_SECONDS, forbidden, make_producer
from monitors.records import RawRecord
from monitors.settings import KafkaSettings

FLUSH_SECONDS = 60.0


class KafkaSender:
    """The port `Sender` on Kafka: raw records go as they are."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        # An idempotent producer of kafka-python takes nothing more once one record was refused.
        self._producer = make_producer(
            settings, enable_idempotence=False, max_in_flight_requests_per_connection=1
        )

    def send(self, records: Sequence[RawRecord]) -> list[SendAnswer]:
        begun = [self._begun(record) for record in records]
        with contextlib.suppress(kafka_errors.KafkaTimeoutError):
            self._producer.flush(timeout=FLUSH_SECONDS)
        return [
            one if isinstance(one, SendAnswer) else self._answer(record, one)
            for record, one in zip(records, begun, strict=True)
        ]

    def close(self) -> None:
        self._producer.close(timeout=CLOSE_SECONDS)

    def _begun(self, record: RawRecord) -> Any:
        try:
            return self._producer.send(
                record.partition.topic,
                value=record.value,
                key=record.key,
                partition=record.partition.index,
                timestamp_ms=record.timestamp_ms if record.timestamp_ms >= 0 else None,
                headers=[(name, value or b"") for name, value in record.headers],
            )
        except (kafka_errors.KafkaError, AssertionError) as error:
            return SendAnswer(_said(error))

    def _answer(self, record: RawRecord, sent: Any) -> SendAnswer:
        if sent.succeeded():
            return SendAnswer()
        error = sent.exception or kafka_errors.KafkaTimeoutError(f"no answer in {FLUSH_SECONDS:.0f} s")
        if isinstance(error, kafka_errors.TopicAuthorizationFailedError):
            return SendAnswer(str(forbidden(self._settings, "Write", "topic", (record.partition.topic,))))
        # Whatever took too long, or broke off, may have been stored all the same.
        return SendAnswer(_said(error), certain=not error.retriable)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
