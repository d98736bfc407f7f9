"""Segments: is a challenger surely worse in a part of the rows, however good it is on the whole?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr

from flows.certainty import bounds
from flows.scoring import (
    MIN_CLASS_ROWS,
    MIN_DIFFERING_ROWS,
    Answers,
    Floats,
    Metric,
    Values,
    canonical,
    differing_rows,
    row_values,
)
from flows.verdict import interval, signed
from monitors.settings import GateSettings


@dataclass(frozen=True)
class Regression:
    """One segment's change, positive being better; `p` is the chance of as bad a one without any loss."""

    segment: str
    rows: int
    gain: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        """`eu: -.041, CI -.06 to -.02, 412 rows`."""
        return f"{self.segment}: {signed(self.gain)}, CI {interval(self.low, self.high)}, {self.rows} rows"


def regressions(
    settings: GateSettings,
    metric: Metric,
    labels: Values,
    segments: Values,
    challenger: Answers,
    champion: Answers,
) -> tuple[int, list[Regression]]:
    """
    How many segments had enough rows, and those that got surely worse by more than `segment_margin`.

    The worst comes first. Holm's correction: with no loss anywhere, the chance that any segment is
    named is at most one minus the confidence.
    """
    changes = list(_changes(settings, metric, labels, segments, challenger, champion))
    return len(changes), _surely(changes, 1.0 - settings.confidence)


def _surely(changes: Sequence[Regression], level: float) -> list[Regression]:
    """Holm's step-down: each p-value is held against the level by what is left to judge."""
    found: list[Regression] = []
    for place, change in enumerate(sorted(changes, key=lambda change: change.p)):
        if change.p > level / (len(changes) - place):
            break
        found.append(change)
    return sorted(found, key=lambda change: change.gain)


def _changes(
    settings: GateSettings,
    metric: Metric,
    labels: Values,
    segments: Values,
    challenger: Answers,
    champion: Answers,
) -> Iterator[Regression]:
    truth = canonical(labels) if metric != "mae" else labels
    names = np.array(["" if value is None else str(value) for value in segments], dtype=object)
    for name in sorted(set(names) - {""}):
        where = np.flatnonzero(names == name)
        if len(where) < settings.min_segment_rows or not _judgeable(metric, truth[where]):
            continue
        ours, theirs = challenger.only(where), champion.only(where)
        if change := _change(settings, metric, name, truth[where], ours, theirs):
            yield change


def _judgeable(metric: Metric, truth: Values) -> bool:
    """Whether both metrics of classes find enough rows of enough classes."""
    if metric in ("accuracy", "mae"):
        return True
    names, counts = np.unique(truth.astype(str), return_counts=True)
    return len(names) >= 2 and int(counts.min()) >= MIN_CLASS_ROWS


def _change(
    settings: GateSettings, metric: Metric, name: str, truth: Values, ours: Answers, theirs: Answers
) -> Regression | None:
    sign = -1.0 if metric == "mae" else 1.0
    if differing_rows(metric, truth, ours, theirs) < MIN_DIFFERING_ROWS:
        return Regression(name, len(truth), 0.0, 0.0, 0.0, p=1.0)
    gains: Floats = sign * (row_values(metric, truth, ours) - row_values(metric, truth, theirs))
    found = bounds(gains[None, :], settings.confidence, settings.resamples, seed=0)
    gain, error = float(found.means[0]), float(found.errors[0])
    distance = (
        (gain + settings.segment_margin) / error
        if error
        else np.sign(gain + settings.segment_margin) * np.inf
    )
    p = float(stdtr(found.waves, distance))
    return Regression(name, len(truth), gain, float(found.low[0]), float(found.high[0]), p)
