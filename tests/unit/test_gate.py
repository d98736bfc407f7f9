"""The gate promotes what is surely better on later rows, and nothing else."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.gate import Holdout, judge
from flows.scoring import Answers, MetricMismatch, canonical, joined, proper_values, row_values, score
from flows.segments import regressions
from flows.verdict import Verdict
from monitors.settings import GateSettings

FAST = GateSettings(resamples=400)


def verdict(
    labels: np.ndarray,
    challenger: Answers,
    champion: Answers | None,
    gate: GateSettings = FAST,
    kind: str = "classification",
    first: float = 1.0,
    seed: int = 0,
) -> Verdict:
    holdout = Holdout(labels, np.arange(len(labels)) + first)
    return judge(gate, kind, holdout, [challenger], champion, trained_until=0.5, seed=seed)


def guesses(truth: np.ndarray, right: float, random: np.random.Generator) -> Answers:
    """A model that is right about this share of rows, whatever they are."""
    hit = random.random(len(truth)) < right
    return Answers("simulated", np.where(hit, truth, 1 - truth), np.where(hit == (truth == 1), 0.8, 0.2))


def failed(result: Verdict) -> list[str]:
    return [check.name for check in result.checks if not check.passed]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(100, 400),
    metric=st.sampled_from(["accuracy", "balanced_accuracy", "auc"]),
)
def test_a_model_is_never_promoted_over_itself(seed: int, rows: int, metric: str) -> None:
    random = np.random.default_rng(seed)
    truth = np.r_[np.zeros(20, int), np.ones(20, int), random.integers(0, 2, rows)]
    same = guesses(truth, 0.8, random)
    result = verdict(truth, same, same, GateSettings(metric=metric, resamples=200))  # type: ignore[arg-type]
    assert result.action == "refused"
    assert failed(result)[0] == "differing rows"


def test_a_regression_model_is_never_promoted_over_itself() -> None:
    truth = np.random.default_rng(0).normal(size=500)
    same = Answers("same", truth + 0.1)
    assert verdict(truth, same, same, kind="regression").action == "refused"


@pytest.mark.parametrize(("rows", "right"), [(150, 0.97), (300, 0.9), (1000, 0.7)])
def test_of_equally_good_pairs_about_one_in_twenty_is_promoted(rows: int, right: float) -> None:
    promoted = 0
    trials = 250
    for trial in range(trials):
        random = np.random.default_rng([trial, rows])
        truth = random.integers(0, 2, rows)
        pair = guesses(truth, right, random), guesses(truth, right, random)
        promoted += verdict(truth, *pair, seed=trial).action == "promoted"
    # 5 % of 250 is 12.5, and 23 is three standard deviations above that.
    assert promoted <= 23


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "auc"])
def test_a_clearly_better_classifier_is_promoted(metric: str) -> None:
    random = np.random.default_rng(1)
    truth = random.integers(0, 2, 600)
    gate = GateSettings(metric=metric)  # type: ignore[arg-type]
    result = verdict(truth, guesses(truth, 0.93, random), guesses(truth, 0.85, random), gate)
    assert (result.action, failed(result)) == ("promoted", [])
    assert result.low is not None and result.low > 0


def scored(truth: np.ndarray, distance: float, random: np.random.Generator) -> Answers:
    """A model with calibrated probabilities: the classes' scores lie `distance` deviations apart."""
    scores = truth * distance + random.normal(size=len(truth))
    probabilities = 1.0 / (1.0 + np.exp(-distance * (scores - distance / 2.0)))
    return Answers("scored", (probabilities > 0.5).astype(int), probabilities)


def test_brier_scores_prove_what_hits_alone_could_not() -> None:
    random = np.random.default_rng(10)
    truth = random.integers(0, 2, 1200)
    better, usual = scored(truth, 2.15, random), scored(truth, 2.0, random)
    without = [Answers(one.source, one.predictions) for one in (better, usual)]
    by_hits, by_brier = verdict(truth, *without), verdict(truth, better, usual)
    assert (by_hits.action, by_brier.action) == ("refused", "promoted")
    assert "Brier +" in by_brier.sentence
    assert by_brier.low == by_hits.low


