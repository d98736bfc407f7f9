"""Performance falls, is told since when, and asks only when a gate could confirm a cure."""

from datetime import UTC, datetime, timedelta

import msgspec
import numpy as np

from monitors import losses
from monitors.baseline import Baseline
from monitors.drift import DriftReport, Finding
from monitors.losses import Fall, LossState, LossWindow
from monitors.settings import PolicySettings

START = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = PolicySettings()
WELL = Baseline(0.1, 0.3, 2_000)
ROWS = 500


def window(number: int, loss: float, version: str = "1") -> LossWindow:
    start = START + timedelta(hours=number)
    return LossWindow(version, start, start + timedelta(hours=1), loss, ROWS)


def play(
    state: LossState, found: list[float], version: str = "1", first: int = 0
) -> tuple[LossState, list[Fall | None]]:
    falls: list[Fall | None] = []
    for number, loss in enumerate(found, first):
        state, fall = losses.observe(SETTINGS, state, window(number, loss, version), 0.3, version)
        falls.append(fall)
    return state, falls


def test_a_loss_at_its_baseline_is_quiet_for_much_longer_than_the_budget() -> None:
    random, state, alarms = np.random.default_rng(3), losses.start(WELL), 0
    windows = 3_000
    for number in range(windows):
        loss = 0.1 + random.normal() * 0.3 / ROWS**0.5
        state, fall = losses.observe(SETTINGS, state, window(number, loss), 0.3, "1")
        if fall is not None:
            alarms, state = alarms + 1, losses.start(WELL)
    assert alarms <= windows / SETTINGS.windows_between_false_retrainings


def test_a_baseline_without_any_mistake_can_be_fallen_from() -> None:
    """Where a model was always right, the deviation of its losses is nothing."""
    perfect = Baseline(0.0, 0.0, 150)
    _, falls = play(losses.start(perfect), [0.0] * 10 + [1.0] * 4)
    assert falls[:10] == [None] * 10
    assert falls[-1] is not None and falls[-1].due


def test_an_abrupt_fall_is_told_since_its_first_window_and_asks_with_the_second() -> None:
    _state, falls = play(losses.start(WELL), [0.1] * 10 + [0.4, 0.4])
    assert falls[:11] == [None] * 11
    fall = falls[11]
    assert fall is not None
    assert fall.due
    assert fall.since == window(10, 0.4).start


def test_a_second_fall_inside_the_first_has_a_change_point_of_its_own() -> None:
    state, _ = play(losses.start(WELL), [0.16] * 12)
    _, falls = play(state, [0.5] * 3, first=12)
    last = falls[-1]
    assert last is not None
    assert last.since == window(12, 0.5).start


def test_attempts_wait_for_twice_the_labels_each_time() -> None:
    state, _falls = play(losses.start(WELL), [0.4] * 2)
    due = []
    state = losses.tried(state)
    for number in range(2, 9):
        state, fall = losses.observe(SETTINGS, state, window(number, 0.4), 0.3, "1")
        if fall is not None and fall.due:
            due.append(number)
            state = losses.tried(state)
    assert due == [3, 7]


def test_a_fall_too_small_for_a_gate_to_confirm_waits() -> None:
    quarter = 0.1 + 0.6 * 0.3 / ROWS**0.5
    _state, falls = play(losses.start(WELL), [quarter + 0.01] * 12)
    first = next(fall for fall in falls if fall is not None)
    assert not first.due or first.windows > SETTINGS.first_attempt_windows


REACHED = Baseline(0.25, 0.3, 500)
REFERENCE_ROWS = 5_000


def fallen(windows: int = 3) -> LossState:
    state, _ = play(losses.start(WELL), [0.4] * windows)
    return losses.tried(state)


def test_the_best_level_known_is_kept_while_few_rows_follow_the_change() -> None:
    """A model of mixed rows must not become the new normal: a better one is possible, and asked for again."""
    state = losses.judged(fallen(), REACHED, promoted=True, grown_rows=REFERENCE_ROWS)
    assert state.level is not None
    assert state.level.loss == WELL.loss
    _, falls = play(state, [0.25] * 4, version="1", first=3)
    assert any(fall is not None and fall.due for fall in falls)


def test_what_retraining_reaches_is_the_level_once_a_reference_of_rows_follows_the_change() -> None:
    rows_since = 3 * ROWS
    state = losses.judged(fallen(), REACHED, promoted=True, grown_rows=rows_since)
    assert state.level == REACHED
    _, falls = play(state, [0.25] * 20, first=3)
    assert falls == [None] * 20


def test_a_better_level_is_taken_at_once() -> None:
    better = Baseline(0.05, 0.3, 500)
    state = losses.judged(fallen(), better, promoted=True, grown_rows=REFERENCE_ROWS)
    assert state.level == better


def test_after_a_refusal_the_level_is_what_the_best_candidate_reached() -> None:
    """What no retraining mends is no fall; a champion that is worse than what can be had still is one."""
    state = losses.judged(fallen(), REACHED, promoted=False, grown_rows=0)
    assert state.level == REACHED
    _, falls = play(state, [0.4] * 8, first=3)
    assert falls[-1] is not None


def test_a_refusal_waits_longer_unless_the_proof_came_near() -> None:
    far = losses.judged(fallen(), REACHED, promoted=False, grown_rows=0)
    near = losses.judged(fallen(), REACHED, promoted=False, grown_rows=0, surety=0.8)
    waits = []
    for state in (far, near):
        _, falls = play(state, [0.6] * 10, first=3)
        waits.append(next(number for number, fall in enumerate(falls) if fall is not None and fall.due))
    assert waits[0] > waits[1]


def test_what_nothing_could_mend_becomes_the_baseline() -> None:
    state, _ = play(losses.start(WELL), [0.4] * 3)
    state = losses.accepted(state, "1")
    assert state.level is not None
    assert abs(state.level.loss - 0.4) < 1e-9
    _, falls = play(state, [0.4] * 20, first=3)
    assert falls == [None] * 20


def test_the_old_versions_windows_say_nothing_of_the_new_one() -> None:
    state = losses.start(WELL)
    for number in range(5):
        state, fall = losses.observe(SETTINGS, state, window(number, 0.9, "1"), 0.3, "2")
        assert fall is None


def test_without_a_baseline_the_first_windows_are_it() -> None:
    state, falls = play(losses.start(None), [0.2] * SETTINGS.baseline_windows)
    assert state.level is not None
    assert abs(state.level.loss - 0.2) < 1e-9
    assert falls == [None] * SETTINGS.baseline_windows


def test_a_state_outlives_its_checkpoint() -> None:
    state, _ = play(losses.start(WELL), [0.1, 0.4, 0.4])
    assert msgspec.json.decode(msgspec.json.encode(state), type=LossState) == state


def test_unseen_categories_are_no_damage_and_a_wrong_unit_is() -> None:
    unseen = Finding("month", "unseen_category", 1.0, True)
    assert not DriftReport((), (unseen,)).damaged
    assert DriftReport((), (unseen, Finding("price", "out_of_range", 1.0, True))).damaged
