"""What an evaluation hands to the monitors: how well a model did, and what the loss is held against."""

import numpy as np
import pytest

from flows.evaluation import baseline_of, level_after
from flows.scoring import Answers
from monitors.baseline import Baseline

CANDIDATE, CHAMPION = Baseline(0.2, 0.4, 500), Baseline(0.3, 0.45, 500)


def test_after_a_promotion_the_level_is_what_the_new_champion_reached() -> None:
    assert level_after("promoted", CANDIDATE, CHAMPION) == CANDIDATE


def test_after_a_refusal_the_level_lies_between_the_two() -> None:
    """Neither is known to be the better one, and the best of several candidates is that by chance, too."""
    level = level_after("refused", CANDIDATE, CHAMPION)
    assert level is not None
    assert level.loss == pytest.approx(0.25)


def test_a_champion_that_no_candidate_came_up_to_is_held_against_the_candidates() -> None:
    assert level_after("refused", CHAMPION, CANDIDATE) == CHAMPION
    assert level_after("refused", CANDIDATE, None) == CANDIDATE
    assert level_after("refused", None, CHAMPION) is None


def test_a_few_rows_without_a_mistake_promise_none() -> None:
    labels = np.zeros(100, dtype=int)
    found = baseline_of("classification", labels, Answers("always right", labels))
    assert found is not None
    assert found.loss == 0.0
    assert 0.05 < found.deviation < 0.1
    exact = baseline_of("regression", labels.astype(float), Answers("exact", labels.astype(float)))
    assert exact == Baseline(0.0, 0.0, 100)
