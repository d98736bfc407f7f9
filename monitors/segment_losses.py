"""
Segment losses: in which parts of the rows performance has fallen, and by how much.

It only tells: what is decided is decided on all rows together (`monitors/losses.py`), whose excursion is
followed here segment by segment. A segment's level is its mean loss over the windows outside of any.
"""

import math
from collections.abc import Iterable, Mapping
from datetime import datetime

import msgspec

from monitors.losses import LossState
from monitors.performance import Performance, SegmentLoss

MOST_LEVELS = 40
# Beyond so many rows the older half of what a segment's level rests on is forgotten.
MOST_ROWS = 50_000
MOST_WINDOWS = 32
# A rise of fewer standard errors is not told.
SURE = 2.0
FEWEST_ROWS = 20
MOST_TOLD = 5


class SegmentWindow(msgspec.Struct, frozen=True, array_like=True):
    """One labelled window of an excursion."""

    start: datetime
    version: str
    losses: tuple[SegmentLoss, ...]


class SegmentLossState(msgspec.Struct, frozen=True):
    """The segments' levels, the largest first, and the newest windows of the excursion."""

    levels: tuple[SegmentLoss, ...] = ()
    windows: tuple[SegmentWindow, ...] = ()


class SegmentFall(msgspec.Struct, frozen=True):
    """A segment whose loss has risen: over how many rows, and from what; None for one that is new."""

    segment: str
    loss: float
    baseline: float | None
    rows: int


def observe(
    state: SegmentLossState, performance: Performance, before: LossState, after: LossState, serving: str
) -> SegmentLossState:
    """Take a labelled window; `before` and `after` are what was known of all rows together."""
    if performance.start is None:
        return state
    window = SegmentWindow(performance.start, performance.version, performance.segments)
    if after.windows:
        if all(one.start != window.start for one in after.windows):
            return state  # of a version that serves no more
        since = after.windows[0].start
        kept = [one for one in (*state.windows, window) if one.start >= since]
        return SegmentLossState(state.levels, tuple(kept[-MOST_WINDOWS:]))
    if performance.version != serving:
        return state
    # An excursion that came to nothing was chance, and one that was accepted is the new normal.
    past = () if before.fallen else state.windows
    return SegmentLossState(_levels(state.levels, (*past, window)))


def falls(state: SegmentLossState, losses: LossState, serving: str) -> tuple[SegmentFall, ...]:
    """
    The segments whose loss has surely risen since the excursion began, by what they add to its rise.

    A segment that was not there before is held against the level of all rows.

    >>> from monitors.baseline import Baseline
    >>> now = SegmentLoss("eu", 100, 0.5), SegmentLoss("us", 90, 0.1)
    >>> before = SegmentLoss("eu", 900, 0.1), SegmentLoss("us", 900, 0.1)
    >>> state = SegmentLossState(before, (SegmentWindow(datetime(2026, 1, 1), "1", now),))
    >>> falls(state, LossState(level=Baseline(0.1, 0.3, 5_000)), "1")
    (SegmentFall(segment='eu', loss=0.5, baseline=0.1, rows=100),)
    """
    if losses.level is None:
        return ()
    now = _sums(loss for one in state.windows if one.version == serving for loss in one.losses)
    known = {one.segment: one for one in state.levels}
    found: list[tuple[float, SegmentFall]] = []
    for segment, loss in now.items():
        before = known.get(segment)
        level = losses.level.loss if before is None else before.loss
        share = 1.0 / loss.rows + (0.0 if before is None else 1.0 / before.rows)
        rise = loss.loss - level
        if loss.rows >= FEWEST_ROWS and rise > SURE * losses.level.deviation * math.sqrt(share):
            baseline = None if before is None else before.loss
            found.append((rise * loss.rows, SegmentFall(segment, loss.loss, baseline, loss.rows)))
    found.sort(key=lambda entry: (-entry[0], entry[1].segment))
    return tuple(fall for _, fall in found[:MOST_TOLD])


def _levels(known: tuple[SegmentLoss, ...], windows: Iterable[SegmentWindow]) -> tuple[SegmentLoss, ...]:
    summed = _sums((*known, *(loss for window in windows for loss in window.losses)))
    halved = (
        msgspec.structs.replace(one, rows=one.rows // 2) if one.rows > MOST_ROWS else one
        for one in summed.values()
    )
    return tuple(sorted(halved, key=lambda one: (-one.rows, one.segment))[:MOST_LEVELS])


def _sums(losses: Iterable[SegmentLoss]) -> Mapping[str, SegmentLoss]:
    """Rows and mean loss by segment."""
    found: dict[str, SegmentLoss] = {}
    for one in losses:
        before = found.get(one.segment)
        if before is None:
            found[one.segment] = one
            continue
        rows = before.rows + one.rows
        mean = (before.loss * before.rows + one.loss * one.rows) / rows
        found[one.segment] = SegmentLoss(one.segment, rows, mean)
    return found
