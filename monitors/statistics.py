"""
Drift statistics: how far apart are two samples, in the number that Evidently would give?

Every sum runs in a fixed order or is rounded once (`math.fsum`), so that a score is the same to the
last bit in every process. The arithmetic follows scipy's where scipy is what Evidently calls; a golden
test (`tests/unit/test_drift_golden.py`) holds method, score and verdict to Evidently's own.
"""

import difflib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray
from scipy.special import chdtrc, ndtr, rel_entr

EVIDENTLY_VERSION = "0.7.23"
"""The Evidently whose scores these are."""

Floats = NDArray[np.float64]
ColumnType = Literal["numeric", "categorical"]

_KS_EXACT_UP_TO = 10_000
FEW_VALUES = 5
"""A numeric column with no more values than this is scored by value."""
_SMALL_REFERENCE = 1_000


class Method(msgspec.Struct, frozen=True):
    """One way to score a column: how its score is judged, and which columns a user may state it for."""

    name: str
    threshold: float
    comparison: Literal["<", "<=", ">="]
    types: tuple[ColumnType, ...]

    @property
    def implementation(self) -> str:
        """Method and version, as the ledger keeps them beside each score."""
        return f"evidently-{EVIDENTLY_VERSION}/{self.name}"

    def says_drift(self, score: float, threshold: float) -> bool:
        """Only `ks` counts a p-value equal to the threshold as drift."""
        if self.comparison == "<":
            return score < threshold
        return score <= threshold if self.comparison == "<=" else score >= threshold


METHODS = {
    method.name: method
    for method in (
        Method("ks", 0.05, "<=", ("numeric",)),
        Method("wasserstein", 0.1, ">=", ("numeric",)),
        Method("psi", 0.1, ">=", ("numeric", "categorical")),
        Method("jensenshannon", 0.1, ">=", ("numeric", "categorical")),
        Method("kl_div", 0.1, ">=", ("numeric", "categorical")),
        Method("chisquare", 0.05, "<", ("categorical",)),
        Method("z", 0.05, "<", ("categorical",)),
    )
}


class UnknownMethod(ValueError):
    """A method was stated that is not in `METHODS`; the message names the nearest one."""


def method_named(name: str, column: str) -> Method:
    """
    The method of that name, or an error that helps.

    >>> method_named("psii", "age")
    Traceback (most recent call last):
    monitors.statistics.UnknownMethod: drift.methods.age: no method is called 'psii'; nearest: psi
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name.lower(), METHODS, n=1)
    hint = f"nearest: {near[0]}" if near else f"there are {', '.join(METHODS)}"
    raise UnknownMethod(f"drift.methods.{column}: no method is called {name!r}; {hint}")


def default_method(type: ColumnType, reference_rows: int, distinct: int) -> Method:
    """
    Evidently's choice; `distinct` counts the values of reference and current together.

    >>> default_method("numeric", 5_000, 900).name, default_method("categorical", 800, 2).name
    ('wasserstein', 'z')
    """
    by_value = type == "categorical" or distinct <= FEW_VALUES
    if reference_rows > _SMALL_REFERENCE:
        return METHODS["jensenshannon" if by_value else "wasserstein"]
    if by_value:
        return METHODS["chisquare" if distinct > 2 else "z"]
    return METHODS["ks"]


def ks_p_value(reference: Floats, current: Floats) -> float:
    """
    Two-sample Kolmogorov-Smirnov p-value of two sorted samples, exact up to 10 000 values each.

    >>> ks_p_value(np.arange(50.0), np.arange(50.0))
    1.0
    """
    first, second = reference.size, current.size
    distance = _ks_distance(reference, current)
    if max(first, second) <= _KS_EXACT_UP_TO:
        common = first // math.gcd(first, second) * second
        steps = round(distance * common)
        exact = _ks_exact(first, second, steps)
        if exact is not None:
            return exact
        distance = steps / common
    return _ks_asymptotic(first, second, distance)


def _ks_distance(reference: Floats, current: Floats) -> float:
    """The largest gap is found at, or just before, one of the current values: no merge is needed."""
    at = np.searchsorted(reference, current, "right") / reference.size
    at -= np.searchsorted(current, current, "right") / current.size
    before = np.searchsorted(reference, current, "left") / reference.size
    before -= np.searchsorted(current, current, "left") / current.size
    return float(max(-at.min(), -before.min(), at.max(), before.max(), 0.0))


@lru_cache(maxsize=65_536)
def _ks_exact(first: int, second: int, steps: int) -> float | None:
    """The p-value depends on nothing but the sizes and the distance in steps of 1/lcm."""
    # Importing scipy.stats takes a second, which only references under 1 001 rows have to pay.
    from scipy.stats import _stats_py

    common_divisor = math.gcd(first, second)
    distance = steps / (first // common_divisor * second)
    found, _, p_value = _stats_py._attempt_exact_2kssamp(first, second, common_divisor, distance, "two-sided")
    return min(max(float(p_value), 0.0), 1.0) if found else None


def _ks_asymptotic(first: int, second: int, distance: float) -> float:
    from scipy.stats import kstwo

    large, small = float(max(first, second)), float(min(first, second))
    p_value = float(kstwo.sf(distance, np.round(large * small / (large + small))))
    return min(max(p_value, 0.0), 1.0)


def wasserstein(reference: Floats, current: Floats) -> float:
    """
    Earth mover's distance of two sorted samples, by one linear merge.

    >>> wasserstein(np.array([0.0, 1.0]), np.array([3.0, 4.0]))
    3.0
    """
    places = np.searchsorted(reference, current, "right")
    places += np.arange(current.size)
    from_reference = np.ones(reference.size + current.size, dtype=bool)
    from_reference[places] = False
    merged = np.empty(from_reference.size)
    merged[places] = current
    merged[from_reference] = reference
    passed = np.cumsum(from_reference[:-1])
    gaps = np.abs(passed / reference.size - (np.arange(1, merged.size) - passed) / current.size)
    gaps *= np.diff(merged)
    # Not a dot product: BLAS adds up in an order that depends on threads and alignment.
    return float(np.add.reduce(gaps))


def scale_of(values: Floats) -> float:
    """
    What a Wasserstein distance is divided by: the reference's deviation, and at least 0.001.

    NaN where it is beyond floating point: divided by infinity, any distance would pass for no drift.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        mean = values.sum() / values.size
        deviation = math.sqrt(float(((mean - values) ** 2).sum()) / values.size)
    return max(deviation, 0.001) if math.isfinite(deviation) else math.nan


