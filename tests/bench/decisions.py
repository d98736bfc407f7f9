"""
How long until a needless alarm, and how long until a needed one, on autocorrelated streams.

20 columns of AR(1) rows with standard normal margins; reference 5,000 rows, windows of 1,000. Our evidence
runs beside Evidently's default (any column; half of the columns) and a Kolmogorov-Smirnov test of every
column with Bonferroni's correction. Each run has a reference of its own, as each retraining makes one; for
each rule it ends with that rule's first alarm, or at `--horizon` budgets. `kept` asks for both bounds:

`lower_bound`: 95 %, of the mean windows between alarms, exact if alarms come at a constant rate (Poisson's:
all windows watched, those of runs without an alarm too, over the largest rate that so few alarms allow).
`floor`: 95 %, whatever the rate does: the horizon times the share of runs that surely outlive it (Clopper and
Pearson's bound). It cannot exceed the horizon. `early` counts the alarms of the first budget's windows.

All of it follows from the seeds. `make bench-decisions ARGS="--runs 100 --runs-long 30 --jobs 2"`.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.signal import lfilter
from scipy.stats import beta, chi2, kstwo

from monitors.evidence import EvidenceState, observe
from monitors.shifts import NumericYardstick
from monitors.statistics import method_named

COLUMNS, REFERENCE, WINDOW = 20, 5_000, 1_000
PHIS = (0.0, 0.5, 0.9)
# Stable windows before a shift: few, and so many that their own spread is what a shift is held against.
QUIET = (10, 150)
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
        return np.asarray(made)


class Rules:
    """All rules on one stream; each says whether the window is an alarm."""

    def __init__(self, reference: np.ndarray, budget: float) -> None:
        self._budget = budget
        self._yardsticks = [NumericYardstick.of(column) for column in reference]
        self._ordered = np.sort(reference, axis=1)
        self._scales = reference.std(axis=1)
        self._state = EvidenceState()

    def alarms(self, window: np.ndarray, wanted: set[str]) -> set[str]:
        """Which of the wanted rules say drift; what is not wanted isn't computed."""
        ordered = np.sort(window, axis=1)
        found = set()
        if "budget" in wanted and self._over_budget(ordered):
            found.add("budget")
        if "evidently any column" in wanted and self._drifted(ordered, slice(None)):
            found.add("evidently any column")
        if "evidently half" in wanted and self._half(ordered):
            found.add("evidently half")
        if "ks + bonferroni" in wanted and self.largest_gap(ordered) > FAR:
            found.add("ks + bonferroni")
        return found & wanted

    def _over_budget(self, window: np.ndarray) -> bool:
        shifts = [
            shift
            for number, (yardstick, column) in enumerate(zip(self._yardsticks, window, strict=True))
            for shift in yardstick.measure(f"c{number}", column)
        ]
        self._state, evidence = observe(self._state, shifts, self._budget)
        return evidence.value >= self._budget

    def _half(self, window: np.ndarray) -> bool:
        """Whether half of the columns drifted: eleven of which none did settle it for all twenty."""
        first, rest = slice(0, COLUMNS // 2 + 1), slice(COLUMNS // 2 + 1, None)
        drifted = self._drifted(window, first)
        return drifted > 0 and drifted + self._drifted(window, rest) >= COLUMNS / 2

    def _drifted(self, window: np.ndarray, columns: slice) -> int:
        return int((self.wasserstein(window, columns) >= WASSERSTEIN).sum())

    def wasserstein(self, window: np.ndarray, columns: slice) -> np.ndarray:
        """Of sorted columns: a reference of k times as many rows is paired off quantile by quantile."""
        chosen = window[columns]
        pairs = self._ordered[columns].reshape(len(chosen), WINDOW, -1) - chosen[:, :, np.newaxis]
        return np.asarray(np.abs(pairs, out=pairs).mean(axis=(1, 2)) / self._scales[columns])

    def largest_gap(self, window: np.ndarray) -> float:
        """The largest of the columns' distances of Kolmogorov and Smirnov; there are no ties."""
        shares = np.array([np.searchsorted(*pair) for pair in zip(self._ordered, window, strict=True)])
        gaps = shares / REFERENCE - np.arange(WINDOW) / WINDOW
        return float(max(gaps.max(), (1.0 / WINDOW - gaps).max()))


@dataclass(frozen=True)
class Job:
    phi: float
    budget: int
    seed: int
    run: int
    windows: int
    shift: float = 0.0
    columns: int = 0
    quiet: int = 0
    compare: bool = False


def first_alarms(job: Job) -> dict[str, int | None]:
    """The window, counted from the shift on, of each rule's first alarm; None: none in time."""
    stream = Stream(job.phi, (job.seed, job.budget, job.columns, job.run))
    rules = Rules(stream.rows(REFERENCE), job.budget)
    for _ in range(job.quiet):
        if rules.alarms(stream.rows(WINDOW), {"budget"}):
            return {"budget": 0}
    found: dict[str, int | None] = dict.fromkeys(RULES if job.compare else RULES[:1])
    for number in range(1, job.windows + 1):
        window = stream.rows(WINDOW)
        window[: job.columns] += job.shift
        wanted = {name for name, alarm in found.items() if alarm is None}
        found |= dict.fromkeys(rules.alarms(window, wanted), number)
        if None not in found.values():
            break
    return found


def lower_bound(alarms: int, windows: int) -> float:
    """95 %, of the mean windows between alarms, where these come at a constant rate."""
    return windows / (float(chi2.ppf(0.95, 2 * alarms + 2)) / 2.0)


def floor(alarms: int, runs: int, horizon: int) -> float:
    """95 %, of the mean windows to the first alarm: who outlives the horizon counts it, others nothing."""
    alive = runs - alarms
    return horizon * float(beta.ppf(0.05, alive, alarms + 1)) if alive else 0.0


def null_rows(
    pool: ProcessPoolExecutor, seed: int, budget: int, runs: int, horizon: int
) -> Iterator[dict[str, object]]:
    windows = horizon * budget
    for phi in PHIS:
        jobs = [Job(phi, budget, seed, run, windows, compare=True) for run in range(runs)]
        results = list(pool.map(first_alarms, jobs, chunksize=1))
        for rule in RULES:
            firsts = [first for result in results if (first := result[rule]) is not None]
            watched = sum(firsts) + windows * (runs - len(firsts))
            lowest = lower_bound(len(firsts), watched)
            surely = floor(len(firsts), runs, windows)
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
    for phi, shift, columns in product(PHIS, (0.25, 0.5), (1, 10)):
        jobs = [Job(phi, budget, seed, run, LONGEST_DELAY, shift, columns, quiet) for run in range(runs)]
        found = [result["budget"] for result in pool.map(first_alarms, jobs, chunksize=1)]
        delays = [LONGEST_DELAY + 1 if number is None else number for number in found if number != 0]
        yield {
            "phi": phi,
            "budget": budget,
            "quiet_before": quiet,
            "shift_sd": shift,
            "columns": columns,
            "runs": len(delays),
            "needless": len(found) - len(delays),
            "median_delay": statistics.median(delays),
            "worst_delay": max(delays),
            "not_found": sum(one > LONGEST_DELAY for one in delays),
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
        delays: list[dict[str, object]] = []
        for budget, quiet in product((100, 1_000), QUIET):
            delays += map(_told, delay_rows(pool, options.seed, budget, options.delay_runs, quiet))
    kept = all(row["kept"] for row in null if row["rule"] == "budget")
    _say(json.dumps({"budget_kept": kept, "null": null, "delays": delays}))


if __name__ == "__main__":
    main()
