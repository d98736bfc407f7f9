"""A champion of before that serves again: what the episode at hand and the level make of it."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from monitors import steps
from monitors.baseline import Baseline
from monitors.episodes import Circumstances, Episode, ModelState, Stage
from monitors.events import Outcome
from monitors.losses import LossState
from monitors.performance import Performance
from monitors.settings import ModelSettings, PolicySettings

START = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = ModelSettings()
LEVEL = Baseline(loss=0.1, deviation=0.3, rows=2_000)
BACK = Outcome(
    action="rolled-back",
    sentence="1 is surely better than 2",
    model_version="1",
    champion_before="2",
    baseline=Baseline(loss=0.12, deviation=0.3, rows=100),
)
EPISODE = Episode(
    id="episode-1",
    number=1,
    model="fraud",
    version="2",
    stage=Stage.OPEN,
    since=START,
    opened_at=START,
    attempts=2,
    signal="performance",
)
FALLING = ModelState(
    serving="2",
    stage=Stage.OPEN,
    episodes=1,
    episode=EPISODE,
    drifting=True,
    fresh_rows=300,
    refusals=2,
    losses=LossState(level=LEVEL, cusum=9.0, fallen=True, doublings=2),
)


def performance(loss: float, rows: int = 100, sound: bool = True) -> Performance:
    return Performance(
        version="2",
        key=7,
        metric="accuracy",
        score=1.0 - loss,
        labelled=rows,
        unlabelled=0,
        loss=loss,
        deviation=0.3,
        start=START,
        end=START + timedelta(hours=1),
        sound=sound,
    )


def test_the_episode_waits_for_the_one_that_is_back_to_show_itself() -> None:
    state, told = steps.on_outcome(SETTINGS, FALLING, "a comparison", BACK)
    assert told == () and state.episode is not None
    assert (state.serving, state.stage, state.episode.promoted) == ("1", Stage.VERIFYING, "1")
    assert (state.losses.cusum, state.losses.fallen, state.refusals, state.drifting) == (0.0, False, 0, False)


def test_it_is_told_twice_without_harm() -> None:
    once, _ = steps.on_outcome(SETTINGS, FALLING, "a comparison", BACK)
    again, told = steps.on_outcome(SETTINGS, once, "a comparison", BACK)
    assert again is once and told == ()


def test_without_an_episode_or_beside_an_attempt_only_who_serves_changes() -> None:
    calm = msgspec.structs.replace(FALLING, stage=Stage.QUIET, episode=None)
    state, _ = steps.on_outcome(SETTINGS, calm, "a comparison", BACK)
    assert (state.serving, state.stage, state.episode) == ("1", Stage.QUIET, None)
    trying = msgspec.structs.replace(FALLING, episode=msgspec.structs.replace(EPISODE, request="attempt-3"))
    state, _ = steps.on_outcome(SETTINGS, trying, "a comparison", BACK)
    assert (state.serving, state.stage, state.episode) == ("1", Stage.OPEN, trying.episode)


def test_what_was_reached_before_stays_the_level_unless_labels_are_late() -> None:
    prompt, _ = steps.on_outcome(SETTINGS, FALLING, "a comparison", BACK)
    assert prompt.losses.level == LEVEL
    late = msgspec.structs.replace(FALLING, late_labels=True)
    state, _ = steps.on_outcome(SETTINGS, late, "a comparison", BACK)
    assert state.losses.level == BACK.baseline
    better = msgspec.structs.replace(BACK, baseline=Baseline(loss=0.05, deviation=0.3, rows=100))
    for known in (FALLING, late):
        state, _ = steps.on_outcome(SETTINGS, known, "a comparison", better)
        assert state.losses.level == better.baseline


@pytest.mark.parametrize(("newest", "late"), [(None, False), (1.0, False), (1.9, False), (2.0, True)])
def test_labels_are_late_once_a_whole_window_lies_between(newest: float | None, late: bool) -> None:
    begun = None if newest is None else START + timedelta(hours=newest)
    state = msgspec.structs.replace(FALLING, episode=None, newest=begun)
    around = Circumstances("cluster|group", "retrain")
    state, _ = steps.on_performance(around, SETTINGS, "fraud", state, performance(0.1))
    assert state.late_labels is late


def test_a_rise_is_counted_in_deviations_of_a_windows_mean() -> None:
    calm = msgspec.structs.replace(FALLING, episode=None)
    assert steps.rise(SETTINGS, calm, performance(0.13)) == 1.0
    assert steps.rise(SETTINGS, calm, performance(0.13, rows=400)) == 2.0
    found = steps.rise(SETTINGS, calm, performance(0.07))
    assert found is not None and found < 0.0


def test_nothing_rises_where_it_would_say_nothing_of_the_champion() -> None:
    around = Circumstances("cluster|group", "retrain")
    assert not steps.is_quiet(around)
    calm = msgspec.structs.replace(FALLING, episode=None)
    trying = msgspec.structs.replace(FALLING, episode=msgspec.structs.replace(EPISODE, request="attempt-3"))
    unknown = msgspec.structs.replace(calm, losses=LossState())
    by_thresholds = ModelSettings(policy=PolicySettings(method="thresholds"))
    assert steps.rise(SETTINGS, trying, performance(0.9)) is None
    assert steps.rise(SETTINGS, unknown, performance(0.9)) is None
    assert steps.rise(SETTINGS, calm, performance(0.9, sound=False)) is None
    assert steps.rise(by_thresholds, calm, performance(0.9)) is None
