"""
What slots of a season are good for: needless alarms without them, and detection delays with them.

20 columns of AR(1) rows (phi 0.5) with standard normal margins, of which 10 follow the season: by 0.7
standard deviations up and down a day, and on two days of the week 0.7 lower. Windows of an hour, budget 100.
`first`: the median window of the first alarm where nothing but the season moves; `lower_bound` as in
`decisions.py`. Delays are of one column (of those with a season) that moves by so many standard deviations
after some seasons, 61 where it was not found in 60 windows; `needless`: runs with an alarm before.
All of it follows from the seed. `make bench-seasons ARGS="--runs 30"`.
"""

import argparse
import json
import math
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from copy import copy
from dataclasses import dataclass

import numpy as np
from scipy.signal import lfilter
from scipy.stats import chi2

from monitors.evidence import EvidenceState, observe
from monitors.seasons import Season
from monitors.shifts import Calendar, NumericYardstick

COLUMNS, SEASONAL, PHI, SWING, BUDGET, LONGEST = 20, 10, 0.5, 0.7, 100, 60
HOUR = 3_600_000_000
SHIFTS = (0.25, 0.5)


@dataclass(frozen=True)
class Case:
    """A season, how many hours the reference lasts, rows in an hour, and quiet seasons before a shift."""

    name: str
    hours: int
    reference_hours: int
    rows: int
    quiet: int


CASES = (
    Case("day, reference of a day", 24, 24, 200, 4),
    Case("day, reference of 5 hours", 24, 5, 1_000, 4),
    Case("week, reference of a week", 168, 168, 100, 3),
)


@dataclass(frozen=True)
class Job:
    case: Case
    slots: bool
    run: int
    windows: int
    seed: int


class Stream:
    """Rows hour by hour, from the first hour of a season on."""

    def __init__(self, case: Case, seed: list[int]) -> None:
        self._case = case
        self._random = np.random.default_rng(seed)
        self._state = self._random.standard_normal((COLUMNS, 1)) * PHI
        self._hour = 0

    def hours(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of so many hours, and their times in microseconds."""
        rows = count * self._case.rows
        noise = self._random.standard_normal((COLUMNS, rows)) * math.sqrt(1.0 - PHI**2)
        made, self._state = lfilter([1.0], [1.0, -PHI], noise, axis=1, zi=self._state)
        hours = self._hour + np.arange(rows) / self._case.rows
        self._hour += count
        season = SWING * np.sin(2.0 * math.pi * hours / 24.0)
        if self._case.hours > 24:
            season -= SWING * (hours // 24 % 7 >= 5)
        made[:SEASONAL] += season
        return made, (hours * HOUR).astype(np.int64)


class Rule:
    """The evidence of a stream, with or without slots."""

    def __init__(self, case: Case, slots: bool, reference: np.ndarray, times: np.ndarray) -> None:
        self._season = Season(case.hours * 3_600.0, case.hours) if slots else None
        calendar = None
        if self._season is not None:
            calendar = Calendar(self._season, self._season.slots_of(times))
        self._yardsticks = [NumericYardstick.of(column, calendar) for column in reference]
        self._state = EvidenceState()

    def alarms(self, window: np.ndarray, times: np.ndarray) -> bool:
        slot = -1 if self._season is None else int(self._season.slots_of(times[:1])[0])
        shifts = [
            shift
            for number, (yardstick, column) in enumerate(zip(self._yardsticks, window, strict=True))
            for shift in yardstick.measure(f"c{number}", column, slot)
        ]
        self._state, evidence = observe(self._state, shifts, BUDGET)
        return evidence.value >= BUDGET


def begun(job: Job, purpose: int) -> tuple[Stream, Rule]:
    stream = Stream(job.case, [job.seed, purpose, job.run, CASES.index(job.case)])
    return stream, Rule(job.case, job.slots, *stream.hours(job.case.reference_hours))


def first_alarm(job: Job) -> int | None:
    stream, rule = begun(job, 0)
    for number in range(1, job.windows + 1):
        if rule.alarms(*stream.hours(1)):
            return number
    return None


def delays(job: Job) -> list[int] | None:
    """Windows from each shift to the alarm; None: there was one before."""
    stream, rule = begun(job, 1)
    for _ in range(job.case.quiet * job.case.hours):
        if rule.alarms(*stream.hours(1)):
            return None
    later = [stream.hours(1) for _ in range(LONGEST)]
    return [_delay(copy(rule), later, shift) for shift in SHIFTS]


def _delay(rule: Rule, later: list[tuple[np.ndarray, np.ndarray]], shift: float) -> int:
    """One more than `LONGEST` where nothing was found."""
    moved = np.zeros((COLUMNS, 1))
    moved[0] = shift
    for number, (window, times) in enumerate(later, start=1):
        if rule.alarms(window + moved, times):
            return number
    return LONGEST + 1


def row(pool: ProcessPoolExecutor, case: Case, slots: bool, options: argparse.Namespace) -> dict[str, object]:
    jobs = [Job(case, slots, run, options.windows, options.seed) for run in range(options.runs)]
    firsts = [first for first in pool.map(first_alarm, jobs) if first is not None]
    watched = sum(firsts) + options.windows * (options.runs - len(firsts))
    found = [one for one in pool.map(delays, jobs) if one is not None]
    told: dict[str, object] = {
        "case": case.name,
        "slots": case.hours if slots else 1,
        "runs": options.runs,
        "windows": watched,
        "alarms": len(firsts),
        "first": statistics.median(firsts) if firsts else None,
        "lower_bound": round(watched / (float(chi2.ppf(0.95, 2 * len(firsts) + 2)) / 2.0), 1),
        "needless": options.runs - len(found),
    }
    for place, shift in enumerate(SHIFTS):
        taken = [one[place] for one in found]
        told[f"delay_{shift}_sd"] = statistics.median(taken) if taken else None
    return told


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--windows", type=int, default=400, help="after which a run is ended")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for case in CASES:
            for slots in (False, True):
                rows.append(row(pool, case, slots, options))
                _say("  ".join(f"{name}={value}" for name, value in rows[-1].items()))
    _say(json.dumps(rows))


if __name__ == "__main__":
    main()
