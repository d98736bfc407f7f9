"""Training: challengers from the spans of rows that may know the present best, walking forward in time."""

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
from flows.scoring import Answers, canonical, joined, numbers
from monitors.settings import ModelSettings

if TYPE_CHECKING:
    import pandas as pd

# A span with fewer rows to train on isn't worth a candidate of its own.
MIN_SPAN_ROWS = 20
# Fewer rows are better learned by a linear model: a tree's leaves would have to be as large as they.
SMALL_ROWS = 500
# More held out rows than this share of a reference would judge by a world that is gone.
MAX_HOLDOUT = 0.5
ALL, RECENT, SINCE = "all rows", "recent rows", "rows since the change"
# Of the recent rows, those so many references old count half: where the world moves all the time, the newest
# know it best.
HALF_LIFE = 1.0
_DEFAULTS: Mapping[str, Any] = {"max_iter": 40, "max_leaf_nodes": 15, "early_stopping": False}
# OpenMP's threads spin while they wait for each other: on fewer cells, beside busy processes, that
# takes many times what it saves.
_THREADED_CELLS = 2_000_000
# HistGradientBoosting takes 255 categories of a column; the rarest of more share one.
_MAX_CATEGORIES = 200


class UnusableTrainer(FlowError):
    """The user's trainer, or the parameters stated for ours, gave no model."""


class Candidate(msgspec.Struct, frozen=True):
    """One span of rows to train on, and its score and bounds where it was judged beside others."""

    span: str
    rows: int
    score: float | None = None
    low: float | None = None
    high: float | None = None


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


@dataclass(frozen=True, eq=False)
class Trial:
    """
    What each span's models said of the same later rows, which none of them had seen.

    The newest `holdout` rows are cut into folds in time. Every fold is answered by a model of the span
    as it was when the fold began (rolling-origin evaluation: Tashman, International Journal of
    Forecasting 16, 2000), so that a candidate is judged as fresh as it would be put to use. `trained_until`
    is the last event time before the holdout.
    """

    holdout: LabelledRows
    before: LabelledRows
    answers: tuple[Answers, ...]
    trained_until: float

    @property
    def spans(self) -> tuple[str, ...]:
        """The names of the spans, in the order of the answers."""
        return tuple(one.source for one in self.answers)


def walk_forward(
    settings: ModelSettings,
    rows: LabelledRows,
    since: datetime | None = None,
    after: float | None = None,
    only: str = "",
) -> Trial:
    """
    Let the spans answer the newest rows, fold by fold.

    `since` is the estimated change point: a share of the rows after it is held out, so that a holdout
    judges by the world as it is. `after` is the last event time that the champion was trained on: only
    later rows are unseen by it, too. `only` names the one span wanted. Raises `NotRetrainable` where
    too few rows are left.
    """
    change = rows.first_at(since) if since else max(0, len(rows) - settings.reference_rows)
    cuts = _folds(settings, rows, change, after)
    first = cuts[0]
    names = [name for name in (ALL, RECENT, SINCE) if _is_candidate(settings, name, change, first)]
    wanted = [name for name in names if name == only] or names
    answered = [_answered(settings, rows, name, change, cuts) for name in wanted]
    return Trial(
        holdout=rows.between(first, len(rows)),
        before=rows.between(max(min(change, first - MIN_SPAN_ROWS), 2 * first - len(rows), 0), first),
        answers=tuple(answered),
        trained_until=float(rows.event_times[first - 1]),
    )


def refit(settings: ModelSettings, rows: LabelledRows, span: str, since: datetime | None) -> Challenger:
    """The span's model up to the newest row: what is promoted where its walk forward was the better one."""
    change = rows.first_at(since) if since else max(0, len(rows) - settings.reference_rows)
    start = _start(settings, span, change, len(rows))
    return fit_span(settings, rows.between(start, len(rows)), span)


