"""A challenger learns from rows before the holdout, from the span that knows the present best."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from flows.callables import UnusableCallable
from flows.errors import NotRetrainable
from flows.rows import LabelledRows
from flows.schema import Schema
from flows.training import (
    ALL,
    RECENT,
    SINCE,
    UnusableTrainer,
    answers,
    fit_span,
    refit,
    training_labels,
    walk_forward,
)
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
    trial = walk_forward(settings(), stream(2000), at(1200))
    assert len(trial.holdout) == 400
    assert trial.trained_until == 1599.0


def test_without_a_known_change_the_holdout_is_a_share_of_a_reference() -> None:
    recent = msgspec.structs.replace(settings(), reference_rows=800)
    assert len(walk_forward(recent, stream(2000)).holdout) == 400


def test_few_rows_since_the_change_still_leave_the_newest_rows_as_the_holdout() -> None:
    assert len(walk_forward(settings(), stream(2000), at(1990)).holdout) == GateSettings().min_holdout_rows


def test_rows_that_the_champion_was_trained_on_are_no_holdout() -> None:
    assert len(walk_forward(settings(), stream(2000), at(1200), after=1899.0).holdout) == 100
    with pytest.raises(NotRetrainable, match="10 of them later than the champion's training"):
        walk_forward(settings(), stream(2000), at(1200), after=1989.0)


def test_rows_of_one_moment_are_never_on_both_sides_of_a_cut() -> None:
    rows = stream(2000)
    times = np.floor(rows.event_times / 70)
    tied = LabelledRows.sorted(rows.features, rows.labels, times, rows.predictions, rows.probabilities)
    trial = walk_forward(settings(), tied, None)
    assert trial.trained_until < trial.holdout.event_times[0]


def test_rows_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(NotRetrainable, match="40 labelled rows"):
        walk_forward(settings(), stream(40), None)


def test_after_a_change_the_span_since_then_knows_best() -> None:
    rows = stream(1600, change_at=1000)
    trial = walk_forward(settings(), rows, at(1000))
    right = {one.source: (one.predictions == trial.holdout.labels).mean() for one in trial.answers}
    assert right[SINCE] > 0.9 > 0.6 > right[ALL]
    made = refit(settings(), rows, SINCE, at(1000))
    assert (made.trained_from, made.trained_until) == (1000.0, 1599.0)


def test_one_span_alone_can_be_asked_for() -> None:
    assert walk_forward(settings(), stream(1600), at(1000), only=SINCE).spans == (SINCE,)


def test_no_fold_is_answered_by_a_model_that_saw_it_or_what_came_after() -> None:
    rows, short = stream(1600, change_at=1000), msgspec.structs.replace(settings(), reference_rows=800)
    before = walk_forward(short, rows, at(1000))
    spoilt = rows.labels.copy()
    spoilt[1400:] = 1 - spoilt[1400:].astype(int)
    other = LabelledRows.sorted(rows.features, spoilt, rows.event_times, rows.predictions, rows.probabilities)
    after = walk_forward(short, other, at(1000))
    known = 1400 - (1600 - len(before.holdout))
    for one, two in zip(before.answers, after.answers, strict=True):
        assert (one.predictions[:known] == two.predictions[:known]).all(), one.source
    assert any(
        (one.predictions != two.predictions).any()
        for one, two in zip(before.answers, after.answers, strict=True)
    ), "later folds do learn from earlier ones"


def test_few_rows_are_learned_by_a_linear_model() -> None:
    assert "LogisticRegression" in repr(fit_span(ModelSettings(), stream(200)).estimator)
    assert "HistGradientBoosting" in repr(fit_span(ModelSettings(), stream(600)).estimator)


@pytest.mark.parametrize("reference", [800, 400])
def test_the_newest_of_the_recent_rows_know_best(reference: int) -> None:
    """Somewhat less than half of them are of the world as it is by now."""
    newest = round(0.475 * reference)
    rows = stream(1600, change_at=1600 - newest)
    short = ModelSettings(reference_rows=reference)
    now = rows.between(1600 - newest, 1600)
    right = {}
    for span in (RECENT, ALL):
        made = fit_span(short, rows.between(1600 - reference, 1600), span)
        said = answers(span, made.schema, made.estimator, now.features)
        right[span] = (said.predictions == now.labels).mean()
        assert made.parameters.get("half_life_rows") == (reference if span == RECENT else None)
    assert right[RECENT] > max(0.7, right[ALL] + 0.15)


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
    challenger = fit_span(ModelSettings(kind="regression"), numeric)
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
        fit_span(settings(), same)


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
