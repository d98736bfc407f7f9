"""
Evidence: how surely a version's inputs have moved, counted so that a stated budget of false alarms holds.

Every feature of every column has a handful of Shiryaev-Roberts detectors, one for each direction and
size of shift. Each multiplies the likelihood ratios of the windows' standardised shifts; the mean of
all of them exceeds a budget of B windows once in B windows or more where nothing moves, whatever the
dependence between the columns (e-detectors: Shin, Ramdas and Rinaldo, New England Journal of
Statistics in Data Science 2, 2024). A window's shift is held against all that came before it, the
reference and the quiet windows since, so that a young reference's own error is not taken for drift
(recursive residuals: Brown, Durbin and Evans, JRSS B 37, 1975).
"""

import math
from collections.abc import Iterable, Sequence

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


class FeatureState(msgspec.Struct, frozen=True, array_like=True):
    """
    What is known of one feature: the rows of quiet windows and their sum, their residuals, and the
    logarithms of the detectors. `room` is how many rows may join.
    """

    room: float = 0.0
    rows: float = 0.0
    total: float = 0.0
    residuals: int = 0
    squares: float = 0.0
    detectors: tuple[float, ...] = (_SMALLEST_LOG,) * (2 * len(SIZES))


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
    """The evidence after a window, in windows of budget, and what it comes from, most telling first."""

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
    moved: list[Moved] = []
    residuals: list[tuple[str, float, float, float]] = []
    ceiling = math.log(budget * len(SIZES) * 2 * max(1, len(shifts))) + _SPARE_LOG
    for shift in shifts:
        if shift.unit <= 0.0 or not shift.rows:
            continue
        known = features.get(shift.key, FeatureState())
        residual, effect = _residual(known, shift)
        detectors = tuple(_advanced(known.detectors, residual, effect, ceiling))
        room = MAX_JOINED * shift.reference_rows
        features[shift.key] = msgspec.structs.replace(known, detectors=detectors, room=room)
        residuals.append((shift.key, float(shift.rows), shift.value, residual))
        moved.append(Moved(shift.column, shift.kind, effect, _mean_of(detectors)))
    count = max(1, len(features))
    value = sum(_mean_of(feature.detectors) for feature in features.values()) / count
    moved = [msgspec.structs.replace(one, evidence=one.evidence / count) for one in moved]
    moved.sort(key=lambda one: (-one.evidence, one.column, one.kind))
    after = EvidenceState(features, state.waiting, state.quiet, state.windows + 1)
    after = _joined(after, Waiting(tuple(residuals)), SUSPICIOUS * budget * count)
    telling = tuple(one for one in moved if one.evidence >= value / (2 * count) and one.evidence > 1.0)
    return after, Evidence(value, telling, after.quiet >= CERTIFYING_WINDOWS)


def _residual(known: FeatureState, shift: Shift) -> tuple[float, float]:
    """The shift against all that came before, in its own standard deviations and in a row's."""
    before = shift.reference_rows + known.rows
    mean = (shift.reference_rows * shift.expected + known.total) / before
    unit = shift.unit * _inflation(known)
    residual = (shift.value - mean) / (unit * math.sqrt(1.0 / shift.rows + 1.0 / before))
    effect = (shift.value - mean) / shift.deviation if shift.deviation else 0.0
    return max(-LARGEST_RESIDUAL, min(LARGEST_RESIDUAL, residual)), effect


def _inflation(known: FeatureState) -> float:
    """What quiet windows vary more than the reference lets expect: seasons, sessions, batches."""
    prior = 10.0
    return math.sqrt(max(1.0, (prior + known.squares) / (prior + known.residuals)))


def _advanced(detectors: Sequence[float], residual: float, effect: float, ceiling: float) -> Iterable[float]:
    """log R' = log(1 + R) + log likelihood ratio, for each direction and size."""
    directions = [(sign, size) for sign in (1.0, -1.0) for size in SIZES]
    for log_r, (sign, size) in zip(detectors, directions, strict=True):
        gain = sign * size * residual - size * size / 2.0
        if abs(effect) < SMALLEST_EFFECT:
            gain = min(gain, 0.0)
        yield min(ceiling, max(_SMALLEST_LOG, _log_one_plus(log_r) + gain))


def _log_one_plus(log_r: float) -> float:
    return log_r + math.log1p(math.exp(-log_r)) if log_r > 0.0 else math.log1p(math.exp(log_r))


def _mean_of(detectors: Sequence[float]) -> float:
    return sum(math.exp(one) for one in detectors) / len(detectors)


def _joined(state: EvidenceState, window: Waiting, limit: float) -> EvidenceState:
    """
    Quiet windows join with a delay, so that the first windows of a drift do not.

    Feature by feature: where one drifts, the reference's error in the others would add up else.
    """
    waiting = tuple(
        Waiting(tuple(one for one in before.shifts if _mean_of(state.features[one[0]].detectors) < limit))
        for before in (*state.waiting, window)
    )
    if len(waiting) <= _PATIENCE:
        return msgspec.structs.replace(state, waiting=waiting)
    features = dict(state.features)
    for key, rows, mean, residual in waiting[0].shifts:
        features[key] = _with(features[key], rows, mean, residual)
    all_quiet = len(waiting[0].shifts) == len(features)
    quiet = state.quiet + 1 if all_quiet else state.quiet
    return msgspec.structs.replace(state, features=features, waiting=waiting[1:], quiet=quiet)


def _with(known: FeatureState, rows: float, mean: float, residual: float) -> FeatureState:
    if known.rows >= known.room:
        return known
    return msgspec.structs.replace(
        known,
        rows=known.rows + rows,
        total=known.total + rows * mean,
        residuals=known.residuals + 1,
        squares=known.squares + residual * residual,
    )
