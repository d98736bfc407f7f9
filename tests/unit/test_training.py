"""A challenger learns from rows before the holdout, from the span that knows the present best."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flows.callables import UnusableCallable
from flows.errors import NotRetrainable
from flows.rows import LabelledRows
from flows.schema import Schema
from flows.training import UnusableTrainer, answers, fit_span, split, train, training_labels
from monitors.settings import DriftSettings, GateSettings, ModelSettings, TrainingSettings


def stream(rows: int = 1600, change_at: int | None = None, seed: int = 0) -> LabelledRows:
    """Rows one second apart; from `change_at` on the label means the opposite."""
    random = np.random.default_rng(seed)
    amount = random.normal(size=rows)
    country = random.choice(["de", "fr", "it"], rows)
    label = (amount + (country == "de") > 0).astype(int)
    if change_at is not None:
        label[change_at:] = 1 - label[change_at:]
    features = pd.DataFrame({"amount": amount, "country": country.astype(object)})
    nothing: list[Any] = [None] * rows
    return LabelledRows.sorted(features, label.tolist(), [float(i) for i in range(rows)], nothing, nothing)


def at(second: float) -> datetime:
    return datetime.fromtimestamp(second, UTC)


def settings(**training: Any) -> ModelSettings:
    return ModelSettings(training=TrainingSettings(parameters={"max_iter": 20}, **training))


def test_the_holdout_is_a_share_of_the_rows_since_the_change() -> None:
    cut = split(settings(), stream(2000), at(1200))
    assert (cut.since, cut.select_from, cut.holdout_from) == (1200, 1650, 1800)


def test_without_a_known_change_the_holdout_is_a_share_of_all_rows() -> None:
    assert split(settings(), stream(2000), None).holdout_from == 1500


def test_few_rows_since_the_change_still_leave_the_newest_rows_as_the_holdout() -> None:
    cut = split(settings(), stream(2000), at(1950))
    assert cut.holdout_from == 2000 - GateSettings().min_holdout_rows


def test_rows_of_one_moment_are_never_on_both_sides_of_a_cut() -> None:
    rows = stream(2000)
    times = np.floor(rows.event_times / 70)
    tied = LabelledRows.sorted(rows.features, rows.labels, times, rows.predictions, rows.probabilities)
    cut = split(settings(), tied, None)
    for start in (cut.select_from, cut.holdout_from):
        assert tied.event_times[start - 1] < tied.event_times[start]


def test_rows_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(NotRetrainable, match="140 labelled rows don't suffice"):
        split(settings(), stream(140), None)


def test_after_a_change_the_span_since_then_wins() -> None:
    challenger = train(settings(), stream(1600, change_at=1000), at(1000))
    assert challenger.span == "rows since the change"
    assert (challenger.trained_from, challenger.trained_until) == (1000, 1449)
    scores = {candidate.span: candidate.score for candidate in challenger.candidates}
    assert scores["rows since the change"] > scores["all rows"]  # type: ignore[operator]


def test_without_a_real_change_all_rows_win() -> None:
    challenger = train(settings(), stream(4000), at(3400))
    assert challenger.span == "all rows"


def test_nothing_of_the_holdout_reaches_the_challenger() -> None:
    rows = stream(1600, change_at=1000)
    spoilt = rows.labels.copy()
    holdout_from = split(settings(), rows, at(1000)).holdout_from
    spoilt[holdout_from:] = 7
    other = LabelledRows.sorted(rows.features, spoilt, rows.event_times, rows.predictions, rows.probabilities)
    one, two = train(settings(), rows, at(1000)), train(settings(), other, at(1000))
    frame = one.schema.arrange(rows.features)
    assert (one.estimator.predict_proba(frame) == two.estimator.predict_proba(frame)).all()


def test_the_same_rows_and_seed_give_the_same_model() -> None:
    rows = stream()
    frame = Schema.of(rows.features, {}).arrange(rows.features)
    one, two = fit_span(settings(), rows), fit_span(settings(), rows)
    assert (one.estimator.predict_proba(frame) == two.estimator.predict_proba(frame)).all()


def test_an_unknown_category_and_missing_values_are_answered() -> None:
    challenger = fit_span(settings(), stream())
    odd = pd.DataFrame({"country": ["xx", None, float("nan")], "amount": [None, float("inf"), 2.0]})
    told = answers("challenger", challenger.schema, challenger.estimator, odd)
    assert set(told.predictions.tolist()) <= {0, 1}
    assert answers("c", challenger.schema, challenger.estimator, odd[["amount"]]).predictions.shape == (3,)


def test_a_regression_model_answers_numbers() -> None:
    rows = stream()
    labels = rows.features["amount"].to_numpy() * 3
    numeric = LabelledRows.sorted(
        rows.features, labels, rows.event_times, rows.predictions, rows.probabilities
    )
    challenger = train(ModelSettings(kind="regression"), numeric)
    told = answers("c", challenger.schema, challenger.estimator, numeric.features)
    assert np.abs(told.predictions - labels).mean() < 0.3
    assert told.probabilities is None


def test_labels_are_integers_where_all_of_them_are() -> None:
    assert training_labels(np.array([True, 0, "1"], dtype=object), "classification").tolist() == [1, 0, 1]
    assert training_labels(np.array(["a", 1], dtype=object), "classification").tolist() == ["a", "1"]


def test_one_label_only_is_nothing_to_learn() -> None:
    rows = stream()
    same = LabelledRows.sorted(
        rows.features, [1] * len(rows), rows.event_times, rows.predictions, rows.probabilities
    )
    with pytest.raises(NotRetrainable, match="one label"):
        train(settings(), same)


def test_a_parameter_that_the_trainer_does_not_know_is_named() -> None:
    wrong = ModelSettings(training=TrainingSettings(parameters={"n_tres": 7}))
    with pytest.raises(UnusableTrainer, match=r"training\.parameters.*n_tres"):
        fit_span(wrong, stream())


def test_a_users_trainer_gets_frame_labels_and_settings(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_trainer_here.py").write_text(
        "from sklearn.dummy import DummyClassifier\n"
        "def fit(features, labels, settings):\n"
        "    assert list(features.columns) == ['amount', 'country'] and settings.kind == 'classification'\n"
        "    return DummyClassifier(strategy='constant', constant=1).fit(features, labels)\n"
        "def nothing(features, labels, settings):\n"
        "    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    theirs = fit_span(settings(callable="their_trainer_here:fit"), stream())
    assert theirs.parameters["callable"] == "their_trainer_here:fit"
    told = answers("theirs", theirs.schema, theirs.estimator, stream(5).features)
    assert told.predictions.tolist() == [1] * 5
    with pytest.raises(UnusableTrainer, match="has no predict"):
        fit_span(settings(callable="their_trainer_here:nothing"), stream())
    with pytest.raises(UnusableCallable, match="has no function absent"):
        fit_span(settings(callable="their_trainer_here:absent"), stream())


def test_stray_strings_do_not_make_a_number_a_category_and_stated_types_win() -> None:
    frame = pd.DataFrame({"n": [*range(99), "oops"], "code": [*range(100)]}, dtype=object)
    assert Schema.of(frame, {}).columns == {"n": "numeric", "code": "numeric"}
    stated = DriftSettings(types={"code": "categorical"})
    schema = Schema.of(frame, stated.types)
    assert schema.categorical == ["code"]
    assert np.isnan(schema.arrange(frame)["n"].iloc[-1])
    assert schema.arrange(frame)["code"].iloc[3] == "3"
    assert Schema.decode(schema.encode()) == schema
