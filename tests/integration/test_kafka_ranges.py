"""Reading ranges once and for all, and what becomes of records that are too large."""

from typing import Any

import pytest

from daemon.wire import kafka_ranges as wire
from daemon.wire.kafka import (
    KafkaDeadLetters,
    KafkaRefused,
    KafkaUnreachable,
    ensure_topics,
    log_bounds,
    read_ranges,
)
from monitors.events import OffsetRange
from monitors.records import InvalidRecord, Partition, RawRecord

pytestmark = pytest.mark.kafka


def test_a_range_is_read_in_each_partitions_order_up_to_its_end(kafka: Any) -> None:
    topic = kafka.topic(2)
    for index in (0, 1):
        kafka.produce(topic, [b"%d" % number for number in range(300)], index)
    ranges = [OffsetRange(topic, 0, 10, 290), OffsetRange(topic, 1, 0, 5)]
    records = list(read_ranges(kafka.settings(), ranges))
    assert [r.offset for r in records if r.partition.index == 0] == list(range(10, 290))
    assert [r.offset for r in records if r.partition.index == 1] == list(range(5))


def test_an_empty_range_needs_no_broker() -> None:
    from monitors.settings import KafkaSettings

    assert list(read_ranges(KafkaSettings(), [OffsetRange("nowhere", 0, 4, 4)])) == []


def test_a_range_is_cut_where_the_log_is(kafka: Any) -> None:
    topic = kafka.topic()
    kafka.produce(topic, [b"%d" % number for number in range(10)])
    kafka.delete_before(Partition(topic, 0), 4)
    records = list(read_ranges(kafka.settings(), [OffsetRange(topic, 0, 2, 99)]))
    assert [record.offset for record in records] == list(range(4, 10))


def test_a_range_that_nothing_comes_of_is_an_error(kafka: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    topic = kafka.topic()
    kafka.produce(topic, [b"1"])
    monkeypatch.setattr(wire, "STALL_SECONDS", 1.0)
    records = read_ranges(kafka.settings(), [OffsetRange(topic, 0, 0, 1)])
    monkeypatch.setattr(wire, "MAX_POLL_RECORDS", 1)
    original = wire.make_consumer

    def deaf(*arguments: Any, **options: Any) -> Any:
        consumer = original(*arguments, **options)
        consumer.poll = lambda **_: {}
        return consumer

    monkeypatch.setattr(wire, "make_consumer", deaf)
    with pytest.raises(KafkaUnreachable, match=f"sent nothing .* {topic}/0 before offset 1"):
        list(records)


def test_bounds_follow_the_log(kafka: Any) -> None:
    topic = kafka.topic(2)
    kafka.produce(topic, [b"a", b"b", b"c"], 1)
    kafka.delete_before(Partition(topic, 1), 2)
    assert log_bounds(kafka.settings(), topic) == {Partition(topic, 0): (0, 0), Partition(topic, 1): (2, 3)}


def test_topics_are_made_once(kafka: Any) -> None:
    name = kafka.name("made")
    assert ensure_topics(kafka.settings(), {name: 3}) == (name,)
    assert ensure_topics(kafka.settings(), {name: 3}) == ()
    assert len(log_bounds(kafka.settings(), name)) == 3


def letters_of(kafka: Any, topic: str) -> list[RawRecord]:
    ranges = [
        OffsetRange(topic, partition.index, first, end)
        for partition, (first, end) in log_bounds(kafka.settings(), topic).items()
    ]
    return list(read_ranges(kafka.settings(), ranges))


def put_large(kafka: Any, topic: str) -> RawRecord:
    letters = KafkaDeadLetters(kafka.settings(dead_letter_topic=topic))
    large = RawRecord(Partition("p", 2), 9, 77, b"k", b"x" * 3_000_000, (("h", b"v"),))
    letters.put(large, InvalidRecord("too_large", "3000000 bytes"))
    letters.put(RawRecord(Partition("p", 2), 10, 78, None, b"small"), InvalidRecord("not_json", "?"))
    letters.flush()
    letters.close()
    stored = {dict(letter.headers)["retrain-daemon.offset"]: letter for letter in letters_of(kafka, topic)}
    assert sorted(stored) == [b"10", b"9"]
    assert stored[b"10"].value == b"small"
    return stored[b"9"]


def test_an_enormous_record_is_kept_as_far_as_it_fits(kafka: Any) -> None:
    letter = put_large(kafka, kafka.name("dead"))
    headers = dict(letter.headers)
    assert letter.value == b"x" * len(letter.value or b"")
    assert 500_000 < len(letter.value or b"") < 1_000_000
    assert headers["retrain-daemon.truncated"] == f"{len(letter.value or b'')} of 3000000 bytes".encode()
    assert (letter.key, headers["h"], headers["retrain-daemon.offset"]) == (b"k", b"v", b"9")
    assert headers["retrain-daemon.timestamp"] == b"77"


def test_a_topic_that_takes_little_gets_little(real_kafka: Any) -> None:
    topic = real_kafka.topic(max_message_bytes="10000")
    letter = put_large(real_kafka, topic)
    assert dict(letter.headers)["retrain-daemon.truncated"] == b"1000 of 3000000 bytes"


def test_letters_that_cannot_be_stored_are_an_error_that_says_so(
    real_kafka: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = real_kafka.topic(max_message_bytes="100")
    letters = KafkaDeadLetters(real_kafka.settings(dead_letter_topic=topic))
    letters.put(RawRecord(Partition("p", 0), 1, 0, None, b"x" * 500), InvalidRecord("not_json", "?"))
    with pytest.raises(
        (KafkaUnreachable, KafkaRefused), match=f"1 dead letters are not stored in topic '{topic}'"
    ):
        letters.flush()
    real_kafka.configure(topic, {"max.message.bytes": "100000"})
    letters.flush()
    letters.close()
    assert [letter.value for letter in letters_of(real_kafka, topic)] == [b"x" * 500]
