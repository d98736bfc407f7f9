"""The gate: may this challenger take the champion's place, judged on the same later, unseen rows?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from flows.scoring import (
    Answers,
    Floats,
    Metric,
    Values,
    canonical,
    differing_rows,
    metric_of,
    numbers,
    score,
    scorer,
)
from monitors.settings import GateSettings

# Below this the bootstrap of a few one-sided rows claims a certainty that a sign test would not.
MIN_DIFFERING_ROWS = 8
MIN_CLASS_ROWS = 5
_CELLS = 2_000_000


@dataclass(frozen=True, eq=False)
class Holdout:
    """The labelled rows that decide, in event-time order; times are seconds since the epoch."""

    labels: Values
    event_times: Floats


class Check(msgspec.Struct, frozen=True):
    """One condition and whether it held; `detail` has the numbers."""

    name: str
    passed: bool
    detail: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """
    What the gate says, and every number it says it from.

    `low` and `high` bound the improvement over the champion, positive being better whatever the
    metric; `low` is the one-sided bound at the asked confidence.
    """

    action: Literal["promoted", "refused"]
    sentence: str
    metric: str
    rows: int = 0
    challenger_score: float | None = None
    champion_score: float | None = None
    champion: str = ""
    low: float | None = None
    high: float | None = None
    checks: tuple[Check, ...] = ()


def judge(
    settings: GateSettings,
    kind: str,
    holdout: Holdout,
    challenger: Answers,
    champion: Answers | None,
    *,
    trained_until: float,
    seed: int = 0,
) -> Verdict:
    """
    Promote only a challenger that is surely better; whatever is not sure keeps the champion.

    Both models answer the same rows, all later than `trained_until`, the last event time that the
    challenger was trained on. The challenger's own lower bound must reach the floor, and the lower
    bound of the paired improvement must be above zero. Without a champion the floor alone decides.
    """
    metric = metric_of(settings, kind)
    checks = list(_preconditions(settings, metric, holdout, challenger, champion, trained_until))
    if failed := next((check for check in checks if not check.passed), None):
        return refusal(metric, failed.detail, rows=len(holdout.labels), checks=checks)
    contest = _contest(settings, metric, holdout.labels, challenger, champion, seed)
    checks += _outcomes(settings, metric, contest)
    failed = next((check for check in checks if not check.passed), None)
    return Verdict(
        action="refused" if failed else "promoted",
        sentence=failed.detail if failed else _sentence(contest),
        metric=metric,
        rows=len(holdout.labels),
        challenger_score=contest.challenger,
        champion_score=contest.champion,
        champion=champion.source if champion else "",
        low=contest.low,
        high=contest.high,
        checks=tuple(checks),
    )


def refusal(metric: str, sentence: str, *, rows: int = 0, checks: Sequence[Check] = ()) -> Verdict:
    """A verdict for want of something to judge; the champion stays."""
    told = tuple(checks) or (Check("judgeable", False, sentence),)
    return Verdict(action="refused", sentence=sentence, metric=metric, rows=rows, checks=told)


# What must hold before anything is compared


def _preconditions(
    settings: GateSettings,
    metric: Metric,
    holdout: Holdout,
    challenger: Answers,
    champion: Answers | None,
    trained_until: float,
) -> Iterator[Check]:
    rows, needed = len(holdout.labels), settings.min_holdout_rows
    enough = rows >= max(needed, 1)
    yield Check("rows", enough, f"{'' if enough else 'only '}{rows} holdout rows, {needed} needed")
    if not enough:
        return
    later = bool(holdout.event_times.min() > trained_until)
    yield Check("later", later, f"the holdout is {'' if later else 'not '}later than the training rows")
    if metric in ("balanced_accuracy", "auc"):
        yield _classes(metric, holdout.labels)
    for role, answers in (("challenger", challenger), ("champion", champion)):
        if answers is not None:
            yield _answered(metric, role, rows, answers)


def _classes(metric: Metric, labels: Values) -> Check:
    names, counts = np.unique(canonical(labels).astype(str), return_counts=True)
    fewest = int(counts.min())
    if len(names) < 2 or (metric == "auc" and len(names) > 2):
        wanted = "exactly two" if metric == "auc" else "at least two"
        return Check("classes", False, f"{metric} needs {wanted} classes, the holdout has {len(names)}")
    enough = fewest >= MIN_CLASS_ROWS
    return Check(
        "classes", enough, f"{fewest} holdout rows of the rarest class, {metric} needs {MIN_CLASS_ROWS}"
    )


def _answered(metric: Metric, role: str, rows: int, answers: Answers) -> Check:
    name = f"{role} answers"
    if len(answers.predictions) != rows:
        return Check(name, False, f"the {role} answered {len(answers.predictions)} of {rows} rows")
    if metric == "auc":
        if answers.probabilities is None:
            return Check(name, False, f"auc needs probabilities, and there are none of the {role}")
        known = np.isfinite(numbers(answers.probabilities))
    elif metric == "mae":
        known = np.isfinite(numbers(answers.predictions))
    else:
        known = np.array([value is not None for value in canonical(answers.predictions)])
    unknown = int(rows - known.sum())
    return Check(name, not unknown, f"the {role} has no usable answer for {unknown} of {rows} rows")


# The paired bootstrap


@dataclass(frozen=True)
class _Contest:
    """Scores of both on the same resamples, summed up; improvements are positive when better."""

    challenger: float
    challenger_bound: float
    champion: float | None
    differing: int
    low: float | None
    high: float | None


def _contest(
    settings: GateSettings,
    metric: Metric,
    labels: Values,
    challenger: Answers,
    champion: Answers | None,
    seed: int,
) -> _Contest:
    tail = 1.0 - settings.confidence
    ours = scorer(metric, labels, challenger)
    theirs = scorer(metric, labels, champion) if champion else None
    drawn = [
        (ours(counts), theirs(counts) if theirs else None)
        for counts in _resamples(len(labels), settings.resamples, seed)
    ]
    ours_drawn = np.concatenate([one for one, _ in drawn])
    sign = -1.0 if metric == "mae" else 1.0
    low = high = None
    if theirs:
        gains = sign * (ours_drawn - np.concatenate([other for _, other in drawn if other is not None]))
        low = float(np.quantile(gains, tail, method="lower"))
        high = float(np.quantile(gains, 1.0 - tail, method="higher"))
    bound = np.quantile(sign * ours_drawn, tail, method="lower")
    return _Contest(
        challenger=score(metric, labels, challenger),
        challenger_bound=float(sign * bound),
        champion=score(metric, labels, champion) if champion else None,
        differing=differing_rows(metric, challenger, champion) if champion else 0,
        low=low,
        high=high,
    )


def _resamples(rows: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Counts of drawn rows, some resamples at a time so that memory stays small."""
    random = np.random.default_rng(seed)
    left = resamples
    while left > 0:
        many = min(left, max(1, _CELLS // rows))
        cells = random.integers(0, rows, (many, rows)) + np.arange(many)[:, None] * rows
        yield np.bincount(cells.ravel(), minlength=many * rows).reshape(many, rows).astype(float)
        left -= many


# What is said of it


def _outcomes(settings: GateSettings, metric: Metric, contest: _Contest) -> Iterator[Check]:
    if settings.floor is not None:
        yield _floor(settings.floor, metric, contest)
    if contest.low is None:
        return
    enough = contest.differing >= MIN_DIFFERING_ROWS
    differ = f"the two differ on {contest.differing} holdout rows, {MIN_DIFFERING_ROWS} needed"
    yield Check("differing rows", enough, differ if enough else f"{_sentence(contest)}: {differ}")
    yield Check("superior", contest.low > 0.0, _sentence(contest))


def _floor(floor: float, metric: Metric, contest: _Contest) -> Check:
    bound = contest.challenger_bound
    passed = bound <= floor if metric == "mae" else bound >= floor
    reach = "up to" if metric == "mae" else "from"
    verb = "keeps" if passed else "misses"
    sentence = f"{_plain(contest.challenger)}, CI {reach} {_plain(bound)}, {verb} the floor {floor:g}"
    return Check("floor", passed, sentence)


def _sentence(contest: _Contest) -> str:
    if contest.champion is None or contest.low is None or contest.high is None:
        return f"{_plain(contest.challenger)}, and no champion to compare with"
    return (
        f"{_plain(contest.challenger)} against {_plain(contest.champion)},"
        f" CI {interval(contest.low, contest.high)}"
    )


def interval(low: float, high: float) -> str:
    """
    Bounds of an improvement, signed, with as many decimals as it takes to tell them from zero.

    >>> interval(0.031, 0.0789), interval(-0.02, 0.004), interval(1.234, 20.0)
    ('+.03 to +.08', '-.020 to +.004', '+1.23 to +20')
    """
    decimals = 2
    while decimals < 5 and any(bound and not round(bound, decimals) for bound in (low, high)):
        decimals += 1
    return f"{_signed(low, decimals)} to {_signed(high, decimals)}"


def _signed(value: float, decimals: int) -> str:
    if abs(value) >= 1.0:
        return f"{value:+.2f}" if abs(value) < 10.0 else f"{value:+.4g}"
    return f"{value:+.{decimals}f}".replace("0.", ".", 1)


def _plain(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
