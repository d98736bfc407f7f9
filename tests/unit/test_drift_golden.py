"""The compiled scores are Evidently's: method, verdict and score of several hundred random columns."""

import math
import random
from collections import Counter
from datetime import UTC, datetime

import numpy as np
import pytest

from monitors.drift_engine import CompiledReference, compile_reference
from monitors.records import Partition, PredictionRecord, Scalar
from monitors.reference import Reference
from monitors.settings import DriftSettings, QualitySettings
from monitors.statistics import EVIDENTLY_VERSION, METHODS

# Importing Evidently warns of several deprecations that are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

LENIENT = QualitySettings(
    missing_share=9.0,
    null_share_rise=9.0,
    wrong_type_share=9.0,
    infinite_share=9.0,
    out_of_range_share=9.0,
    unseen_category_share=9.0,
)
"""Here even broken columns are scored, as Evidently scores them."""


def normal(rng: np.random.Generator, size: int, moved: float) -> list[Scalar]:
    return rng.normal(moved, 1.0 + moved / 3, size).tolist()


def skewed(rng: np.random.Generator, size: int, moved: float) -> list[Scalar]:
    return rng.lognormal(moved, 1.0, size).tolist()


def tied(rng: np.random.Generator, size: int, moved: float) -> list[Scalar]:
    return np.round(rng.normal(moved, 1.0, size), 1).tolist()


def integers(rng: np.random.Generator, size: int, moved: float) -> list[Scalar]:
    return rng.integers(0, 40 + int(10 * moved), size).tolist()


def few_floats(rng: np.random.Generator, size: int, moved: float) -> list[Scalar]:
    return rng.choice([0.0, 1.0, 2.5, 4.0], size, p=[0.4, 0.3, 0.2, 0.1]).tolist() + [moved] * 2


def two_floats(rng: np.random.Generator, size: int, moved: float) -> list[Scalar]:
    return (rng.random(size) < 0.4 + moved / 10).astype(float).tolist()


def constant(rng: np.random.Generator, size: int, moved: float) -> list[Scalar]:
    return [5.0 + 0.0001 * (moved > 0.5)] * size


def small_integers(rng: np.random.Generator, size: int, moved: float) -> list[Scalar]:
    return np.minimum(rng.poisson(2.0 + moved, size), 9).tolist()


def booleans(rng: np.random.Generator, size: int, moved: float) -> list[Scalar]:
    return (rng.random(size) < 0.5 + moved / 5).tolist()


def words(rng: np.random.Generator, size: int, moved: float) -> list[Scalar]:
    known = [f"w{index}" for index in range(12)]
    weights = np.arange(12, 0, -1) ** (1.0 + moved)
    drawn = rng.choice(known, size, p=weights / weights.sum()).tolist()
    return drawn[: size - 3] + ["unseen"] * 3 if moved > 0.9 else drawn


SHAPES = [
    normal,
    skewed,
    tied,
    integers,
    few_floats,
    two_floats,
    constant,
    small_integers,
    booleans,
    words,
]
CATEGORICAL = {small_integers, booleans, words}
COLUMNS_PER_SHAPE = 60


def with_gaps(rng: random.Random, values: list[Scalar]) -> list[Scalar]:
    """Now and then some nulls, and infinities among floats."""
    holes = rng.choice([0, 0, 5])
    infinities = rng.choice([0, 0, 3]) if isinstance(values[0], float) else 0
    for _ in range(holes):
        values[rng.randrange(len(values))] = None
    for _ in range(infinities):
        values[rng.randrange(len(values))] = rng.choice([math.inf, -math.inf])
    return values


def compiled(before: list[Scalar], settings: DriftSettings) -> CompiledReference:
    rows = [{"column": value} for value in before]
    reference = Reference.from_rows("model", "1", rows, [0] * len(rows), settings)
    return compile_reference(Reference.from_bytes(reference.to_bytes()), settings, LENIENT, "classification")


