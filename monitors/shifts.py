"""Shifts: how far a column's window lies from its reference, in units that know about serial correlation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from monitors.seasons import Season, Slots
from monitors.statistics import Floats, beside_season, long_run_deviation, seasonal_deviation

ShiftKind = Literal["location", "spread", "category"]

MAX_CATEGORIES = 8
MIN_CATEGORY_SHARE = 0.01
# The correlation of rows is measured from few effective rows, and an alarm must not come of that: the
# fewer they are, the more is added.
CAUTION = 3.0


class Shift(msgspec.Struct, frozen=True, array_like=True):
    """
    The mean of one feature of a column over a window, beside the same mean over the reference.

    A numeric column has two features of each value's rank in the reference, scaled to -1..1: the rank
    itself (location) and its square (spread). A categorical one has the share of each of its most
    common categories, `category` being its place among them. `unit` is the long-run standard
    deviation of one row: a mean of n rows varies by `unit / sqrt(n)`. `deviation` is the plain one.

    With a season, `expected` and `reference_rows` are of the reference's rows in the window's `slot` alone
    (none: 0 rows, and the mean of all), and `unit` is that beside the season, raised where the window's own
    rows deviate more than the reference's do beside it: slots differ in that, too. `slot` is -1 else.
    """

    column: str
    kind: ShiftKind
    value: float
    rows: int
    expected: float
    reference_rows: int
    unit: float
    deviation: float
    category: int = 0
    slot: int = -1
    season: str = ""

    @property
    def key(self) -> str:
        """Which feature of which column this is; the same in every window."""
        return f"{self.column}|{self.kind}|{self.category}" if self.category else f"{self.column}|{self.kind}"


@dataclass(frozen=True, slots=True)
class Calendar:
    """Where in the season the rows of a column lie; None where the reference has no times."""

    season: Season
    slots: Slots | None

    def of_rows(self, rows: npt.NDArray[np.int64]) -> "Calendar":
        """The same of some of the rows."""
        return self if self.slots is None else Calendar(self.season, self.slots[rows])


@dataclass(frozen=True, slots=True)
class _Feature:
    """What a feature was like in the reference, and in each slot of the season."""

    kind: ShiftKind
    expected: float
    rows: int
    unit: float
    deviation: float
    beside: float
    category: int = 0
    season: str = ""
    by_slot: Mapping[int, tuple[float, int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, kind: ShiftKind, series: Floats, category: int = 0, calendar: Calendar | None = None
    ) -> "_Feature":
        slots = None if calendar is None else calendar.slots
        deviation = beside = float(series.std())
        unit = long_run_deviation(series)
        if slots is not None:
            beside, unit = float(beside_season(series, slots).std()), seasonal_deviation(series, slots)
        effective = series.size * (beside / unit) ** 2 if unit > 0.0 else 1.0
        unit *= 1.0 + CAUTION / max(1.0, effective) ** 0.5
        name = "" if calendar is None else calendar.season.name
        by_slot = {} if slots is None else _by_slot(series, slots)
        mean = float(series.mean())
        return cls(kind, mean, series.size, unit, deviation, beside, category, name, by_slot)

    def shift(self, column: str, value: float, square: float, rows: int, slot: int) -> Shift:
        """`square` is the mean of the window's squares."""
        expected, reference_rows, unit = self.expected, self.rows, self.unit
        if self.season:
            expected, reference_rows = self.by_slot.get(slot, (self.expected, 0))
            own = max(0.0, square - value * value) ** 0.5
            unit *= max(1.0, own / self.beside) if self.beside else 1.0
        return Shift(
            column,
            self.kind,
            value,
            rows,
            expected,
            reference_rows,
            unit,
            self.deviation,
            self.category,
            slot if self.season else -1,
            self.season,
        )


def _by_slot(series: Floats, slots: Slots) -> dict[int, tuple[float, int]]:
    """Mean and rows of each slot that has any."""
    rows, totals = np.bincount(slots), np.bincount(slots, series)
    return {
        slot: (float(totals[slot]) / int(rows[slot]), int(rows[slot]))
        for slot in np.flatnonzero(rows).tolist()
    }


@dataclass(frozen=True, slots=True)
class NumericYardstick:
    """Measures windows of a numeric column by ranks among the reference's values."""

    ordered: Floats
    features: tuple[_Feature, ...]

    @classmethod
    def of(cls, values: Floats, calendar: Calendar | None = None) -> "NumericYardstick":
        """From the finite values of the reference, in the order of time."""
        ordered = np.sort(values)
        ranks = _ranks(ordered, values)
        series: tuple[tuple[ShiftKind, Floats], ...] = (("location", ranks), ("spread", ranks**2))
        features = [_Feature.of(kind, one, calendar=calendar) for kind, one in series]
        return cls(ordered, tuple(one for one in features if one.deviation > 0.0))

    def measure(self, column: str, values: Floats, slot: int = -1) -> tuple[Shift, ...]:
        """The shifts of a window's finite values, in any order; `slot` is the window's, of the season."""
        if not values.size:
            return ()
        ranks = _ranks(self.ordered, np.sort(values))
        rows = values.size
        squares = ranks * ranks
        mean, square = float(ranks.sum()) / rows, float(squares.sum()) / rows
        fourth = float((squares * squares).sum()) / rows if slot >= 0 else 0.0
        means = {"location": (mean, square), "spread": (square, fourth)}
        return tuple(one.shift(column, *means[one.kind], rows, slot) for one in self.features)


def _ranks(ordered: Floats, values: Floats) -> Floats:
    """Midranks among the ordered values, scaled to -1..1."""
    left = np.searchsorted(ordered, values, side="left")
    tied = ordered[np.minimum(left, ordered.size - 1)] == values
    # Searching takes most of a window's time, and where no value is met again both sides are the same.
    right = np.searchsorted(ordered, values, side="right") if tied.any() else left
    return np.asarray((left + right) / ordered.size - 1.0, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class CategoricalYardstick:
    """Measures windows of a categorical column by the shares of its most common categories."""

    categories: tuple[object, ...]
    features: tuple[_Feature, ...]

    @classmethod
    def of(
        cls, values: Sequence[object], counts: Mapping[Any, int], calendar: Calendar | None = None
    ) -> "CategoricalYardstick":
        """From the reference's categories in the order of time, and how often each occurred."""
        total = sum(counts.values())
        common = sorted(counts.items(), key=lambda entry: (-entry[1], str(entry[0])))[:MAX_CATEGORIES]
        kept = [name for name, count in common if MIN_CATEGORY_SHARE <= count / total < 1.0]
        if len(kept) == 2 == len(counts):
            kept = kept[:1]  # the other one's share says the same
        series = [np.array([value == name for value in values], dtype=np.float64) for name in kept]
        features = [
            _Feature.of("category", one, place, calendar) for place, one in enumerate(series, start=1)
        ]
        return cls(tuple(kept), tuple(features))

    def measure(self, column: str, counts: Mapping[Any, int], slot: int = -1) -> tuple[Shift, ...]:
        """The shifts of a window's counted categories; `slot` is the window's, of the season."""
        total = sum(counts.values())
        if not total:
            return ()
        shares = [counts.get(name, 0) / total for name in self.categories]
        return tuple(
            feature.shift(column, share, share, total, slot)
            for share, feature in zip(shares, self.features, strict=True)
        )
