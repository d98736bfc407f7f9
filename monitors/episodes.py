"""Episodes: one stretch of drift, and the retraining requests that it leads to, one at a time."""

import uuid
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Literal

import msgspec

from monitors.drift import DriftReport, DriftScore, SegmentShift
from monitors.events import (
    NAMESPACE,
    Event,
    Kind,
    OffsetRange,
    Outcome,
    Related,
    RetrainRequest,
    requested,
)
from monitors.losses import LossState
from monitors.policy import Decision, Phase, Signal, Verdict
from monitors.probation import Probation
from monitors.records import Partition
from monitors.segment_losses import SegmentLossState
from monitors.settings import PolicySettings

# More columns than this are in the ledger, and not in an event.
MOST_COLUMNS = 50


class Stage(StrEnum):
    """Where a model stands. `quiet` and `suspected` have no episode yet; the last two have none any more."""

    QUIET = "quiet"
    SUSPECTED = "suspected"
    OPEN = "open"
    VERIFYING = "verifying"
    RESOLVED = "resolved"
    FUTILE = "futile"


class Episode(msgspec.Struct, frozen=True):
    """
    A stretch of drift in what `version` sees. `request` is the one in flight, or empty.

    `since` is the estimated change point, and `signal` what the episode is about now.
    """

    id: str
    number: int
    model: str
    version: str
    stage: Stage
    since: datetime
    opened_at: datetime
    attempts: int = 0
    request: str = ""
    promoted: str = ""
    signal: Signal = "data drift"
    opened_by: Signal = "data drift"


class ModelState(msgspec.Struct, frozen=True):
    """
    What must be remembered of a model between windows.

    Only windows of the `serving` version lead to anything; the others are observed. `home` is the one
    partition that count windows are made of. Of the budget policy alone are `losses`, `drifting` (the
    newest window's evidence), `fresh_rows` (labelled since the episode last looked for a cure),
    `refusals` in a row and `unlabelled` windows in a row; `segment_losses` only tell. `newest` is when the
    newest window began, and `late_labels` whether the last labels were of one much older.
    """

    serving: str = ""
    stage: Stage = Stage.QUIET
    episodes: int = 0
    episode: Episode | None = None
    wait_windows: int = 0
    cooled_at: datetime | None = None
    broken: tuple[str, ...] = ()
    probation: Probation | None = None
    home: Partition | None = None
    losses: LossState = LossState()
    drifting: bool = False
    fresh_rows: int = 0
    refusals: int = 0
    unlabelled: int = 0
    segment_losses: SegmentLossState = SegmentLossState()
    newest: datetime | None = None
    late_labels: bool = False


