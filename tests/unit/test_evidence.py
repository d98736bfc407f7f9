"""Evidence keeps a budget where nothing moves, and finds what does, in any of many columns."""

import math

import msgspec
import numpy as np
import pytest
from scipy.signal import lfilter

from monitors.evidence import CERTIFYING_WINDOWS, EvidenceState, FeatureState, observe
from monitors.shifts import CategoricalYardstick, NumericYardstick, Shift
from monitors.statistics import long_run_deviation

COLUMNS, REFERENCE, WINDOW = 6, 2_000, 400


def autoregressive(phi: float, rows: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(rows + 200) * math.sqrt(1 - phi**2)
    return np.asarray(lfilter([1.0], [1.0, -phi], noise)[200:])


class World:
    """Columns that go on where the reference ended; one of them may move."""

    def __init__(self, phi: float, windows: int, seed: int = 0) -> None:
        rows = REFERENCE + windows * WINDOW
        self._columns = [autoregressive(phi, rows, 100 * seed + column) for column in range(COLUMNS)]
        self._yardsticks = [NumericYardstick.of(column[:REFERENCE]) for column in self._columns]

    def shifts(self, window: int, moved: float = 0.0) -> list[Shift]:
        start = REFERENCE + window * WINDOW
        found: list[Shift] = []
        for number, (column, yardstick) in enumerate(zip(self._columns, self._yardsticks, strict=True)):
            values = column[start : start + WINDOW] + (moved if number == 0 else 0.0)
            found += yardstick.measure(f"c{number}", values)
        return found


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_stable_streams_do_not_use_up_the_budget(phi: float) -> None:
    budget, windows, alarms = 50.0, 100, 0
    for seed in range(4):
        world, state = World(phi, windows, seed), EvidenceState()
        for window in range(windows):
            state, evidence = observe(state, world.shifts(window), budget)
            if evidence.value >= budget:
                alarms, state = alarms + 1, EvidenceState()
    assert alarms <= 4 * windows / budget


@pytest.mark.parametrize(("phi", "latest"), [(0.0, 3), (0.5, 5), (0.9, 12)])
def test_a_shift_of_one_column_is_found_and_named(phi: float, latest: int) -> None:
    world, state = World(phi, 40), EvidenceState()
    for window in range(20):
        state, evidence = observe(state, world.shifts(window), 100.0)
        assert evidence.value < 100.0
    for window in range(20, 20 + latest):
        state, evidence = observe(state, world.shifts(window, moved=0.8), 100.0)
    assert evidence.value >= 100.0
    assert evidence.moved[0].column == "c0"
    assert evidence.moved[0].effect > 0.2


def test_evidence_is_gone_soon_after_the_drift_is() -> None:
    world, state = World(0.0, 50), EvidenceState()
    for window in range(20):
        state, evidence = observe(state, world.shifts(window, moved=1.0), 100.0)
    assert evidence.value >= 100.0
    for window in range(20, 45):
        state, evidence = observe(state, world.shifts(window), 100.0)
    assert evidence.value < 25.0


def test_a_sure_but_tiny_shift_is_no_drift() -> None:
    tiny = Shift("x", "location", 0.04, 10**9, 0.0, 10**9, 0.6, 0.6)
    state = EvidenceState()
    for _ in range(50):
        state, evidence = observe(state, [tiny], 100.0)
    assert evidence.value < 100.0


def test_windows_that_drift_never_join_what_they_are_held_against() -> None:
    world, state = World(0.0, 60), EvidenceState()
    for window in range(60):
        state, evidence = observe(state, world.shifts(window, moved=0.8), 100.0)
    assert state.quiet <= 2
    assert evidence.value >= 100.0


def test_quiet_windows_certify_the_budget() -> None:
    calm, state = Shift("x", "location", 0.0, 100, 0.0, 500, 0.6, 0.6), EvidenceState()
    for _ in range(CERTIFYING_WINDOWS + 1):
        state, evidence = observe(state, [calm], 100.0)
        assert not evidence.certified
    for _ in range(2):
        state, evidence = observe(state, [calm], 100.0)
    assert evidence.certified


def test_a_feature_is_certified_by_its_own_quiet_windows_only() -> None:
    old = Shift("x", "location", 0.0, 100, 0.0, 500, 0.6, 0.6)
    young, state = msgspec.structs.replace(old, column="y"), EvidenceState()
    for _ in range(CERTIFYING_WINDOWS + 3):
        state, evidence = observe(state, [old], 100.0)
    assert evidence.certified
    for _ in range(CERTIFYING_WINDOWS + 2):
        state, evidence = observe(state, [old, young], 100.0)
        assert not evidence.certified
    assert observe(state, [old, young], 100.0)[1].certified
    assert not observe(state, [], 100.0)[1].certified


def swinging(sizes: np.ndarray) -> list[Shift]:
    """Windows whose means are so many of the reference's standard deviations away."""
    far = Shift("x", "location", 0.0, 100, 0.0, 100_000, 1.0, 0.1)
    return [msgspec.structs.replace(far, value=float(size) / math.sqrt(100)) for size in sizes]


def alarms(windows: list[Shift], known: EvidenceState, budget: float) -> int:
    """How often an alarm comes after which all that was known before is known again."""
    state, found = known, 0
    for shift in windows:
        state, evidence = observe(state, [shift], budget)
        if evidence.value >= budget:
            state, found = known, found + 1
    return found


def quiet_for(windows: list[Shift]) -> EvidenceState:
    """What is known after these windows if none of them was taken for drift."""
    state = EvidenceState()
    for shift in windows:
        state, _ = observe(state, [shift], 1e30)
    untouched = FeatureState().detectors
    calm = {key: msgspec.structs.replace(known, detectors=untouched) for key, known in state.features.items()}
    return msgspec.structs.replace(state, features=calm)


def correlated(phi: float, windows: int, seed: int) -> np.ndarray:
    return autoregressive(phi, windows, seed) if phi else np.random.default_rng(seed).standard_normal(windows)


@pytest.mark.parametrize(("spread", "phi"), [(1.0, 0.0), (2.0, 0.0), (1.0, 0.7), (2.0, 0.7)])
def test_certified_evidence_is_held_against_how_quiet_windows_vary(spread: float, phi: float) -> None:
    budget, windows, found = 100.0, 1_000, 0
    for seed in range(4):
        sizes = spread * correlated(phi, CERTIFYING_WINDOWS + 10 + windows, seed)
        known = quiet_for(swinging(sizes[: CERTIFYING_WINDOWS + 10]))
        found += alarms(swinging(sizes[CERTIFYING_WINDOWS + 10 :]), known, budget)
    assert found <= 4 * windows / budget


def test_a_slow_drift_is_found_though_its_first_windows_were_taken_for_quiet_ones() -> None:
    sizes = np.random.default_rng(5).standard_normal(900)
    sizes[300:] += np.linspace(0.0, 6.0, 600)
    state, value = EvidenceState(), 0.0
    for shift in swinging(sizes):
        state, evidence = observe(state, [shift], 100.0)
        value = max(value, evidence.value)
    assert value >= 100.0


def test_a_state_outlives_its_checkpoint_to_the_last_bit() -> None:
    world, state = World(0.5, 6), EvidenceState()
    for window in range(5):
        state, _ = observe(state, world.shifts(window), 100.0)
    kept = msgspec.json.decode(msgspec.json.encode(state), type=EvidenceState)
    assert observe(kept, world.shifts(5), 100.0) == observe(state, world.shifts(5), 100.0)


def test_a_state_of_before_spreads_and_seasons_is_still_read() -> None:
    shift = msgspec.json.decode(b'["x","location",0.1,100,0.0,500,0.6,0.6,0]', type=Shift)
    before = b"""{
        "features": {"x|location": [5000.0, 100.0, 12.5, 1, 2.5, [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0]]},
        "waiting": [[[["x|location", 100.0, 0.1, 0.5]]], [[["x|location", 100.0, 0.1, 0.5]]]],
        "quiet": 1, "windows": 3}"""
    state, _ = observe(msgspec.json.decode(before, type=EvidenceState), [shift], 100.0)
    known = state.features["x|location"]
    assert (known.rows, known.total, known.residuals) == (200.0, 22.5, 2)


def test_correlated_rows_count_for_less() -> None:
    independent, correlated = autoregressive(0.0, 5_000, 1), autoregressive(0.9, 5_000, 1)
    assert 0.9 < long_run_deviation(independent) / independent.std() < 1.4
    # An AR(1) of 0.9 has a long-run deviation of sqrt(19) of its own.
    assert 3.5 < long_run_deviation(correlated) / correlated.std() < 6.0


def test_a_category_that_becomes_common_is_a_shift_of_that_column() -> None:
    values = ["a", "b", "c", "b"] * 250
    yardstick = CategoricalYardstick.of(values, {"a": 250, "b": 500, "c": 250})
    shifts = yardstick.measure("plan", {"a": 100, "b": 40, "c": 60})
    by_value = {round(shift.value, 2): round(shift.expected, 2) for shift in shifts}
    assert by_value == {0.5: 0.25, 0.2: 0.5, 0.3: 0.25}
