"""
Certainty: bounds for the means of rows that depend on their neighbours, for several candidates at once.

The long-run variance of a mean is that of the rows' slowest cosine waves (equal-weighted periodogram,
Lazarus, Lewis, Stock & Watson 2018): the fewer of them, the longer a dependence they see, and Student's
t of as many degrees of freedom pays for how few they are. How many follows from the block length of
Politis & White (2004, corrected by Patton, Politis & White 2009), and from whether the very slowest waves
stand out, as they do where one model is better for a while and then the other. In simulations
(`tests/bench/bench_gate.py`) this keeps its level where a block bootstrap of the same block length does not.
"""

from dataclasses import dataclass

import numpy as np
from scipy.fft import dct, irfft, next_fast_len, rfft
from scipy.special import fdtri, stdtrit

from flows.scoring import Floats

# So few waves see a dependence over a quarter of the rows; with fewer, t's tail makes any bound useless.
FEWEST_WAVES = 4
_SLOWEST_WAVES = (16, 8, FEWEST_WAVES)
# How surely the slowest waves must stand out before they alone are believed.
_STANDING_OUT = 0.80
_MOST_DEPENDENT = 0.97


@dataclass(frozen=True, eq=False)
class Bounds:
    """
    Simultaneous one-sided bounds of several means; arrays have one entry per candidate.

    All of `low` hold together with the asked confidence, and so do all of `high`. `waves` is the
    number of degrees of freedom that the variances were estimated with.
    """

    means: Floats
    errors: Floats
    low: Floats
    high: Floats
    waves: int


def bounds(rows: Floats, confidence: float, draws: int, seed: int, tried: int = 0) -> Bounds:
    """
    Bound the mean of each row of `rows`, an array of (candidates, rows in time order).

    The bounds of several candidates are corrected for their number, and being alike makes that
    cheaper: the critical value is that of the greatest of correlated t statistics, from `draws`
    random ones. `tried` counts candidates that were dropped on these rows before.
    """
    means = rows.mean(axis=1)
    waves = min(waves_of(values) for values in rows)
    errors = np.sqrt([long_run_variance(values, waves) / rows.shape[1] for values in rows])
    tail = (1.0 - confidence) * len(rows) / max(tried, len(rows))
    reach = critical_value(rows, tail, waves, draws, seed) * errors
    return Bounds(means, errors, means - reach, means + reach, waves)


def waves_of(values: Floats) -> int:
    """How many of the slowest waves to estimate the variance of the mean from: fewer, the more dependent."""
    count = len(values)
    most = max(FEWEST_WAVES, int(0.4 * count ** (2 / 3)))
    if not values.std():
        return most
    waves = int(np.clip(0.5 * count / block_length(values), FEWEST_WAVES, most))
    power = _powers(values)
    for slowest in _SLOWEST_WAVES:
        usual = max(power[:waves].mean(), values.var())
        if slowest < waves and power[:slowest].mean() > usual * fdtri(slowest, waves, _STANDING_OUT):
            waves = slowest
    return waves


def long_run_variance(values: Floats, waves: int) -> float:
    """
    The variance of the mean times the number of rows: the greatest of three estimates.

    That of the slowest waves as they are; of the waves of what a first-order autoregression leaves,
    which sees more of a dependence nearly as long as the rows; and of independent rows, since a
    dependence that makes a mean surer than that is not believed.
    """
    count = len(values)
    centred = values - values.mean()
    independent = float(centred @ centred) / (count - 1)
    if not independent:
        return 0.0
    plain = float(_powers(values)[:waves].mean())
    phi = float(centred[1:] @ centred[:-1] / (centred[:-1] @ centred[:-1] or 1.0))
    # Estimates of phi are too small by about this much (Kendall 1954).
    phi = min(max(phi + (1.0 + 3.0 * phi) / count, 0.0), _MOST_DEPENDENT)
    whitened = float(_powers(centred[1:] - phi * centred[:-1])[:waves].mean()) / (1.0 - phi) ** 2
    return max(plain, whitened, independent)