class Judged(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """
    One closed window with everything that was decided about it: the evidence.

    `segments` are what the shift of a window that fires is concentrated in, where it is.
    """

    model: str
    version: str
    key: int
    start: datetime
    end: datetime
    seen: int
    sampled: int
    spans: tuple[OffsetRange, ...]
    report: DriftReport
    decision: Decision
    segments: tuple[SegmentShift, ...] = ()


class Circumstances(msgspec.Struct, frozen=True):
    """What an episode depends on beside the windows; `origin` names cluster and consumer group."""

    origin: str
    mode: Literal["observe", "retrain"]
    silenced: bool = False
    report_url: str = ""


class Occasion(msgspec.Struct, frozen=True, kw_only=True):
    """The window after which a retraining is asked for, and why; `report` has no scores for labels alone."""

    model: str
    version: str
    key: int
    start: datetime
    end: datetime
    spans: tuple[OffsetRange, ...]
    report: DriftReport
    reason: str
    report_url: str
    basis: Literal["window", "labels"] = "window"

    @classmethod
    def of(cls, judged: Judged, report_url: str) -> "Occasion":
        """A judged window is occasion enough."""
        return cls(
            model=judged.model,
            version=judged.version,
            key=judged.key,
            start=judged.start,
            end=judged.end,
            spans=judged.spans,
            report=judged.report,
            reason=judged.decision.clause,
            report_url=report_url,
        )


Step = tuple[ModelState, tuple[Event, ...]]


def on_window(around: Circumstances, settings: PolicySettings, state: ModelState, judged: Judged) -> Step:
    """Take one judged window; returns the new state and what there is to tell, in order."""
    if not state.serving:
        state = msgspec.structs.replace(state, serving=judged.version)
    state, told = data_health(around, state, judged)
    decided = judged.decision.verdict in (Verdict.CALM, Verdict.DRIFTED)
    if judged.version != state.serving or not decided:
        return state, told
    if state.wait_windows:
        state = msgspec.structs.replace(state, wait_windows=state.wait_windows - 1)
        waiting = True
    else:
        waiting = False
    state, more = _progress(around, settings, state, judged, waiting)
    return state, told + more


def on_outcome(settings: PolicySettings, state: ModelState, request: str, outcome: Outcome) -> Step:
    """A request ended. One that is not in flight changes nothing, so being told twice is harmless."""
    episode = state.episode
    if episode is None or not episode.request or episode.request != request:
        return state, ()
    if outcome.action == "promoted":
        return _verifying(state, episode, outcome.model_version), ()
    ended = msgspec.structs.replace(episode, request="")
    wait = settings.backoff_windows * 2 ** (ended.attempts - 1)
    state = msgspec.structs.replace(state, episode=ended, wait_windows=wait)
    if ended.attempts >= settings.max_attempts:
        return _futile(state, ended, f"{ended.attempts} attempts ended without a promotion")
    return state, ()


def on_champion(
    settings: PolicySettings, state: ModelState, version: str, action: Literal["promoted", "rolled-back"]
) -> Step:
    """The champion moved without a request of ours: somebody retrained or rolled back by hand."""
    if not version or version == state.serving:
        return state, ()
    episode = state.episode
    if action == "rolled-back":
        state = msgspec.structs.replace(state, serving=version, wait_windows=2 * settings.backoff_windows)
        if episode is not None and not episode.request:
            return _futile(state, episode, f"rolled back to {version}")
        return state, ()
    if episode is not None and not episode.request and state.stage is Stage.OPEN:
        return _verifying(state, episode, version), ()
    return msgspec.structs.replace(state, serving=version), ()


def data_health(around: Circumstances, state: ModelState, judged: Judged) -> Step:
    """Tell once that a version's data broke, and once that it was mended."""
    verdict, version = judged.decision.verdict, judged.version
    was_broken = version in state.broken
    if verdict is Verdict.BROKEN and not was_broken:
        state = msgspec.structs.replace(state, broken=(*state.broken, version))
        return state, (_window_event(around, Kind.DATA_BROKEN, judged),)
    if verdict in (Verdict.CALM, Verdict.DRIFTED) and was_broken:
        state = msgspec.structs.replace(state, broken=tuple(v for v in state.broken if v != version))
        return state, (_window_event(around, Kind.DATA_MENDED, judged),)
    return state, ()


def _progress(
    around: Circumstances, settings: PolicySettings, state: ModelState, judged: Judged, waiting: bool
) -> Step:
    episode, phase = state.episode, judged.decision.phase
    if episode is None:
        return _without_episode(around, settings, state, judged)
    if state.stage is Stage.VERIFYING:
        return _resolve(settings, state, judged) if phase is not Phase.PENDING else (state, ())
    if episode.request:
        return state, ()
    if phase is Phase.INACTIVE:
        return _resolve(settings, state, judged)
    if state.stage is Stage.OPEN and phase is Phase.FIRING and not waiting:
        return ask(around, state, Occasion.of(judged, around.report_url))
    return state, ()


def _without_episode(
    around: Circumstances, settings: PolicySettings, state: ModelState, judged: Judged
) -> Step:
    phase = judged.decision.phase
    cooled = state.cooled_at is None or judged.end >= state.cooled_at
    if phase is Phase.FIRING and cooled:
        return _open(around, state, judged)
    stage = Stage.QUIET if phase is Phase.INACTIVE else Stage.SUSPECTED
    return msgspec.structs.replace(state, stage=stage), ()


def _open(around: Circumstances, state: ModelState, judged: Judged) -> Step:
    episode = Episode(
        id=str(episode_id(around.origin, judged)),
        number=state.episodes + 1,
        model=judged.model,
        version=judged.version,
        stage=Stage.OPEN,
        since=judged.decision.since or judged.start,
        opened_at=judged.end,
    )
    opened = msgspec.structs.replace(
        state, stage=Stage.OPEN, episodes=episode.number, episode=episode, wait_windows=0
    )
    told = detected(around, episode, facts(around, judged))
    wait = state.wait_windows
    if wait:
        return msgspec.structs.replace(opened, wait_windows=wait), (told,)
    state, asked = ask(around, opened, Occasion.of(judged, around.report_url))
    return state, (told, *asked)


def detected(around: Circumstances, episode: Episode, found: dict[str, Any]) -> Event:
    """An episode has opened; `found` is what was seen."""
    return Event(
        kind=Kind.DRIFT_DETECTED,
        model=episode.model,
        subject=episode.id,
        version=episode.version,
        episode=episode.id,
        payload={"episode_number": episode.number, **found},
        related=_report(around),
    )


def ask(around: Circumstances, state: ModelState, occasion: Occasion) -> Step:
    """Ask for the episode's next attempt, unless nothing may be asked for."""
    episode = state.episode
    assert episode is not None
    if around.mode == "observe" or around.silenced:
        return state, ()
    attempt = episode.attempts + 1
    asked = request_of(episode, attempt, occasion)
    event = requested(asked, (Related(occasion.report_url, "report"),) if occasion.report_url else ())
    ahead = msgspec.structs.replace(episode, attempts=attempt, request=asked.request)
    return msgspec.structs.replace(state, episode=ahead), (event,)


def request_of(episode: Episode, attempt: int, occasion: Occasion) -> RetrainRequest:
    """What is asked for after this window; its id follows from the episode and the attempt."""
    report = occasion.report
    return RetrainRequest(
        request=str(uuid.uuid5(NAMESPACE, f"request|{episode.id}|{attempt}")),
        episode=episode.id,
        episode_number=episode.number,
        attempt=attempt,
        model=occasion.model,
        model_version=occasion.version,
        reason=occasion.reason,
        signal=episode.signal,
        basis=occasion.basis,
        suspected_since=episode.since,
        window_start=occasion.start,
        window_end=occasion.end,
        offsets=occasion.spans,
        drift_share=report.drift_share,
        drifted_columns=report.drifted_columns,
        report_url=occasion.report_url,
    )


def _verifying(state: ModelState, episode: Episode, version: str) -> ModelState:
    verifying = msgspec.structs.replace(episode, stage=Stage.VERIFYING, request="", promoted=version)
    return msgspec.structs.replace(
        state, serving=version, stage=Stage.VERIFYING, episode=verifying, wait_windows=0
    )


def _resolve(settings: PolicySettings, state: ModelState, judged: Judged) -> Step:
    stage = Stage.QUIET if judged.decision.phase is Phase.INACTIVE else Stage.SUSPECTED
    return resolved(settings, state, judged.version, judged.decision.clause, judged.end, stage)


def resolved(
    settings: PolicySettings,
    state: ModelState,
    version: str,
    reason: str,
    end: datetime,
    stage: Stage = Stage.QUIET,
) -> Step:
    """The episode is over, as of the window that ended then."""
    episode = state.episode
    assert episode is not None
    told = Event(
        kind=Kind.DRIFT_RESOLVED,
        model=episode.model,
        subject=episode.id,
        version=version,
        episode=episode.id,
        payload={
            "episode_number": episode.number,
            "attempts": episode.attempts,
            "promoted": episode.promoted,
            "reason": reason,
            "window_end": end.isoformat(),
        },
    )
    cooled = end + timedelta(seconds=settings.cooldown_seconds)
    return msgspec.structs.replace(state, stage=stage, episode=None, wait_windows=0, cooled_at=cooled), (
        told,
    )


def _futile(state: ModelState, episode: Episode, reason: str) -> Step:
    ended = msgspec.structs.replace(episode, stage=Stage.FUTILE, request="")
    told = futile_event(episode, reason)
    return msgspec.structs.replace(state, stage=Stage.FUTILE, episode=ended), (told,)


def futile_event(episode: Episode, reason: str) -> Event:
    """The episode is given up."""
    return Event(
        kind=Kind.EPISODE_FUTILE,
        model=episode.model,
        subject=episode.id,
        version=episode.version,
        episode=episode.id,
        payload={"episode_number": episode.number, "attempts": episode.attempts, "reason": reason},
    )


def _window_event(around: Circumstances, kind: Kind, judged: Judged) -> Event:
    return Event(
        kind=kind,
        model=judged.model,
        subject=str(episode_id(around.origin, judged)),
        version=judged.version,
        payload={
            **facts(around, judged),
            "action": _health_action(kind, judged.report),
            "broken": [
                {"column": found.column, "code": found.code, "share": found.share}
                for found in judged.report.findings
                if found.broken
            ],
        },
        related=_report(around),
    )


def _health_action(kind: Kind, report: DriftReport) -> str:
    if kind is Kind.DATA_MENDED:
        return "watch"
    if report.damaged:
        return "none: broken data is no reason to retrain"
    return "none, unless labels tell of a loss: the categories may be new ones"


def facts(around: Circumstances, judged: Judged) -> dict[str, Any]:
    report = judged.report
    return {
        "model_version": judged.version,
        "window_start": judged.start.isoformat(),
        "window_end": judged.end.isoformat(),
        "offsets": msgspec.to_builtins(judged.spans),
        "rows": judged.seen,
        "signal": judged.decision.signal,
        "change_point": None if judged.decision.since is None else judged.decision.since.isoformat(),
        "evidence": judged.decision.evidence,
        "moved": [
            {"column": one.column, "kind": one.kind, "effect": one.effect} for one in judged.decision.moved
        ],
        "drift_share": report.drift_share,
        "columns": _told_columns(judged),
        "segments": msgspec.to_builtins(judged.segments),
        "prediction": None if report.prediction is None else _score(report.prediction),
        "clause": judged.decision.clause,
        "report_url": around.report_url,
    }


def _told_columns(judged: Judged) -> list[dict[str, Any]]:
    """Those that speak for drift first, then those that drifted by themselves; of very many not all."""
    scores = {score.column: score for score in judged.report.scores}
    moved = [one.column for one in judged.decision.moved if one.column in scores]
    drifted = judged.report.drifted_columns
    return [_score(scores[name]) for name in list(dict.fromkeys((*moved, *drifted)))[:MOST_COLUMNS]]


def _score(score: DriftScore) -> dict[str, Any]:
    return {
        "column": score.column,
        "method": score.implementation,
        "score": score.score,
        "threshold": score.threshold,
        "drifted": score.drifted,
    }


def _report(around: Circumstances) -> tuple[Related, ...]:
    return (Related(around.report_url, "report"),) if around.report_url else ()


def performance_episode(origin: str, opening: Judged | Occasion) -> str:
    """The id of an episode that labels opened; it follows from the window whose labels they were."""
    text = f"episode|{origin}|{opening.model}|{opening.version}|performance|{opening.key}"
    return str(uuid.uuid5(NAMESPACE, text))


def episode_id(origin: str, judged: Judged) -> uuid.UUID:
    """Follows from where the window was read, so that reading it again gives the same episode."""
    spans = ";".join(f"{span.topic}/{span.partition}:{span.start}-{span.end}" for span in judged.spans)
    return uuid.uuid5(NAMESPACE, f"episode|{origin}|{judged.model}|{judged.version}|{spans}")
