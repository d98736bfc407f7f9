"""
Evidence: how surely a version's inputs have moved, counted so that a stated budget of false alarms holds.

Every feature of every column has a handful of Shiryaev-Roberts detectors, one for each direction and
size of shift. Each multiplies the likelihood ratios of the windows' standardised shifts; the mean of
all of them exceeds a budget of B windows once in B windows or more where nothing moves, whatever the
dependence between the columns (e-detectors: Shin, Ramdas and Rinaldo, New England Journal of
Statistics in Data Science 2, 2024). A window's shift is held against all that came before it, the
reference and the quiet windows since, so that a young reference's own error is not taken for drift
(recursive residuals: Brown, Durbin and Evans, JRSS B 37, 1975).

How much a window's mean varies where nothing moves is `estimated` from the reference's rows at first, and
raised as far as quiet windows vary more. A feature of which `CERTIFYING_WINDOWS` windows were quiet has a
spread of its own: that of those windows, and at least what chance could have hidden from them.
"""

import math
from collections.abc import Collection, Sequence
from math import exp, log1p

import msgspec

from monitors.shifts import Shift

SIZES = (1.0, 2.5, 5.0)
"""The shifts looked for, in standard deviations of a window's mean."""

# A shift smaller than this share of a row's standard deviation is no drift, however sure it is.
SMALLEST_EFFECT = 0.1
# Quiet windows join what is compared with until they outweigh the reference so many times: beyond that
# a slow drift would be absorbed.
MAX_JOINED = 10.0
LARGEST_RESIDUAL = 8.0
CERTIFYING_WINDOWS = 100
_PATIENCE = 2
# A feature that alone makes up this share of the budget is not quiet. Not less: a detector grows by one
# with each quiet window, and what stops joining holds the reference's own error against every window.
SUSPICIOUS = 0.25
# Beyond the budget evidence grows no further, so that it is gone soon after the drift is.
_SPARE_LOG = 2.0
_SMALLEST_LOG = -300.0
# The gain of a detector is its first number times the residual, less the second.
_GAINS = tuple((sign * size, size * size / 2.0) for sign in (1.0, -1.0) for size in SIZES)
# The reference's estimate counts for so many quiet windows.
_PRIOR_WINDOWS = 10.0
_LARGEST_SERIAL = 0.9
_SMALLEST_SPREAD = 0.75
_ONE_IN_TWENTY = 1.645


class FeatureState(msgspec.Struct, frozen=True, array_like=True):
    """
    What is known of one feature: the rows of quiet windows and their sum, their residuals (in the
    reference's units), and the logarithms of the detectors. `room` is how many rows may join.
    `products` sums each residual times the one before it, which is `last`.
    """

    room: float = 0.0
    rows: float = 0.0
    total: float = 0.0
    residuals: int = 0
    squares: float = 0.0
    detectors: tuple[float, ...] = (_SMALLEST_LOG,) * len(_GAINS)
    products: float = 0.0
    last: float = 0.0


class Waiting(msgspec.Struct, frozen=True, array_like=True):
    """A window that joins when the next ones turn out to be quiet, too: (feature, rows, mean, residual)."""

    shifts: tuple[tuple[str, float, float, float], ...]


class EvidenceState(msgspec.Struct, frozen=True):
    """The state of all features, by key. `quiet` are the windows that joined so far."""

    features: dict[str, FeatureState] = {}
    waiting: tuple[Waiting, ...] = ()
    quiet: int = 0
    windows: int = 0


class Moved(msgspec.Struct, frozen=True):
    """A feature that speaks for drift: its share of the evidence, and its shift in standard deviations."""

    column: str
    kind: str
    effect: float
    evidence: float


class Evidence(msgspec.Struct, frozen=True):
    """
    The evidence after a window, in windows of budget, and what it comes from, most telling first.

    `certified`: each feature of this window was held against the spread of its own quiet windows, of which
    there were `CERTIFYING_WINDOWS` or more. It says nothing of windows that are unlike those.
    """

    value: float
    moved: tuple[Moved, ...]
    certified: bool


def observe(state: EvidenceState, shifts: Sequence[Shift], budget: float) -> tuple[EvidenceState, Evidence]:
    """
    Take the shifts of one window; the state after it, and the evidence.

    >>> calm = Shift("age", "location", 0.0, 1000, 0.0, 5000, 0.6, 0.6)
    >>> far = msgspec.structs.replace(calm, value=0.3)
    >>> observe(EvidenceState(), [calm], 100.0)[1].value < 1
    True
    >>> observe(EvidenceState(), [far], 100.0)[1].value > 1000
    True
    """
    features = dict(state.features)
    means = {key: _mean_of(known.detectors) for key, known in features.items()}
    moved: list[Moved] = []
    residuals: list[tuple[str, float, float, float]] = []
    ceiling = math.log(budget * len(_GAINS) * max(1, len(shifts))) + _SPARE_LOG
    certified = True
    for shift in shifts:
        if shift.unit <= 0.0 or not shift.rows:
            continue
        key = shift.key
        known = features.get(key, _NOTHING)
        residual, effect = _residual(known, shift)
        detectors = _advanced(known.detectors, residual / _spread(known), effect, ceiling)
        features[key] = FeatureState(
            MAX_JOINED * shift.reference_rows,
            known.rows,
            known.total,
            known.residuals,
            known.squares,
            detectors,
            known.products,
            known.last,
        )
        means[key] = _mean_of(detectors)
        residuals.append((key, float(shift.rows), shift.value, residual))
        moved.append(Moved(shift.column, shift.kind, effect, means[key]))
        certified = certified and known.residuals >= CERTIFYING_WINDOWS
    count = max(1, len(features))
    value = sum(means.values()) / count
    limit = SUSPICIOUS * budget * count
    after = EvidenceState(features, state.waiting, state.quiet, state.windows + 1)
    after = _joined(after, Waiting(tuple(residuals)), {key for key, mean in means.items() if mean < limit})
    return after, Evidence(value, _telling(moved, value, count), certified and bool(residuals))


