"""The gate promotes an equal no more often than it says, also where rows depend on their neighbours."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.certainty import block_length, bounds, waves_of

BENCH: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "bench_gate.py"))
PAIRS = 300
# 5 % of 300 are 15; 24 are what one honest gate in a hundred would exceed.
MOST_EQUALS = 24


def promoted(metric: str, dependence: str, rows: int, **more: Any) -> int:
    cell = BENCH["Cell"](metric, dependence, rows, **more)
    return int(BENCH["measure"](cell, PAIRS, others=False).promoted)


@pytest.mark.parametrize("rows", [100, 500, 2000])
@pytest.mark.parametrize("dependence", ["independent", "ar 0.5", "ar 0.9", "turns of 50"])
def test_an_equal_is_promoted_in_at_most_one_of_twenty(dependence: str, rows: int) -> None:
    assert promoted("accuracy", dependence, rows) <= MOST_EQUALS


@pytest.mark.parametrize("metric", ["balanced_accuracy", "auc", "mae"])
@pytest.mark.parametrize("rows", [100, 500])
def test_so_it_is_by_every_metric(metric: str, rows: int) -> None:
    assert promoted(metric, "ar 0.9", rows) <= MOST_EQUALS


@pytest.mark.parametrize("dependence", ["independent", "ar 0.9"])
def test_so_it_is_of_three_candidates_together(dependence: str) -> None:
    assert promoted("accuracy", dependence, 500, candidates=3) <= MOST_EQUALS


def test_two_points_better_on_2000_rows_is_mostly_seen() -> None:
    assert promoted("accuracy", "independent", 2000, edge=True) >= 0.65 * PAIRS
    assert promoted("accuracy", "ar 0.5", 2000, edge=True) >= 0.45 * PAIRS


def autoregression(phi: float, rows: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.asarray(BENCH["series"](f"ar {phi}", rows, random))


def test_the_blocks_grow_and_the_waves_shrink_with_the_dependence() -> None:
    lengths = [
        float(np.median([block_length(autoregression(phi, 2000, seed)) for seed in range(30)]))
        for phi in (0.0, 0.5, 0.9)
    ]
    waves = [
        float(np.median([waves_of(autoregression(phi, 2000, seed)) for seed in range(30)]))
        for phi in (0.0, 0.5, 0.9)
    ]
    assert lengths[0] < 4 < lengths[1] < lengths[2] / 2
    assert waves[0] > 2 * waves[2]


def test_the_block_length_is_that_of_patton_politis_and_white() -> None:
    # The estimate's limit for an autoregression: b = (2 G^2 / D)^(1/3) n^(1/3), from its true covariances.
    phi, rows = 0.7, 20_000
    slope, spectrum = 2 * phi / (1 - phi) ** 2, (1 + phi) / (1 - phi)
    wanted = (1.5 * (slope / spectrum) ** 2) ** (1 / 3) * rows ** (1 / 3)
    found = [block_length(autoregression(phi, rows, seed)) for seed in range(10)]
    assert np.median(found) == pytest.approx(wanted, rel=0.2)


def test_candidates_that_are_alike_cost_less_than_candidates_that_are_not() -> None:
    random = np.random.default_rng(0)
    one = random.standard_normal(500)
    apart = np.stack([one, random.standard_normal(500), random.standard_normal(500)])
    alike = np.stack([one, one + 0.1 * apart[1], one + 0.1 * apart[2]])
    reach = [
        (found.means[0] - found.low[0]) / found.errors[0]
        for found in (bounds(rows, 0.95, 5_000, seed=1) for rows in (one[None, :], alike, apart))
    ]
    assert reach[0] < reach[1] < reach[2] < reach[0] + 0.7


def test_candidates_that_were_dropped_on_these_rows_are_paid_for() -> None:
    rows = np.random.default_rng(0).standard_normal((1, 500))
    assert bounds(rows, 0.95, 5_000, 0, tried=3).low[0] < bounds(rows, 0.95, 5_000, 0).low[0]
