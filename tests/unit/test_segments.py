"""Segments: where a shift is concentrated, and where performance has fallen, is said in numbers and names."""

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from daemon.evidently_worker import EvidentlyEngine, EvidentlyWorker
from daemon.explain import NoOneElse, explain, lines
from monitors import budget
from monitors.baseline import Baseline
from monitors.drift_engine import CompiledReference, compile_reference
from monitors.episodes import Circumstances, ModelState
from monitors.events import Event
from monitors.losses import LossState
from monitors.performance import Labels, Patience, PendingWindow, Performance, SegmentLoss
from monitors.records import Partition, PredictionRecord, Scalar
from monitors.reference import InvalidReference, Reference
from monitors.segments import LONGEST_NAME, MOST_NAMED, OTHERS, Segments
from monitors.settings import DriftSettings, ModelSettings, PolicySettings, QualitySettings, WindowSettings

START = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
AROUND = Circumstances("cluster|g", "observe")


def test_of_very_many_segments_the_largest_are_told_apart() -> None:
    named = [f"s{number % 100:02}" for number in range(1_000)] + ["s99"] * 50 + [None, ""]
    segments = Segments.of(named)
    assert segments.names == ("s99", *(f"s{number:02}" for number in range(MOST_NAMED - 1)), OTHERS)
    parts = dict(segments.parts())
    assert len(parts["s99"]) == 60 and len(parts[OTHERS]) == 1_050 - 60 - 19 * 10
    assert sum(map(len, parts.values())) == 1_050, "rows without a segment are in none"
    assert not segments.complete


def test_names_of_segments_are_cut_and_none_can_pass_for_the_rest() -> None:
    long, odd = "x" * 1_000, Segments.of([OTHERS, "eu", "x" * 1_000])
    assert odd.names == ("eu", long[:LONGEST_NAME], OTHERS)
    assert dict(odd.parts())[OTHERS] == [0]
    assert Segments.of([None, ""]) == Segments()


# Drift


def rows(
    count: int, value: Callable[[int], Scalar], segment: Callable[[int], str | None]
) -> list[PredictionRecord]:
    place = Partition("p", 0)
    return [
        PredictionRecord(
            "m", "1", str(i), START, {"a": value(i), "b": i % 7}, i % 2, place, i, segment=segment(i)
        )
        for i in range(count)
    ]


def compiled(before: Sequence[PredictionRecord], named: bool = True) -> CompiledReference:
    reference = Reference.from_rows(
        "m",
        "1",
        [row.features for row in before],
        [row.prediction for row in before],
        DriftSettings(),
        segments=[row.segment for row in before] if named else (),
    )
    stored = Reference.from_bytes(reference.to_bytes())
    assert stored == reference
    return compile_reference(stored, DriftSettings(), QualitySettings(), "classification")


def country(number: int) -> str:
    """Three segments: half of the rows, 30 % and 20 %."""
    return "dddddeeeff"[number % 10]


def price(number: int) -> float:
    """They differ for good: f is dearer by far."""
    return float(number * 13 % 101) + (200.0 if country(number) == "f" else 0.0)


BEFORE = rows(2_000, price, country)


def located(now: list[PredictionRecord], columns: Sequence[str] = ("a",)) -> list[tuple[str, str]]:
    return [(one.column, one.segment) for one in compiled(BEFORE).locate(now, columns)]


def test_a_shift_of_one_segment_is_found_there_and_by_how_much() -> None:
    now = rows(1_000, lambda i: price(i) + (60.0 if country(i) == "e" else 0.0), country)
    (found,) = compiled(BEFORE).locate(now, ("a",))
    assert (found.column, found.segment, found.rows) == ("a", "e", 300)
    assert found.effect > 0.3 and found.share > 0.95
    assert located(now, ("b", "gone")) == []


@pytest.mark.parametrize(
    ("large", "small", "named"),
    [(40.0, 0.0, ["d"]), (0.0, 40.0, ["e"]), (40.0, 15.0, ["d"]), (40.0, 40.0, []), (40.0, 30.0, [])],
)
def test_a_segment_is_named_that_moved_twice_as_far_as_the_rest(
    large: float, small: float, named: list[str]
) -> None:
    """Also one of seven rows in ten, whose share of the shift can't be much larger than that of the rows."""

    def moved(count: int, by_large: float, by_small: float) -> list[PredictionRecord]:
        return rows(
            count,
            lambda i: i * 13 % 101 + (by_large if i % 10 < 7 else by_small),
            lambda i: "d" if i % 10 < 7 else "e",
        )

    found = compiled(moved(2_000, 0.0, 0.0)).locate(moved(1_000, large, small), ("a",))
    assert [one.segment for one in found] == named


