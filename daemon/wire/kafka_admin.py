"""What Kafka says of itself: what we may do there, how new its records are, and what time it has."""

import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from kafka import TopicPartition
from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType, OffsetSpec

from daemon.wire.kafka_client import CLOSE_SECONDS, REQUEST_SECONDS, admin, ensure_topics, make_producer
from monitors.settings import KafkaSettings

_LOG_APPEND = "LogAppendTime"


class Rights(msgspec.Struct, frozen=True):
    """The operations that are granted to us; None where the broker does not tell."""

    topics: dict[str, frozenset[str] | None]
    group: frozenset[str] | None


def allowed(settings: KafkaSettings, topics: Sequence[str]) -> Rights:
    """What we may do with those of these topics that are there, and with our group."""
    with admin(settings) as client:
        found = client.describe_topics(list(topics))
        rights = {topic["name"]: _operations(topic) for topic in found if topic["error_code"] in (0, 29)}
        return Rights(rights, _group_rights(client, settings.group))


def _group_rights(client: Any, group: str) -> frozenset[str] | None:
    deadline = time.monotonic() + REQUEST_SECONDS
    while True:
        try:
            groups = client.describe_groups([group], include_authorized_operations=True)
        except kafka_errors.GroupAuthorizationFailedError:
            return frozenset()
        except kafka_errors.CoordinatorNotAvailableError:
            # A cluster in which no group was ever seen makes the place for them when it is first asked.
            if time.monotonic() > deadline:
                return None
            time.sleep(0.5)
            continue
        refused = "GroupAuthorizationFailed" in str(groups[group].get("error"))
        return frozenset() if refused else _operations(groups[group])


def newest_times(settings: KafkaSettings, topics: Sequence[str]) -> dict[str, tuple[datetime, bool]]:
    """The newest record's timestamp of each topic that has one, and whether it is the broker's own."""
    with admin(settings) as client:
        found = {one["name"]: one for one in client.describe_topics(list(topics)) if one["error_code"] == 0}
        times = {}
        for name, topic in found.items():
            wanted = {
                TopicPartition(name, one["partition_index"]): OffsetSpec.MAX_TIMESTAMP
                for one in topic["partitions"]
            }
            answers = client.list_partition_offsets(wanted, timeout_ms=int(REQUEST_SECONDS * 1000))
            newest = max((one.timestamp for one in answers.values()), default=-1)
            if newest >= 0:
                by_broker = _timestamp_type(client, name) == _LOG_APPEND
                times[name] = datetime.fromtimestamp(newest / 1000, UTC), by_broker
        return times


def clock_of(settings: KafkaSettings) -> tuple[datetime, datetime, datetime]:
    """Our time, the broker's and ours again, by one record in a topic that is made for it and deleted."""
    topic = f"{settings.client_id}.clock-{uuid.uuid4().hex[:8]}"
    ensure_topics(settings, {topic: 1}, {"message.timestamp.type": _LOG_APPEND})
    try:
        producer = make_producer(settings)
        try:
            producer.send(topic, value=b"what time is it?").get(timeout=REQUEST_SECONDS)
            asked = datetime.now(UTC)
            stored = producer.send(topic, value=b"what time is it?").get(timeout=REQUEST_SECONDS)
            answered = datetime.now(UTC)
        finally:
            producer.close(timeout=CLOSE_SECONDS)
    finally:
        with admin(settings) as client:
            client.delete_topics([topic])
    return asked, datetime.fromtimestamp(stored.timestamp / 1000, UTC), answered


def _operations(described: Any) -> frozenset[str] | None:
    told = described.get("authorized_operations")
    if told is None or told == -(2**31):
        return None
    if isinstance(told, int):
        from kafka.admin import ACLOperation

        return frozenset(one.name for one in ACLOperation if one.value > 1 and told & (1 << one.value))
    return frozenset(str(getattr(one, "name", one)) for one in told)


def _timestamp_type(client: Any, topic: str) -> str:
    resource = ConfigResource(ConfigResourceType.TOPIC, topic, configs={"message.timestamp.type": None})
    try:
        told = client.describe_configs([resource], config_filter="all")
    except kafka_errors.KafkaError:
        return ""
    for kind in told.values():
        for entry in kind.values():
            value = entry.get("message.timestamp.type", {})
            return str(value.get("value", "") if isinstance(value, dict) else value)
    return ""
