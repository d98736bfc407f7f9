"""Reading ranges of the log, each once and for all and without a group."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import structlog
from kafka import TopicPartition

from daemon.wire.kafka_client import (
    CLOSE_SECONDS,
    REQUEST_SECONDS,
    KafkaUnreachable,
    make_consumer,
    translated,
)
from monitors.events import OffsetRange
from monitors.records import Partition, RawRecord
from monitors.settings import KafkaSettings

log = structlog.get_logger()

MAX_POLL_RECORDS = 5_000
STALL_SECONDS = 30.0


def raw_record(partition: Partition, record: Any) -> RawRecord:
    """kafka-python's record as ours, its content untouched."""
    headers = tuple(record.headers) if record.headers else ()
    return RawRecord(partition, record.offset, record.timestamp, record.key, record.value, headers)


def read_ranges(settings: KafkaSettings, ranges: Sequence[OffsetRange]) -> Iterator[RawRecord]:
    """
    Yield the records of these ranges, each partition's in order, without joining a group.

    What retention has deleted from a range is left out; the log says so. Raises `KafkaUnreachable`
    where nothing comes for half a minute though the range is not read to its end.
    """
    wanted = {TopicPartition(one.topic, one.partition): one for one in ranges if one.start < one.end}
    if not wanted:
        return
    consumer = make_consumer(settings, max_poll_records=MAX_POLL_RECORDS)
    try:
        with translated(settings):
            yield from _read_assigned(settings, consumer, wanted)
    finally:
        consumer.close(autocommit=False, timeout_ms=int(CLOSE_SECONDS * 1000))


def _read_assigned(
    settings: KafkaSettings, consumer: Any, wanted: dict[TopicPartition, OffsetRange]
) -> Iterator[RawRecord]:
    left = _place(consumer, wanted)
    heard = time.monotonic()
    while left:
        polled = consumer.poll(timeout_ms=500)
        for partition, records in polled.items():
            ours = Partition(partition.topic, partition.partition)
            yield from (
                raw_record(ours, record) for record in records if record.offset < wanted[partition].end
            )
        # The position, not the last record: what ends a range may be a marker, or compacted away.
        done = {one for one in left if (consumer.position(one, timeout_ms=10_000) or 0) >= left[one]}
        if done:
            left = {one: end for one, end in left.items() if one not in done}
            consumer.pause(*done)
        if polled or done:
            heard = time.monotonic()
        elif time.monotonic() - heard > STALL_SECONDS:
            names = ", ".join(f"{one.topic}/{one.partition} before offset {end}" for one, end in left.items())
            raise KafkaUnreachable(
                f"Kafka at {settings.bootstrap_servers} sent nothing for {STALL_SECONDS:.0f} s while "
                f"reading {names}; check that the broker is well, then try again"
            )


def _place(consumer: Any, wanted: dict[TopicPartition, OffsetRange]) -> dict[TopicPartition, int]:
    """Put the consumer at each range's start; return the ends, cut where the log is shorter."""
    consumer.assign(list(wanted))
    milliseconds = int(REQUEST_SECONDS * 1000)
    first = consumer.beginning_offsets(list(wanted), timeout_ms=milliseconds)
    end = consumer.end_offsets(list(wanted), timeout_ms=milliseconds)
    left = {}
    for one, span in wanted.items():
        start, stop = max(span.start, first[one]), min(span.end, end[one])
        if (start, stop) != (span.start, span.end):
            log.warning(
                "range_cut",
                topic=one.topic,
                partition=one.partition,
                start=span.start,
                end=span.end,
                available_start=start,
                available_end=stop,
            )
        consumer.seek(one, start)
        if start < stop:
            left[one] = stop
        else:
            consumer.pause(one)
    return left