def test_of_one_segment_alone_nothing_is_said() -> None:
    alone = compiled(rows(2_000, price, lambda i: "d"))
    assert alone.locate(rows(1_000, lambda i: price(i) + 60.0, lambda i: "d"), ("a",)) == ()


def test_segments_that_are_unlike_each_other_are_not_taken_for_a_shift() -> None:
    assert located(rows(1_000, price, country)) == []
    everywhere = rows(1_000, lambda i: price(i) - 40.0, country)
    assert located(everywhere) == [], "it comes from all of them alike"


def test_a_segment_that_is_new_is_held_against_all_of_the_reference() -> None:
    new = rows(
        1_000,
        lambda i: price(i) + (250.0 if i % 10 == 0 else 0.0),
        lambda i: "br" if i % 10 == 0 else country(i),
    )
    assert located(new) == [("a", "br")]
    many = compiled(rows(2_000, price, lambda i: f"s{i % 30}"))
    assert many.locate(new, ("a",)) == (), "it may have been one of those that were pooled"


def test_where_nobody_names_segments_nothing_is_said() -> None:
    now = rows(1_000, lambda i: price(i) + (60.0 if country(i) == "e" else 0.0), country)
    assert compiled(BEFORE, named=False).locate(now, ("a",)) == ()
    nowhere = [msgspec.structs.replace(row, segment=None) for row in now]
    assert compiled(BEFORE).locate(nowhere, ("a",)) == ()


def test_a_shift_of_categories_and_of_predictions_is_found_too() -> None:
    before = rows(2_000, lambda i: "xyz"[i * 13 % 101 % 3], country)
    now = [
        msgspec.structs.replace(row, features={"a": "x"}, prediction=1) if row.segment == "f" else row
        for row in before[:1_000]
    ]
    found = compiled(before).locate(now, ("a", "prediction"))
    assert [(one.column, one.segment) for one in found] == [("a", "f"), ("prediction", "f")]


def test_rows_in_another_order_are_located_alike() -> None:
    now = rows(1_000, lambda i: price(i) + (60.0 if country(i) == "e" else 0.0), country)
    one, other = compiled(BEFORE).locate(now, ("a",)), compiled(BEFORE).locate(now[::-1], ("a",))
    assert one == other


def test_an_engine_whose_scores_are_evidentlys_locates_alike() -> None:
    now = rows(1_000, lambda i: price(i) + (60.0 if country(i) == "e" else 0.0), country)
    features, predictions = [row.features for row in BEFORE], [row.prediction for row in BEFORE]
    segments = [row.segment for row in BEFORE]
    reference = Reference.from_rows("m", "1", features, predictions, DriftSettings(), segments=segments)
    terms = DriftSettings(), QualitySettings(), "classification"
    engine = EvidentlyEngine(EvidentlyWorker(), reference.to_bytes(), *terms)
    assert engine.locate(now, ("a",)) == compiled(BEFORE).locate(now, ("a",)) != ()


def test_a_reference_of_before_has_no_segments_and_one_of_other_rows_is_refused() -> None:
    reference = Reference.from_rows("m", "1", [{"a": 1.0}] * 3, [0] * 3, DriftSettings(), segments=["eu"] * 3)
    old = msgspec.msgpack.decode(reference.to_bytes())
    del old["segments"]
    text = msgspec.msgpack.encode(old)
    assert Reference.from_bytes(text).segments is msgspec.UNSET
    assert Reference.from_bytes(text).to_bytes() == text, "and its digest is what it was"
    nowhere = Reference.from_rows("m", "1", [{"a": 1.0}] * 3, [0] * 3, DriftSettings(), segments=[None] * 3)
    assert nowhere.to_bytes() == text
    odd = msgspec.structs.replace(reference, segments=Segments.of(["eu"]))
    with pytest.raises(InvalidReference, match="segments are not those of its rows"):
        Reference.from_bytes(odd.to_bytes())
    with pytest.raises(InvalidReference, match="3 rows came with 2 segments"):
        Reference.from_rows("m", "1", [{"a": 1.0}] * 3, [0] * 3, DriftSettings(), segments=["eu"] * 2)


# Performance


