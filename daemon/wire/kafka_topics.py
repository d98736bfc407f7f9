"""Which log stands behind a topic's name: one that was deleted and made anew is another."""

import time
from collections.abc import Iterable
from typing import Any
from uuid import UUID

import structlog

from daemon.wire.kafka_client import UnknownTopic
from monitors.settings import KafkaSettings

log = structlog.get_logger()

# A broker that has just started may not know its topics yet; a topic that is made anew is away meanwhile.
GONE_SECONDS = 30.0
_NO_ID = UUID(int=0)


class Topics:
    """
    What Kafka says of the topics that are read, as a consumer hears it while it reads.

    kafka-python goes on at the old offset of a topic that was made anew, without a word, and takes one
    that was deleted for one without partitions.
    """

    def __init__(self, settings: KafkaSettings, consumer: Any, topics: Iterable[str]) -> None:
        self._settings = settings
        self._cluster = consumer._cluster
        self._topics = tuple(topics)
        self._ids: dict[str, str] = {}
        self._gone: dict[str, float] = {}

    def id_of(self, topic: str) -> str:
        """What only this log is called; empty where the broker does not tell."""
        found = self._cluster.topic_id(topic)
        return "" if found is None or found == _NO_ID else str(found)

    def renewed(self) -> frozenset[str]:
        """The topics that became other logs since this was last asked."""
        now = {topic: found for topic in self._topics if (found := self.id_of(topic))}
        changed = frozenset(topic for topic in now if self._ids.get(topic, now[topic]) != now[topic])
        self._ids |= now
        return changed

    def require(self) -> None:
        """Tell of a topic that is no longer there; raise `UnknownTopic` once it is gone for good."""
        for topic in self._topics:
            if self._cluster.partitions_for_topic(topic):
                self._gone.pop(topic, None)
                continue
            if topic not in self._gone:
                log.error("topic_gone", topic=topic)
            since = self._gone.setdefault(topic, time.monotonic())
            if time.monotonic() - since > GONE_SECONDS:
                raise UnknownTopic(
                    f"Kafka at {self._settings.bootstrap_servers} has had no topic {topic!r} for "
                    f"{GONE_SECONDS:.0f} s, though it was read before: create it, then start again; "
                    "what the old one held and was not read is told as data.lost"
                )
