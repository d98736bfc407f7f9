"""A hundred thousand mutated records: nothing falls over, and each is taken or is a dead letter, exactly."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from daemon.config import LogSettings
from daemon.engines import StoredEngines
from daemon.evidently_worker import EvidentlyWorker
from daemon.ledger import Ledger
from daemon.logs import configure
from daemon.loop import Loop, LoopSettings
from daemon.memory import MemoryDeadLetters, MemoryLog, MemorySource
from daemon.metrics import MONITOR_CODES
from daemon.ports import DeadLetters, Source
from daemon.wire.kafka import KafkaSource, log_bounds, read_ranges
from daemon.wire.kafka_client import make_producer
from daemon.wire.kafka_dead_letters import KafkaDeadLetters
from daemon.wire.references import ReferenceStore
from monitors.decoding import CODES, make_decoder
from monitors.drift import WindowRows
from monitors.episodes import Judged
from monitors.events import OffsetRange
from monitors.monitor import Result
from monitors.records import Partition
from monitors.settings import (
    FieldSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    PolicySettings,
    WindowSettings,
)

RECORDS = 100_000
SEED = 20_260_101
# Ten times what the daemon takes, and less than what a broker does.
MAX_BYTES = 200_000
START = datetime(2026, 1, 1, tzinfo=UTC)
LIMITS = LimitSettings(max_record_bytes=20_000, max_features=40, max_versions_per_model=4)
POLICY = PolicySettings(method="thresholds", for_windows=1)
MODELS = {
    "timed": ModelSettings(
        serving_version="1",
        reference_rows=500,
        label_horizon_seconds=300.0,
        window=WindowSettings(
            seconds=100.0, grace_seconds=10.0, min_rows=20, max_rows=600, idle_seconds=3_600
        ),
        policy=POLICY,
    ),
    "counted": ModelSettings(
        serving_version="1",
        reference_rows=500,
        window=WindowSettings(rows=300, min_rows=20, max_rows=300, idle_seconds=3_600),
        policy=POLICY,
    ),
}
MAPPED = FieldSettings(model="@header:model", id="@key", event_time="@timestamp", features="in.side")

Headers = list[tuple[str, bytes | None]]


class NoReviews:
    """Evidently has tests of its own."""

    def url_of(self, model: str, version: str, key: int) -> str:
        return ""

    def offer(self, judged: Judged, rows: WindowRows, wanted: bool) -> None: ...


class Message(msgspec.Struct):
    """What a producer sends. `place` is one of four logs, which read their records differently."""

    place: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int


class Fuzzer:
    """Valid records, most of them spoiled in one or several ways; the same seed gives the same ones."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._before = b"{}"
        self._spoilers: list[Callable[[bytes], bytes]] = [
            self._flip,
            self._truncate,
            self._insert,
            self._repeat,
            self._splice,
            self._recode,
        ]

    def messages(self, count: int) -> Iterator[Message]:
        """So many messages, in the order of the log."""
        for number in range(count):
            yield self._message(number)

    def _message(self, number: int) -> Message:
        place = self._chance.choices(("steady", "wild", "mapped", "labels"), (5, 2, 1, 2))[0]
        time = START + timedelta(seconds=number * 0.05)
        body, headers = self._body(place, number, time)
        key: bytes | None = f"r{number}".encode()
        milliseconds = int(time.timestamp() * 1_000)
        if self._chance.random() < 0.3:
            body = self._changed(body)
        value = self._written(body)
        if self._chance.random() < 0.3:
            value = self._spoiled(value)
        told = None if self._chance.random() < 0.01 else value[:MAX_BYTES]
        if self._chance.random() < 0.1:
            key = self._chance.choice([None, b"", b"\xff\xfe", b"null", b"1e999", self._bytes(40)])
        if self._chance.random() < 0.1:
            headers = self._other_headers(headers)
        # Stream time belongs to a partition: only there may a producer's clock be out of its mind.
        if place in ("wild", "mapped") and self._chance.random() < 0.05:
            milliseconds = self._chance.choice([0, 1, 2**31, 2**41, 2**53, 2**62, milliseconds * 1_000])
        return Message(place, key, told, headers, milliseconds)

    def _body(self, place: str, number: int, time: datetime) -> tuple[dict[str, Any], Headers]:
        model = "timed" if number % 3 else "counted"
        features = {"x": number * 7 % 50, "y": number % 11 / 7, "plan": "abc"[number % 3]}
        told: dict[str, Any] = {"model": model, "id": f"r{number}", "event_time": time.isoformat()}
        if place == "labels":
            # As labels are, of an earlier record.
            return told | {"id": f"r{max(0, number - 400)}", "label": number % 2}, []
        served = {"model_version": "1", "prediction": number % 2, "probability": 0.25, "segment": None}
        if place == "mapped":
            return served | {"in": {"side": features}}, [("model", model.encode())]
        return told | served | {"features": features}, []

    # --- what is said ----------------------------------------------------------------------------

    def _changed(self, body: dict[str, Any]) -> dict[str, Any]:
        """One to three of its fields, wherever they are: gone, of another kind, or too many of them."""
        for _ in range(self._chance.randint(1, 3)):
            inside = self._chance.choice([one for one in (body, *body.values()) if isinstance(one, dict)])
            name = self._chance.choice([*inside, self._text(), ""])
            what = self._chance.randrange(10)
            if what == 0:
                inside.pop(name, None)
            elif what == 1:
                inside |= {f"{name}{n}": n for n in range(self._chance.choice([2, 39, 45]))}
            elif what == 2 and "model_version" in body:
                body["model_version"] = self._chance.choice(
                    [f"v{self._chance.randrange(50)}", 2, 2.5, "\x00"]
                )
            elif what == 3 and "event_time" in body:
                body["event_time"] = self._time(body["event_time"])
            else:
                inside[name] = self._value()
        return body

    def _value(self) -> Any:
        nested: Any = self._chance.choice([[], {}, [1], "in"])
        for _ in range(self._chance.choice([1, 3, 60, 70])):
            nested = self._chance.choice([lambda inner: [inner], lambda inner: {"in": inner}])(nested)
        number = self._chance.choice([0, -1, 2**53 + 1, 2**63, -(2**63) - 1, 10**30, 10**400])
        real = self._chance.choice([0.0, -0.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")])
        return self._chance.choice([None, True, False, number, real, self._text(), nested])

    def _text(self) -> str:
        odd = ["", "\x00", "\ud800", "\udfff\ud800", "\u202egnol", "é" * 30, "🎈", "\ufeff", "a\nb", "%s{}"]
        return self._chance.choice([*odd, "x" * self._chance.choice([10, 201, 501, 25_000])])

    def _time(self, time: Any) -> Any:
        told = str(time)
        return self._chance.choice(
            [
                told[:19],
                told.replace("+00:00", "Z"),
                told.replace("+00:00", "+14:00"),
                told.replace("2026", self._chance.choice(["0001", "1969", "2199", "9999", "12026"])),
                told.replace("T", " "),
                1_767_225_600,
                1e300,
                -1,
                "2026-02-30T00:00:00Z",
                "2026-01-01T23:59:60Z",
                "2026-01-01T00:00:00.123456789Z",
            ]
        )

    # --- how it is written -----------------------------------------------------------------------

    def _written(self, body: dict[str, Any]) -> bytes:
        text = json.dumps(body, ensure_ascii=self._chance.random() < 0.5)
        if self._chance.random() < 0.03:
            # The same name twice, once with another value.
            name = self._chance.choice([*body, "model"])
            text = f"{{{json.dumps(name)}: {json.dumps(self._value())}, {text[1:]}"
        if self._chance.random() < 0.02:
            text = text.replace(": 1", f": {'9' * self._chance.choice([5, 400, 5_000])}", 1)
        return text.encode("utf-8", "surrogatepass")

    def _spoiled(self, value: bytes) -> bytes:
        for _ in range(self._chance.choice([1, 1, 1, 2, 5])):
            value, self._before = self._chance.choice(self._spoilers)(value), value
        return value

    def _flip(self, value: bytes) -> bytes:
        flipped = bytearray(value)
        for _ in range(self._chance.choice([1, 1, 2, 8])):
            if flipped:
                flipped[self._chance.randrange(len(flipped))] ^= 1 << self._chance.randrange(8)
        return bytes(flipped)

    def _truncate(self, value: bytes) -> bytes:
        return value[: self._chance.randint(0, len(value))]

    def _insert(self, value: bytes) -> bytes:
        at = self._chance.randint(0, len(value))
        odd = [b"\\u0000", b"\\ud800", b"\x00", b"\xff", b"[" * 80, b'"', b"}", b" ", self._bytes(8)]
        return value[:at] + self._chance.choice(odd) + value[at:]

    def _repeat(self, value: bytes) -> bytes:
        first, last = sorted(self._chance.randint(0, len(value)) for _ in range(2))
        return value[:last] + value[first:last] * self._chance.choice([1, 2, 50]) + value[last:]

    def _splice(self, value: bytes) -> bytes:
        return value[: self._chance.randint(0, len(value))] + self._before[len(self._before) // 2 :]

    def _recode(self, value: bytes) -> bytes:
        codec = self._chance.choice(["utf-16", "utf-8-sig", "utf-32-le", "utf-7"])
        return value.decode("utf-8", "replace").encode(codec)

    def _bytes(self, most: int) -> bytes:
        return self._chance.randbytes(self._chance.randint(0, most))

    def _other_headers(self, headers: Headers) -> Headers:
        odd: Headers = [
            ("model", None),
            ("model", b"\xff\xfe"),
            ("model", b"timed"),
            ("", b""),
            ("retrain-daemon.code", b"made up"),
            ("é" * 20, self._bytes(300)),
        ]
        return self._chance.choice([[], headers[:-1]]) + self._chance.choices(
            odd, k=self._chance.randint(0, 4)
        )


class Places:
    """Which topic and partition each of the fuzzer's logs is."""

    def __init__(self, predictions: str, mapped: str, labels: str, letters: str) -> None:
        self.of = {
            "steady": Partition(predictions, 0),
            "wild": Partition(predictions, 1),
            "mapped": Partition(mapped, 0),
            "labels": Partition(labels, 0),
        }
        self.kafka = KafkaSettings(
            topic=(predictions, mapped), labels_topic=labels, dead_letter_topic=letters, start="earliest"
        )
        self.fields = {predictions: FieldSettings(), mapped: MAPPED, labels: FieldSettings()}


class Reading:
    """The loop on a ledger that outlives it, and what became of the records by that ledger."""

    def __init__(self, folder: Path, places: Places) -> None:
        self._folder, self._places = folder, places
        self.ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")

    def loop(self, source: Source, letters: DeadLetters) -> Loop:
        """A new process, but for the memory."""
        labels = self._places.kafka.labels_topic
        return Loop(
            LoopSettings(
                group="g",
                member="m",
                mode="retrain",
                models=MODELS,
                limits=LIMITS,
                labels_topic=labels,
                checkpoint_seconds=1.0,
            ),
            source,
            make_decoder(self._places.fields, labels, list(MODELS), LIMITS),
            letters,
            self.ledger,
            StoredEngines(
                ReferenceStore(str(self._folder / "references")), MODELS, "compiled", EvidentlyWorker()
            ),
            NoReviews(),
        )

    def taken(self) -> int:
        """Predictions that are in a window that was judged, in an open one, or were counted as late."""
        judged = sum(one.seen for model in MODELS for one in self.ledger.evidence(model))
        windows = [
            version.state.windows
            for model in self.ledger.restore().models.values()
            for version in model.versions.values()
        ]
        waiting = sum(window.seen for state in windows for window in state.open)
        return judged + waiting + sum(state.late for state in windows)

    def judged(self, model: str) -> list[Judged]:
        """The windows of the version that is there from the beginning."""
        return [one for one in self.ledger.evidence(model) if one.version == "1"]


def last_words(count: int, places: Places) -> Iterator[Message]:
    """One good record for each log of predictions, so that no label has to wait for what never comes."""
    time = START + timedelta(seconds=count)
    for place in places.of.keys() - {"labels"}:
        body = {"model": "timed", "id": f"last-{place}", "event_time": time.isoformat(), "model_version": "1"}
        body |= {"prediction": 1, "features": {"x": 1}, "in": {"side": {"x": 1}}}
        milliseconds = int(time.timestamp() * 1_000)
        yield Message(place, b"last", json.dumps(body).encode(), [("model", b"timed")], milliseconds)


def stream(count: int, places: Places) -> Iterator[Message]:
    """The fuzzed messages, and the last words."""
    yield from Fuzzer(SEED).messages(count)
    yield from last_words(count, places)


def check_all(reading: Reading, counters: dict[str, int], sent: Counter[str], letters: Counter[str]) -> None:
    """Every record was read, and is taken or a dead letter; none is both, or neither."""
    dead = letters.total()
    assert counters["records"] == sent.total()
    assert counters["dead_letters"] == dead
    assert reading.taken() == sent["predictions"] - letters["predictions"]
    assert 0.2 < dead / sent.total() < 0.6, "there is a good deal of both"
    assert len(reading.judged("timed")) > sent.total() / 2_500, "windows were judged beside it"
    assert len(reading.judged("counted")) > sent.total() / 50_000


@pytest.mark.parametrize("records", [50_000, pytest.param(RECORDS, marks=pytest.mark.slow)])
def test_each_of_so_many_is_taken_or_a_dead_letter(tmp_path: Path, records: int) -> None:
    configure(LogSettings(level="error"))
    places = Places("predictions", "mapped", "labels", "letters")
    log, letters, sent = MemoryLog(), MemoryDeadLetters(), Counter[str]()
    for topic, partitions in (("predictions", 2), ("mapped", 1), ("labels", 1)):
        log.create(topic, partitions)
    reading = Reading(tmp_path, places)
    loop = reading.loop(source := MemorySource(log, places.kafka), letters)
    for number, message in enumerate(stream(records, places)):
        sent["labels" if message.place == "labels" else "predictions"] += 1
        log.append(
            places.of[message.place],
            message.value,
            key=message.key,
            headers=tuple(message.headers),
            timestamp_ms=message.timestamp_ms,
        )
        if number % 1_000 == 999:
            loop.run_once(0.0)
        if (number + 1) % (records // 4) == 0:
            # Whatever was taken has to come back from the ledger, too.
            loop._checkpoint(Result())
            source.close()
            loop = reading.loop(source := MemorySource(log, places.kafka), letters)
    run_to_the_end(loop, source)

    codes = Counter(error.code for _, error in letters.stored)
    assert codes.keys() == CODES.keys() | set(MONITOR_CODES), "the fuzzer reaches every reason there is"
    kinds = Counter(kind_of(raw.partition, places) for raw, _ in letters.stored)
    check_all(reading, reading.ledger.counters(), sent, kinds)
    offsets = {(raw.partition, raw.offset) for raw, _ in letters.stored}
    assert len(offsets) == len(letters.stored)
    reading.ledger.close()


@pytest.mark.slow
@pytest.mark.kafka
def test_each_of_a_hundred_thousand_is_so_on_a_broker_too(kafka: Any, tmp_path: Path) -> None:
    configure(LogSettings(level="error"))
    # A broker refuses records from the future unless it is told not to.
    patient = {"message_timestamp_after_max_ms": str(2**63 - 1)}
    predictions, mapped, labels, dead = (
        kafka.topic(2, **patient),
        *(kafka.topic(1, **patient) for _ in range(2)),
        kafka.topic(),
    )
    places = Places(predictions, mapped, labels, dead)
    settings = kafka.settings(
        topic=places.kafka.topic, labels_topic=labels, dead_letter_topic=dead, session_timeout_seconds=30.0
    )
    sent = write(settings, list(stream(RECORDS, places)), places)
    reading = Reading(tmp_path, places)
    source, stored = KafkaSource(settings), KafkaDeadLetters(settings)
    run_to_the_end(reading.loop(source, stored), source)
    stored.close()
    source.close()

    headers = list(letters_of(settings))
    kinds = Counter(kind_of(Partition(told["topic"], int(told["partition"])), places) for told in headers)
    check_all(reading, reading.ledger.counters(), sent, kinds)
    found = {(told["topic"], told["partition"], told["offset"]) for told in headers}
    assert len(found) == len(headers), "each says where it was read"
    assert {told["code"] for told in headers} == CODES.keys() | set(MONITOR_CODES)
    reading.ledger.close()


def run_to_the_end(loop: Loop, source: Source) -> None:
    """Until there is nothing left to read, for some cycles, and then a last checkpoint."""
    quiet = 0
    for _ in range(5_000):
        loop.run_once(0.05)
        quiet = quiet + 1 if loop._next and source.drained().issuperset(loop._next) else 0
        if quiet == 3:
            break
    loop._checkpoint(Result())
    assert quiet == 3 and not loop._held, "everything was read in time"


def kind_of(partition: Partition, places: Places) -> str:
    return "labels" if partition.topic == places.kafka.labels_topic else "predictions"


def write(settings: KafkaSettings, messages: Sequence[Message], places: Places) -> Counter[str]:
    """Send everything and count what the broker has; what a client cannot send is given a value."""
    producer, sent = make_producer(settings), Counter[str]()
    for message in messages:
        partition = places.of[message.place]
        key = b"" if message.key is None and message.value is None else message.key
        producer.send(
            partition.topic,
            key=key,
            value=message.value,
            partition=partition.index,
            headers=[(name, value or b"") for name, value in message.headers],  # as kafka-python wants them
            timestamp_ms=message.timestamp_ms,
        )
        sent[kind_of(partition, places)] += 1
    producer.flush()
    producer.close()
    stored = sum(end for topic in places.fields for _, end in log_bounds(settings, topic).values())
    assert stored == sent.total() == len(messages)
    return sent


def letters_of(settings: KafkaSettings) -> Iterator[dict[str, str]]:
    """Our headers of each dead letter; those that the record came with are behind them."""
    ranges = [
        OffsetRange(partition.topic, partition.index, first, end)
        for partition, (first, end) in log_bounds(settings, settings.dead_letter_topic).items()
    ]
    for raw in read_ranges(settings, ranges):
        told = dict(reversed(raw.headers))
        yield {
            name.removeprefix("retrain-daemon."): value.decode()
            for name, value in told.items()
            if name.startswith("retrain-daemon.") and value is not None
        }