def bin_edges(reference: Floats, current: Floats) -> Floats:
    """
    Sturges bins over both sorted samples together, so they move with every window, as Evidently's do.

    >>> bin_edges(np.array([0.0, 1.0]), np.array([2.0, 3.0])).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    low = float(min(reference[0], current[0]))
    high = float(max(reference[-1], current[-1]))
    width = (high - low) / (np.log2(reference.size + current.size) + 1.0)
    if not width:
        return np.array([low - 0.5, low + 0.5])
    return np.linspace(low, high, int(np.ceil((high - low) / width)) + 1)


def shares_in_bins(values: Floats, edges: Floats) -> Floats:
    """The share of the sorted values in each bin; the last bin includes its right edge."""
    passed = np.concatenate(
        (np.searchsorted(values, edges[:-1], "left"), np.searchsorted(values, edges[-1:], "right"))
    )
    return np.diff(passed) / values.size


def jensen_shannon(reference: Floats, current: Floats) -> float:
    """
    Jensen-Shannon distance of two lists of shares, natural logarithm: 0 to 0.8326.

    >>> jensen_shannon(np.array([0.5, 0.5]), np.array([0.5, 0.5]))
    0.0
    """
    reference, current = _normalised(reference), _normalised(current)
    middle = (reference + current) / 2.0
    divergence = _sum(rel_entr(reference, middle)) + _sum(rel_entr(current, middle))
    # Rounding can leave a hair less than nothing, of which scipy would take the root and get NaN.
    return math.sqrt(max(divergence, 0.0) / 2.0)


def psi(reference: Floats, current: Floats) -> float:
    """Population stability index of two lists of shares, empty ones filled as Evidently fills them."""
    reference, current = _without_zeros(reference), _without_zeros(current)
    return _sum((reference - current) * np.log(reference / current))


def kl_divergence(reference: Floats, current: Floats) -> float:
    """Kullback-Leibler divergence of two lists of shares, empty ones filled as Evidently fills them."""
    return _sum(rel_entr(_normalised(_without_zeros(reference)), _normalised(_without_zeros(current))))


def _normalised(shares: Floats) -> Floats:
    return shares / _sum(shares)


def _without_zeros(shares: Floats) -> Floats:
    zero = shares == 0
    if not zero.any():
        return shares
    least = float(shares[~zero].min())
    return np.where(zero, least / 10**6 if least <= 0.0001 else 0.0001, shares)


def _sum(terms: Floats) -> float:
    """Rounded once, so the order of the terms cannot show."""
    return math.fsum(terms.tolist())


def chisquare_p_value(reference: Floats, current: Floats) -> float:
    """
    Goodness of fit of the current counts, the reference taken as exact; NaN for a single value.

    >>> chisquare_p_value(np.array([50.0, 0.0]), np.array([50.0, 1.0]))  # one unseen value is enough
    0.0
    """
    if reference.size == 1:
        return math.nan
    expected = reference * (current.sum() / reference.sum())
    with np.errstate(divide="ignore"):
        statistic = _sum((current - expected) ** 2 / expected)
    return 0.0 if math.isinf(statistic) else float(chdtrc(reference.size - 1, statistic))


def z_p_value(reference: Floats, current: Floats) -> float:
    """
    Difference of two proportions, by counts in the order of their keys: the first against the rest.

    >>> z_p_value(np.array([30.0, 70.0]), np.array([30.0, 70.0]))
    1.0
    """
    if reference.size == 1:
        return 1.0
    first, second = float(reference.sum()), float(current.sum())
    share_first = (first - float(reference[0])) / first
    share_second = (second - float(current[0])) / second
    pooled = (share_first * first + share_second * second) / (first + second)
    spread = pooled * (1 - pooled) * (1.0 / first + 1.0 / second)
    if spread <= 0.0:
        return math.nan
    return float(2 * (1 - ndtr(abs((share_first - share_second) / math.sqrt(spread)))))


ON_SHARES: dict[str, Callable[[Floats, Floats], float]] = {
    "jensenshannon": jensen_shannon,
    "psi": psi,
    "kl_div": kl_divergence,
}
"""Scores of two lists of shares that belong to the same bins or keys."""

ON_COUNTS: dict[str, Callable[[Floats, Floats], float]] = {
    "chisquare": chisquare_p_value,
    "z": z_p_value,
}
"""Scores of two lists of counts that belong to the same keys, in the order of those keys."""

ON_SORTED: dict[str, Callable[[Floats, Floats], float]] = {"ks": ks_p_value, "wasserstein": wasserstein}
"""Scores of two sorted samples; Wasserstein's is yet to be divided by `scale_of` the reference."""


