"""Retrace: what a model's steps, as the ledger has them, lead to when they are taken again."""

from collections.abc import Callable, Mapping, Sequence

import msgspec

from monitors import steps
from monitors.baseline import Baseline
from monitors.episodes import Circumstances, Judged, ModelState, Step, on_champion
from monitors.events import Event, Kind, RetrainRequest
from monitors.settings import ModelSettings
from monitors.steps import Closed, Ended, Heard, Taken

# The version of a window and its key.
Window = tuple[str, int]
_decoder: msgspec.json.Decoder[Taken] = msgspec.json.Decoder(Taken)


class Untraceable(Exception):
    """The ledger does not hold all that the model's state came from."""


def retrace(
    model: str,
    origin: str,
    kept: Sequence[tuple[str, str]],
    judged: Mapping[Window, Judged],
    settings_of: Callable[[str], ModelSettings],
    baseline_of: Callable[[Window], Baseline | None],
) -> dict[str, RetrainRequest]:
    """
    The requests that a model's steps lead to, by their ids: all of them, in the order of the ledger.

    Raises `Untraceable` where windows were judged of which no step tells: by an older program, or so long
    ago that retention has taken them.
    """
    taken = [(settings_of(digest), _decoded(body)) for digest, body in kept]
    closed = [(step.version, step.key) for _, step in taken if isinstance(step, Closed)]
    if len(closed) != len(set(closed)) or set(closed) != judged.keys():
        raise Untraceable(f"{len(judged)} windows of {model} and steps of {len(closed)}")
    state = ModelState(serving=taken[0][0].serving_version) if taken else ModelState()
    told: list[Event] = []
    for settings, step in taken:
        state, events = _again(step, model, origin, settings, state, judged, baseline_of)
        told += events
    asked = [
        msgspec.convert(event.payload, RetrainRequest)
        for event in told
        if event.kind is Kind.RETRAIN_REQUESTED
    ]
    return {one.request: one for one in asked}


def _again(
    step: Taken,
    model: str,
    origin: str,
    settings: ModelSettings,
    state: ModelState,
    judged: Mapping[Window, Judged],
    baseline_of: Callable[[Window], Baseline | None],
) -> Step:
    if isinstance(step, Ended):
        return steps.on_outcome(settings, state, step.request, step.outcome)
    if isinstance(step, Closed | Heard):
        around = Circumstances(origin, "retrain", silenced=step.quiet)
        if isinstance(step, Heard):
            return steps.on_performance(around, settings, model, state, step.performance)
        window = step.version, step.key
        return steps.on_window(around, settings, state, judged[window], baseline_of(window))
    return on_champion(settings.policy, state, step.version, step.action)


def _decoded(body: str) -> Taken:
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Untraceable(f"a step cannot be read: {error}") from error
