"""The log of a topic between two times: read once, without a group, and put in the order of stream time."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime

import msgspec

from daemon.wire.kafka import log_bounds, read_ranges
from daemon.wire.kafka_client import admin, bounds_between
from flows.backtest.table import UnusableStream
from monitors.decoding import make_decoder
from monitors.events import OffsetRange
from monitors.records import InvalidRecord, LabelRecord, Partition, PredictionRecord
from monitors.settings import FlowSettings


class TopicLog(msgspec.Struct, frozen=True):
    """
    Valid records of all models, each partition's in order.

    `predictions` stand in the order in which the stream times of their partitions pass their event times;
    `lines` are the labels by partition, those without any included, and `origin` is what the daemon names
    its episodes after.
    """

    origin: str
    predictions: tuple[PredictionRecord, ...]
    lines: dict[Partition, tuple[LabelRecord, ...]]


def read_topic(
    settings: FlowSettings, models: Collection[str], since: datetime | None, until: datetime | None
) -> TopicLog:
    """Everything logged in `since <= Kafka timestamp < until`, of the model and of those beside it."""
    kafka = settings.kafka
    decoder = make_decoder(settings.fields, kafka.labels_topic, models, settings.limits)
    topics = (*kafka.topics, *((kafka.labels_topic,) if kafka.labels_topic else ()))
    predictions: dict[Partition, list[PredictionRecord]] = {}
    labelled = log_bounds(kafka, kafka.labels_topic) if kafka.labels_topic else {}
    lines: dict[Partition, list[LabelRecord]] = {partition: [] for partition in labelled}
    for raw in read_ranges(kafka, list(_ranges(settings, topics, since, until))):
        try:
            record = decoder.decode(raw)
        except InvalidRecord:
            # The daemon keeps these as dead letters, and so no window has them either.
            continue
        if isinstance(record, LabelRecord):
            lines.setdefault(record.partition, []).append(record)
        else:
            predictions.setdefault(record.partition, []).append(record)
    if not any(record.model == settings.model for line in predictions.values() for record in line):
        raise UnusableStream(
            f"{', '.join(kafka.topics)} at {kafka.bootstrap_servers} holds no prediction of"
            f" {settings.model!r} between these times; look at --from, --to and [fields]"
        )
    return TopicLog(
        f"{_cluster_id(settings)}|{kafka.group}",
        tuple(in_stream_time(predictions.values())),
        {partition: tuple(line) for partition, line in lines.items()},
    )


def in_stream_time(partitions: Iterable[Sequence[PredictionRecord]]) -> Iterator[PredictionRecord]:
    """
    One order of all records that keeps each partition's own and lets no partition run ahead.

    So a window closes as soon as the log allows it, as it does for a daemon that keeps up.
    """
    placed: list[tuple[datetime, Partition, int, PredictionRecord]] = []
    for line in partitions:
        reached = line[0].event_time
        for record in line:
            reached = max(reached, record.event_time)
            placed.append((reached, record.partition, record.offset, record))
    placed.sort(key=lambda entry: entry[:3])
    return (record for *_, record in placed)


def _ranges(
    settings: FlowSettings, topics: Iterable[str], since: datetime | None, until: datetime | None
) -> Iterator[OffsetRange]:
    for topic in topics:
        # A label is later than its prediction: those that come after the last prediction count, too.
        last = None if topic == settings.kafka.labels_topic else until
        for partition, (start, end) in bounds_between(settings.kafka, topic, since, last).items():
            if start < end:
                yield OffsetRange(partition.topic, partition.index, start, end)


def _cluster_id(settings: FlowSettings) -> str:
    with admin(settings.kafka) as client:
        return str(client.describe_cluster()["cluster_id"])
