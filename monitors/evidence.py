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

With a season each slot has a mean of its own, and all slots of a feature share one spread. A window of a slot
that nobody has seen is no evidence: it is learned. Means of young slots do not lean on those of others: hours
that follow each other differ from the mean of all in the same direction, which would add up.
"""

import math
from collections.abc import Collection, Sequence
from math import exp, log1p
from typing import NamedTuple

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

    `slots` holds, of each slot of the season that was seen, rows and their sum, the reference's included, and
    how many rows there may be; `room`, `rows` and `total` are used without a season.
    """

    room: float = 0.0
    rows: float = 0.0
    total: float = 0.0
    residuals: int = 0
    squares: float = 0.0
    detectors: tuple[float, ...] = (_SMALLEST_LOG,) * len(_GAINS)
    products: float = 0.0
    last: float = 0.0
    slots: dict[int, tuple[float, float, float]] = {}


class Waiting(msgspec.Struct, frozen=True, array_like=True):
    """
    A window that joins when the next ones turn out to be quiet, too: (feature, rows, mean, residual).

    `new` are the features that had never been seen in its slot, and so have no residual.
    """

    shifts: tuple[tuple[str, float, float, float], ...]
    slot: int = -1
    new: tuple[str, ...] = ()


class EvidenceState(msgspec.Struct, frozen=True):
    """The state of all features, by key. `quiet` are the windows that joined so far."""

    features: dict[str, FeatureState] = {}
    waiting: tuple[Waiting, ...] = ()
    quiet: int = 0
    windows: int = 0
    season: str = ""


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
    state = _in_season(state, shifts)
    features = dict(state.features)
    means = {key: _mean_of(known.detectors) for key, known in features.items()}
    moved: list[Moved] = []
    window: list[tuple[str, float, float, float]] = []
    new: list[str] = []
    ceiling = math.log(budget * len(_GAINS) * max(1, len(shifts))) + _SPARE_LOG
    for shift in shifts:
        if shift.unit <= 0.0 or not shift.rows:
            continue
        key = shift.key
        known = _with_reference(features.get(key, _NOTHING), shift)
        compared = _compared(known, shift)
        if compared is None:
            new.append(key)
        else:
            known = _advanced(known, compared, ceiling)
        features[key], means[key] = known, _mean_of(known.detectors)
        residual, effect = (compared.residual, compared.effect) if compared else (0.0, 0.0)
        window.append((key, float(shift.rows), shift.value, residual))
        moved.append(Moved(shift.column, shift.kind, effect, means[key]))
    count = max(1, len(features))
    value, limit = sum(means.values()) / count, SUSPICIOUS * budget * count
    waiting = Waiting(tuple(window), shifts[0].slot if shifts else -1, tuple(new))
    after = EvidenceState(features, state.waiting, state.quiet, state.windows + 1, state.season)
    after = _joined(after, waiting, {key for key, mean in means.items() if mean < limit})
    own = all(features[key].residuals >= CERTIFYING_WINDOWS for key, _, _, _ in window)
    return after, Evidence(value, _telling(moved, value, count), bool(window) and not new and own)


_NOTHING = FeatureState()


class _Compared(NamedTuple):
    """A shift in the reference's standard deviations, in quiet windows' and in a row's."""

    residual: float
    standardised: float
    effect: float


def _in_season(state: EvidenceState, shifts: Sequence[Shift]) -> EvidenceState:
    """Slots of a season that is configured no more mean nothing in another one."""
    season = shifts[0].season if shifts else state.season
    if season == state.season:
        return state
    features = {key: msgspec.structs.replace(known, slots={}) for key, known in state.features.items()}
    return EvidenceState(features, (), state.quiet, state.windows, season)


def _telling(moved: Sequence[Moved], value: float, count: int) -> tuple[Moved, ...]:
    """Those that make up at least half of their share of the evidence, and one window of it."""
    least = max(value / 2.0, float(count))
    kept = [
        Moved(one.column, one.kind, one.effect, one.evidence / count)
        for one in moved
        if one.evidence >= least and one.evidence > count
    ]
    return tuple(sorted(kept, key=lambda one: (-one.evidence, one.column, one.kind)))


def _with_reference(known: FeatureState, shift: Shift) -> FeatureState:
    """What is known, with the reference's rows of the slot if they were not counted yet, and room to join."""
    rows = float(shift.reference_rows)
    if shift.slot < 0:
        room = MAX_JOINED * rows
        return known if known.room == room else msgspec.structs.replace(known, room=room)
    if not rows or shift.slot in known.slots:
        return known
    room = rows + MAX_JOINED * max(rows, float(shift.rows))
    entry = (rows, rows * shift.expected, room)
    return msgspec.structs.replace(known, slots={**known.slots, shift.slot: entry})