def judged(window: PendingWindow | None = None) -> Performance:
    """Ten rows: e is wrong in two of three, d in none of five; f has no label, one row no segment."""
    labels = Labels("classification", 10, Patience(HOUR, HOUR, 1_000))
    named = ["d", "d", "d", "d", "d", "e", "e", "e", "f", None]
    wrong = {5, 6, 9}
    labels.expect(
        "1",
        0,
        START,
        START + HOUR,
        [
            msgspec.structs.replace(
                row, segment=named[i], prediction=1, label=None if i == 8 else i not in wrong
            )
            for i, row in enumerate(rows(10, float, country))
        ],
    )
    if window is not None:
        labels = Labels("classification", 10, Patience(HOUR, HOUR, 1_000))
        labels.restore([window], [], 0)
    labels.pass_labels(START + 9 * HOUR)
    (found,) = labels.take_judged()
    return found


def test_a_second_judgement_has_the_loss_of_each_segment() -> None:
    assert judged().segments == (SegmentLoss("d", 5, 0.0), SegmentLoss("e", 3, pytest.approx(2 / 3)))
    assert judged().labelled == 9


def test_a_window_that_waited_since_before_segments_were_kept_is_judged_without() -> None:
    """As the schema before wrote it: the field is not there."""
    new = PendingWindow("1", 0, START + HOUR, {"a": 1, "b": 1}, {"a": 1, "b": 0}, START)
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(new))
    del old["segments"]
    found = judged(msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=PendingWindow))
    assert (found.labelled, found.loss, found.segments) == (2, 0.5, ())


SETTINGS = ModelSettings(policy=PolicySettings(windows_between_false_retrainings=20.0))


class Labelled:
    """The labelled windows of a model, whose loss was 0.1 when it was made."""

    def __init__(self) -> None:
        self.state = ModelState(serving="1", losses=LossState(level=Baseline(0.1, 0.3, 5_000)))
        self.number = 0
        self.events: list[Event] = []

    def window(self, **losses: float) -> None:
        """One window in which each segment has 200 rows and this loss."""
        start = START + self.number * HOUR
        parts = tuple(SegmentLoss(name, 200, loss) for name, loss in losses.items())
        performance = Performance(
            version="1",
            key=self.number,
            metric="accuracy",
            score=None,
            labelled=200 * len(parts),
            unlabelled=0,
            loss=sum(losses.values()) / len(losses),
            deviation=0.3,
            start=start,
            end=start + HOUR,
            segments=parts,
        )
        self.number += 1
        self.state, told = budget.on_performance(AROUND, SETTINGS, "m", self.state, performance)
        self.events += told

    @property
    def fall(self) -> list[dict[str, Any]]:
        """What the event says of segments."""
        (event,) = self.events
        assert event.payload["signal"] == "performance"
        return list(event.payload["segments"])


def test_a_fall_names_the_segments_that_fell_and_by_how_much() -> None:
    life = Labelled()
    for _ in range(5):
        life.window(d=0.05, e=0.15, f=0.1)
    for _ in range(3):
        life.window(d=0.05, e=0.25, f=0.5)
    assert [one["segment"] for one in life.fall] == ["f", "e"], "what adds most to it comes first"
    first = life.fall[0]
    assert first["loss"] == pytest.approx(0.5) and first["baseline"] == pytest.approx(0.1)
    assert first["rows"] in (200, 400)
    assert len(json.dumps(life.fall)) < 300


def test_a_segment_that_was_always_bad_is_not_named() -> None:
    life = Labelled()
    for _ in range(5):
        life.window(d=0.0, e=0.2)
    for _ in range(3):
        life.window(d=0.4, e=0.2)
    assert [one["segment"] for one in life.fall] == ["d"]


def test_a_segment_that_came_with_the_fall_has_no_baseline() -> None:
    life = Labelled()
    for _ in range(5):
        life.window(d=0.1)
    for _ in range(3):
        life.window(d=0.1, br=0.7)
    (only,) = life.fall
    assert (only["segment"], only["baseline"]) == ("br", None)


def test_an_excursion_that_was_chance_counts_for_the_level_and_a_real_one_does_not() -> None:
    life = Labelled()
    life.window(d=0.11)
    assert life.state.losses.windows == ()
    life.window(d=0.125)
    assert len(life.state.losses.windows) == len(life.state.segment_losses.windows) == 1
    life.window(d=0.0)
    assert life.state.segment_losses.windows == ()
    (level,) = life.state.segment_losses.levels
    assert (level.rows, level.loss) == (600, pytest.approx((0.11 + 0.125 + 0.0) / 3))
    for _ in range(4):
        life.window(d=0.6)
    assert life.state.losses.fallen
    for _ in range(12):
        life.window(d=0.0)
    assert not life.state.losses.fallen
    (level,) = life.state.segment_losses.levels
    assert level.loss < 0.1


