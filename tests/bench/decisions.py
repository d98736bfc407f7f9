"""
How long until a needless alarm, and how long until a needed one, on autocorrelated streams.

20 columns of AR(1) rows with standard normal margins, rounded to 1/1,024 so that each value's rank can be
looked up (`NumericYardstick` itself measures one window of each run, and must say the same); reference
5,000 rows, windows of 1,000. Our evidence runs beside Evidently's default (any column; half of the columns)
and a Kolmogorov-Smirnov test of every column with Bonferroni's correction. Each run has a reference of its
own, as each retraining makes one; for each rule it ends with that rule's first alarm, or at `--horizon`
budgets. `kept` asks for both bounds:

`lower_bound`: 95 %, of the mean windows between alarms, exact if alarms come at a constant rate (Poisson's:
all windows watched, those of runs without an alarm too, over the largest rate that so few alarms allow).
`floor`: 95 %, whatever the rate does: the mean of the windows watched in a run, which the horizon limits,
less what so few runs can hide (Massart's bound: Annals of Probability 18, 1990). `early` counts the alarms of
the first budget's windows.

All of it follows from the seeds. `make bench-decisions ARGS="--runs 100 --runs-long 30 --jobs 2"`.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import copy
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.signal import lfilter
from scipy.stats import chi2, kstwo

from monitors.evidence import EvidenceState, observe
from monitors.shifts import NumericYardstick, Shift
from monitors.statistics import method_named

COLUMNS, REFERENCE, WINDOW = 20, 5_000, 1_000
PHIS = (0.0, 0.5, 0.9)
STEPS, FURTHEST = 1_024, 8
# Stable windows before a shift: few, and so many that their own spread is what a shift is held against.
QUIET = (10, 150)
SHIFTS = tuple(product((0.25, 0.5), (1, 10)))
LONGEST_DELAY = 60
RULES = ("budget", "evidently any column", "evidently half", "ks + bonferroni")
WASSERSTEIN = method_named("wasserstein", "x").threshold
# The distance from which on Kolmogorov and Smirnov's p-value is below 0.05 over the number of columns.
FAR = float(kstwo.isf(0.05 / COLUMNS, round(REFERENCE * WINDOW / (REFERENCE + WINDOW))))


class Stream:
    """Columns of AR(1) rows that go on where they stopped."""

    def __init__(self, phi: float, seed: Sequence[int]) -> None:
        self._phi = phi
        self._random = np.random.default_rng([round(10 * phi), *seed])
        self._state = self._random.standard_normal((COLUMNS, 1)) * phi

    def rows(self, count: int) -> np.ndarray:
        noise = self._random.standard_normal((COLUMNS, count)) * math.sqrt(1.0 - self._phi**2)
        made, self._state = lfilter([1.0], [1.0, -self._phi], noise, axis=1, zi=self._state)
        limited = np.clip(np.rint(made * STEPS), -(FURTHEST - 1) * STEPS, (FURTHEST - 1) * STEPS)
        return np.asarray(limited / STEPS)


class Rules:
    """All rules on one stream; each says whether the window is an alarm."""

    def __init__(self, reference: np.ndarray, budget: float) -> None:
        self._budget = budget
        self._yardsticks = [NumericYardstick.of(column) for column in reference]
        self._ordered = np.sort(reference, axis=1)
        self._scales = reference.std(axis=1)
        self._blocks = self._ordered.reshape(COLUMNS, WINDOW, -1)
        self._middles = self._blocks.mean(axis=2)
        self._widths = np.abs(self._blocks - self._middles[:, :, np.newaxis]).mean(axis=(1, 2))
        self._ranks = np.concatenate([_ranks_of_all(column) for column in self._ordered])
        self._state = EvidenceState()
        self._checked = False

    def alarms(self, window: np.ndarray, wanted: set[str]) -> set[str]:
        """Which of the wanted rules say drift; what is not wanted isn't computed."""
        found = set()
        if "budget" in wanted and self.observe(window) >= self._budget:
            found.add("budget")
        ordered = np.sort(window, axis=1) if wanted - {"budget"} else window
        if {"evidently any column", "evidently half"} & wanted:
            drifted = self._drifted(ordered)
            found |= {"evidently any column"} if drifted else set()
            found |= {"evidently half"} if drifted >= COLUMNS / 2 else set()
        if "ks + bonferroni" in wanted and self.largest_gap(ordered) > FAR:
            found.add("ks + bonferroni")
        return found & wanted

    def observe(self, window: np.ndarray) -> float:
        """The evidence after a window."""
        shifts = self._shifts(window)
        self._state, evidence = observe(self._state, shifts, self._budget)
        return evidence.value

    def _shifts(self, window: np.ndarray) -> list[Shift]:
        places = np.rint(window * STEPS).astype(np.int64) + FURTHEST * STEPS
        ranks = self._ranks[places + np.arange(COLUMNS)[:, np.newaxis] * (2 * FURTHEST * STEPS + 1)]
        means = {"location": ranks.mean(axis=1), "spread": (ranks * ranks).mean(axis=1)}
        found = [
            feature.shift(f"c{number}", float(means[feature.kind][number]), 0.0, WINDOW, -1)
            for number, yardstick in enumerate(self._yardsticks)
            for feature in yardstick.features
        ]
        if not self._checked:
            self._check(window, found)
        return found

    def _check(self, window: np.ndarray, found: list[Shift]) -> None:
        """Looking ranks up must not change what is measured."""
        measured = [
            shift
            for number, (yardstick, column) in enumerate(zip(self._yardsticks, window, strict=True))
            for shift in yardstick.measure(f"c{number}", column)
        ]
        far = max(abs(one.value - other.value) for one, other in zip(found, measured, strict=True))
        if far > 1e-12 or [one.key for one in found] != [one.key for one in measured]:
            raise AssertionError(f"the ranks looked up are {far} away from the yardstick's")
        self._checked = True

    def _drifted(self, window: np.ndarray) -> int:
        """Columns over the threshold: no distance exceeds that to the blocks' means, plus their width."""
        most = (np.abs(self._middles - window).mean(axis=1) + self._widths) / self._scales
        near = np.flatnonzero(most >= WASSERSTEIN)
        return int((self.wasserstein(window[near], near) >= WASSERSTEIN).sum()) if near.size else 0

    def wasserstein(self, window: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Of sorted columns: a reference of k times as many rows is paired off quantile by quantile."""
        pairs = self._blocks[columns] - window[:, :, np.newaxis]
        return np.asarray(np.abs(pairs, out=pairs).mean(axis=(1, 2)) / self._scales[columns])

    def largest_gap(self, window: np.ndarray) -> float:
        """The largest of the columns' distances of Kolmogorov and Smirnov."""
        shares = np.arange(WINDOW + 1) / WINDOW
        largest = 0.0
        for reference, column in zip(self._ordered, window, strict=True):
            before = np.searchsorted(reference, column, side="left") / REFERENCE
            after = np.searchsorted(reference, column, side="right") / REFERENCE
            below = before - shares[np.searchsorted(column, column, side="left")]
            above = shares[np.searchsorted(column, column, side="right")] - after
            largest = max(largest, float(below.max()), float(above.max()))
        return largest


def _ranks_of_all(ordered: np.ndarray) -> np.ndarray:
    """The rank, -1 to 1, of every value that a row can have."""
    values = np.arange(-FURTHEST * STEPS, FURTHEST * STEPS + 1) / STEPS
    left, right = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return np.asarray((left + right) / ordered.size - 1.0)


@dataclass(frozen=True)
class Job:
    phi: float
    budget: int
    seed: int
    run: int
    windows: int = 0
    quiet: int = 0


def first_alarms(job: Job) -> dict[str, int | None]:
    """The window of each rule's first alarm; None: none in time."""
    stream = Stream(job.phi, (job.seed, job.budget, 0, job.run))
    rules = Rules(stream.rows(REFERENCE), job.budget)
    found: dict[str, int | None] = dict.fromkeys(RULES)
    for number in range(1, job.windows + 1):
        wanted = {name for name, alarm in found.items() if alarm is None}
        found |= dict.fromkeys(rules.alarms(stream.rows(WINDOW), wanted), number)
        if None not in found.values():
            break
    return found


def delays(job: Job) -> list[int] | None:
    """Windows from each of `SHIFTS` to the alarm, all after the same quiet ones; None: these alarmed."""
    stream = Stream(job.phi, (job.seed, job.budget, job.quiet, job.run))
    rules = Rules(stream.rows(REFERENCE), job.budget)
    for _ in range(job.quiet):
        if rules.alarms(stream.rows(WINDOW), {"budget"}):
            return None
    later = [stream.rows(WINDOW) for _ in range(LONGEST_DELAY)]
    return [_delay(copy(rules), later, *shift) for shift in SHIFTS]


def _delay(rules: Rules, later: Sequence[np.ndarray], shift: float, columns: int) -> int:
    """One more than `LONGEST_DELAY` where nothing was found."""
    moved = np.zeros((COLUMNS, 1))
    moved[:columns] = shift
    for number, window in enumerate(later, start=1):
        if rules.alarms(window + moved, {"budget"}):
            return number
    return LONGEST_DELAY + 1


def lower_bound(alarms: int, windows: int) -> float:
    """95 %, of the mean windows between alarms, where these come at a constant rate."""
    return windows / (float(chi2.ppf(0.95, 2 * alarms + 2)) / 2.0)


def floor(watched: int, runs: int, horizon: int) -> float:
    """95 %, of the mean windows to the first alarm, those beyond the horizon not counted."""
    return max(0.0, watched / runs - horizon * math.sqrt(math.log(1.0 / 0.05) / (2.0 * runs)))


def null_rows(
    pool: ProcessPoolExecutor, seed: int, budget: int, runs: int, horizon: int
) -> Iterator[dict[str, object]]:
    windows = horizon * budget
    for phi in PHIS:
        jobs = [Job(phi, budget, seed, run, windows) for run in range(runs)]
        results = list(pool.map(first_alarms, jobs, chunksize=1))
        for rule in RULES:
            firsts = [first for result in results if (first := result[rule]) is not None]
            watched = sum(firsts) + windows * (runs - len(firsts))
            lowest = lower_bound(len(firsts), watched)
            surely = floor(watched, runs, windows)
            yield {
                "phi": phi,
                "budget": budget,
                "rule": rule,
                "runs": runs,
                "windows": watched,
                "alarms": len(firsts),
                "early": sum(first <= budget for first in firsts),
                "mean_windows": round(watched / max(1, len(firsts)), 1),
                "lower_bound": round(lowest, 1),
                "floor": round(surely, 1),
                "kept": bool(min(lowest, surely) >= budget),
            }


def delay_rows(
    pool: ProcessPoolExecutor, seed: int, budget: int, runs: int, quiet: int
) -> Iterator[dict[str, object]]:
    for phi in PHIS:
        jobs = [Job(phi, budget, seed, run, quiet=quiet) for run in range(runs)]
        found = [one for one in pool.map(delays, jobs, chunksize=1) if one is not None]
        for place, (shift, columns) in enumerate(SHIFTS):
            taken = [one[place] for one in found]
            yield {
                "phi": phi,
                "budget": budget,
                "quiet_before": quiet,
                "shift_sd": shift,
                "columns": columns,
                "runs": len(taken),
                "needless": runs - len(taken),
                "median_delay": statistics.median(taken),
                "worst_delay": max(taken),
                "not_found": sum(one > LONGEST_DELAY for one in taken),
            }


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _told(row: dict[str, object]) -> dict[str, object]:
    _say("  ".join(f"{name}={value}" for name, value in row.items()))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--runs-long", type=int, default=30)
    parser.add_argument("--delay-runs", type=int, default=30)
    parser.add_argument("--horizon", type=int, default=4, help="budgets after which a run is ended")
    parser.add_argument("--horizon-long", type=int, default=2, help="the same for the budget of 1,000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs) as pool:
        null = list(map(_told, null_rows(pool, options.seed, 100, options.runs, options.horizon)))
        if options.runs_long:
            rows = null_rows(pool, options.seed, 1_000, options.runs_long, options.horizon_long)
            null += map(_told, rows)
        found: list[dict[str, object]] = []
        for budget, quiet in product((100, 1_000), QUIET):
            found += map(_told, delay_rows(pool, options.seed, budget, options.delay_runs, quiet))
    kept = all(row["kept"] for row in null if row["rule"] == "budget")
    _say(json.dumps({"budget_kept": kept, "null": null, "delays": found}))


if __name__ == "__main__":
    main()