def _compared(known: FeatureState, shift: Shift) -> _Compared | None:
    """The shift against all that came before; None where nothing is known of the slot."""
    spread = _spread(known)
    if shift.slot < 0:
        before = shift.reference_rows + known.rows
        total = shift.reference_rows * shift.expected + known.total
    elif shift.slot in known.slots:
        before, total, _ = known.slots[shift.slot]
    else:
        return None
    gap = shift.value - total / before
    residual = gap / (shift.unit * math.sqrt(1.0 / shift.rows + 1.0 / before))
    return _Compared(residual, residual / spread, gap / shift.deviation if shift.deviation else 0.0)


def _spread(known: FeatureState) -> float:
    """
    How far residuals spread where nothing moves, as quiet windows tell: seasons, sessions, batches.

    At first the reference's own estimate counts for some windows, and is only ever raised. Certified, it
    is the upper 95 % bound of what the quiet windows show.
    """
    if not known.residuals:
        return 1.0
    count = known.residuals
    serial = known.products / (_PRIOR_WINDOWS + known.squares) - 1.0 / math.sqrt(count)
    serial = min(max(serial, 0.0), _LARGEST_SERIAL)
    along = (1.0 + serial) / (1.0 - serial)
    if count < CERTIFYING_WINDOWS:
        return math.sqrt(max(1.0, along * (_PRIOR_WINDOWS + known.squares) / (_PRIOR_WINDOWS + count)))
    return max(_SMALLEST_SPREAD, math.sqrt(along * known.squares / (count * _least_share(count))))


def _least_share(count: int) -> float:
    """A variance measured `count` times is in 95 % of cases at least this share of the true one.

    The chi-square distribution's quantile as Wilson and Hilferty (PNAS 17, 1931) give it.
    """
    return (1.0 - 2.0 / (9.0 * count) - _ONE_IN_TWENTY * math.sqrt(2.0 / (9.0 * count))) ** 3


def _advanced(known: FeatureState, compared: _Compared, ceiling: float) -> FeatureState:
    """log R' = log(1 + R) + log likelihood ratio, for each direction and size."""
    residual = max(-LARGEST_RESIDUAL, min(LARGEST_RESIDUAL, compared.standardised))
    largest = math.inf if abs(compared.effect) >= SMALLEST_EFFECT else 0.0
    after = []
    for log_r, (slope, cost) in zip(known.detectors, _GAINS, strict=True):
        gain = slope * residual - cost
        # The larger of 1 and R is taken out of the logarithm, so that it can't overflow.
        grown = log_r + log1p(exp(-log_r)) if log_r > 0.0 else log1p(exp(log_r))
        grown += gain if gain < largest else largest
        after.append(ceiling if grown > ceiling else _SMALLEST_LOG if grown < _SMALLEST_LOG else grown)
    return msgspec.structs.replace(known, detectors=tuple(after))


def _mean_of(detectors: Sequence[float]) -> float:
    return sum(map(exp, detectors)) / len(detectors)


def _joined(state: EvidenceState, window: Waiting, quiet: Collection[str]) -> EvidenceState:
    """
    Quiet windows join with a delay, so that the first windows of a drift do not.

    Feature by feature: where one drifts, the reference's error in the others would add up else.
    """
    waiting = tuple(
        Waiting(tuple(one for one in before.shifts if one[0] in quiet), before.slot, before.new)
        for before in (*state.waiting, window)
    )
    if len(waiting) <= _PATIENCE:
        return EvidenceState(state.features, waiting, state.quiet, state.windows, state.season)
    features, joining = dict(state.features), waiting[0]
    for key, rows, mean, residual in joining.shifts:
        known = _with_rows(features[key], joining.slot, rows, mean)
        features[key] = known if key in joining.new else _with_residual(known, residual)
    all_quiet = len(joining.shifts) == len(features)
    joined = state.quiet + 1 if all_quiet else state.quiet
    return EvidenceState(features, waiting[1:], joined, state.windows, state.season)


def _with_rows(known: FeatureState, slot: int, rows: float, mean: float) -> FeatureState:
    if slot < 0:
        if known.rows >= known.room:
            return known
        return msgspec.structs.replace(known, rows=known.rows + rows, total=known.total + rows * mean)
    before, total, room = known.slots.get(slot, (0.0, 0.0, MAX_JOINED * rows))
    if before >= room:
        return known
    entry = (before + rows, total + rows * mean, room)
    return msgspec.structs.replace(known, slots={**known.slots, slot: entry})


def _with_residual(known: FeatureState, residual: float) -> FeatureState:
    return msgspec.structs.replace(
        known,
        residuals=known.residuals + 1,
        squares=known.squares + residual * residual,
        products=known.products + residual * known.last,
        last=residual,
    )
