"""Ten thousand bad records among good ones: nothing falls over, nothing is lost, windows are the same."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from daemon.engines import StoredEngines
from daemon.evidently_worker import EvidentlyWorker
from daemon.ledger import Ledger
from daemon.loop import Loop, LoopSettings
from daemon.wire.kafka import KafkaSource, log_bounds, read_ranges
from daemon.wire.kafka_client import make_producer
from daemon.wire.kafka_dead_letters import KafkaDeadLetters
from daemon.wire.references import ReferenceStore
from monitors.decoding import make_decoder
from monitors.drift import WindowRows
from monitors.episodes import Judged
from monitors.events import OffsetRange
from monitors.settings import (
    FieldSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    PolicySettings,
    WindowSettings,
)

pytestmark = pytest.mark.kafka

START = datetime(2026, 1, 1, tzinfo=UTC)
GOOD, BAD = 2_000, 10_000
LIMITS = LimitSettings(max_record_bytes=200_000, max_versions_per_model=4)
MODEL = ModelSettings(
    serving_version="1",
    reference_rows=400,
    window=WindowSettings(seconds=100.0, grace_seconds=0.0, min_rows=20),
    policy=PolicySettings(method="thresholds", for_windows=1),
)


class NoReviews:
    """Evidently has tests of its own."""

    def url_of(self, model: str, version: str, key: int) -> str:
        return ""

    def offer(self, judged: Judged, rows: WindowRows, wanted: bool) -> None: ...


def good_record(number: int) -> dict[str, Any]:
    drifted = number >= 1_500
    return {
        "model": "fraud",
        "model_version": "1",
        "id": f"r{number}",
        "event_time": (START + timedelta(seconds=number)).isoformat(),
        "features": {"x": number * 7 % 50 + (60 if drifted else 0), "plan": "ab"[number % 2]},
        "prediction": number % 2,
    }


def bad_values(chance: random.Random) -> Iterator[bytes]:
    """Garbage, cut-off records, hostile ones and enormous ones, each kind as often as the next."""
    record = good_record(0)
    whole = json.dumps(record).encode()

    def changed(**fields: object) -> bytes:
        return json.dumps(record | fields).encode()

    kinds: list[Callable[[int], bytes]] = [
        lambda _: chance.randbytes(chance.randrange(1, 300)),
        lambda _: whole[: chance.randrange(1, len(whole))],
        lambda number: changed(model=f"unknown-{number}"),
        lambda _: changed(event_time="2190-01-01T00:00:00+00:00"),
        lambda _: changed(features=[1, 2, 3]),
        lambda _: b"[" * chance.randrange(100, 5_000),
        lambda number: changed(event_time=number),
        lambda number: b'{"model": "' + b"x" * (250_000 if number % 400 == 7 else 10),
    ]
    for number in range(BAD):
        yield kinds[number % len(kinds)](number)


def many_versions(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield json.dumps(good_record(0) | {"model_version": f"made-up-{number}"}).encode()


def write(settings: KafkaSettings, values: list[bytes]) -> None:
    producer = make_producer(settings)
    for value in values:
        producer.send(settings.topics[0], value=value, partition=0, key=b"fraud")
    producer.flush()
    producer.close()


def judge(settings: KafkaSettings, folder: Path) -> tuple[list[Judged], dict[str, int]]:
    """Read the whole topic; returns what was decided about version 1, and the counters."""
    source = KafkaSource(settings)
    ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
    store = ReferenceStore(str(folder / "references"))
    models = {"fraud": MODEL}
    loop = Loop(
        LoopSettings(
            group=settings.group,
            member="m",
            mode="retrain",
            models=models,
            limits=LIMITS,
            labels_topic="",
            checkpoint_seconds=1.0,
        ),
        source,
        make_decoder({settings.topics[0]: FieldSettings()}, "", ["fraud"], LIMITS),
        KafkaDeadLetters(settings),
        ledger,
        StoredEngines(store, models, "compiled", EvidentlyWorker()),
        NoReviews(),
    )
    for _ in range(400):
        loop.run_once(0.2)
        if loop.owner.is_set() and source.drained():
            break
    loop._checkpoint(loop.run_once(0.2))
    source.close()
    judged = [one for one in ledger.evidence("fraud") if one.version == "1"]
    counters = ledger.counters()
    ledger.close()
    return judged, counters


def dead_letters(settings: KafkaSettings) -> list[dict[str, bytes | None]]:
    ranges = [
        OffsetRange(partition.topic, partition.index, first, end)
        for partition, (first, end) in log_bounds(settings, settings.dead_letter_topic).items()
    ]
    return [dict(raw.headers) | {"value": raw.value} for raw in read_ranges(settings, ranges)]


def without_offsets(judged: list[Judged]) -> list[tuple[object, ...]]:
    return [(one.key, one.start, one.end, one.seen, one.report, one.decision) for one in judged]


def test_hostile_records_change_no_window_and_none_is_lost(kafka: Any, tmp_path: Path) -> None:
    chance = random.Random(3)
    clean = kafka.settings(topic=kafka.topic(), dead_letter_topic=kafka.topic())
    hostile = kafka.settings(topic=kafka.topic(), dead_letter_topic=kafka.topic())
    good = [json.dumps(good_record(number)).encode() for number in range(GOOD)]
    bad = [*bad_values(chance), *many_versions(3_000)]
    # In a log the good ones stay in order, and the bad ones are anywhere.
    mixed = [(chance.random(), value) for value in bad]
    mixed += [(number / GOOD, value) for number, value in enumerate(good)]
    write(clean, good)
    write(hostile, [value for _, value in sorted(mixed, key=lambda entry: entry[0])])

    (tmp_path / "clean").mkdir()
    (tmp_path / "hostile").mkdir()
    expected, _ = judge(clean, tmp_path / "clean")
    found, counters = judge(hostile, tmp_path / "hostile")

    assert without_offsets(found) == without_offsets(expected)
    assert len(expected) > 15
    letters = dead_letters(hostile)
    assert counters["records"] == GOOD + len(bad)
    admitted = LIMITS.max_versions_per_model
    assert len(letters) == counters["dead_letters"] == len(bad) - admitted
    codes = Counter((letter["retrain-daemon.code"] or b"").decode() for letter in letters)
    assert codes["too_many_versions"] == 3_000 - admitted
    assert codes["unknown_model"] >= BAD // 8
    assert codes["too_far_ahead"] >= BAD // 8
    assert codes["too_large"] == BAD // 400
    places = {(letter["retrain-daemon.partition"], letter["retrain-daemon.offset"]) for letter in letters}
    assert len(places) == len(letters), "each says where it was read"
