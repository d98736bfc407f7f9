"""Sharing check: whether the log keeps models apart by partition, so that members can share them."""

from collections.abc import Mapping

import msgspec

from daemon.config import Config
from monitors.decoding import make_decoder
from monitors.events import OffsetRange
from monitors.records import InvalidRecord, Partition

# How many of the latest records are looked at, of each partition and of all.
OF_EACH = 200
OF_ALL = 20_000

Bounds = Mapping[Partition, tuple[int, int]]


class Places(msgspec.Struct, frozen=True):
    """By model and topic: the indexes of the partitions in which its latest records are."""

    indexes: dict[str, dict[str, set[int]]]

    def in_topic(self, topic: str) -> str:
        """Whether models span partitions of the topic, in words."""
        found = {model: sorted(at[topic]) for model, at in self.indexes.items() if topic in at}
        spread = {model: indexes for model, indexes in found.items() if len(indexes) > 1}
        if not spread:
            return f"each model is in one partition, of {len(found)} seen lately"
        model, indexes = next(iter(spread.items()))
        return f"{len(spread)} of {len(found)} models span partitions ({model}: {_listed(indexes)})"

    def parted(self) -> str:
        """The first model that is not in one index of all topics, in words; empty if there is none."""
        for model, at in self.indexes.items():
            indexes = sorted(set[int]().union(*at.values()))
            if len(indexes) > 1:
                return f"{model} is in partitions {_listed(indexes)} of {', '.join(sorted(at))}"
        return ""


def look(config: Config, bounds: Bounds) -> Places:
    """Where models are, by the latest records of each partition; who did not occur lately is nowhere."""
    from daemon.wire.kafka import read_ranges

    decoder = make_decoder(config.mappings, config.kafka.labels_topic, list(config.models), config.limits)
    places: dict[str, dict[str, set[int]]] = {}
    for raw in read_ranges(config.kafka, _latest(bounds)):
        try:
            record = decoder.decode(raw)
        except InvalidRecord:
            continue
        at = places.setdefault(record.model, {})
        at.setdefault(raw.partition.topic, set()).add(raw.partition.index)
    return Places(places)


def _latest(bounds: Bounds) -> list[OffsetRange]:
    most = max(1, min(OF_EACH, OF_ALL // max(1, len(bounds))))
    return [
        OffsetRange(partition.topic, partition.index, max(first, end - most), end)
        for partition, (first, end) in sorted(bounds.items())
        if end > first
    ]


def _listed(indexes: list[int]) -> str:
    shown = ", ".join(map(str, indexes[:5]))
    return f"{shown}, ..." if len(indexes) > 5 else shown
