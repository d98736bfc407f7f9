"""What every form of the port `DeadLetters` promises."""

from collections.abc import Iterator
from typing import Any

import pytest

from daemon.memory import MemoryDeadLetters
from daemon.ports import DeadLetters
from daemon.wire.kafka import KafkaDeadLetters, log_bounds, read_ranges
from monitors.events import OffsetRange
from monitors.records import InvalidRecord, Partition, RawRecord

RECORD = RawRecord(Partition("predictions", 3), 17, -1, b"key", b"\xffnot json", (("trace", b"t"),))


class InMemory:
    def __init__(self) -> None:
        self.letters = MemoryDeadLetters()

    def stored(self) -> list[tuple[bytes | None, bytes | None, str]]:
        return [(raw.key, raw.value, error.code) for raw, error in self.letters.stored]


class OnKafka:
    def __init__(self, kafka: Any) -> None:
        self.kind = kafka.kind
        self._settings = kafka.settings(dead_letter_topic=kafka.name("dead"))
        self.letters = KafkaDeadLetters(self._settings)

    def stored(self) -> list[tuple[bytes | None, bytes | None, str]]:
        topic = self._settings.dead_letter_topic
        ranges = [
            OffsetRange(topic, partition.index, first, end)
            for partition, (first, end) in log_bounds(self._settings, topic).items()
        ]
        return [
            (raw.key, raw.value, dict(raw.headers)["retrain-daemon.code"].decode())  # type: ignore[union-attr]
            for raw in read_ranges(self._settings, ranges)
        ]


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def place(request: pytest.FixtureRequest) -> Iterator[Any]:
    where = InMemory() if request.param == "memory" else OnKafka(request.getfixturevalue("kafka"))
    yield where
    where.letters.close()


def put(letters: DeadLetters, *codes: str) -> None:
    for code in codes:
        letters.put(RECORD, InvalidRecord(code, "why it is invalid"))


def test_flush_stores_what_was_put_in_order(place: Any) -> None:
    put(place.letters, "not_json", "no_model")
    place.letters.flush()
    assert place.stored() == [(b"key", b"\xffnot json", "not_json"), (b"key", b"\xffnot json", "no_model")]


def test_a_second_flush_stores_nothing_twice(place: Any) -> None:
    put(place.letters, "not_json")
    place.letters.flush()
    place.letters.flush()
    assert len(place.stored()) == 1


def test_an_empty_record_is_a_letter_too(place: Any) -> None:
    empty = RawRecord(Partition("predictions", 0), 1, 5, None, None)
    place.letters.put(empty, InvalidRecord("empty", "no value"))
    place.letters.flush()
    ((key, value, code),) = place.stored()
    assert (key, value or None, code) == (None, None, "empty")
