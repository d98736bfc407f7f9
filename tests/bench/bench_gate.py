"""
How often the gate promotes an equal, and how often it sees a better one, on simulated pairs of models.

Each pair answers the same holdout; right and wrong answers, errors and scores come from latent series that
both share in part, as models that were trained on the same log do. `ar 0.9` is a first-order autoregression;
in `turns of 50` one model is better for about 50 rows and then the other, and in `5 turns` a whole holdout
sees only about five of them, which no test can tell from a difference that stays. `by Brier`: the
models state calibrated probabilities, so that the gate's proof is by those. Beside the gate, up to 2,000
rows: the paired differences taken for independent rows, and a circular block bootstrap of Politis and
White's block length.

The last line is JSON. Options: --pairs, --jobs, --quick (the main cells alone), --gate-only (leave out the
other two, which take most of the time).
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.signal import lfilter
from scipy.stats import beta, norm

from flows.certainty import block_length
from flows.gate import Holdout, judge
from flows.scoring import Answers, Floats, Metric, row_values
from monitors.settings import GateSettings

METRICS: tuple[Metric, ...] = ("accuracy", "balanced_accuracy", "auc", "mae")
DEPENDENCES = ("independent", "ar 0.5", "ar 0.9", "turns of 50", "5 turns")
SHARED = 0.7
LEVEL = 0.05
GOOD, BETTER = 0.88, 0.90
RESAMPLES = 500
MOST_OTHERS = 2000


@dataclass(frozen=True)
class Cell:
    """One row of the table; `edge` is whether the challenger is better by two points (mae: 2 %)."""

    metric: Metric
    dependence: str
    rows: int
    edge: bool = False
    candidates: int = 1
    proper: bool = False

    @property
    def name(self) -> str:
        """As the table calls it."""
        several = f", {self.candidates} candidates" if self.candidates > 1 else ""
        proof = " by Brier" if self.proper else ""
        return f"{self.metric}{proof}, {self.dependence}{several}"


@dataclass(frozen=True)
class Measured:
    """How many pairs the gate promotes, and, if `compared`, the others; milliseconds of CPU per judgement."""

    cell: Cell
    pairs: int
    promoted: int
    independent: int
    bootstrap: int
    milliseconds: float
    compared: bool = True

    @property
    def shares(self) -> tuple[float, float, float]:
        """The gate's, that of rows alone and that of blocks."""
        return self.promoted / self.pairs, self.independent / self.pairs, self.bootstrap / self.pairs

    @property
    def high(self) -> float:
        """The upper 95 % bound of the share that the gate promotes (Clopper and Pearson, one-sided)."""
        return float(beta.ppf(0.95, self.promoted + 1, self.pairs - self.promoted))


def cells(quick: bool) -> Iterator[Cell]:
    """Equal pairs first, then better ones."""
    sizes = (500, 2000) if quick else (100, 500, 2000, 20_000)
    for proper in (False, True):
        for dependence in DEPENDENCES:
            yield from (Cell("accuracy", dependence, rows, proper=proper) for rows in sizes)
    others = ("ar 0.9",) if quick else ("independent", "ar 0.9", "turns of 50")
    for metric in METRICS[1:]:
        for dependence in others:
            yield from (Cell(metric, dependence, rows) for rows in sizes[:3])
    for dependence in ("independent", "ar 0.9"):
        yield from (Cell("accuracy", dependence, rows, candidates=3) for rows in (500, 2000))
    yield Cell("accuracy", "ar 0.9", 2000, candidates=3, proper=True)
    yield from _better_cells(quick)


def _better_cells(quick: bool) -> Iterator[Cell]:
    dependences = ("independent", "ar 0.5", "ar 0.9", "turns of 50")
    for metric in METRICS[:1] if quick else METRICS:
        for dependence in dependences:
            yield Cell(metric, dependence, 2000, edge=True)
    for dependence in dependences:
        yield Cell("accuracy", dependence, 2000, edge=True, proper=True)
    yield Cell("accuracy", "independent", 2000, edge=True, candidates=3)


def series(dependence: str, rows: int, random: np.random.Generator) -> Floats:
    """Standard normal rows that depend on their neighbours as told."""
    phi = float(dependence.split()[1]) if dependence.startswith("ar") else 0.0
    noise = random.standard_normal(rows) * np.sqrt(1.0 - phi**2)
    noise[0] /= np.sqrt(1.0 - phi**2)
    return np.asarray(lfilter([1.0], [1.0, -phi], noise), dtype=float)


def turns(dependence: str, rows: int, random: np.random.Generator) -> Floats:
    """Plus one where one model is the better for a while, minus one where the other is, else zero."""
    lengths = {"turns of 50": 50.0, "5 turns": rows / 5.0}
    if dependence not in lengths:
        return np.zeros(rows)
    turned = np.cumsum(random.random(rows) < 1.0 / lengths[dependence]) + random.integers(0, 2)
    return np.where(turned % 2, 1.0, -1.0)


def pair(cell: Cell, random: np.random.Generator) -> tuple[Floats, list[Answers], Answers]:
    """The labels, the challengers' answers and the champion's."""
    common = np.sqrt(SHARED) * series(cell.dependence, cell.rows, random)
    swing = 0.15 * turns(cell.dependence, cell.rows, random)
    labels = (random.random(cell.rows) < 0.4).astype(float)
    if cell.metric == "mae":
        labels = random.standard_normal(cell.rows)

    def model(name: str, better: bool, sign: float) -> Answers:
        own = np.sqrt(1.0 - SHARED) * series(cell.dependence, cell.rows, random)
        return _answers(cell, name, labels, common + own + sign * swing, better)

    challengers = [model(f"candidate {place}", cell.edge, 1.0) for place in range(cell.candidates)]
    return labels, challengers, model("champion", False, -1.0)