_NOTHING = FeatureState()


def _telling(moved: Sequence[Moved], value: float, count: int) -> tuple[Moved, ...]:
    """Those that make up at least half of their share of the evidence, and one window of it."""
    least = max(value / 2.0, float(count))
    kept = [
        Moved(one.column, one.kind, one.effect, one.evidence / count)
        for one in moved
        if one.evidence >= least and one.evidence > count
    ]
    return tuple(sorted(kept, key=lambda one: (-one.evidence, one.column, one.kind)))


def _residual(known: FeatureState, shift: Shift) -> tuple[float, float]:
    """The shift against all that came before, in the reference's standard deviations and in a row's."""
    before = shift.reference_rows + known.rows
    gap = shift.value - (shift.reference_rows * shift.expected + known.total) / before
    residual = gap / (shift.unit * math.sqrt(1.0 / shift.rows + 1.0 / before))
    return residual, gap / shift.deviation if shift.deviation else 0.0


def _spread(known: FeatureState) -> float:
    """
    How far residuals spread where nothing moves, as quiet windows tell: seasons, sessions, batches.

    At first the reference's own estimate counts for some windows, and is only ever raised. Certified, it
    is the upper 95 % bound of what the quiet windows show (chi-square by Wilson and Hilferty, PNAS 17, 1931).
    """
    if not known.residuals:
        return 1.0
    count = known.residuals
    serial = known.products / (_PRIOR_WINDOWS + known.squares) - 1.0 / math.sqrt(count)
    serial = min(max(serial, 0.0), _LARGEST_SERIAL)
    along = (1.0 + serial) / (1.0 - serial)
    if count < CERTIFYING_WINDOWS:
        return math.sqrt(max(1.0, along * (_PRIOR_WINDOWS + known.squares) / (_PRIOR_WINDOWS + count)))
    least = (1.0 - 2.0 / (9.0 * count) - _ONE_IN_TWENTY * math.sqrt(2.0 / (9.0 * count))) ** 3
    return max(_SMALLEST_SPREAD, math.sqrt(along * known.squares / (count * least)))


def _advanced(
    detectors: Sequence[float], residual: float, effect: float, ceiling: float
) -> tuple[float, ...]:
    """log R' = log(1 + R) + log likelihood ratio, for each direction and size."""
    residual = max(-LARGEST_RESIDUAL, min(LARGEST_RESIDUAL, residual))
    largest = math.inf if abs(effect) >= SMALLEST_EFFECT else 0.0
    after = []
    for log_r, (slope, cost) in zip(detectors, _GAINS, strict=True):
        gain = slope * residual - cost
        # The larger of 1 and R is taken out of the logarithm, so that it can't overflow.
        grown = log_r + log1p(exp(-log_r)) if log_r > 0.0 else log1p(exp(log_r))
        grown += gain if gain < largest else largest
        after.append(ceiling if grown > ceiling else _SMALLEST_LOG if grown < _SMALLEST_LOG else grown)
    return tuple(after)


def _mean_of(detectors: Sequence[float]) -> float:
    return sum(map(exp, detectors)) / len(detectors)


def _joined(state: EvidenceState, window: Waiting, quiet: Collection[str]) -> EvidenceState:
    """
    Quiet windows join with a delay, so that the first windows of a drift do not.

    Feature by feature: where one drifts, the reference's error in the others would add up else.
    """
    waiting = tuple(
        Waiting(tuple(one for one in before.shifts if one[0] in quiet)) for before in (*state.waiting, window)
    )
    if len(waiting) <= _PATIENCE:
        return EvidenceState(state.features, waiting, state.quiet, state.windows)
    features = dict(state.features)
    for key, rows, mean, residual in waiting[0].shifts:
        features[key] = _with(features[key], rows, mean, residual)
    all_quiet = len(waiting[0].shifts) == len(features)
    joined = state.quiet + 1 if all_quiet else state.quiet
    return EvidenceState(features, waiting[1:], joined, state.windows)


def _with(known: FeatureState, rows: float, mean: float, residual: float) -> FeatureState:
    if known.rows >= known.room:
        rows = 0.0
    return FeatureState(
        known.room,
        known.rows + rows,
        known.total + rows * mean,
        known.residuals + 1,
        known.squares + residual * residual,
        known.detectors,
        known.products + residual * known.last,
        residual,
    )
