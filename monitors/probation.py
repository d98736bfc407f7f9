"""Probation: is a new champion, once labels of what it served are there, no worse than the one before it?"""

import uuid
from datetime import datetime

import msgspec

from monitors.events import NAMESPACE, Event, Kind, OffsetRange, Outcome, RetrainRequest


class Served(msgspec.Struct, frozen=True):
    """A closed window of what some version answered."""

    version: str
    start: datetime
    end: datetime
    spans: tuple[OffsetRange, ...]


class Probation(msgspec.Struct, frozen=True):
    """
    A champion that has still to show itself. `promotion` is the request that it came from.

    It has served since `since`, last in the window `newest`, and the labels of `matured` of its windows
    are there. `request` asks for the comparison once these are enough, and is empty before.
    """

    model: str
    version: str
    promotion: str
    needed: int
    since: datetime | None = None
    newest: Served | None = None
    matured: int = 0
    request: str = ""


def begin(model: str, request: str, outcome: Outcome, windows: int) -> Probation | None:
    """
    What a promotion begins; None where probations last no windows, or there was no champion before.

    >>> promoted = Outcome(action="promoted", sentence="", model_version="5", champion_before="4")
    >>> begin("fraud", "request-1", promoted, windows=4).version
    '5'
    >>> begin("fraud", "request-1", promoted, windows=0)
    """
    if not windows or outcome.action != "promoted" or not outcome.champion_before:
        return None
    return Probation(model, outcome.model_version, request, needed=windows)


def on_window(probation: Probation, served: Served) -> Probation:
    """A window has closed; its labels are still to come."""
    if served.version != probation.version:
        return probation
    since = served.start if probation.since is None else min(probation.since, served.start)
    return msgspec.structs.replace(probation, since=since, newest=served)


def on_labels(probation: Probation, version: str, labelled: int) -> tuple[Probation, tuple[Event, ...]]:
    """One more window's labels have matured; the last one needed asks for the comparison."""
    newest = probation.newest
    if version != probation.version or not labelled or probation.request or newest is None:
        return probation, ()
    probation = msgspec.structs.replace(probation, matured=probation.matured + 1)
    if probation.matured < probation.needed:
        return probation, ()
    asked = request_of(probation, newest)
    return msgspec.structs.replace(probation, request=asked.request), (_event(asked),)


def on_outcome(probation: Probation, request: str) -> Probation | None:
    """The comparison came to an end, whichever: the probation is over."""
    return None if probation.request and probation.request == request else probation


def on_champion(probation: Probation, version: str) -> Probation | None:
    """Another champion has nothing to do with how this one does."""
    return probation if version == probation.version else None


def request_of(probation: Probation, newest: Served) -> RetrainRequest:
    """What is asked for; its id follows from the promotion, so that it is asked for once."""
    return RetrainRequest(
        request=str(uuid.uuid5(NAMESPACE, f"probation|{probation.promotion}")),
        kind="probation",
        promotion=probation.promotion,
        episode="",
        episode_number=0,
        attempt=1,
        model=probation.model,
        model_version=probation.version,
        reason=f"labels of {probation.matured} windows that version {probation.version} served are there",
        suspected_since=probation.since or newest.start,
        window_start=newest.start,
        window_end=newest.end,
        offsets=newest.spans,
        drift_share=0.0,
        drifted_columns=(),
    )


def _event(asked: RetrainRequest) -> Event:
    return Event(
        kind=Kind.RETRAIN_REQUESTED,
        model=asked.model,
        subject=asked.request,
        version=asked.model_version,
        request=asked.request,
        payload=msgspec.to_builtins(asked),
    )
