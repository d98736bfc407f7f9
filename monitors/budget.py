"""
The budget policy's episodes: three signals, and a request only where a gate could confirm a cure.

Data and prediction drift are judged with each window; performance when its labels have come. Drift
without a loss is watched: it asks once enough rows after it have labels. A fall of performance asks as
soon as labels since the change suffice, and again as more of them arrive.
"""

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec

from monitors import losses, segment_losses
from monitors.drift import DriftReport
from monitors.episodes import (
    Circumstances,
    Episode,
    Judged,
    ModelState,
    Occasion,
    Stage,
    Step,
    ask,
    data_health,
    detected,
    episode_id,
    facts,
    futile_event,
    performance_episode,
    resolved,
)
from monitors.events import Outcome
from monitors.losses import Fall, LossWindow
from monitors.performance import Performance
from monitors.policy import Phase, Verdict
from monitors.segment_losses import SegmentFall
from monitors.settings import ModelSettings

# After so many windows whose labels never came, drift has to decide without them.
UNLABELLED_WINDOWS = 3


def on_window(around: Circumstances, settings: ModelSettings, state: ModelState, judged: Judged) -> Step:
    """Take one judged window; returns the new state and what there is to tell, in order."""
    if not state.serving:
        state = msgspec.structs.replace(state, serving=judged.version)
    newest = judged.start if state.newest is None else max(state.newest, judged.start)
    state, told = data_health(around, msgspec.structs.replace(state, newest=newest), judged)
    decided = judged.decision.verdict in (Verdict.CALM, Verdict.DRIFTED)
    if judged.version != state.serving or not decided:
        return state, told
    state = msgspec.structs.replace(
        state, drifting=judged.decision.phase is Phase.FIRING, wait_windows=max(0, state.wait_windows - 1)
    )
    state, more = _progress(around, settings, state, judged)
    return state, told + more


def _progress(around: Circumstances, settings: ModelSettings, state: ModelState, judged: Judged) -> Step:
    episode, phase = state.episode, judged.decision.phase
    if episode is None:
        if phase is Phase.FIRING:
            return _open_drift(around, state, judged)
        stage = Stage.QUIET if phase is Phase.INACTIVE else Stage.SUSPECTED
        return msgspec.structs.replace(state, stage=stage), ()
    if episode.request:
        return state, ()
    if phase is Phase.INACTIVE and not state.losses.fallen:
        return resolved(settings.policy, state, judged.version, judged.decision.clause, judged.end)
    if state.stage is Stage.VERIFYING and phase is Phase.FIRING:
        reopened = msgspec.structs.replace(episode, stage=Stage.OPEN, since=judged.start)
        state = msgspec.structs.replace(state, stage=Stage.OPEN, episode=reopened, fresh_rows=0)
    blind = state.unlabelled >= UNLABELLED_WINDOWS and not state.losses.seen
    if state.stage is Stage.OPEN and phase is Phase.FIRING and blind and not state.wait_windows:
        return ask(around, state, Occasion.of(judged, around.report_url))
    return state, ()


def _open_drift(around: Circumstances, state: ModelState, judged: Judged) -> Step:
    episode = Episode(
        id=str(episode_id(around.origin, judged)),
        number=state.episodes + 1,
        model=judged.model,
        version=judged.version,
        stage=Stage.OPEN,
        since=judged.decision.since or judged.start,
        opened_at=judged.end,
        signal=judged.decision.signal,
        opened_by=judged.decision.signal,
    )
    told = detected(around, episode, {**facts(around, judged), "action": "watch until labels tell"})
    return _opened(state, episode), (told,)


def _opened(state: ModelState, episode: Episode) -> ModelState:
    return msgspec.structs.replace(
        state,
        stage=Stage.OPEN,
        episodes=episode.number,
        episode=episode,
        fresh_rows=0,
        refusals=0,
        wait_windows=0,
    )


