"""The reader on a broker that loses, corrupts, forgets and dies."""

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.ports import Assignment, OffsetLoss
from daemon.wire.kafka import (
    FETCH_WAIT_MILLISECONDS,
    IDLE_END_CHECK_SECONDS,
    IDLE_FETCH_WAIT_MILLISECONDS,
    KafkaSource,
    UnknownTopic,
    ensure_topics,
    make_producer,
)
from daemon.wire.local_kafka import LocalKafka, java_and_maven
from monitors.records import Partition, RawRecord
from monitors.settings import KafkaSettings

pytestmark = pytest.mark.kafka
PATIENCE_SECONDS = 90.0


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[LocalKafka]:
    """A real broker that the test may break, and that deletes at once what has expired."""
    if not java_and_maven():
        pytest.skip("needs Java and Maven")
    quick = {
        "log.retention.check.interval.ms": "300",
        "log.initial.task.delay.ms": "300",
        "log.segment.delete.delay.ms": "0",
    }
    with LocalKafka(tmp_path / "kafka", overrides=quick) as broker:
        yield broker


@pytest.fixture
def sources() -> Iterator[list[KafkaSource]]:
    made: list[KafkaSource] = []
    yield made
    for source in made:
        source.close()


def settings_of(broker: LocalKafka, topic: str) -> KafkaSettings:
    return KafkaSettings(
        bootstrap_servers=broker.bootstrap_servers,
        topic=topic,
        group="tests",
        start="earliest",
        session_timeout_seconds=6.0,
    )


def assigned(source: KafkaSource) -> Assignment:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        source.poll(0.3)
        news = source.assignment()
        if news is not None:
            return news
    raise AssertionError("the group never settled")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def read(source: KafkaSource, count: int) -> list[RawRecord]:
    records: list[RawRecord] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(records) < count and time.monotonic() < deadline:
        records += source.poll(0.3)
    return records


ACTIVE_MEMBER = """
    import sys
    from daemon.wire.kafka import KafkaSource
    from monitors.settings import KafkaSettings
    source = KafkaSource(KafkaSettings(bootstrap_servers=sys.argv[1], topic=sys.argv[2], group=sys.argv[3],
                                       start="earliest", session_timeout_seconds=6.0))
    while True:
        source.poll(0.3)
        if source.assignment() is not None:
            source.seek({})
            print("active", flush=True)
"""


def test_a_standby_takes_over_from_a_killed_member(kafka: Any, sources: list[KafkaSource]) -> None:
    topic = kafka.topic(2)
    settings = kafka.settings(topic=topic)
    command = [sys.executable, "-c", textwrap.dedent(ACTIVE_MEMBER)]
    with subprocess.Popen(
        [*command, settings.bootstrap_servers, topic, settings.group], stdout=subprocess.PIPE, text=True
    ) as active:
        try:
            assert active.stdout is not None
            while "active" not in active.stdout.readline():
                assert active.poll() is None
            standby = KafkaSource(settings)
            sources.append(standby)
            assert assigned(standby) == Assignment(())
        finally:
            active.kill()
    kafka.produce(topic, [b"after"])
    assert assigned(standby).partitions == (Partition(topic, 0), Partition(topic, 1))
    standby.seek({})
    assert [record.value for record in read(standby, 1)] == [b"after"]


def test_a_join_that_ends_between_two_polls_is_kept(kafka: Any, sources: list[KafkaSource]) -> None:
    """kafka-python would forget it, and send no heartbeats, or upset the group by joining once more."""
    topic = kafka.topic()
    member = KafkaSource(kafka.settings(topic=topic))
    sources.append(member)
    assigned(member)
    member.seek({})
    coordinator = member._consumer._coordinator
    # As if a topic had changed: what kafka-python forgets for good, where the member leads its group.
    coordinator._assignment_snapshot = {}
    member._consumer.poll(timeout_ms=0)  # begins to join, and has no time to see it through
    until(lambda: coordinator.state == "<stable>")
    joined, at = coordinator._generation.generation_id, time.monotonic()
    until(lambda: coordinator.heartbeat.last_receive > at)
    kafka.produce(topic, [b"1"])
    assert [record.value for record in read(member, 1)] == [b"1"]
    assert coordinator._generation.generation_id == joined, "it joined once more"
    assert member.assignment() is None