def test_a_better_brier_score_is_not_enough_where_accuracy_is_the_lower_one() -> None:
    """A champion that is right more often and says it badly stays."""
    random = np.random.default_rng(6)
    truth = random.integers(0, 2, 2000)
    challenger = scored(truth, 2.0, random)
    more = (challenger.predictions == truth) | (random.random(2000) < 0.1)
    answered = np.where(more, truth, 1 - truth)
    champion = Answers("timid", answered, np.where(answered == 1, 0.51, 0.49))
    result = verdict(truth, challenger, champion)
    assert (result.action, failed(result)) == ("refused", ["superior"])
    assert result.surety is not None and result.surety > 1.0


def shared(truth: np.ndarray, distance: float, random: np.random.Generator) -> Answers:
    """A model of four classes with calibrated probabilities of each."""
    scores = random.normal(size=(len(truth), 4)) + distance * np.eye(4)[truth]
    shares = np.exp(distance * scores)
    shares /= shares.sum(axis=1, keepdims=True)
    return Answers(
        "shared", shares.argmax(axis=1), class_probabilities=dict(zip("0123", shares.T, strict=True))
    )


def test_of_more_classes_brier_scores_prove_more_than_hits_alone() -> None:
    found = []
    for trial in range(40):
        random = np.random.default_rng([trial, 5])
        truth = random.integers(0, 4, 500)
        better, usual = shared(truth, 2.2, random), shared(truth, 2.0, random)
        without = [Answers(one.source, one.predictions) for one in (better, usual)]
        by_hits, by_brier = verdict(truth, *without), verdict(truth, better, usual)
        assert "Brier" in by_brier.sentence and "Brier" not in by_hits.sentence
        found.append((by_hits.action == "promoted", by_brier.action == "promoted"))
    hits, brier = map(sum, zip(*found, strict=True))
    assert brier > 1.2 * hits, f"{brier} of 40 proved by Brier scores, {hits} by hits"


def test_brier_scores_of_two_classes_are_one_whichever_way_they_are_stated() -> None:
    random = np.random.default_rng(1)
    truth = random.integers(0, 2, 50)
    one = scored(truth, 2.0, random)
    assert one.probabilities is not None
    other = Answers(
        "both", one.predictions, class_probabilities={"0": 1.0 - one.probabilities, "1": one.probabilities}
    )
    assert proper_values(truth, other) == pytest.approx(proper_values(truth, one))
    third = np.where(np.arange(50) % 2, truth, 2)
    unknown = proper_values(third, other)
    assert unknown is not None
    assert unknown[0] == pytest.approx(
        1.0 - (1.0 + one.probabilities[0] ** 2 + (1 - one.probabilities[0]) ** 2) / 2
    )


def test_answers_are_joined_whichever_classes_their_models_knew() -> None:
    first = Answers(
        "a", np.array([0, 2]), class_probabilities={"0": np.array([0.9, 0.2]), "2": np.array([0.1, 0.8])}
    )
    then = Answers("a", np.array([1]), class_probabilities={"0": np.array([0.3]), "1": np.array([0.7])})
    both = joined([first, then])
    assert both.predictions.tolist() == [0, 2, 1] and both.class_probabilities is not None
    assert {name: of.tolist() for name, of in both.class_probabilities.items()} == {
        "0": [0.9, 0.2, 0.3],
        "1": [0.0, 0.0, 0.7],
        "2": [0.1, 0.8, 0.0],
    }
    last = both.only(np.array([False, False, True]))
    assert last.class_probabilities is not None and last.class_probabilities["1"].tolist() == [0.7]
    assert joined([first, Answers("a", np.array([1]))]).class_probabilities is None


@pytest.mark.parametrize("classes", [2, 4])
def test_of_equally_good_pairs_with_probabilities_about_one_in_twenty_is_promoted(classes: int) -> None:
    promoted, trials = 0, 250
    for trial in range(trials):
        random = np.random.default_rng([trial, 7])
        truth = random.integers(0, classes, 400)
        made = scored if classes == 2 else shared
        pair = made(truth, 2.0, random), made(truth, 2.0, random)
        promoted += verdict(truth, *pair, seed=trial).action == "promoted"
    # 5 % of 250 is 12.5, and 23 is three standard deviations above that.
    assert promoted <= 23


