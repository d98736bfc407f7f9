"""Steps: what moves a model's state, one after the other, and what each of them leads to."""

from typing import Literal

import msgspec

from monitors import budget, episodes, losses
from monitors.baseline import Baseline
from monitors.episodes import Circumstances, Judged, ModelState, Step
from monitors.events import Outcome
from monitors.performance import Performance
from monitors.settings import ModelSettings


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """A window was judged; `quiet`: nothing could be asked for, whatever it said."""

    version: str
    key: int
    quiet: bool = False


class Heard(msgspec.Struct, frozen=True, tag="heard"):
    """The labels of a window were heard: its second judgement."""

    performance: Performance
    quiet: bool = False


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """A request came to an end."""

    request: str
    outcome: Outcome


class Moved(msgspec.Struct, frozen=True, tag="moved"):
    """Somebody else moved the champion."""

    version: str
    action: Literal["promoted", "rolled-back"]


Taken = Closed | Heard | Ended | Moved


def is_quiet(around: Circumstances) -> bool:
    """Whether nothing may be asked for."""
    return around.silenced or around.mode == "observe"


def on_window(
    around: Circumstances,
    settings: ModelSettings,
    state: ModelState,
    judged: Judged,
    baseline: Baseline | None,
) -> Step:
    """A window was judged; `baseline` is how well its version did when it was made, where that is known."""
    if settings.policy.method != "budget":
        return episodes.on_window(around, settings.policy, state, judged)
    serving = not state.serving or judged.version == state.serving
    if serving and baseline is not None and state.losses == losses.start(None):
        state = msgspec.structs.replace(state, losses=losses.start(baseline))
    return budget.on_window(around, settings, state, judged)


def on_performance(
    around: Circumstances, settings: ModelSettings, model: str, state: ModelState, performance: Performance
) -> Step:
    """A second judgement; only a budget heeds it."""
    if settings.policy.method != "budget":
        return state, ()
    return budget.on_performance(around, settings, model, state, performance)


def on_outcome(settings: ModelSettings, state: ModelState, request: str, outcome: Outcome) -> Step:
    """A request ended."""
    if settings.policy.method != "budget":
        return episodes.on_outcome(settings.policy, state, request, outcome)
    if outcome.action == "rolled-back":
        return budget.on_comeback(settings, state, outcome), ()
    return budget.on_outcome(settings, state, request, outcome)


def rise(settings: ModelSettings, state: ModelState, performance: Performance) -> float | None:
    """How far a window's loss lies above the level, in deviations; None where that asks for nothing."""
    level, episode = state.losses.level, state.episode
    busy = episode is not None and bool(episode.request)
    if settings.policy.method != "budget" or level is None or busy:
        return None
    if not performance.sound or performance.loss is None or not performance.labelled:
        return None
    return losses.rise_above(level, performance.loss, performance.labelled, performance.deviation)
