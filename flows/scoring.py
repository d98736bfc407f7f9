"""Scoring: how good one model's answers are, and what each labelled row contributes to that."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from monitors.settings import GateSettings

Metric = Literal["accuracy", "balanced_accuracy", "auc", "mae"]
Floats = npt.NDArray[np.float64]
Values = npt.NDArray[Any]

# Below this the bounds of a few one-sided rows claim a certainty that a sign test would not.
MIN_DIFFERING_ROWS = 8
# Fewer rows of a class say nothing about it.
MIN_CLASS_ROWS = 5
_CLASS_METRICS = ("accuracy", "balanced_accuracy", "auc")


@dataclass(frozen=True, eq=False)
class Answers:
    """
    What one model says of the holdout's rows; `probabilities` are those of the greater of two classes.

    `class_probabilities` are those of each of more classes, by its name in the spelling of `canonical`; a
    class that is not among them has none. `columns` are what it reads, by name with their types, and
    `classes` what it can answer, in the same spelling; None where that is not known, as of logged
    predictions.
    """

    source: str
    predictions: Values
    probabilities: Values | None = None
    columns: Mapping[str, str] | None = None
    classes: tuple[str, ...] | None = None
    class_probabilities: Mapping[str, Floats] | None = None

    def only(self, rows: Values) -> "Answers":
        """The answers to these rows: a mask or indices."""
        stated, known = self.probabilities, self.class_probabilities
        return replace(
            self,
            predictions=np.asarray(self.predictions)[rows],
            probabilities=None if stated is None else np.asarray(stated)[rows],
            class_probabilities=None if known is None else {name: of[rows] for name, of in known.items()},
        )


def joined(parts: Sequence[Answers]) -> Answers:
    """Answers to successive rows as one; a class that one of their models did not know had none by it."""
    stated = [one.probabilities for one in parts if one.probabilities is not None]
    known = [one.class_probabilities for one in parts if one.class_probabilities is not None]
    none = [np.zeros(len(one.predictions)) for one in parts]
    names = {name for one in known for name in one} if len(known) == len(parts) else set()
    by_class = {
        name: np.concatenate([one.get(name, zeros) for one, zeros in zip(known, none, strict=True)])
        for name in names
    }
    return replace(
        parts[-1],
        predictions=np.concatenate([one.predictions for one in parts]),
        probabilities=np.concatenate(stated) if len(stated) == len(parts) else None,
        class_probabilities=by_class or None,
    )


class MetricMismatch(ValueError):
    """The metric does not fit the kind of model."""


def metric_of(settings: GateSettings, kind: str) -> Metric:
    """The metric to judge by: the stated one, else accuracy for classes and mae for numbers."""
    metric: Metric = settings.metric or ("mae" if kind == "regression" else "accuracy")
    if (metric in _CLASS_METRICS) != (kind == "classification"):
        raise MetricMismatch(
            f"gate.metric = {metric!r} does not judge a model of kind {kind!r}: use"
            f" {'mae' if kind == 'regression' else 'accuracy, balanced_accuracy or auc'}"
        )
    return metric


def score(metric: Metric, labels: Values, answers: Answers) -> float:
    """The metric's plain value on these rows, nan where it is not defined."""
    return float(row_values(metric, labels, answers).mean())


def better(metric: Metric, one: float, other: float) -> bool:
    """Whether `one` is strictly the better score."""
    return one < other if metric == "mae" else one > other


def canonical(values: Sequence[Any] | Values) -> Values:
    """
    Class labels in one spelling, because JSON, CSV and numpy write the same class differently.

    >>> canonical([True, 1, 1.0, "1", "no", None]).tolist()
    ['1', '1', '1', '1', 'no', None]
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in "iufb":
        distinct, which = np.unique(values, return_inverse=True)
        return _spelled(distinct.tolist())[which]
    return _spelled(values)


def _spelled(values: Sequence[Any] | Values) -> Values:
    # There are few classes and many rows; True and 1 are one key and need not be one type.
    known: dict[tuple[type, Any], str | None] = {}
    spelled = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        key = (type(value), value)
        if key not in known:
            known[key] = _spelling(value)
        spelled[place] = known[key]
    return spelled


def numbers(values: Sequence[Any] | Values) -> Floats:
    """Numbers as floats; whatever is none is nan."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iufb":
        return np.asarray(values, dtype=float)
    return np.array([_number(value) for value in values], dtype=float)