def on_performance(
    around: Circumstances, settings: ModelSettings, model: str, state: ModelState, performance: Performance
) -> Step:
    """Take the second judgement of a window; broken data is no fault of the model."""
    if not performance.sound:
        return state, ()
    if performance.loss is None or performance.start is None or performance.end is None:
        unlabelled = state.unlabelled + 1
        return msgspec.structs.replace(state, unlabelled=unlabelled), ()
    window = LossWindow(
        performance.version, performance.start, performance.end, performance.loss, performance.labelled
    )
    state = msgspec.structs.replace(state, late_labels=_late(state.newest, window))
    serving = state.serving or performance.version
    before = state.losses
    after, fall = losses.observe(settings.policy, before, window, performance.deviation, serving)
    parts = segment_losses.observe(state.segment_losses, performance, before, after, serving)
    state = msgspec.structs.replace(state, losses=after, segment_losses=parts, unlabelled=0)
    if state.episode is not None and performance.version == serving:
        state = msgspec.structs.replace(state, fresh_rows=state.fresh_rows + performance.labelled)
    occasion = _occasion(model, serving, performance)
    told: Step = state, ()
    if fall is not None:
        told = _fallen(around, state, fall, occasion)
    elif state.episode is not None and state.episode.signal == "performance" and not state.episode.request:
        return _recovered(settings, state, occasion)
    state, events = told
    if fall is not None and fall.due:
        state, more = _attempt(around, settings, state, occasion, fall)
    else:
        state, more = _attempt_on_drift(around, settings, state, occasion)
    return state, events + more


def _late(newest: datetime | None, labelled: LossWindow) -> bool:
    """Whether a whole window lies between the labelled one and the newest that was judged."""
    return newest is not None and newest - labelled.end >= labelled.end - labelled.start


def _occasion(model: str, version: str, performance: Performance) -> Occasion:
    assert performance.start is not None
    assert performance.end is not None
    return Occasion(
        model=model,
        version=version,
        key=performance.key,
        start=performance.start,
        end=performance.end,
        spans=performance.spans,
        report=DriftReport(()),
        reason="",
        report_url="",
        basis="labels",
    )


def _fallen(around: Circumstances, state: ModelState, fall: Fall, occasion: Occasion) -> Step:
    """Performance has fallen: an episode of its own, or the drift episode at hand is one of loss now."""
    episode = state.episode
    if episode is not None:
        if episode.signal != "performance" and not episode.request:
            lossy = msgspec.structs.replace(episode, signal="performance", since=fall.since, stage=Stage.OPEN)
            return msgspec.structs.replace(state, episode=lossy, stage=Stage.OPEN), ()
        if state.stage is Stage.VERIFYING:
            still = msgspec.structs.replace(episode, stage=Stage.OPEN)
            return msgspec.structs.replace(state, episode=still, stage=Stage.OPEN), ()
        return state, ()
    episode = Episode(
        id=performance_episode(around.origin, occasion),
        number=state.episodes + 1,
        model=occasion.model,
        version=occasion.version,
        stage=Stage.OPEN,
        since=fall.since,
        opened_at=occasion.end,
        signal="performance",
        opened_by="performance",
    )
    fallen = segment_losses.falls(state.segment_losses, state.losses, occasion.version)
    found = {**_fall_facts(fall, occasion, fallen), "action": _action(around, fall)}
    return _opened(state, episode), (detected(around, episode, found),)


def _action(around: Circumstances, fall: Fall) -> str:
    if around.mode == "observe" or around.silenced:
        return "none: nothing is asked for while silenced" if around.silenced else 'none: mode = "observe"'
    return "retrain" if fall.due else f"wait: {fall.reason}"


def _fall_facts(fall: Fall, occasion: Occasion, segments: Sequence[SegmentFall]) -> dict[str, Any]:
    return {
        "signal": "performance",
        "change_point": fall.since.isoformat(),
        "model_version": occasion.version,
        "window_start": occasion.start.isoformat(),
        "window_end": occasion.end.isoformat(),
        "offsets": msgspec.to_builtins(occasion.spans),
        "loss": None if math.isnan(fall.loss) else fall.loss,
        "baseline": fall.baseline,
        "segments": msgspec.to_builtins(segments),
        "clause": _sentence(fall),
    }


def _sentence(fall: Fall) -> str:
    now = "unknown" if math.isnan(fall.loss) else f"{fall.loss:.4g}"
    return (
        f"performance: loss {now} against {fall.baseline:.4g} over {fall.windows} labelled windows"
        f" since {fall.since.isoformat()}"
    )


def _attempt(
    around: Circumstances, settings: ModelSettings, state: ModelState, occasion: Occasion, fall: Fall
) -> Step:
    episode = state.episode
    if episode is None or episode.request or around.mode == "observe" or around.silenced:
        return state, ()
    since = msgspec.structs.replace(episode, since=fall.since, signal="performance")
    tried = losses.tried(state.losses)
    state = msgspec.structs.replace(state, episode=since, losses=tried, fresh_rows=0)
    reason = msgspec.structs.replace(occasion, reason=_sentence(fall))
    return ask(around, state, reason)


