"""
Losses: whether performance has fallen, since when, and whether a gate could confirm a cure.

A CUSUM of the standardised mean losses of labelled windows against the level that retraining is known to
reach (Page, Biometrika 41, 1954). Its alarm level for a budget of B windows is log(B): the bound of an
e-detector, which is exceeded less than once in B windows where the loss stays at the baseline, and much less
by Siegmund's approximation (Sequential Analysis, 1985), which leaves room for the baseline's own error.
"""

import math
from collections.abc import Sequence
from datetime import datetime

import msgspec

from monitors.baseline import Baseline
from monitors.settings import PolicySettings

# Half of the smallest fall worth finding, in standard deviations of a window's mean loss.
DRIFT = 0.5
LARGEST_STEP = 4.0
MAX_WINDOWS = 256
# How often the labelled windows that an attempt waits for are doubled at most.
MOST_DOUBLINGS = 3
# A candidate whose proof came so far may soon be sure of it.
ALMOST = 0.4
# A jump inside an excursion this sure is a change of its own.
JUMP = 3.0
CONFIRMABLE = 1.645


class LossWindow(msgspec.Struct, frozen=True):
    """The labelled rows of one window: whose predictions, since when, and their mean loss."""

    version: str
    start: datetime
    end: datetime
    loss: float
    rows: int


class LossState(msgspec.Struct, frozen=True):
    """
    The CUSUM and the windows of its excursion, oldest first, all of them later than the last zero.

    `level` is what retraining is known to reach; `doublings` counts the attempts that an excursion has led
    to, `seen` the labelled windows so far and `tried` their number at the last attempt.
    """

    level: Baseline | None = None
    learned: tuple[LossWindow, ...] = ()
    cusum: float = 0.0
    windows: tuple[LossWindow, ...] = ()
    fallen: bool = False
    doublings: int = 0
    seen: int = 0
    tried: int = -1_000_000


class Fall(msgspec.Struct, frozen=True):
    """Performance has fallen: since when, by how much, and whether a retraining is worth asking for now."""

    since: datetime
    loss: float
    baseline: float
    windows: int
    due: bool
    reason: str


def alarm_level(budget: float) -> float:
    return math.log(budget)


def start(baseline: Baseline | None) -> LossState:
    """Of a model whose loss is known from its own evaluation, or not at all."""
    return LossState(level=baseline)


def observe(
    settings: PolicySettings, state: LossState, window: LossWindow, deviation: float, serving: str
) -> tuple[LossState, Fall | None]:
    """
    Take one labelled window; `deviation` is the long-run standard deviation of its rows' losses.

    Windows of the version before the one that serves tell nothing once performance is no longer falling.
    """
    state = msgspec.structs.replace(state, seen=state.seen + 1)
    if state.level is None:
        return _learn(settings, state, window, deviation), None
    if window.version != serving and not state.fallen:
        return state, None
    rise = rise_above(state.level, window.loss, window.rows, deviation)
    step = min(rise, LARGEST_STEP) - DRIFT
    cusum = max(0.0, state.cusum + step)
    if cusum == 0.0:
        return _calm(state), None
    windows = (*state.windows, window)[-MAX_WINDOWS:]
    fallen = state.fallen or cusum > alarm_level(settings.windows_between_false_retrainings)
    state = msgspec.structs.replace(state, cusum=cusum, windows=windows, fallen=fallen)
    if not fallen:
        return state, None
    return _judged(settings, state, serving)


def rise_above(level: Baseline, loss: float, rows: int, deviation: float) -> float:
    """
    How far the mean loss of so many rows lies above the level, in deviations of such a mean.

    >>> rise_above(Baseline(0.1, 0.3, 1_000), 0.13, 100, 0.3)
    1.0
    """
    rise = loss - level.loss
    # A level of a model that made no mistake, or always the same one, knows of no deviation.
    noise = (level.deviation or deviation) / math.sqrt(rows)
    if noise > 0.0:
        return rise / noise
    return math.inf if rise > 0.0 else 0.0


def _learn(settings: PolicySettings, state: LossState, window: LossWindow, deviation: float) -> LossState:
    """Without a baseline the first labelled windows are it."""
    learned = (*state.learned, window)
    if len(learned) < settings.baseline_windows:
        return msgspec.structs.replace(state, learned=learned)
    rows = sum(one.rows for one in learned)
    loss = sum(one.loss * one.rows for one in learned) / rows
    spread = sum(one.rows * (one.loss - loss) ** 2 for one in learned)
    between = math.sqrt(spread / max(1, len(learned) - 1))
    return msgspec.structs.replace(state, learned=(), level=Baseline(loss, max(deviation, between), rows))


def _calm(state: LossState) -> LossState:
    return msgspec.structs.replace(state, cusum=0.0, windows=(), fallen=False, doublings=0)


