"""The log once more: what is still there of a topic, read without joining a group."""

from collections.abc import Iterator, Mapping, Sequence

from daemon.wire.kafka import read_ranges
from daemon.wire.kafka_client import UnknownTopic, admin, log_bounds
from monitors.events import OffsetRange
from monitors.records import Partition, RawRecord
from monitors.settings import KafkaSettings


class KafkaLog:
    """The port `Log` on Kafka."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings

    def read(self, ranges: Sequence[OffsetRange]) -> Iterator[RawRecord]:
        return read_ranges(self._settings, ranges)

    def bounds(self, topic: str) -> Mapping[Partition, tuple[int, int]]:
        try:
            return log_bounds(self._settings, topic)
        except UnknownTopic:
            return {}

    def cluster_id(self) -> str:
        with admin(self._settings) as client:
            return str(client.describe_cluster()["cluster_id"])
