"""Concentration: which segments a shift comes from, where it doesn't come from all of them alike."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from monitors.drift import DriftReport, SegmentShift
from monitors.policy import Decision, Phase
from monitors.segments import OTHERS, Segments
from monitors.shifts import Shift

MOST_COLUMNS = 3
MOST_SEGMENTS = 3
FEWEST_ROWS = 30
SMALLEST_EFFECT = 0.1
# A segment is named if its rows have moved so many times as far as the others.
FARTHER = 2.0

Measure = Callable[[Sequence[int]], Sequence[Shift]]
"""The shifts of the rows with these numbers."""


def suspects(report: DriftReport, decision: Decision) -> tuple[str, ...]:
    """
    The columns to look for in segments: those that speak for drift, once it has lasted long enough.

    >>> from monitors.policy import Verdict
    >>> suspects(DriftReport(()), Decision(Verdict.CALM, Phase.INACTIVE, "a clause"))
    ()
    """
    if decision.phase is not Phase.FIRING:
        return ()
    moved = dict.fromkeys(one.column for one in decision.moved)
    return tuple(moved or report.drifted_columns)[:MOST_COLUMNS]


def concentration(
    column: str, now: Measure, segments: Segments, before: Mapping[str, Mapping[str, Shift]], complete: bool
) -> tuple[SegmentShift, ...]:
    """
    Where the shift of a column comes from, most of it first.

    Each segment is held against itself in the reference, whose shifts are `before`; one that the
    reference does not have, where it is `complete`, against all of the reference.

    >>> def now(rows):
    ...     mean = sum(1.0 if row >= 60 else 0.0 for row in rows) / len(rows)
    ...     return [Shift("age", "location", mean, len(rows), 0.0, 500, 1.0, 1.0)]
    >>> segments = Segments.of(["eu"] * 60 + ["us"] * 40)
    >>> [(found.segment, found.effect) for found in concentration("age", now, segments, {}, True)]
    [('us', 1.0)]
    """
    feature = max(now(range(len(segments.places))), key=lambda shift: abs(_effect(shift)), default=None)
    if feature is None or not feature.deviation:
        return ()
    found = list(_parts(column, feature, now, segments, before, complete))
    sign = 1.0 if _effect(feature) > 0.0 else -1.0
    moved = [max(0.0, sign * one.effect) * one.rows for one in found]
    total, rows = sum(moved), sum(one.rows for one in found)
    named = [
        SegmentShift(one.column, one.segment, one.effect, one.rows, part / total)
        for one, part in zip(found, moved, strict=True)
        if sign * one.effect >= SMALLEST_EFFECT
        and rows > one.rows
        and part / one.rows >= FARTHER * (total - part) / (rows - one.rows)
    ]
    return tuple(sorted(named, key=lambda one: (-one.share, one.segment))[:MOST_SEGMENTS])


def _parts(
    column: str,
    feature: Shift,
    now: Measure,
    segments: Segments,
    before: Mapping[str, Mapping[str, Shift]],
    complete: bool,
) -> Iterator[SegmentShift]:
    for segment, rows in segments.parts():
        if segment == OTHERS or len(rows) < FEWEST_ROWS:
            continue
        current = next((shift for shift in now(rows) if shift.key == feature.key), None)
        known = before.get(segment, {}).get(feature.key)
        expected = known.value if known is not None else feature.expected
        if current is not None and (known is not None or (segment not in before and complete)):
            effect = (current.value - expected) / feature.deviation
            yield SegmentShift(column, segment, effect, len(rows), 0.0)


def _effect(shift: Shift) -> float:
    return (shift.value - shift.expected) / shift.deviation if shift.deviation else 0.0