def test_a_worse_model_is_refused_with_the_interval_in_the_sentence() -> None:
    random = np.random.default_rng(2)
    truth = random.integers(0, 2, 600)
    result = verdict(truth, guesses(truth, 0.80, random), guesses(truth, 0.90, random))
    assert (result.action, failed(result)) == ("refused", ["superior"])
    assert result.challenger_score is not None and result.champion_score is not None
    start = f"{result.challenger_score:.3f} against {result.champion_score:.3f}, CI -."
    assert result.sentence.startswith(start)
    assert " to -." in result.sentence


def test_a_lower_error_is_the_better_one() -> None:
    random = np.random.default_rng(3)
    truth = random.normal(size=400)
    near = Answers("near", truth + random.normal(0, 0.5, 400))
    far = Answers("far", truth + random.normal(0, 1.0, 400))
    assert verdict(truth, near, far, kind="regression").action == "promoted"
    assert verdict(truth, far, near, kind="regression").action == "refused"


@pytest.mark.parametrize(("floor", "action"), [(0.85, "promoted"), (0.93, "refused")])
def test_the_lower_bound_of_the_score_must_reach_the_floor(floor: float, action: str) -> None:
    random = np.random.default_rng(4)
    truth = random.integers(0, 2, 1000)
    gate = GateSettings(floor=floor)
    result = verdict(truth, guesses(truth, 0.93, random), None, gate)
    assert result.action == action
    assert ("floor" in failed(result)) == (action == "refused")


def test_an_error_must_stay_under_the_floor() -> None:
    truth = np.random.default_rng(5).normal(size=300)
    model = Answers("model", truth + 0.5)
    under = verdict(truth, model, None, GateSettings(floor=0.6), kind="regression")
    over = verdict(truth, model, None, GateSettings(floor=0.4), kind="regression")
    assert (under.action, over.action) == ("promoted", "refused")


def test_too_few_rows_are_no_basis() -> None:
    truth = np.zeros(24, int)
    result = verdict(truth, Answers("a", truth), None)
    assert (result.action, result.sentence) == ("refused", "only 24 holdout rows, 25 needed")


def test_rows_that_are_not_later_than_training_are_no_basis() -> None:
    truth = np.zeros(200, int)
    result = verdict(truth, Answers("a", truth), Answers("b", 1 - truth), first=0.5)
    assert (result.action, failed(result)) == ("refused", ["later"])


def test_a_champion_that_did_not_answer_every_row_keeps_its_place() -> None:
    truth = np.array([0, 1] * 100, dtype=object)
    silent = truth.copy()
    silent[7] = None
    result = verdict(truth, Answers("a", truth), Answers("b", silent))
    assert (result.action, failed(result)) == ("refused", ["champion answers"])


def test_auc_is_refused_where_only_labels_were_logged() -> None:
    random = np.random.default_rng(6)
    truth = random.integers(0, 2, 300)
    champion = Answers("logged", guesses(truth, 0.6, random).predictions)
    result = verdict(truth, guesses(truth, 0.95, random), champion, GateSettings(metric="auc"))
    assert (result.action, failed(result)) == ("refused", ["champion answers"])


def test_auc_counts_ties_as_halves() -> None:
    truth = np.array([0, 0, 1, 1])
    answers = Answers("coarse", truth, np.array([0.1, 0.5, 0.5, 0.9]))
    assert score("auc", truth, answers) == pytest.approx(3.5 / 4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.integers(2, 50))
def test_auc_equals_scikit_learns(seed: int, levels: int) -> None:
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    random = np.random.default_rng(seed)
    truth = np.r_[0, 1, random.integers(0, 2, 100)]
    chances = random.integers(0, levels, 102) / levels
    answers = Answers("any", (chances > 0.5).astype(int), chances)
    assert score("auc", truth, answers) == pytest.approx(roc_auc_score(truth, chances))
    recalls = balanced_accuracy_score(truth, answers.predictions)
    assert score("balanced_accuracy", truth, answers) == pytest.approx(recalls)


def test_one_class_is_the_same_in_every_spelling() -> None:
    assert canonical([np.int64(1), True, 1.0, "1", np.float64("nan")]).tolist() == ["1"] * 4 + [None]


