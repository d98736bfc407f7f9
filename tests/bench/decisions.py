"""
How long until a needless alarm, and how long until a needed one, on autocorrelated streams.

20 columns of AR(1) rows with standard normal margins; reference 5,000 rows, windows of 1,000. Our evidence
runs beside Evidently's default (any column; half of the columns) and a Kolmogorov-Smirnov test of every
column with Bonferroni's correction. A run ends with its first alarm or at `--horizon` budgets; the bound
is Poisson's exact one for the rate of alarms. `make bench-decisions ARGS="--runs 100 --runs-long 30"`.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy.signal import lfilter
from scipy.stats import chi2, kstwo

from monitors.drift_engine import NumericReference
from monitors.evidence import EvidenceState, observe
from monitors.shifts import NumericYardstick
from monitors.statistics import method_named

COLUMNS, REFERENCE, WINDOW = 20, 5_000, 1_000
PHIS = (0.0, 0.5, 0.9)
RULES = ("budget", "evidently any column", "evidently half", "ks + bonferroni")
WASSERSTEIN = method_named("wasserstein", "x")


class Stream:
    """Columns of AR(1) rows that go on where they stopped."""

    def __init__(self, phi: float, seed: int) -> None:
        self._phi = phi
        self._random = np.random.default_rng(seed)
        self._state = self._random.standard_normal((COLUMNS, 1)) * phi

    def rows(self, count: int) -> np.ndarray:
        noise = self._random.standard_normal((COLUMNS, count)) * math.sqrt(1.0 - self._phi**2)
        made, self._state = lfilter([1.0], [1.0, -self._phi], noise, axis=1, zi=self._state)
        return made


class Rules:
    """All rules on one stream; each says whether the window is an alarm."""

    def __init__(self, reference: np.ndarray, budget: float) -> None:
        self._budget = budget
        self._yardsticks = [NumericYardstick.of(column) for column in reference]
        self._references = [NumericReference.of(column) for column in reference]
        self._state = EvidenceState()

    def budget(self, window: np.ndarray) -> bool:
        shifts = [
            shift
            for number, (yardstick, column) in enumerate(zip(self._yardsticks, window, strict=True))
            for shift in yardstick.measure(f"c{number}", column)
        ]
        self._state, evidence = observe(self._state, shifts, self._budget)
        return evidence.value >= self._budget

    def others(self, window: np.ndarray) -> dict[str, bool]:
        ordered = np.sort(window, axis=1)
        drifted = [
            reference.score(WASSERSTEIN, column) >= WASSERSTEIN.threshold
            for reference, column in zip(self._references, ordered, strict=True)
        ]
        p = min(_ks(one.values, other) for one, other in zip(self._references, ordered, strict=True))
        return {
            "evidently any column": any(drifted),
            "evidently half": sum(drifted) >= COLUMNS / 2,
            "ks + bonferroni": p < 0.05 / COLUMNS,
        }


def _ks(one: np.ndarray, other: np.ndarray) -> float:
    everything = np.concatenate([one, other])
    gaps = np.searchsorted(one, everything, side="right") / one.size
    gaps = gaps - np.searchsorted(other, everything, side="right") / other.size
    effective = one.size * other.size / (one.size + other.size)
    return float(kstwo.sf(np.abs(gaps).max(), round(effective)))


@dataclass(frozen=True)
class Job:
    phi: float
    budget: float
    seed: int
    windows: int
    shift: float = 0.0
    columns: int = 0
    quiet: int = 0
    compare: bool = False


def first_alarms(job: Job) -> dict[str, int | None]:
    """The window, counted from the shift on, of each rule's first alarm; None: none in time."""
    stream = Stream(job.phi, job.seed)
    rules = Rules(stream.rows(REFERENCE), job.budget)
    for _ in range(job.quiet):
        if rules.budget(stream.rows(WINDOW)):
            return {"budget": 0}
    wanted = RULES if job.compare else RULES[:1]
    found: dict[str, int | None] = {}
    for number in range(1, job.windows + 1):
        window = stream.rows(WINDOW)
        window[: job.columns] += job.shift
        for name in _alarms(rules, window, wanted, found):
            found[name] = number
        if len(found) == len(wanted):
            break
    return {name: found.get(name) for name in wanted}


def _alarms(
    rules: Rules, window: np.ndarray, wanted: tuple[str, ...], found: dict[str, int | None]
) -> list[str]:
    """The rules that have not alarmed before, and do so now."""
    alarms = {"budget": "budget" not in found and rules.budget(window)}
    if len(wanted) > 1 and not found.keys() >= set(wanted[1:]):
        alarms |= rules.others(window)
    return [name for name, alarm in alarms.items() if alarm and name not in found]


def bound(alarms: int, windows: int) -> float:
    """The lower 95 % bound of the mean windows between alarms, for Poisson alarms at a constant rate."""
    return windows / (chi2.ppf(0.95, 2 * alarms + 2) / 2.0)


def null_rows(pool: ProcessPoolExecutor, budget: int, runs: int, horizon: int) -> Iterator[dict[str, object]]:
    for phi in PHIS:
        windows = horizon * budget
        jobs = [
            Job(phi, budget, 1_000 * budget + seed, windows, compare=budget <= 100) for seed in range(runs)
        ]
        results = list(pool.map(first_alarms, jobs, chunksize=1))
        for rule in RULES if budget <= 100 else RULES[:1]:
            spans = [result[rule] or windows for result in results]
            alarms = sum(result[rule] is not None for result in results)
            lowest = bound(alarms, sum(spans))
            yield {
                "phi": phi,
                "budget": budget,
                "rule": rule,
                "runs": runs,
                "alarms": alarms,
                "mean_windows": round(sum(spans) / max(1, alarms), 1),
                "lower_bound": round(lowest, 1),
                "kept": bool(lowest >= budget),
            }


def delay_rows(pool: ProcessPoolExecutor, budget: int, runs: int) -> Iterator[dict[str, object]]:
    for phi in PHIS:
        for shift in (0.25, 0.5):
            for columns in (1, 10):
                jobs = [
                    Job(phi, budget, 7_000_000 + seed, 60, shift, columns, quiet=10) for seed in range(runs)
                ]
                found = [result["budget"] for result in pool.map(first_alarms, jobs, chunksize=1)]
                delays = [number if number is not None else 61 for number in found if number != 0]
                yield {
                    "phi": phi,
                    "budget": budget,
                    "shift_sd": shift,
                    "columns": columns,
                    "runs": len(delays),
                    "median_delay": statistics.median(delays),
                    "worst_delay": max(delays),
                    "not_in_60": sum(one == 61 for one in delays),
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
    parser.add_argument("--delay-runs", type=int, default=20)
    parser.add_argument("--horizon", type=int, default=4, help="budgets after which a run is ended")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs) as pool:
        null = [_told(row) for row in null_rows(pool, 100, options.runs, options.horizon)]
        if options.runs_long:
            null += [_told(row) for row in null_rows(pool, 1_000, options.runs_long, options.horizon)]
        delays = [
            _told(row) for budget in (100, 1_000) for row in delay_rows(pool, budget, options.delay_runs)
        ]
    kept = all(row["kept"] for row in null if row["rule"] == "budget")
    _say(json.dumps({"budget_kept": kept, "null": null, "delays": delays}))


if __name__ == "__main__":
    main()
