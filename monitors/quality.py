"""Quality: what is wrong with a column's data in a window, before anybody asks whether it drifted."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from monitors.columns import Counts, Key, Numbers, Tally
from monitors.drift import Finding
from monitors.settings import QualitySettings
from monitors.statistics import Floats

SPANS = 10.0
"""A number is out of range when it is further off than this many times the reference's own span."""

MAX_NEW_COLUMNS = 50
MAX_NAME_LENGTH = 120

ENOUGH_ROWS = 100
ENOUGH_SHARE = 0.5
# Of a column that is zero as a rule fewer values out of range than these may be outliers.
FEWEST_MOVED = 10


@dataclass(frozen=True, slots=True)
class Range:
    """
    Between which numbers a column lay in the reference, and beyond which ones it is out of range.

    >>> reference = Range(0.0, 2.0)
    >>> reference.low, reference.high
    (-20.0, 22.0)
    >>> Range(5.0, 5.0).high, Range(0.0, 0.0).high  # a constant is widened by its own size
    (55.0, 10.0)
    """

    least: float
    most: float

    @property
    def constant(self) -> bool:
        """It never varied."""
        return self.least == self.most

    @property
    def low(self) -> float:
        """Below this is out of range."""
        return self.least - SPANS * self._span

    @property
    def high(self) -> float:
        """Above this is out of range."""
        return self.most + SPANS * self._span

    @property
    def _span(self) -> float:
        return (abs(self.most) or 1.0) if self.constant else self.most - self.least

    def is_outside(self, number: float) -> bool:
        """It is out of range."""
        return not self.low <= number <= self.high


def too_few(usable: int, rows: int) -> bool:
    """
    True where a score would rest on a remnant of the rows.

    A short window that is complete passes: how short a window may be is `window.min_rows`' business.

    >>> too_few(50, 1_000), too_few(50, 60), too_few(0, 0)
    (True, False, True)
    """
    return usable == 0 or (usable < ENOUGH_ROWS and usable < ENOUGH_SHARE * rows)


def find_gaps(column: str, tally: Tally, null_before: float, quality: QualitySettings) -> list[Finding]:
    """Missing, null, wrongly typed and infinite values; `null_before` is the reference's share of null."""
    missing, null = _share(tally.missing, tally), _share(tally.null, tally)
    wrong, infinite = _share(tally.wrong_type, tally), _share(tally.infinite, tally)
    before = f"null share {null_before:.4f} in the reference"
    gone = null_before - null - missing >= quality.null_share_rise
    vanished = [Finding(column, "null_share", null, False, before)] if gone and not null else []
    return vanished + [
        finding
        for finding in (
            # A producer that leaves nulls out is not broken: only what is missing beyond them counts.
            _finding(column, "missing", missing, missing - null_before, quality.missing_share),
            _finding(column, "wrong_type", wrong, wrong, quality.wrong_type_share),
            _finding(column, "null_share", null, null - null_before, quality.null_share_rise, before),
            _finding(column, "infinite", infinite, infinite, quality.infinite_share),
        )
        if finding is not None
    ]


def find_out_of_range(
    column: str, numbers: Numbers, reference: Range, quality: QualitySettings
) -> list[Finding]:
    """Numbers of another order of magnitude, and any other value of a column that never varied."""
    values = numbers.values
    if values.size == 0:
        return []
    outside = _outside(values, reference.low, reference.high)
    if reference.constant:
        others = _share(_outside(values, reference.least, reference.most), numbers.tally)
        detail = "constant in the reference: any other value scores as drift"
        far, limit = _share(outside, numbers.tally), quality.out_of_range_share
        found = _finding(column, "out_of_range", others, far, limit, detail)
        return [found] if found else []
    return _out_of_range(column, outside, values.size - _outside(values, 0.0, 0.0), numbers.tally, quality)


def find_unseen(
    column: str, counts: Counts, seen: Mapping[Key, int], quality: QualitySettings
) -> list[Finding]:
    """
    Categories that the reference does not have; how many, never which.

    Those that are numbers may be the next months or shops: only ones of another magnitude are broken.
    """
    unseen = [count for key, count in counts.counts.items() if key not in seen]
    share = _share(sum(unseen), counts.tally)
    detail = f"{len(unseen)} categories are not in the reference"
    known = [float(key) for key in seen if not isinstance(key, str)]
    numbers = len(known) == len(seen) > 0
    excess = 0.0 if numbers else share
    found = _finding(column, "unseen_category", share, excess, quality.unseen_category_share, detail)
    far = _find_far(column, counts, Range(min(known), max(known)), quality) if numbers else []
    return far + ([found] if found else [])


def _find_far(column: str, counts: Counts, known: Range, quality: QualitySettings) -> list[Finding]:
    """Categories that are numbers, as those of a reference that has no others."""
    far = [count for key, count in counts.counts.items() if isinstance(key, str) or known.is_outside(key)]
    return _out_of_range(column, sum(far), counts.counts.get(0, 0), counts.tally, quality)


def _out_of_range(
    column: str, outside: int, zeros: int, tally: Tally, quality: QualitySettings
) -> list[Finding]:
    """A change of unit leaves zeros where they are: where most are, what it can move is counted alone."""
    share = _share(outside, tally)
    movable = tally.usable - zeros
    excess = max(share, outside / movable) if outside >= FEWEST_MOVED else share
    found = _finding(column, "out_of_range", share, excess, quality.out_of_range_share)
    return [found] if found else []


def find_new(occurrences: dict[str, int], rows: int) -> list[Finding]:
    """Columns that the reference does not have; hostile rows cannot make this list, or a name, long."""
    named = sorted(occurrences)[:MAX_NEW_COLUMNS]
    findings = [Finding(name[:MAX_NAME_LENGTH], "new", occurrences[name] / rows, False) for name in named]
    if len(occurrences) > len(named):
        rest = len(occurrences) - len(named)
        findings.append(Finding("*", "new", 1.0, False, f"and {rest} more new columns"))
    return findings


def _finding(
    column: str, code: str, share: float, excess: float, limit: float, detail: str = ""
) -> Finding | None:
    """Says what is there, and calls it broken where the excess reaches the limit."""
    return Finding(column, code, share, excess >= limit, detail) if share > 0.0 else None


def _outside(ordered: Floats, low: float, high: float) -> int:
    below = int(np.searchsorted(ordered, low, "left"))
    return below + ordered.size - int(np.searchsorted(ordered, high, "right"))


def _share(part: int, tally: Tally) -> float:
    return part / tally.rows if tally.rows else 0.0