def critical_value(rows: Floats, tail: float, waves: int, draws: int, seed: int) -> float:
    """How many standard errors the greatest of the candidates' t statistics stays within."""
    if len(rows) == 1:
        return float(stdtrit(waves, 1.0 - tail))
    random = np.random.default_rng(seed)
    triangle = _correlation_root(rows)
    candidates = len(rows)
    numerators = random.standard_normal((draws, candidates)) @ triangle.T
    # Bartlett's decomposition of a Wishart matrix, of which the diagonal is all that is needed.
    factors = np.tril(random.standard_normal((draws, candidates, candidates)), -1)
    freedom = np.maximum(waves - np.arange(candidates), 1)
    factors[:, np.arange(candidates), np.arange(candidates)] = np.sqrt(
        random.chisquare(freedom, (draws, candidates))
    )
    variances = ((triangle @ factors) ** 2).sum(axis=2) / waves
    greatest = (numerators / np.sqrt(variances)).max(axis=1)
    return float(np.quantile(greatest, 1.0 - tail, method="higher"))


def block_length(values: Floats) -> float:
    """
    Politis and White's automatic block length for a circular block bootstrap of the mean, in rows.

    >>> block_length(np.array([1.0, 1.0, 1.0]))
    1.0
    """
    count = len(values)
    quiet = max(5, int(np.log10(count)))
    longest = int(np.ceil(np.sqrt(count))) + quiet
    covariances = _autocovariances(values, longest + quiet)
    if not covariances[0]:
        return 1.0
    loud = np.abs(covariances[1:] / covariances[0]) > 2.0 * np.sqrt(np.log10(count) / count)
    if loud.size < quiet:
        # Too few rows to see a dependence end: none of it may be assumed away.
        return float(np.sqrt(count))
    runs = np.lib.stride_tricks.sliding_window_view(loud, quiet)
    silent = np.flatnonzero(~runs.any(axis=1))
    last = int(silent[0]) if len(silent) else longest
    lags = np.arange(1, min(2 * max(last, 1), longest) + 1)
    window = np.minimum(1.0, 2.0 * (1.0 - lags / lags[-1]))
    weighted = window * covariances[1 : len(lags) + 1]
    spectrum = covariances[0] + 2.0 * weighted.sum()
    slope = 2.0 * (lags * weighted).sum()
    longest_block = min(3.0 * np.sqrt(count), count / 3.0)
    if not spectrum:
        return float(longest_block)
    block = (1.5 * slope**2 / spectrum**2) ** (1 / 3) * count ** (1 / 3)
    return float(np.clip(block, 1.0, max(longest_block, 1.0)))


def _powers(values: Floats) -> Floats:
    """The power of each cosine wave, slowest first; the mean, the wave that stands still, is left out."""
    return np.asarray(dct(values, type=2, norm="ortho")[1:] ** 2, dtype=float)


def _autocovariances(values: Floats, most: int) -> Floats:
    count = len(values)
    padded = next_fast_len(2 * count, real=True)
    waves = rfft(values - values.mean(), padded)
    found = irfft(waves * np.conj(waves), padded)[:count] / count
    return np.pad(found, (0, max(0, most + 1 - count)))[: most + 1]


def _correlation_root(rows: Floats) -> Floats:
    """A triangular root of the rows' correlations; candidates without variance are taken for independent."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    sizes = np.sqrt((centred**2).sum(axis=1))
    products = np.outer(sizes, sizes)
    shape = centred @ centred.T / np.where(products > 0.0, products, 1.0)
    np.fill_diagonal(shape, 1.0)
    # Two equal candidates leave no full rank; this much of independence costs nothing.
    return np.asarray(np.linalg.cholesky((shape + 1e-6 * np.eye(len(rows))) / (1.0 + 1e-6)))