def _attempt_on_drift(
    around: Circumstances, settings: ModelSettings, state: ModelState, occasion: Occasion
) -> Step:
    """Drift without a loss that a gate could confirm: asks when enough labelled rows have come."""
    episode = state.episode
    if episode is None or episode.request or state.stage is not Stage.OPEN or not state.drifting:
        return state, ()
    needed = settings.policy.retrain_share * settings.reference_rows * 2**state.refusals
    if state.fresh_rows < needed or around.mode == "observe" or around.silenced:
        return state, ()
    reason = f"{episode.signal}: {state.fresh_rows} labelled rows since the last look, {needed:.0f} wanted"
    tried = msgspec.structs.replace(state.losses, tried=state.losses.seen)
    state = msgspec.structs.replace(state, losses=tried, fresh_rows=0)
    return ask(around, state, msgspec.structs.replace(occasion, reason=reason))


def _recovered(settings: ModelSettings, state: ModelState, occasion: Occasion) -> Step:
    """The loss is back at its baseline; what is left may be drift, which is watched."""
    if state.drifting and state.episode is not None:
        drift = msgspec.structs.replace(state.episode, signal="data drift", stage=Stage.OPEN)
        return msgspec.structs.replace(state, episode=drift, stage=Stage.OPEN), ()
    return resolved(
        settings.policy,
        state,
        occasion.version,
        "performance: the loss is at the level that retraining is known to reach",
        occasion.end,
    )


def on_outcome(settings: ModelSettings, state: ModelState, request: str, outcome: Outcome) -> Step:
    """A request ended. One that is not in flight changes nothing, so being told twice is harmless."""
    episode = state.episode
    if episode is None or not episode.request or episode.request != request:
        return state, ()
    if outcome.action == "promoted":
        return _promoted(settings, state, episode, outcome)
    ended = msgspec.structs.replace(episode, request="")
    wait = settings.policy.backoff_windows * 2 ** (ended.attempts - 1)
    state = msgspec.structs.replace(state, episode=ended, refusals=state.refusals + 1, wait_windows=wait)
    if outcome.action == "refused":
        after = losses.judged(
            state.losses, outcome.baseline, False, settings.reference_rows, outcome.surety or 0.0
        )
        state = msgspec.structs.replace(state, losses=after)
    if state.refusals < settings.policy.max_attempts:
        return state, ()
    told = futile_event(ended, f"{state.refusals} attempts in a row ended without a promotion")
    state = msgspec.structs.replace(
        state, losses=losses.accepted(state.losses, state.serving), wait_windows=0, refusals=0
    )
    if state.drifting:
        # The drift goes on, and is not asked about again before something else happens.
        kept = msgspec.structs.replace(ended, stage=Stage.FUTILE)
        return msgspec.structs.replace(state, stage=Stage.FUTILE, episode=kept), (told,)
    return msgspec.structs.replace(state, stage=Stage.QUIET, episode=None), (told,)


def on_comeback(settings: ModelSettings, state: ModelState, outcome: Outcome) -> ModelState:
    """A champion of before serves again, for it does better by now; telling twice is harmless."""
    if not outcome.model_version or outcome.model_version == state.serving:
        return state
    episode = state.episode
    state = msgspec.structs.replace(
        state,
        serving=outcome.model_version,
        losses=losses.came_back(state.losses, outcome.baseline, state.late_labels, settings.reference_rows),
        drifting=False,
        fresh_rows=0,
        refusals=0,
        wait_windows=0,
    )
    if episode is None or episode.request:
        return state
    verifying = msgspec.structs.replace(episode, stage=Stage.VERIFYING, promoted=outcome.model_version)
    return msgspec.structs.replace(state, stage=Stage.VERIFYING, episode=verifying)


def _promoted(settings: ModelSettings, state: ModelState, episode: Episode, outcome: Outcome) -> Step:
    verifying = msgspec.structs.replace(
        episode, stage=Stage.VERIFYING, request="", promoted=outcome.model_version
    )
    known = losses.judged(state.losses, outcome.baseline, True, settings.reference_rows)
    return (
        msgspec.structs.replace(
            state,
            serving=outcome.model_version,
            stage=Stage.VERIFYING,
            episode=verifying,
            losses=known,
            drifting=False,
            fresh_rows=0,
            refusals=0,
            wait_windows=0,
        ),
        (),
    )
