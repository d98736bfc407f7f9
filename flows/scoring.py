"""Scoring: how good one model's answers are, on any resample of the same labelled rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from monitors.settings import GateSettings

Metric = Literal["accuracy", "balanced_accuracy", "auc", "mae"]
Floats = npt.NDArray[np.float64]
Values = npt.NDArray[Any]
# Scores of one model, one per resample: a row of counts says how often each holdout row was drawn.
Scorer = Callable[[Floats], Floats]

_CLASS_METRICS = ("accuracy", "balanced_accuracy", "auc")


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model says of the holdout's rows; `probabilities` are those of the greater of two classes."""

    source: str
    predictions: Values
    probabilities: Values | None = None


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
    return float(scorer(metric, labels, answers)(np.ones((1, len(labels))))[0])


def better(metric: Metric, one: float, other: float) -> bool:
    """Whether `one` is strictly the better score."""
    return one < other if metric == "mae" else one > other


def canonical(values: Sequence[Any] | Values) -> Values:
    """
    Class labels in one spelling, because JSON, CSV and numpy write the same class differently.

    >>> canonical([True, 1, 1.0, "1", "no", None]).tolist()
    ['1', '1', '1', '1', 'no', None]
    """
    spelled = np.empty(len(values), dtype=object)
    spelled[:] = [_spelling(value) for value in values]
    return spelled


def numbers(values: Sequence[Any] | Values) -> Floats:
    """Numbers as floats; whatever is none is nan."""
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


def scorer(metric: Metric, labels: Values, answers: Answers) -> Scorer:
    if metric == "mae":
        return _mean(np.abs(numbers(labels) - numbers(answers.predictions)))
    truth = canonical(labels)
    if metric == "auc":
        scores = answers.predictions if answers.probabilities is None else answers.probabilities
        return _auc(truth, numbers(scores))
    correct = (truth == canonical(answers.predictions)).astype(float)
    return _mean(correct) if metric == "accuracy" else _mean_recall(truth, correct)


def _mean(row_scores: Floats) -> Scorer:
    def values(counts: Floats) -> Floats:
        return np.asarray(counts @ row_scores / counts.sum(axis=1), dtype=float)

    return values


def _mean_recall(truth: Values, correct: Floats) -> Scorer:
    classes = [(truth == name).astype(float) for name in sorted(set(truth))]

    def values(counts: Floats) -> Floats:
        drawn = np.stack([counts @ members for members in classes])
        hits = np.stack([counts @ (members * correct) for members in classes])
        # A resample may miss a rare class altogether: its recall is then of the others.
        present = drawn > 0
        recalls = np.divide(hits, drawn, out=np.zeros_like(hits), where=present)
        return np.asarray(recalls.sum(axis=0) / present.sum(axis=0), dtype=float)

    return values


def _auc(truth: Values, scores: Floats) -> Scorer:
    """Mann-Whitney with midranks: a positive beats the negatives below it and half of those beside it."""
    positive = (truth == max(set(truth), key=_class_order)).astype(float)
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    positives, negatives = positive[order], 1.0 - positive[order]

    def values(counts: Floats) -> Floats:
        drawn = counts[:, order]
        ups = np.add.reduceat(drawn * positives, starts, axis=1)
        downs = np.add.reduceat(drawn * negatives, starts, axis=1)
        below = np.cumsum(downs, axis=1) - downs
        pairs = ups.sum(axis=1) * downs.sum(axis=1)
        won = (ups * (below + 0.5 * downs)).sum(axis=1)
        halves = np.full(len(pairs), 0.5)
        return np.asarray(np.divide(won, pairs, out=halves, where=pairs > 0), dtype=float)

    return values


def _class_order(name: str) -> tuple[bool, float, str]:
    """Classes that are numbers sort as numbers, as scikit-learn sorts them."""
    number = _number(name)
    return (math.isnan(number), 0.0 if math.isnan(number) else number, name)


def differing_rows(metric: Metric, one: Answers, other: Answers) -> int:
    if metric == "auc" and one.probabilities is not None and other.probabilities is not None:
        return int((numbers(one.probabilities) != numbers(other.probabilities)).sum())
    if metric == "mae":
        return int((numbers(one.predictions) != numbers(other.predictions)).sum())
    return int((canonical(one.predictions) != canonical(other.predictions)).sum())
