"""Notices: the events that no window led to, about the log itself or about the scores."""

from collections.abc import Iterable

from daemon.ports import OffsetLoss
from monitors.events import Event, Kind
from monitors.records import Partition


def data_lost(origin: str, models: Iterable[str], loss: OffsetLoss) -> list[Event]:
    """For each of these models: offsets that were to be read are gone."""
    payload = {
        "topic": loss.partition.topic,
        "partition": loss.partition.index,
        "expected": loss.expected,
        "available": loss.available,
    }
    where = f"{place(loss.partition)}|{loss.expected}|{loss.available}"
    return [
        Event(kind=Kind.DATA_LOST, model=model, subject=f"{origin}|{model}|{where}", payload=payload)
        for model in models
    ]


def data_stalled(
    origin: str, models: Iterable[str], partition: Partition, next_offset: int, seconds: float
) -> list[Event]:
    """For each of these models: records that are there have not come for so long."""
    payload = {
        "topic": partition.topic,
        "partition": partition.index,
        "next_offset": next_offset,
        "seconds": seconds,
    }
    where = f"{place(partition)}|{next_offset}"
    return [
        Event(kind=Kind.DATA_STALLED, model=model, subject=f"{origin}|{model}|{where}", payload=payload)
        for model in models
    ]


def place(partition: Partition) -> str:
    """How a partition is called in logs and in the identity of events."""
    return f"{partition.topic}/{partition.index}"
