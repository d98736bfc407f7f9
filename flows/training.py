"""Training: the challenger, from the spans of rows that may know the present best."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from flows.callables import load_callable
from flows.errors import FlowError, NotRetrainable
from flows.rows import LabelledRows
from flows.schema import Schema
from flows.scoring import Answers, better, canonical, metric_of, numbers, score
from monitors.settings import ModelSettings

if TYPE_CHECKING:
    import pandas as pd

# A span with fewer rows to train on isn't worth a candidate of its own.
MIN_SPAN_ROWS = 100
MIN_SELECT_ROWS = 50
_DEFAULTS: Mapping[str, Any] = {"max_iter": 100, "early_stopping": False}
# OpenMP's threads spin while they wait for each other: on fewer cells, beside busy processes, that
# takes many times what it saves.
_THREADED_CELLS = 2_000_000
# HistGradientBoosting takes 255 categories of a column; the rarest of more share one.
_MAX_CATEGORIES = 200


class UnusableTrainer(FlowError):
    """The user's trainer, or the parameters stated for ours, gave no model."""


class Split(msgspec.Struct, frozen=True):
    """
    Row indices that cut the rows in time: train | select | holdout.

    No event time lies on both sides of a cut. `since` is the first row of the suspected change.
    """

    since: int
    select_from: int
    holdout_from: int


class Candidate(msgspec.Struct, frozen=True):
    """One span that a model was trained on, and its score on the select slice (None: no contest)."""

    span: str
    rows: int
    score: float | None = None


@dataclass(frozen=True, eq=False)
class Challenger:
    """A fitted model, and what it was made of; `trained_until` is its last row's time in seconds."""

    estimator: Any
    schema: Schema
    span: str
    rows: int
    trained_from: float
    trained_until: float
    candidates: tuple[Candidate, ...]
    parameters: Mapping[str, Any]


def train(settings: ModelSettings, rows: LabelledRows, suspected_since: datetime | None = None) -> Challenger:
    """
    Fit a model on each span, keep the better on the select slice, refit it up to the holdout.

    The spans are all rows, and those since the suspected change. The holdout is not looked at.
    """
    cut = split(settings, rows, suspected_since)
    spans = {"all rows": 0}
    if 0 < cut.since <= cut.select_from - MIN_SPAN_ROWS:
        spans["rows since the change"] = cut.since
    candidates = tuple(_candidate(settings, rows, cut, span, start) for span, start in spans.items())
    span = _best(settings, candidates).span
    return fit_span(settings, rows.between(spans[span], cut.holdout_from), span, candidates)


def fit_span(
    settings: ModelSettings,
    rows: LabelledRows,
    span: str = "all rows",
    candidates: tuple[Candidate, ...] = (),
) -> Challenger:
    """A model of these rows, with what is to be recorded of them."""
    schema, estimator = _fit(settings, rows)
    return Challenger(
        estimator=estimator,
        schema=schema,
        span=span,
        rows=len(rows),
        trained_from=float(rows.event_times[0]),
        trained_until=float(rows.event_times[-1]),
        candidates=candidates or (Candidate(span, len(rows)),),
        parameters=parameters_of(settings),
    )


def split(settings: ModelSettings, rows: LabelledRows, suspected_since: datetime | None) -> Split:
    """
    Cut off the newest rows as the holdout, and the newest of the rest to choose a span by.

    Both are a share of the rows since the suspected change, or of all rows where no change is
    known: a holdout larger than the change would judge by the world as it was.
    """
    since = rows.first_at(suspected_since) if suspected_since else 0
    recent = len(rows) - since
    share = settings.training.holdout_share
    holdout = max(round(share * recent), settings.gate.min_holdout_rows)
    holdout_from = _tie_free(rows, len(rows) - holdout)
    select = max(round(share * max(recent - holdout, 0)), MIN_SELECT_ROWS)
    select_from = _tie_free(rows, holdout_from - select)
    if select_from <= 0:
        raise NotRetrainable(
            f"{len(rows)} labelled rows don't suffice for {holdout} holdout rows, {select} to choose by"
            " and any to train on"
        )
    return Split(since=since, select_from=select_from, holdout_from=holdout_from)


def _tie_free(rows: LabelledRows, index: int) -> int:
    """The first row of those that share this row's event time, so that the later side is later."""
    return rows.first_at(float(rows.event_times[index])) if index > 0 else 0