def test_a_fetch_is_held_for_long_only_once_idle(
    kafka: Any, sources: list[KafkaSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker answers nothing else on that connection meanwhile, and windows wait for where logs end."""
    source = KafkaSource(kafka.settings(topic=kafka.topic()))
    sources.append(source)
    assigned(source)
    source.seek({})
    waits: list[int] = []
    fetcher = source._consumer._fetcher
    make = fetcher._create_fetch_requests

    def noted() -> Any:
        made = make()
        waits.extend(request.max_wait_ms for request, *_ in made.values())
        return made

    monkeypatch.setattr(fetcher, "_create_fetch_requests", noted)
    monkeypatch.setattr("daemon.wire.kafka.IDLE_SECONDS", PATIENCE_SECONDS)
    until(lambda: source.poll(0.1) or len(waits) > 2)
    assert set(waits) == {FETCH_WAIT_MILLISECONDS}
    monkeypatch.setattr("daemon.wire.kafka.IDLE_SECONDS", 0.0)
    until(lambda: source.poll(0.1) or waits[-1] == IDLE_FETCH_WAIT_MILLISECONDS)


def test_a_topic_that_grows_is_read_whole(real_kafka: Any, sources: list[KafkaSource]) -> None:
    from daemon.wire.kafka_client import admin

    topic = real_kafka.topic(1)
    source = KafkaSource(real_kafka.settings(topic=topic))
    sources.append(source)
    assert assigned(source).partitions == (Partition(topic, 0),)
    source.seek({})
    with admin(real_kafka.settings()) as client:
        client.create_partitions({topic: 2})
    # The consumer asks for metadata again after 10 s at most; here it is told to.
    source._consumer._cluster.request_update()
    assert assigned(source).partitions == (Partition(topic, 0), Partition(topic, 1))


def test_retention_is_told_and_not_skipped(own_kafka: LocalKafka, sources: list[KafkaSource]) -> None:
    settings = settings_of(own_kafka, "expiring")
    configs = {"retention.ms": "1000", "segment.ms": "100"}
    ensure_topics(settings, {"expiring": 1}, configs)
    producer = make_producer(settings)
    for number in range(5):
        producer.send("expiring", value=b"%d" % number, timestamp_ms=1_600_000_000_000)
    producer.flush(timeout=60)
    source = KafkaSource(settings)
    sources.append(source)
    partition = Partition("expiring", 0)
    assigned(source)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while source.seek({partition: 1}) == {partition: 1} and time.monotonic() < deadline:
        time.sleep(0.3)
    losses = source.losses()
    assert losses[0].partition == partition
    assert losses[0].expected == 1
    assert losses[0].available == 5
    producer.send("expiring", value=b"later")
    producer.close(timeout=5)
    assert [record.offset for record in read(source, 1)] == [5]


def test_a_corrupt_batch_is_skipped_loudly_and_exactly(
    own_kafka: LocalKafka, sources: list[KafkaSource]
) -> None:
    settings = settings_of(own_kafka, "corrupt")
    ensure_topics(settings, {"corrupt": 2})
    producer = make_producer(settings)
    for text in (b"good-one", b"ROTTEN", b"good-two"):
        for _ in range(7):
            producer.send("corrupt", value=text, partition=0)
        producer.flush(timeout=60)
    producer.send("corrupt", value=b"elsewhere", partition=1)
    producer.flush(timeout=60)
    producer.close(timeout=5)
    own_kafka.stop()
    segment = own_kafka.data / "corrupt-0" / "00000000000000000000.log"
    segment.write_bytes(segment.read_bytes().replace(b"ROTTEN", b"R0TTEN", 1))
    own_kafka.start()
    source = KafkaSource(settings)
    sources.append(source)
    assigned(source)
    source.seek({})
    records = read(source, 15)
    by_partition = {index: [r for r in records if r.partition.index == index] for index in (0, 1)}
    offsets = [record.offset for record in by_partition[0]]
    (loss,) = source.losses()
    assert loss == OffsetLoss(Partition("corrupt", 0), expected=7, available=14)
    assert offsets == [*range(7), *range(14, 21)]
    assert [record.value for record in by_partition[1]] == [b"elsewhere"]


@pytest.mark.slow
def test_a_broker_that_is_away_is_waited_for(own_kafka: LocalKafka, sources: list[KafkaSource]) -> None:
    settings = settings_of(own_kafka, "away")
    ensure_topics(settings, {"away": 1})
    source = KafkaSource(settings)
    sources.append(source)
    assigned(source)
    source.seek({})
    assert source.drained() == {Partition("away", 0)}
    assert source.reachable()
    own_kafka.kill()
    began = time.monotonic()
    assert source.poll(0.5) == []
    source.commit({Partition("away", 0): 0})
    time.sleep(IDLE_END_CHECK_SECONDS + 0.1)  # what was last seen of the log is too old now
    assert source.drained() == frozenset(), "a log that cannot be seen is not known to have ended"
    assert not source.reachable()
    assert time.monotonic() - began < 15
    own_kafka.start()
    producer = make_producer(settings)
    producer.send("away", value=b"back")
    producer.flush(timeout=20)
    producer.close(timeout=5)
    deadline = time.monotonic() + PATIENCE_SECONDS
    records: list[RawRecord] = []
    while not records and time.monotonic() < deadline:
        records += source.poll(0.5)
        if source.assignment() is not None:  # away for longer than its session: it has to ask again
            source.seek({Partition("away", 0): 0})
    assert [record.value for record in records] == [b"back"]
    while not source.drained() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert source.reachable()


def test_closing_without_a_broker_is_quick(own_kafka: LocalKafka) -> None:
    settings = settings_of(own_kafka, "closing")
    ensure_topics(settings, {"closing": 1})
    source = KafkaSource(settings)
    assigned(source)
    own_kafka.kill()
    began = time.monotonic()
    source.close()
    assert time.monotonic() - began < 8


def test_an_unknown_topic_is_named_with_what_to_do(kafka: Any) -> None:
    topic = kafka.topic()
    with pytest.raises(UnknownTopic, match=r"no topic 'predicitons'.*kafka\.topic"):
        KafkaSource(kafka.settings(topic=(topic, "predicitons")))


def test_aborted_transactions_are_never_seen(real_kafka: Any, sources: list[KafkaSource]) -> None:
    topic = real_kafka.topic()
    producer = make_producer(real_kafka.settings(), transactional_id=real_kafka.name("tx"))
    producer.init_transactions()
    for text, done in ((b"kept", True), (b"aborted", False), (b"kept too", True)):
        producer.begin_transaction()
        producer.send(topic, value=text)
        (producer.commit_transaction if done else producer.abort_transaction)()
    producer.close(timeout=5)
    source = KafkaSource(real_kafka.settings(topic=topic))
    sources.append(source)
    assigned(source)
    source.seek({})
    assert [record.value for record in read(source, 2)] == [b"kept", b"kept too"]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not source.drained() and time.monotonic() < deadline:
        source.poll(0.2)
    assert source.drained() == {Partition(topic, 0)}, "markers after the last record count as read"