def _judged(settings: PolicySettings, state: LossState, serving: str) -> tuple[LossState, Fall]:
    """Where the change lies, and whether to ask for a retraining because of it."""
    assert state.level is not None
    level = state.level
    jump = _jump([one for one in state.windows if one.version == serving], level.deviation)
    if jump is not None and jump.start > state.windows[0].start:
        kept = tuple(one for one in state.windows if one.start >= jump.start)
        state = msgspec.structs.replace(state, windows=kept, doublings=0)
    current = [one for one in state.windows if one.version == serving]
    first = state.windows[0]
    if not current:
        return state, Fall(first.start, math.nan, level.loss, len(state.windows), False, "no labels yet")
    rows = sum(one.rows for one in current)
    loss = sum(one.loss * one.rows for one in current) / rows
    known = sum(one.rows for one in state.windows)
    needed = settings.first_attempt_windows * 2**state.doublings
    power = (loss - level.loss) * math.sqrt(max(1.0, known / 2.0)) / max(level.deviation, 1e-12)
    since_tried = state.seen - state.tried
    if len(state.windows) < needed:
        reason = f"{len(state.windows)} of {needed} labelled windows since the change"
    elif since_tried < settings.first_attempt_windows:
        reason = f"{since_tried} labelled windows since the last attempt"
    elif power <= CONFIRMABLE:
        reason = "too few labels for a gate to confirm a cure of a loss so small"
    else:
        reason = ""
    return state, Fall(first.start, loss, level.loss, len(state.windows), not reason, reason)


def _jump(windows: Sequence[LossWindow], deviation: float) -> LossWindow | None:
    """The window that begins the likeliest rise among these, where it is sure enough."""
    best, found = JUMP, None
    for place in range(1, len(windows)):
        before, after = windows[:place], windows[place:]
        rows = [sum(one.rows for one in part) for part in (before, after)]
        means = [
            sum(one.loss * one.rows for one in part) / count
            for part, count in zip((before, after), rows, strict=True)
        ]
        noise = deviation * math.sqrt(1.0 / rows[0] + 1.0 / rows[1])
        rise = (means[1] - means[0]) / noise if noise > 0.0 else 0.0
        if rise > best:
            best, found = rise, after[0]
    return found


def tried(state: LossState) -> LossState:
    """A retraining was asked for."""
    return msgspec.structs.replace(state, tried=state.seen, doublings=state.doublings + 1)


def judged(
    state: LossState, reached: Baseline | None, promoted: bool, grown_rows: int, surety: float = 0.0
) -> LossState:
    """
    An attempt ended; `reached` is what the best candidate loses on rows that it had not seen.

    That is the level from now on, whoever serves: what no retraining can mend is no fall. But as long as
    fewer rows than `grown_rows` follow the change, candidates know more of the concept before it, and
    their loss must not become the new normal: then the better level stays, and further attempts follow
    as labels come.
    """
    level = state.level
    if reached is None:
        return state if not promoted else msgspec.structs.replace(state, cusum=0.0, learned=())
    if level is None:
        return msgspec.structs.replace(_calm(state), level=reached, learned=())
    if state.fallen and _can_grow(state, level, reached, grown_rows):
        kept = Baseline(min(level.loss, reached.loss), reached.deviation, reached.rows)
        return msgspec.structs.replace(state, level=kept, cusum=0.0 if promoted else state.cusum)
    doublings = 0 if promoted or surety > ALMOST else state.doublings
    return msgspec.structs.replace(_calm(state), level=reached, doublings=min(doublings, MOST_DOUBLINGS))


def came_back(state: LossState, reached: Baseline | None, late_labels: bool, grown_rows: int) -> LossState:
    """
    A champion of before serves again; `reached` is what it loses on the rows that it came back for.

    It is the best that is at hand, and no proof that a retraining can't do better: where labels are prompt
    enough to tell, performance is held against the level of before. Where they are late, what was reached
    before may be of a world that is gone by the time anybody can know: then it is the level.
    """
    if late_labels:
        return judged(state, reached, True, grown_rows)
    level = state.level
    better = reached is not None and (level is None or reached.loss < level.loss)
    return msgspec.structs.replace(_calm(state), level=reached if better else level, learned=())


def _can_grow(state: LossState, level: Baseline, reached: Baseline, grown_rows: int) -> bool:
    since = sum(one.rows for one in state.windows)
    missing = (reached.loss - level.loss) * math.sqrt(max(1, reached.rows))
    return since < grown_rows and missing > CONFIRMABLE * reached.deviation


def accepted(state: LossState, serving: str) -> LossState:
    """Nothing better is to be had: what the serving version loses now becomes the baseline."""
    newest = [one for one in state.windows if one.version == serving]
    if state.level is None or not newest:
        return _calm(state)
    rows = sum(one.rows for one in newest)
    loss = sum(one.loss * one.rows for one in newest) / rows
    level = Baseline(max(loss, state.level.loss), state.level.deviation, rows)
    return _calm(msgspec.structs.replace(state, level=level))
