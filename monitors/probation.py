"""
Probation: is a champion, as the labels of what it serves come, no worse than those before it?

Once, when so many windows have their labels, it is held against the one it replaced. And as long as it
serves, every window that loses more than a champion should is a reason to ask whether one of those before
it does better by now: a world that comes back needs no retraining.
"""

import uuid
from datetime import datetime
from typing import Any

import msgspec

from monitors.events import NAMESPACE, Event, OffsetRange, Outcome, RetrainRequest, requested
from monitors.performance import Performance
from monitors.settings import GateSettings

# How often the labelled windows that a failed comparison is followed by are doubled at most.
MOST_DOUBLINGS = 6


class Served(msgspec.Struct, frozen=True):
    """A closed window of what some version answered."""

    version: str
    start: datetime
    end: datetime
    spans: tuple[OffsetRange, ...]


class Probation(msgspec.Struct, frozen=True):
    """
    A champion that was not the first one. `promotion` is the request that it came from, if any.

    It has served since `since`, last in the window `newest`, and the labels of `matured` of its windows
    are there; once they are `needed` (0: never) it is held against the one before. `request` is the
    comparison in flight, or empty. After comparisons that `failed` in a row, so many labelled windows `rest`.
    """

    model: str
    version: str
    promotion: str
    needed: int
    since: datetime | None = None
    newest: Served | None = None
    matured: int = 0
    request: str = ""
    failed: int = 0
    rest: int = 0


def begin(model: str, request: str, outcome: Outcome, gate: GateSettings) -> Probation | None:
    """
    What a promotion begins; None where nothing is to be compared, or there was no champion before.

    >>> promoted = Outcome(action="promoted", sentence="", model_version="5", champion_before="4")
    >>> begin("fraud", "request-1", promoted, GateSettings()).version
    '5'
    >>> begin("fraud", "request-1", promoted, GateSettings(probation_rise=0.0))
    """
    wanted = gate.probation_windows or gate.probation_rise
    if not wanted or outcome.action != "promoted" or not outcome.champion_before:
        return None
    return Probation(model, outcome.model_version, request, needed=gate.probation_windows)


def on_window(probation: Probation, served: Served) -> Probation:
    """A window has closed; its labels are still to come."""
    if served.version != probation.version:
        return probation
    since = served.start if probation.since is None else min(probation.since, served.start)
    return msgspec.structs.replace(probation, since=since, newest=served)


def on_labels(
    probation: Probation, gate: GateSettings, origin: str, performance: Performance, rise: float | None
) -> tuple[Probation, tuple[Event, ...]]:
    """
    One more window's labels are there: count it, and ask for a comparison where it is a reason to.

    `origin` names cluster and consumer group. `rise` is how far its loss lies above the level, in
    deviations of such a window's mean; None where nothing may be asked because of it.
    """
    newest = probation.newest
    ours = performance.version == probation.version and performance.labelled and newest is not None
    if ours:
        probation = msgspec.structs.replace(probation, matured=probation.matured + 1)
    if probation.request:
        return probation, ()
    if ours and newest is not None and 0 < probation.needed <= probation.matured:
        return _asking(probation, _with_the_one_before(probation, newest))
    if probation.rest:
        return msgspec.structs.replace(probation, rest=probation.rest - 1), ()
    if rise is not None and gate.probation_rise and rise >= gate.probation_rise and performance.start:
        return _asking(probation, _with_all_before(probation, origin, performance, rise))
    return probation, ()


def on_outcome(probation: Probation, gate: GateSettings, request: str, outcome: Outcome) -> Probation | None:
    """A comparison came to an end; whoever serves now goes on being watched if that is wanted."""
    if not probation.request or probation.request != request:
        return probation
    if not gate.probation_rise:
        return None
    if outcome.action == "rolled-back":
        return Probation(probation.model, outcome.model_version, "", needed=0)
    # The comparison with the one before is made once; another one does not stand for it.
    needed = 0 if request == _once(probation) else probation.needed
    failed = probation.failed + 1 if outcome.action == "failed" else 0
    rest = 2 ** min(failed, MOST_DOUBLINGS) if failed else 0
    return msgspec.structs.replace(probation, request="", needed=needed, failed=failed, rest=rest)


def on_champion(probation: Probation, version: str) -> Probation | None:
    """A person who moves the champion has decided."""
    return probation if version == probation.version else None


def _asking(probation: Probation, asked: RetrainRequest) -> tuple[Probation, tuple[Event, ...]]:
    return msgspec.structs.replace(probation, request=asked.request), (requested(asked),)


def _once(probation: Probation) -> str:
    """The id follows from the promotion, so that it is asked for once."""
    return str(uuid.uuid5(NAMESPACE, f"probation|{probation.promotion}"))


def _with_the_one_before(probation: Probation, newest: Served) -> RetrainRequest:
    return _request(
        probation,
        request=_once(probation),
        promotion=probation.promotion,
        reason=f"labels of {probation.matured} windows that version {probation.version} served are there",
        suspected_since=probation.since or newest.start,
        window_start=newest.start,
        window_end=newest.end,
        offsets=newest.spans,
    )


def _with_all_before(
    probation: Probation, origin: str, performance: Performance, rise: float
) -> RetrainRequest:
    """Its id follows from the window whose labels they are, and from who serves."""
    window = f"{probation.model}|{probation.version}|{performance.version}|{performance.key}"
    return _request(
        probation,
        request=str(uuid.uuid5(NAMESPACE, f"probation|{origin}|{window}")),
        reason=f"a window lost {performance.loss:.4g}, {rise:.1f} deviations above what can be reached",
        basis="labels",
        suspected_since=performance.start,
        window_start=performance.start,
        window_end=performance.end,
        offsets=performance.spans,
    )


def _request(probation: Probation, **stated: Any) -> RetrainRequest:
    """A comparison belongs to no episode, and says nothing of drift."""
    return RetrainRequest(
        kind="probation",
        episode="",
        episode_number=0,
        attempt=1,
        model=probation.model,
        model_version=probation.version,
        drift_share=0.0,
        drifted_columns=(),
        **stated,
    )