def test_what_is_kept_of_segments_is_bounded() -> None:
    life = Labelled()
    for number in range(300):
        life.window(**{f"s{number}-{part}": 0.05 for part in range(3)}, d=0.05)
    assert len(life.state.segment_losses.levels) == 40
    assert life.state.segment_losses.levels[0].rows <= 60_000
    for _ in range(100):
        life.window(**{f"s{part}": 0.5 for part in range(20)})
    assert len(life.state.segment_losses.windows) == 32
    assert len(msgspec.msgpack.encode(life.state.segment_losses)) < 40_000


# From the log to the explanation


BY_BUDGET = ModelSettings(
    reference_rows=200,
    label_horizon_seconds=1_000.0,
    window=WindowSettings(seconds=100.0, grace_seconds=0.0, min_rows=10, max_rows=100),
    policy=PolicySettings(windows_between_false_retrainings=10.0, baseline_windows=2),
)


@pytest.fixture
def segmented(watched: Any) -> Iterator[Any]:
    watched.model = BY_BUDGET
    yield watched


def predict(world: Any, first: int, count: int, shift: float = 0.0) -> None:
    """A row a second, in three segments; `shift` is of segment e alone."""
    for number in range(first, first + count):
        moved = shift if country(number) == "e" else 0.0
        world.write(
            "predictions",
            number,
            {
                "model_version": "1",
                "id": f"r{number}",
                "features": {"x": number * 7 % 50 + moved, "y": number * 3 % 40},
                "prediction": 1,
                "segment": country(number),
            },
        )


def label(world: Any, first: int, count: int, wrong: str = "") -> None:
    """One row in ten is wrong, and all of the segments named."""
    for number in range(first, first + count):
        right = number % 10 and country(number) not in wrong
        world.write("labels", first + count, {"id": f"r{number}", "label": int(bool(right))})


def explained(member: Any) -> tuple[dict[str, Any], str]:
    told = explain(member.ledger, ["fraud"], "fraud:1", NoOneElse())
    return told, "\n".join(lines(told))


def test_a_drift_in_one_segment_is_in_the_event_the_ledger_and_the_explanation(segmented: Any) -> None:
    member = segmented.member()
    predict(segmented, 0, 600)
    predict(segmented, 600, 500, shift=80.0)
    member.cycles()
    (event,) = [json.loads(row["body"]) for row in member.ledger.events() if "detected" in row["kind"]]
    payload = event["payload"]
    assert payload["columns"][0]["column"] == payload["moved"][0]["column"] == "x"
    (found,) = payload["segments"]
    assert (found["column"], found["segment"]) == ("x", "e") and found["effect"] > 1.0
    stored = [judged.segments for judged in member.ledger.evidence("fraud") if judged.segments]
    assert [one.segment for one in stored[0]] == ["e"]
    calm = member.ledger.windows("fraud")[3]["evidence"]
    assert "segments" not in calm, "evidence is written as it was before, or verify would tell"
    told, text = explained(member)
    assert told["detected"]["segments"] == payload["segments"]
    assert "segment e: x moved +" in text


def test_a_fall_in_one_segment_outlives_a_restart_and_is_explained(segmented: Any) -> None:
    member = segmented.member()
    predict(segmented, 0, 1_001)
    member.cycles()
    segmented.log.members.clear()
    second = segmented.member()
    second.cycles(1)
    label(segmented, 200, 400)
    label(segmented, 600, 300, wrong="e")
    segmented.write("labels", 3_000, {"id": "none", "label": 1})
    second.cycles()
    (event,) = [json.loads(row["body"]) for row in second.ledger.events() if "detected" in row["kind"]]
    assert event["payload"]["signal"] == "performance"
    (fallen,) = event["payload"]["segments"]
    assert (fallen["segment"], fallen["loss"], fallen["baseline"]) == ("e", 1.0, pytest.approx(0.0))
    told, text = explained(second)
    window = next(one for one in told["windows"] if one["performance"])
    assert {one["segment"]: one["rows"] for one in window["performance"]["segments"]} == {
        "d": 50,
        "e": 30,
        "f": 20,
    }
    assert "segment e: loss 1, 0 before, 30 rows" in text
    assert "loss      d 0.2 (50), e 1 (30), f 0 (20)" in text
