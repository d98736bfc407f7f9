"""A window is held against its like: the rows of the same slot of the season."""

import math
from datetime import UTC, datetime, timedelta

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors.drift_engine import compile_reference
from monitors.evidence import CERTIFYING_WINDOWS, EvidenceState, observe
from monitors.records import Partition, PredictionRecord
from monitors.reference import InvalidReference, Reference
from monitors.seasons import Season, microseconds_of
from monitors.settings import DriftSettings, QualitySettings
from monitors.shifts import Calendar, NumericYardstick, Shift
from monitors.statistics import long_run_deviation, seasonal_deviation

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = DriftSettings(season_seconds=86_400.0, season_slots=24)
ROWS = 100

moments = st.integers(-(10**15), 7 * 10**15).map(lambda one: START + timedelta(microseconds=one))
seasons = st.builds(Season, st.floats(1.0, 4e7), st.integers(2, 10_000))


@settings(max_examples=300, deadline=None)
@given(season=seasons, moment=moments)
def test_a_slot_is_the_same_of_one_time_and_of_many(season: Season, moment: datetime) -> None:
    slot = season.slot_of(moment)
    assert 0 <= slot < season.slots
    assert season.slots_of(microseconds_of([moment])).tolist() == [slot]


@settings(max_examples=300, deadline=None)
@given(minutes=st.integers(1, 10_080), slots=st.integers(2, 500), moment=moments, later=st.integers(0, 50))
def test_slots_come_round_again_and_in_order(minutes: int, slots: int, moment: datetime, later: int) -> None:
    season = Season(60.0 * minutes, slots)
    assert season.slot_of(moment + later * timedelta(minutes=minutes)) == season.slot_of(moment)
    next_one = season.slot_of(moment + timedelta(seconds=season.seconds / slots))
    assert (next_one - season.slot_of(moment)) % slots in (0, 1, 2)


def test_a_slot_begins_with_its_own_first_microsecond() -> None:
    day = Season(86_400.0, 24)
    for at in range(48):
        begin = START + timedelta(hours=at)
        assert day.slot_of(begin) == at % 24
        assert day.slot_of(begin - timedelta(microseconds=1)) == (at - 1) % 24


def test_without_both_keys_there_is_no_season() -> None:
    assert Season.of(DriftSettings()) is None
    assert Season.of(DAY) == Season(86_400.0, 24)


def hour(at: int) -> float:
    """What the season does to the rows of an hour."""
    return 3.0 * math.sin(2.0 * math.pi * at / 24.0)


def rows_of(at: int, random: np.random.Generator, moved: float = 0.0) -> np.ndarray:
    return random.standard_normal(ROWS) + hour(at) + moved


class World:
    """One column whose mean follows the day; the reference holds the first `known` hours."""

    def __init__(self, known: int, slots: bool = True, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        values = np.concatenate([rows_of(at, self._random) for at in range(known)])
        season = Season(86_400.0, 24)
        calendar = Calendar(season, np.repeat(np.arange(known) % 24, ROWS)) if slots else None
        self._yardstick = NumericYardstick.of(values, calendar)
        self.state, self._slots, self._hour = EvidenceState(), slots, known

    def hours(self, count: int, moved: float = 0.0) -> list[float]:
        """The evidence after each of the next hours."""
        found = []
        for _ in range(count):
            values = rows_of(self._hour, self._random, moved)
            shifts = self._yardstick.measure("x", values, self._hour % 24 if self._slots else -1)
            self.state, evidence = observe(self.state, shifts, 100.0)
            self._hour += 1
            found.append(evidence.value)
        return found


@pytest.mark.parametrize("known", [5, 24, 60])
def test_a_season_is_no_drift_where_it_has_slots(known: int) -> None:
    assert max(World(known).hours(200)) < 100.0
    if known == 5:
        assert max(World(known, slots=False).hours(24)) >= 100.0


@pytest.mark.parametrize("known", [5, 24, 60])
def test_a_shift_beside_the_season_is_found(known: int) -> None:
    world = World(known)
    assert max(world.hours(96)) < 100.0
    assert max(world.hours(6, moved=0.8)) >= 100.0


def test_a_slot_that_nobody_has_seen_is_learned_and_says_nothing() -> None:
    world = World(5)
    before = world.hours(1)[0]
    assert world.hours(10, moved=50.0)[-1] == before


def shift(slot: int, value: float, rows: int = 100, season: str = "86400/24") -> Shift:
    return Shift("x", "location", value, rows, 0.0, 0, 1.0, 0.1, slot=slot, season=season)


def played(state: EvidenceState, *windows: Shift) -> tuple[EvidenceState, float, bool]:
    value, certified = 0.0, False
    for one in windows:
        state, evidence = observe(state, [one], 100.0)
        value, certified = evidence.value, evidence.certified
    return state, value, certified


def test_slots_of_another_season_mean_nothing() -> None:
    taught, *_ = played(EvidenceState(), *[shift(3, 0.0)] * 10)
    assert played(taught, shift(3, 2.0))[1] >= 100.0
    assert played(taught, shift(3, 2.0, season="604800/24"))[1] < 100.0


def test_a_window_of_a_new_slot_is_not_certified() -> None:
    taught, _, certified = played(EvidenceState(), *[shift(3, 0.0)] * (CERTIFYING_WINDOWS + 8))
    assert certified
    assert not played(taught, shift(4, 0.0))[2]


def test_windows_of_new_slots_do_not_tell_how_much_windows_vary() -> None:
    taught, *_ = played(EvidenceState(), *[shift(slot, 0.0) for slot in range(CERTIFYING_WINDOWS + 10)])
    assert not played(taught, shift(0, 0.0))[2]


def test_the_season_is_taken_out_of_what_rows_vary_by() -> None:
    random = np.random.default_rng(1)
    series = np.concatenate([rows_of(at, random) for at in range(72)])
    slots = np.repeat(np.arange(72) % 24, ROWS)
    assert long_run_deviation(series) > 5.0
    assert 0.9 < seasonal_deviation(series, slots) < 1.5


def test_a_slot_whose_rows_vary_more_is_held_against_that() -> None:
    random = np.random.default_rng(2)
    values, wide = random.standard_normal(24 * ROWS), random.uniform(-3.0, 3.0, ROWS)
    calendar = Calendar(Season(86_400.0, 24), np.repeat(np.arange(24), ROWS))
    seasonal, plain = NumericYardstick.of(values, calendar), NumericYardstick.of(values)
    calm, spread = (seasonal.measure("x", rows, 3)[0].unit for rows in (values[:ROWS] / 2, wide))
    assert spread > 1.3 * calm
    assert plain.measure("x", wide)[0].unit == plain.measure("x", values[:ROWS])[0].unit


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    slots=st.integers(1, 12),
    where=st.integers(0, 2**31),
)
def test_a_seasonal_deviation_is_a_finite_number(values: list[float], slots: int, where: int) -> None:
    series = np.array(values)
    places = np.random.default_rng(where).integers(0, slots, series.size)
    found = seasonal_deviation(series, places)
    assert math.isfinite(found) and found >= 0.0