def _spelling(value: Any) -> str | None:
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, str):
        return value
    number = float(value)
    if math.isnan(number):
        return None
    return str(int(number)) if number.is_integer() else repr(number)


def _number(value: Any) -> float:
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


def row_values(metric: Metric, labels: Values, answers: Answers) -> Floats:
    """
    What each row says of the metric: the mean is the score, and the spread is that of the score.

    For accuracy and mae these are the rows' hits and errors. Balanced accuracy and auc are no means
    of rows: there it is the score plus each row's influence on it, which grows as its class is rarer.
    """
    parts = contributions(metric, labels, answers)
    if metric in ("accuracy", "mae"):
        return parts
    _, members = np.unique(canonical(labels).astype(str), return_inverse=True)
    usual = np.bincount(members, parts) / np.bincount(members)
    # For auc either class's rows alone add up to the score.
    score = parts.mean() / 2.0 if metric == "auc" else parts.mean()
    return np.asarray(score + parts - usual[members], dtype=float)


def contributions(metric: Metric, labels: Values, answers: Answers) -> Floats:
    """Each row's hit, error or placement among the other class, weighted as the metric weighs it."""
    if metric == "mae":
        return np.asarray(np.abs(numbers(labels) - numbers(answers.predictions)), dtype=float)
    truth = canonical(labels)
    if metric == "auc":
        scores = answers.predictions if answers.probabilities is None else answers.probabilities
        return _placements(truth, numbers(scores))
    hits = np.asarray(truth == canonical(answers.predictions), dtype=float)
    if metric == "accuracy":
        return hits
    _, members, counts = np.unique(truth.astype(str), return_inverse=True, return_counts=True)
    return np.asarray(hits * len(truth) / (len(counts) * counts)[members], dtype=float)


def proper_values(labels: Values, answers: Answers) -> Floats | None:
    """
    One minus half of each row's Brier score (Brier, Monthly Weather Review 78, 1950): more is better.

    Half, since of two classes either's error is the other's, too. None without probabilities of as many
    classes as the labels have.
    """
    truth = canonical(labels)
    stated = _by_class(truth, answers)
    if stated is None:
        return None
    squares, right = np.zeros(len(truth)), np.zeros(len(truth))
    for name, probabilities in stated.items():
        squares += probabilities**2
        right[truth == name] = probabilities[truth == name]
    return 1.0 - (squares - 2.0 * right + 1.0) / 2.0 if np.isfinite(squares).all() else None


def _by_class(truth: Values, answers: Answers) -> Mapping[str, Floats] | None:
    """Each class's probabilities, also where only those of the greater of two are stated."""
    names = sorted(set(truth), key=_class_order)
    if answers.class_probabilities is not None or answers.probabilities is None or len(names) != 2:
        return answers.class_probabilities
    greater = numbers(answers.probabilities)
    return {names[0]: 1.0 - greater, names[1]: greater}


def _placements(truth: Values, scores: Floats) -> Floats:
    """How much of the other class each row is on the right side of, ties as halves (DeLong 1988)."""
    from scipy.stats import rankdata

    positive = np.asarray(truth == max(set(truth), key=_class_order), dtype=bool)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return np.full(len(truth), math.nan)
    ranks = rankdata(scores)
    below = (ranks[positive] - rankdata(scores[positive])) / negatives
    above = 1.0 - (ranks[~positive] - rankdata(scores[~positive])) / positives
    placed = np.empty(len(truth))
    placed[positive] = below * len(truth) / positives
    placed[~positive] = above * len(truth) / negatives
    return placed


def _class_order(name: str) -> tuple[bool, float, str]:
    """Classes that are numbers sort as numbers, as scikit-learn sorts them."""
    number = _number(name)
    return (math.isnan(number), 0.0 if math.isnan(number) else number, name)


def differing_rows(metric: Metric, labels: Values, one: Answers, other: Answers) -> float:
    """How many rows two models differ on; where some weigh more, as many equal ones as decide as much."""
    weights = np.abs(contributions(metric, labels, one) - contributions(metric, labels, other))
    total = float(weights.sum())
    return total**2 / float(weights @ weights) if total else 0.0


def losses(kind: str, labels: Values, said: Answers) -> Floats:
    """What each answer cost, as the monitors count it: 0 or 1 for classes, the absolute error for numbers."""
    if kind == "regression":
        errors = np.abs(numbers(labels) - numbers(said.predictions))
        return np.asarray(errors[np.isfinite(errors)], dtype=float)
    return np.asarray(canonical(labels) != canonical(said.predictions), dtype=float)