def window(values: list[Scalar]) -> list[PredictionRecord]:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return [
        PredictionRecord("model", "1", str(index), at, {"column": value}, 0, Partition("log", 0), index)
        for index, value in enumerate(values)
    ]


def evidently_says(
    before: list[Scalar], now: list[Scalar], categorical: bool, method: str | None
) -> tuple[str, float, bool]:
    """What Evidently's own test says of the same values, cleaned the way its drift metric cleans them."""
    import pandas as pd
    from evidently.legacy.calculations.stattests import get_stattest
    from evidently.legacy.core import ColumnType

    reference, current = (
        pd.Series(values).replace([-np.inf, np.inf], np.nan).dropna() for values in (before, now)
    )
    type_ = ColumnType.Categorical if categorical else ColumnType.Numerical
    test = get_stattest(reference, current, type_, method)
    result = test(reference, current, type_, None)
    return test.name, float(result.drift_score), bool(result.drifted)


def test_six_hundred_random_columns_are_scored_as_evidently_scores_them() -> None:
    from evidently import __version__

    assert __version__ == EVIDENTLY_VERSION
    differing, methods = [], Counter[str]()
    for shape in SHAPES:
        for seed in range(COLUMNS_PER_SHAPE):
            rng, dice = np.random.default_rng([seed, len(shape.__name__)]), random.Random(seed)
            before = with_gaps(dice, shape(rng, dice.choice([150, 1000, 1001, 2500]), 0.0))
            now = with_gaps(dice, shape(rng, dice.choice([60, 400, 1000]), dice.choice([0.0, 0.2, 1.0])))
            allowed = (
                [m for m in METHODS.values() if m.types != ("numeric",)]
                if shape in CATEGORICAL
                else [m for m in METHODS.values() if "numeric" in m.types]
            )
            stated = dice.choice([None, None, *(method.name for method in allowed)])
            settings = DriftSettings(methods={"column": stated} if stated else {})
            method, score, drifted = evidently_says(before, now, shape in CATEGORICAL, stated)
            report = compiled(before, settings).judge(window(now))
            methods[method] += 1
            if not math.isfinite(score):
                assert not report.scores and report.findings[-1].code == "unscored"
                continue
            ours = report.scores[0]
            same = math.isclose(ours.score, score, rel_tol=1e-12, abs_tol=1e-14)
            if (ours.method, ours.drifted, same) != (method, drifted, True):
                differing.append((shape.__name__, seed, method, score, drifted, ours))
    assert differing == []
    # Without this the sample might never have reached a method.
    assert set(methods) == set(METHODS) and min(methods.values()) >= 10, methods
    assert methods.total() >= 500


@pytest.mark.parametrize("method", ["psi", "kl_div", "jensenshannon"])
def test_a_rarer_category_than_evidently_fills_with_is_filled_as_it_does(method: str) -> None:
    before: list[Scalar] = [*["common"] * 12_000, "rare"]
    now: list[Scalar] = [*["common"] * 400, *["new"] * 3]
    expected = evidently_says(before, now, True, method)
    (ours,) = compiled(before, DriftSettings(methods={"column": method})).judge(window(now)).scores
    assert (ours.method, ours.drifted) == (expected[0], expected[2])
    assert math.isclose(ours.score, expected[1], rel_tol=1e-12)


def test_beyond_ten_thousand_values_ks_is_asymptotic_as_in_scipy() -> None:
    rng = np.random.default_rng(3)
    before, now = rng.normal(size=10_500).tolist(), rng.normal(0.02, 1.0, 900).tolist()
    expected = evidently_says(before, now, False, "ks")
    (ours,) = compiled(before, DriftSettings(methods={"column": "ks"})).judge(window(now)).scores
    assert (ours.method, ours.drifted) == (expected[0], expected[2])
    assert math.isclose(ours.score, expected[1], rel_tol=1e-12)