_FEWEST_BATCHES = 5
_LARGEST_CORRELATION = 0.995
_SMALLEST_SHARE_KEPT = 0.25


def long_run_deviation(series: Floats) -> float:
    """
    The standard deviation that a row of a serially correlated series counts for in a mean.

    The larger of two estimates: an autoregression of order one (its spectral density at zero; Andrews,
    Econometrica 59, 1991), and the means of batches of sqrt(n) and of n / 8 rows. In the order of time.

    >>> round(long_run_deviation(np.tile([0.0, 1.0], 500)), 2)
    0.5
    """
    rows = series.size
    deviation = float(series.std())
    if rows < 2 or deviation == 0.0:
        return deviation
    centred = series - series.mean()
    # Summed pairwise by numpy: a dot product differs in its last bit with the number of threads.
    correlation = float((centred[1:] * centred[:-1]).sum() / (centred * centred).sum())
    correlation = min(max(correlation, 0.0), _LARGEST_CORRELATION)
    found = [deviation * math.sqrt((1.0 + correlation) / (1.0 - correlation))]
    found += [_by_batches(series, size) for size in (int(math.sqrt(rows)), rows // 8) if size > 1]
    return max(found)


def beside_season(series: Floats, slots: npt.NDArray[np.int64]) -> Floats:
    """What is left of each row when the mean of its slot's rows is taken away."""
    means = np.bincount(slots, series) / np.maximum(np.bincount(slots), 1)
    return np.asarray(series - means[slots], dtype=np.float64)


def seasonal_deviation(series: Floats, slots: npt.NDArray[np.int64]) -> float:
    """
    The same beside the season.

    Means of few rows take more than the season with them. What they take of a variance and of a correlation
    is given back as for an autoregression of order one (Marriott and Pope, Biometrika 41, 1954).

    >>> day = np.tile(np.repeat([0.0, 10.0], 50), 50) + np.tile([0.0, 1.0], 2_500)
    >>> round(seasonal_deviation(day, np.tile(np.repeat([0, 1], 50), 50)), 2)
    0.5
    """
    present = np.unique(slots).size
    centred = beside_season(series, slots)
    squares = float((centred * centred).sum())
    if series.size <= present or squares == 0.0:
        return 0.0
    each = series.size / present
    correlation = float((centred[1:] * centred[:-1]).sum()) / squares
    correlation = min(max(correlation + (1.0 + 3.0 * correlation) / each, 0.0), _LARGEST_CORRELATION)
    along = (1.0 + correlation) / (1.0 - correlation)
    variance = squares / series.size / max(_SMALLEST_SHARE_KEPT, 1.0 - along / each)
    found = [math.sqrt(variance * along)]
    found += [
        _by_batches(centred, size) for size in (int(math.sqrt(series.size)), series.size // 8) if size > 1
    ]
    return max(found)


def _by_batches(series: Floats, size: int) -> float:
    batches = series.size // size
    if batches < _FEWEST_BATCHES:
        return 0.0
    means = series[: batches * size].reshape(batches, size).mean(axis=1)
    return float(means.std(ddof=1)) * math.sqrt(size)