def _candidate(settings: ModelSettings, rows: LabelledRows, cut: Split, span: str, start: int) -> Candidate:
    if not 0 < cut.since <= cut.select_from - MIN_SPAN_ROWS:
        return Candidate(span, cut.holdout_from - start)
    schema, estimator = _fit(settings, rows.between(start, cut.select_from))
    select = rows.between(cut.select_from, cut.holdout_from)
    metric = metric_of(settings.gate, settings.kind)
    value = score(metric, select.labels, answers(span, schema, estimator, select.features))
    return Candidate(span, cut.select_from - start, value)


def _best(settings: ModelSettings, candidates: tuple[Candidate, ...]) -> Candidate:
    metric = metric_of(settings.gate, settings.kind)
    best = candidates[0]
    for other in candidates[1:]:
        if best.score is not None and other.score is not None and better(metric, other.score, best.score):
            best = other
    return best


def answers(source: str, schema: Schema, estimator: Any, features: "pd.DataFrame") -> Answers:
    """What a fitted model says of rows; probabilities only of two classes."""
    frame = schema.arrange(features)
    probabilities = None
    with _threads_for(frame):
        predictions = np.asarray(estimator.predict(frame))
        if len(getattr(estimator, "classes_", ())) == 2 and hasattr(estimator, "predict_proba"):
            probabilities = np.asarray(estimator.predict_proba(frame))[:, 1]
    classes = getattr(estimator, "classes_", None)
    return Answers(
        source,
        predictions,
        probabilities,
        columns=schema.columns,
        classes=None if classes is None else tuple(sorted(map(str, canonical(classes)))),
    )


def training_labels(labels: npt.NDArray[Any], kind: str) -> npt.NDArray[Any]:
    """Floats for numbers; integers for classes that all are integers, else strings."""
    if kind == "regression":
        return numbers(labels)
    spelled = canonical(labels)
    if all(name.removeprefix("-").isdecimal() for name in set(spelled)):
        return spelled.astype(np.int64)
    return spelled


def parameters_of(settings: ModelSettings) -> dict[str, Any]:
    """The hyperparameters, as stated and as defaulted."""
    stated = settings.training.parameters
    if settings.training.callable:
        return {"callable": settings.training.callable, **stated}
    return {"trainer": "HistGradientBoosting", **_DEFAULTS, "random_state": settings.training.seed, **stated}


def _fit(settings: ModelSettings, rows: LabelledRows) -> tuple[Schema, Any]:
    import pandas as pd

    labels = training_labels(rows.labels, settings.kind)
    if settings.kind == "classification" and len(set(labels.tolist())) < 2:
        raise NotRetrainable(f"all {len(rows)} training rows have one label: there is nothing to learn")
    schema = Schema.of(rows.features, settings.drift.types)
    frame = schema.arrange(rows.features)
    if settings.training.callable:
        return schema, _user_fit(settings, frame, pd.Series(labels, name="label"))
    model = _default_model(settings, schema)
    with _threads_for(frame):
        return schema, model.fit(frame, labels)


@contextmanager
def _threads_for(frame: "pd.DataFrame") -> Iterator[None]:
    """One OpenMP thread where more would get into each other's way; entered after sklearn was imported."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(None if frame.size >= _THREADED_CELLS else 1, user_api="openmp"):
        yield


def _user_fit(settings: ModelSettings, frame: "pd.DataFrame", labels: "pd.Series") -> Any:
    name = settings.training.callable
    estimator = load_callable(name, "training.callable")(frame, labels, settings)
    if not callable(getattr(estimator, "predict", None)):
        raise UnusableTrainer(
            f"training.callable = {name!r} returned {type(estimator).__name__}, which has no predict:"
            " return the fitted estimator"
        )
    return estimator


def _default_model(settings: ModelSettings, schema: Schema) -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OrdinalEncoder

    # An unknown category is a missing one, which boosting has a branch for.
    encoder = OrdinalEncoder(
        handle_unknown="use_encoded_value",
        unknown_value=np.nan,
        encoded_missing_value=np.nan,
        max_categories=_MAX_CATEGORIES,
    )
    columns = ColumnTransformer(
        [("numeric", "passthrough", schema.numeric), ("categorical", encoder, schema.categorical)]
    )
    classes = settings.kind == "classification"
    boosting = HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor
    first, last = len(schema.numeric), len(schema.columns)
    parameters = {name: value for name, value in parameters_of(settings).items() if name != "trainer"}
    try:
        model = boosting(categorical_features=list(range(first, last)), **parameters)
    except TypeError as error:
        raise UnusableTrainer(f"training.parameters: {error}; they go to {boosting.__name__}") from error
    return Pipeline([("columns", columns), ("model", model)])