def _folds(settings: ModelSettings, rows: LabelledRows, change: int, after: float | None) -> list[int]:
    """The first row of each fold of the holdout."""
    count, needed = len(rows), settings.gate.min_holdout_rows
    largest = MAX_HOLDOUT * settings.reference_rows
    wanted = min(largest, settings.training.holdout_share * (count - change))
    unseen = 0 if after is None else rows.first_after(after)
    first = max(count - max(round(wanted), needed), unseen, 0)
    first = _tie_free(rows, first) if first > unseen else first
    if first < MIN_SPAN_ROWS or count - first < needed:
        raise NotRetrainable(
            f"{count} labelled rows, {count - unseen} of them later than the champion's training, don't"
            f" suffice for {needed} holdout rows and {MIN_SPAN_ROWS} to train on"
        )
    size = max(1, round(largest / settings.training.folds), needed // settings.training.folds)
    folds = max(1, min(settings.training.folds, round((count - first) / size)))
    cuts = [first + round(place * (count - first) / folds) for place in range(folds)]
    return sorted({first, *(_tie_free(rows, cut) for cut in cuts[1:])})


def _is_candidate(settings: ModelSettings, name: str, change: int, first: int) -> bool:
    if name == ALL:
        return True
    if name == RECENT:
        return first > settings.reference_rows
    return 0 < change <= first - MIN_SPAN_ROWS and first - change < settings.reference_rows


def _start(settings: ModelSettings, name: str, change: int, end: int) -> int:
    if name == SINCE:
        return change
    return max(0, end - settings.reference_rows) if name == RECENT else 0


def _answered(
    settings: ModelSettings, rows: LabelledRows, name: str, change: int, cuts: list[int]
) -> Answers:
    folds: list[Answers] = []
    for start, end in zip(cuts, [*cuts[1:], len(rows)], strict=True):
        known = rows.between(_start(settings, name, change, start), start)
        schema, estimator = _fit(settings, known, _half_life(settings, name))
        folds.append(answers(name, schema, estimator, rows.between(start, end).features))
    return joined(folds)


def fit_span(
    settings: ModelSettings,
    rows: LabelledRows,
    span: str = "all rows",
    candidates: tuple[Candidate, ...] = (),
) -> Challenger:
    """A model of these rows, with what is to be recorded of them."""
    half_life = _half_life(settings, span)
    schema, estimator = _fit(settings, rows, half_life)
    return Challenger(
        estimator=estimator,
        schema=schema,
        span=span,
        rows=len(rows),
        trained_from=float(rows.event_times[0]),
        trained_until=float(rows.event_times[-1]),
        candidates=candidates or (Candidate(span, len(rows)),),
        parameters=parameters_of(settings) | ({} if half_life is None else {"half_life_rows": half_life}),
    )


def _tie_free(rows: LabelledRows, index: int) -> int:
    """The first row of those that share this row's event time, so that the later side is later."""
    return rows.first_at(float(rows.event_times[index])) if index > 0 else 0


def answers(source: str, schema: Schema, estimator: Any, features: "pd.DataFrame") -> Answers:
    """What a fitted model says of rows, with its probabilities where it has any."""
    frame = schema.arrange(features)
    classes = getattr(estimator, "classes_", None)
    names = () if classes is None else tuple(map(str, canonical(classes)))
    stated = None
    with _threads_for(frame):
        predictions = np.asarray(estimator.predict(frame))
        if len(names) > 1 and hasattr(estimator, "predict_proba"):
            stated = np.asarray(estimator.predict_proba(frame))
    return Answers(
        source,
        predictions,
        stated[:, 1] if stated is not None and len(names) == 2 else None,
        columns=schema.columns,
        classes=None if classes is None else tuple(sorted(names)),
        class_probabilities=(
            dict(zip(names, stated.T, strict=True)) if stated is not None and len(names) > 2 else None
        ),
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


def _half_life(settings: ModelSettings, span: str) -> float | None:
    """After how many rows one counts half; a trainer of the user's own is given rows without weights."""
    if span != RECENT or settings.training.callable:
        return None
    return HALF_LIFE * settings.reference_rows


def _fit(settings: ModelSettings, rows: LabelledRows, half_life: float | None = None) -> tuple[Schema, Any]:
    import pandas as pd

    labels = training_labels(rows.labels, settings.kind)
    if settings.kind == "classification" and len(set(labels.tolist())) < 2:
        raise NotRetrainable(f"all {len(rows)} training rows have one label: there is nothing to learn")
    schema = Schema.of(rows.features, settings.drift.types)
    frame = schema.arrange(rows.features)
    if settings.training.callable:
        return schema, _user_fit(settings, frame, pd.Series(labels, name="label"))
    small = len(rows) < SMALL_ROWS and not settings.training.parameters
    model = _small_model(settings, schema) if small else _default_model(settings, schema)
    weights = None if half_life is None else 0.5 ** (np.arange(len(rows))[::-1] / half_life)
    with _threads_for(frame):
        return schema, model.fit(frame, labels, model__sample_weight=weights)


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


def _small_model(settings: ModelSettings, schema: Schema) -> Any:
    """A regularised linear model of scaled columns."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numeric = Pipeline([("fill", SimpleImputer(keep_empty_features=True)), ("scale", StandardScaler())])
    encoder = OneHotEncoder(handle_unknown="ignore", max_categories=_MAX_CATEGORIES)
    columns = ColumnTransformer(
        [("numeric", numeric, schema.numeric), ("categorical", encoder, schema.categorical)]
    )
    if settings.kind == "classification":
        return Pipeline([("columns", columns), ("model", LogisticRegression(C=0.1, max_iter=1_000))])
    return Pipeline([("columns", columns), ("model", Ridge(alpha=1.0))])