def test_the_same_rows_give_the_same_verdict() -> None:
    random = np.random.default_rng(7)
    truth = random.integers(0, 2, 300)
    pair = guesses(truth, 0.9, random), guesses(truth, 0.85, random)
    assert verdict(truth, *pair) == verdict(truth, *pair)


def test_a_metric_that_does_not_fit_the_model_is_an_error() -> None:
    with pytest.raises(MetricMismatch, match=r"gate\.metric = 'mae'"):
        verdict(np.zeros(200), Answers("a", np.zeros(200)), None, GateSettings(metric="mae"))


def against(
    truth: np.ndarray,
    challengers: list[Answers],
    champion: Answers | None,
    gate: GateSettings = FAST,
    **more: Any,
) -> Verdict:
    holdout = Holdout(truth, np.arange(len(truth)) + 1.0)
    return judge(gate, "classification", holdout, challengers, champion, trained_until=0.5, **more)


def hits(truth: np.ndarray, wrong: Any, source: str = "model", **more: Any) -> Answers:
    """A model that is wrong on the rows told, and right on the others."""
    said = truth.copy()
    said[wrong] = 1 - said[wrong]
    return Answers(source, said, **more)


def test_of_several_the_best_of_those_surely_better_is_chosen() -> None:
    truth = np.random.default_rng(8).integers(0, 2, 1000)
    champion = hits(truth, slice(0, None, 5), "champion")
    few, none, many = (
        hits(truth, slice(0, None, step), name) for step, name in ((20, "few"), (5, "none"), (8, "many"))
    )
    result = against(truth, [many, few, none], champion)
    assert (result.action, result.chosen, result.challenger_score) == ("promoted", 1, 0.95)
    assert [one.source for one in result.candidates] == ["many", "few", "none"]
    assert [one.failed.name if one.failed else "" for one in result.candidates] == ["", "", "differing rows"]
    assert result.sentence.endswith(" (few, of 3 candidates)")


def test_of_several_none_of_which_is_surely_better_the_nearest_is_told_of() -> None:
    random = np.random.default_rng(9)
    truth = random.integers(0, 2, 500)
    champion = guesses(truth, 0.95, random)
    result = against(truth, [guesses(truth, 0.6, random), guesses(truth, 0.7, random)], champion)
    assert (result.action, result.chosen) == ("refused", 1)
    assert result.champion_score is not None and result.champion_score > 0.9


def test_a_candidate_that_cannot_answer_does_not_stop_the_others() -> None:
    truth = np.random.default_rng(10).integers(0, 2, 600)
    silent = Answers("silent", np.full(600, None, dtype=object))
    good = hits(truth, slice(0, None, 20), "good")
    result = against(truth, [silent, good], hits(truth, slice(0, None, 4)))
    assert (result.action, result.chosen) == ("promoted", 1)
    assert result.candidates[0].score is None and result.candidates[0].failed is not None
    alone = against(truth, [silent], hits(truth, slice(0, None, 4)))
    assert (alone.action, alone.sentence) == (
        "refused",
        "the challenger has no usable answer for 600 of 600 rows",
    )


def test_more_candidates_ask_for_more_certainty() -> None:
    truth = np.random.default_rng(11).integers(0, 2, 1000)
    champion = hits(truth, slice(0, 100), "champion")
    better = hits(truth, np.r_[0:78, 100:108], "better")
    others = [hits(truth, slice(start, start + 100), f"other {start}") for start in range(100, 900, 100)]
    alone = against(truth, [better], champion)
    among = against(truth, [better, *others], champion)
    assert alone.low is not None and among.low is not None and among.low < alone.low
    assert against(truth, [better], champion, tried=9).low == pytest.approx(among.low, abs=0.01)


