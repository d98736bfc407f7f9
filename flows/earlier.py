"""Earlier champions: models that have served before, and may know a world that has come back."""

from collections.abc import Iterator
from itertools import islice

import structlog

from flows.registry import ModelUnloadable, ModelVersion, Registry
from flows.rows import LabelledRows
from flows.scoring import Answers, losses
from flows.training import Challenger

log = structlog.get_logger()

# How many are asked: the most recent ones.
MOST_EARLIER = 6
_SPAN = "version "


def earlier_answers(
    kind: str, registry: Registry, champion: str, before: LabelledRows, holdout: LabelledRows, only: str = ""
) -> tuple[Answers, ...]:
    """
    What the likeliest of the champions before this one says of the holdout, which it has not seen.

    It is the one that did best on the rows right before the holdout, and better than the champion there,
    so that choosing it has no part in how it is judged. `only` names one that is wanted, by its span.
    One that can't be loaded or asked is left out.
    """
    unseen = [
        version
        for version in earlier_champions(registry, champion)
        if version.trained_until < float(holdout.event_times[0]) and only in ("", _SPAN + origin(version))
    ]
    if not unseen:
        return ()
    present = registry.find(champion) if champion and not only else None
    best, least = None, _loss(kind, registry, present, before)
    for version in unseen:
        cost = _loss(kind, registry, version, before)
        if cost is not None and (least is None or cost < least):
            best, least = version, cost
    said = None if best is None else _asked(registry, best, holdout)
    return () if said is None else (said,)


def is_earlier(span: str) -> bool:
    """
    Whether a candidate's span names an earlier champion, and no rows to train on.

    >>> is_earlier("version 3"), is_earlier("all rows")
    (True, False)
    """
    return span.startswith(_SPAN)


def again(registry: Registry, span: str) -> Challenger:
    """The earlier champion that the span names, to be registered anew; raises `ModelUnloadable`."""
    version = span.removeprefix(_SPAN)
    made = registry.find(version)
    if made is None:
        raise ModelUnloadable(f"version {version} does not exist (any more)")
    model = registry.load(version)
    return Challenger(
        estimator=model.estimator,
        schema=model.schema,
        span=span,
        rows=int(made.tags.get("training_rows", "0")),
        trained_from=made.trained_from,
        trained_until=made.trained_until,
        candidates=(),
        parameters={"again": version},
    )


def origin(version: ModelVersion) -> str:
    """The version whose model this is: its own, or the one that was registered anew."""
    span = version.tags.get("span", "")
    return span.removeprefix(_SPAN) if is_earlier(span) else version.version


def earlier_champions(registry: Registry, champion: str) -> tuple[ModelVersion, ...]:
    """The models that were champion and are not, the latest first, `MOST_EARLIER` of them."""
    return tuple(islice(_earlier(registry, champion), MOST_EARLIER))


def _earlier(registry: Registry, champion: str) -> Iterator[ModelVersion]:
    moves = registry.audit()
    # What a person has taken out of service comes back by a person's hand alone.
    banned = [one.move.expected for one in moves if one.move.action == "rolled-back" and not one.move.request]
    left_out = [registry.find(version) for version in (champion, *banned) if version]
    told = {origin(version) for version in left_out if version is not None}
    for record in reversed(moves):
        version = registry.find(record.move.version)
        # Of a version that somebody else has registered nobody knows what it has seen.
        if version is not None and "trained_until" in version.tags and origin(version) not in told:
            told.add(origin(version))
            yield version


def _loss(kind: str, registry: Registry, version: ModelVersion | None, rows: LabelledRows) -> float | None:
    said = None if version is None or not len(rows) else _asked(registry, version, rows)
    return None if said is None else float(losses(kind, rows.labels, said).mean())


def _asked(registry: Registry, version: ModelVersion, rows: LabelledRows) -> Answers | None:
    try:
        return registry.load(version.version).answers(rows.features, _SPAN + origin(version))
    except Exception as error:  # noqa: BLE001 - whatever an estimator may raise: it is no candidate then
        log.info("earlier_champion_left_out", version=version.version, reason=type(error).__name__)
        return None