@settings(max_examples=60, deadline=None)
@given(
    windows=st.lists(
        st.tuples(st.integers(0, 5), st.floats(-1.0, 1.0), st.integers(1, 500), st.integers(0, 300)),
        min_size=1,
        max_size=40,
    )
)
def test_whatever_slots_bring_evidence_stays_a_number_and_outlives_its_checkpoint(
    windows: list[tuple[int, float, int, int]],
) -> None:
    state = kept = EvidenceState()
    for slot, value, rows, known in windows:
        one = msgspec.structs.replace(shift(slot, value, rows), reference_rows=known)
        state, evidence = observe(state, [one], 100.0)
        kept, same = observe(msgspec.json.decode(msgspec.json.encode(kept), type=EvidenceState), [one], 100.0)
        assert math.isfinite(evidence.value) and evidence.value >= 0.0
        assert (kept, same) == (state, evidence)


# From records


def records(hours: range, moved: float = 0.0) -> list[PredictionRecord]:
    random = np.random.default_rng(hours.start)
    return [
        PredictionRecord(
            "m",
            "1",
            f"{at}-{row}",
            START + timedelta(hours=at, seconds=row),
            {"x": float(value), "plan": "free" if value > 0 else "paid"},
            row % 2,
            Partition("log", 0),
            at * ROWS + row,
        )
        for at in hours
        for row, value in enumerate(rows_of(at, random, moved))
    ]


def learned(rows: list[PredictionRecord], timed: bool = True) -> Reference:
    return Reference.from_rows(
        "m",
        "1",
        [row.features for row in rows],
        [row.prediction for row in rows],
        DAY,
        [row.event_time for row in rows] if timed else None,
    )


def shifts_of(reference: Reference, window: list[PredictionRecord], drift: DriftSettings) -> dict[str, Shift]:
    engine = compile_reference(reference, drift, QualitySettings(), "classification")
    report = engine.judge(window)
    assert report == engine.judge(window[::-1])
    return {one.key: one for one in (*report.shifts, *report.prediction_shifts)}


def test_a_window_is_held_against_the_rows_of_its_slot() -> None:
    reference, window = learned(records(range(24))), records(range(30, 31))
    by_slot, by_all = shifts_of(reference, window, DAY), shifts_of(reference, window, DriftSettings())
    assert {one.slot for one in by_slot.values()} == {6} and {one.slot for one in by_all.values()} == {-1}
    assert {one.reference_rows for one in by_slot.values()} == {ROWS}
    assert {one.reference_rows for one in by_all.values()} == {24 * ROWS}
    for key in ("x|location", "plan|category|1"):
        assert abs(by_slot[key].value - by_slot[key].expected) < 0.2
        assert abs(by_all[key].value - by_all[key].expected) > 0.3


def test_a_reference_without_times_knows_no_slot() -> None:
    old = Reference.from_bytes(learned(records(range(24)), timed=False).to_bytes())
    assert b"times" not in old.to_bytes()
    assert {one.reference_rows for one in shifts_of(old, records(range(30, 31)), DAY).values()} == {0}


def test_rows_without_a_value_do_not_put_others_into_the_wrong_slot() -> None:
    rows = records(range(24))
    holed = [
        msgspec.structs.replace(row, features={"x": None if place % 3 else row.features["x"]})
        for place, row in enumerate(rows)
    ]
    found = shifts_of(learned(holed), records(range(30, 31)), DAY)["x|location"]
    assert found.reference_rows in (ROWS // 3, ROWS // 3 + 1)
    assert abs(found.value - found.expected) < 0.2


def test_times_survive_the_bytes_and_belong_to_rows() -> None:
    rows = records(range(2))
    reference = learned(rows)
    assert Reference.from_bytes(reference.to_bytes()) == reference
    assert reference.slots(Season(86_400.0, 24)).tolist() == [0] * ROWS + [1] * ROWS  # type: ignore[union-attr]
    torn = msgspec.structs.replace(reference, times=b"12345678")
    with pytest.raises(InvalidReference, match="differ in length"):
        Reference.from_bytes(torn.to_bytes())
    with pytest.raises(InvalidReference, match="1 event times"):
        Reference.from_rows("m", "1", [{"x": 1.0}] * 2, [0, 0], DAY, [START])