@pytest.mark.parametrize(("margin", "action"), [(0.05, "promoted"), (0.001, "refused")])
def test_non_inferiority_asks_for_no_worse_than_the_margin(margin: float, action: str) -> None:
    random = np.random.default_rng(12)
    truth = random.integers(0, 2, 2000)
    pair = [hits(truth, random.random(2000) < 0.1) for _ in range(2)]
    gate = GateSettings(mode="non_inferiority", margin=margin)
    assert against(truth, pair[:1], pair[1], gate).action == action
    assert against(truth, pair[:1], pair[0], gate).action == "promoted"
    worse = hits(truth, random.random(2000) < 0.2)
    refused = against(truth, [worse], pair[0], gate)
    assert (refused.action, failed(refused)) == ("refused", ["non-inferior"])
    assert refused.sentence.endswith(f"than the margin of {margin:g} allows")


def test_a_segment_that_got_surely_worse_refuses_by_name_and_number() -> None:
    truth = np.random.default_rng(13).integers(0, 2, 2000)
    segments = np.array(["eu", "us", "asia", None], dtype=object)[np.arange(2000) % 4]
    champion = hits(truth, (np.arange(2000) % 3 == 0) & (segments != "us"), "champion")
    worse_in_us = hits(truth, (np.arange(2000) % 20 < 4) & (segments == "us"), "challenger")
    assert against(truth, [worse_in_us], champion).action == "promoted"
    result = against(truth, [worse_in_us], champion, segments=segments)
    assert (result.action, failed(result)) == ("refused", ["segments"])
    assert "but worse in segment us: -.2" in result.sentence and "500 rows" in result.sentence
    assert "eu" not in result.sentence
    allowed = GateSettings(segment_margin=0.5)
    assert against(truth, [worse_in_us], champion, allowed, segments=segments).action == "promoted"
    few = GateSettings(min_segment_rows=501)
    assert against(truth, [worse_in_us], champion, few, segments=segments).action == "promoted"


def test_of_many_segments_of_an_equal_hardly_any_is_called_worse() -> None:
    named = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        truth = random.integers(0, 2, 2000)
        segments = np.array([f"segment {number}" for number in range(10)], dtype=object)[np.arange(2000) % 10]
        pair = [hits(truth, random.random(2000) < 0.15) for _ in range(2)]
        named += bool(regressions(GateSettings(), "accuracy", truth, segments, *pair)[1])
    # Five are to be expected; without a correction it would be forty.
    assert named <= 11


@pytest.mark.parametrize(
    ("columns", "classes", "said"),
    [
        ({"amount": "numeric"}, ("0", "1"), "challenger does not read country, as the champion does"),
        (
            {"amount": "categorical", "country": "categorical"},
            ("0", "1"),
            "challenger reads amount as categorical, the champion as numeric",
        ),
        (
            {"amount": "numeric", "country": "categorical"},
            ("0",),
            "challenger never answers 1, as the champion does",
        ),
    ],
)
def test_a_challenger_that_cannot_stand_in_for_the_champion_is_refused_by_name(
    columns: dict[str, str], classes: tuple[str, ...], said: str
) -> None:
    truth = np.random.default_rng(14).integers(0, 2, 400)
    known: dict[str, Any] = {
        "columns": {"amount": "numeric", "country": "categorical"},
        "classes": ("0", "1"),
    }
    champion = hits(truth, slice(0, None, 3), "champion", **known)
    odd = hits(truth, slice(0, None, 30), "challenger", columns=columns, classes=classes)
    result = against(truth, [odd], champion)
    assert (result.action, failed(result), result.sentence) == ("refused", ["signature"], said)
    more = hits(
        truth,
        slice(0, None, 30),
        "more",
        columns={**known["columns"], "age": "numeric"},
        classes=("0", "1", "2"),
    )
    assert against(truth, [odd, more], champion).chosen == 1


def test_auc_and_recalls_by_row_spread_as_their_scores_do() -> None:
    """The rows' influence has the score's own standard error: that of fresh draws of the same world."""
    for metric in ("auc", "balanced_accuracy"):
        scores, errors = [], []
        for seed in range(400):
            random = np.random.default_rng(seed)
            truth = (random.random(400) < 0.2).astype(int)
            chances = truth + random.normal(size=400)
            values = row_values(metric, truth, Answers("any", (chances > 0.7).astype(int), chances))  # type: ignore[arg-type]
            scores.append(values.mean())
            errors.append(values.std(ddof=1) / 20.0)
        assert np.mean(errors) == pytest.approx(np.std(scores), rel=0.1)
