"""Shifts: how far a column's window lies from its reference, in units that know about serial correlation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from monitors.statistics import Floats, long_run_deviation

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

    @property
    def key(self) -> str:
        """Which feature of which column this is; the same in every window."""
        return f"{self.column}|{self.kind}|{self.category}" if self.category else f"{self.column}|{self.kind}"


@dataclass(frozen=True, slots=True)
class _Feature:
    """What a feature was like in the reference."""

    kind: ShiftKind
    expected: float
    unit: float
    deviation: float
    category: int = 0

    @classmethod
    def of(cls, kind: ShiftKind, series: Floats, category: int = 0) -> "_Feature":
        deviation, unit = float(series.std()), long_run_deviation(series)
        effective = series.size * (deviation / unit) ** 2 if unit > 0.0 else 1.0
        unit *= 1.0 + CAUTION / max(1.0, effective) ** 0.5
        return cls(kind, float(series.mean()), unit, deviation, category)

    def shift(self, column: str, value: float, rows: int, reference_rows: int) -> Shift:
        return Shift(
            column,
            self.kind,
            value,
            rows,
            self.expected,
            reference_rows,
            self.unit,
            self.deviation,
            self.category,
        )


@dataclass(frozen=True, slots=True)
class NumericYardstick:
    """Measures windows of a numeric column by ranks among the reference's values."""

    ordered: Floats
    features: tuple[_Feature, ...]

    @classmethod
    def of(cls, values: Floats) -> "NumericYardstick":
        """From the finite values of the reference, in the order of time."""
        ordered = np.sort(values)
        ranks = _ranks(ordered, values)
        features = (_Feature.of("location", ranks), _Feature.of("spread", ranks**2))
        return cls(ordered, tuple(one for one in features if one.deviation > 0.0))

    def measure(self, column: str, values: Floats) -> tuple[Shift, ...]:
        """The shifts of a window's finite values, in any order."""
        if not values.size:
            return ()
        ranks = _ranks(self.ordered, np.sort(values))
        rows = values.size
        means = {"location": float(ranks.sum()) / rows, "spread": float((ranks * ranks).sum()) / rows}
        return tuple(one.shift(column, means[one.kind], rows, self.ordered.size) for one in self.features)


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
    rows: int
    features: tuple[_Feature, ...]

    @classmethod
    def of(cls, values: Sequence[object], counts: Mapping[Any, int]) -> "CategoricalYardstick":
        """From the reference's categories in the order of time, and how often each occurred."""
        total = sum(counts.values())
        common = sorted(counts.items(), key=lambda entry: (-entry[1], str(entry[0])))[:MAX_CATEGORIES]
        kept = [name for name, count in common if MIN_CATEGORY_SHARE <= count / total < 1.0]
        if len(kept) == 2 == len(counts):
            kept = kept[:1]  # the other one's share says the same
        series = [np.array([value == name for value in values], dtype=np.float64) for name in kept]
        features = tuple(_Feature.of("category", one, place) for place, one in enumerate(series, start=1))
        return cls(tuple(kept), total, features)

    def measure(self, column: str, counts: Mapping[Any, int]) -> tuple[Shift, ...]:
        """The shifts of a window's counted categories."""
        total = sum(counts.values())
        if not total:
            return ()
        return tuple(
            feature.shift(column, counts.get(name, 0) / total, total, self.rows)
            for name, feature in zip(self.categories, self.features, strict=True)
        )