def _answers(cell: Cell, name: str, labels: Floats, latent: Floats, better: bool) -> Answers:
    """The higher its latent value, the worse the answer to a row."""
    good, metric = BETTER if better else GOOD, cell.metric
    if cell.proper:
        # Two normal scores so far apart that a cut between them is right as often as asked, calibrated.
        distance = 2.0 * norm.ppf(good)
        scores = np.where(labels > 0.0, distance - latent, latent)
        odds = np.exp(distance * (scores - distance / 2.0))
        return Answers(name, (scores > distance / 2.0).astype(int), odds / (1.0 + odds))
    if metric == "mae":
        scale = 0.98 if better else 1.0
        return Answers(name, labels + scale * latent)
    if metric == "auc":
        distance = np.sqrt(2.0) * norm.ppf(good)
        scores = np.where(labels > 0.0, distance - latent, latent)
        return Answers(name, (scores > distance / 2.0).astype(int), scores)
    right = latent < norm.ppf(good) * latent.std()
    return Answers(name, np.where(right, labels, 1.0 - labels))


def gate_promotes(
    cell: Cell, labels: Floats, challengers: list[Answers], champion: Answers, seed: int
) -> bool:
    """The gate's own verdict, by its defaults."""
    settings = GateSettings(metric=cell.metric)
    kind = "regression" if cell.metric == "mae" else "classification"
    holdout = Holdout(labels, np.arange(1.0, cell.rows + 1.0))
    verdict = judge(settings, kind, holdout, challengers, champion, trained_until=0.0, seed=seed)
    return verdict.action == "promoted"


def others_promote(
    cell: Cell, labels: Floats, challenger: Answers, champion: Answers, random: np.random.Generator
) -> tuple[bool, bool]:
    """What a t-test of independent rows says, and a block bootstrap's percentile."""
    sign = -1.0 if cell.metric == "mae" else 1.0
    gains = sign * (row_values(cell.metric, labels, challenger) - row_values(cell.metric, labels, champion))
    count, mean = len(gains), gains.mean()
    plain = bool(mean > norm.ppf(1.0 - LEVEL) * gains.std() / np.sqrt(count))
    block = max(1, round(block_length(gains)))
    blocks = -(-count // block)
    sums = np.cumsum(np.r_[0.0, gains, gains[:block]])
    starts = random.integers(0, count, (RESAMPLES, blocks))
    drawn = (sums[starts + block] - sums[starts]).sum(axis=1) / (blocks * block)
    return plain, bool(np.quantile(drawn, LEVEL) > 0.0)


def measure(cell: Cell, pairs: int, others: bool = True) -> Measured:
    """Judge so many pairs; the same ones each time."""
    promoted = independent = bootstrap = 0
    spent, compared = 0.0, others and cell.rows <= MOST_OTHERS
    for number in range(pairs):
        random = np.random.default_rng([number, cell.rows, METRICS.index(cell.metric)])
        labels, challengers, champion = pair(cell, random)
        start = time.process_time()
        promoted += gate_promotes(cell, labels, challengers, champion, number)
        spent += time.process_time() - start
        if compared:
            plain, resampled = others_promote(cell, labels, challengers[0], champion, random)
            independent += plain
            bootstrap += resampled
    return Measured(cell, pairs, promoted, independent, bootstrap, 1000.0 * spent / pairs, compared)


def lines(found: list[Measured]) -> Iterator[str]:
    """The two tables."""
    for edge, title in ((False, "equal: promoted, %"), (True, "better by 2 points: promoted, %")):
        yield ""
        yield f"{title:<44}{'rows':>7}{'gate':>8}{'<= (95 %)':>11}{'rows alone':>12}{'blocks':>8}{'ms':>8}"
        for one in found:
            if one.cell.edge == edge:
                gate, *others = [
                    100.0 * count / one.pairs for count in (one.promoted, one.independent, one.bootstrap)
                ]
                plain, blocks = [f"{share:.1f}" if one.compared else "-" for share in others]
                yield (
                    f"{one.cell.name:<44}{one.cell.rows:>7}{gate:>8.1f}{100.0 * one.high:>11.1f}"
                    f"{plain:>12}{blocks:>8}{one.milliseconds:>8.1f}"
                )


def facts(found: list[Measured]) -> dict[str, Any]:
    """The same for a machine."""
    return {
        f"{'better' if one.cell.edge else 'equal'}: {one.cell.name}, {one.cell.rows} rows": {
            "promoted": one.promoted / one.pairs,
            "bound": round(one.high, 4),
            "rows_alone": one.independent / one.pairs if one.compared else None,
            "block_bootstrap": one.bootstrap / one.pairs if one.compared else None,
        }
        for one in found
    }


def main() -> None:
    """Print both tables and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gate-only", action="store_true")
    options = parser.parse_args()
    judge_all = partial(measure, pairs=options.pairs, others=not options.gate_only)
    with ProcessPoolExecutor(options.jobs) as pool:
        found = list(pool.map(judge_all, cells(options.quick)))
    print("\n".join(lines(found)))  # noqa: T201
    print(json.dumps({"pairs": options.pairs, "cells": facts(found)}))  # noqa: T201


if __name__ == "__main__":
    main()
