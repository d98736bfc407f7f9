"""
Replay a folder of streams with one default policy, and hold it against schedules and known policies.

`cases.json` in the folder names the streams: for each its `kind`, `ref` (rows of the reference), `window`
(rows) and known `drifts` (row numbers). Nothing else is set per case. The last line is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from flows.backtest.options import Options
from flows.backtest.progress import Progress
from flows.backtest.run import Tried, backtest
from flows.backtest.schedules import Schedule
from flows.backtest.stream import Said
from flows.backtest.told import columns
from flows.scoring import canonical, numbers
from monitors.settings import (
    FlowSettings,
    GateSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    RegistrySettings,
    TrainingSettings,
    WindowSettings,
)


class Known(NamedTuple):
    """What another policy reached with labels one window late: its metric, retrainings started, promoted."""

    metric: float
    started: int
    promoted: int


# CUSUM on the labelled loss, follow-up attempts, a one-standard-error gate; tuned on some of these streams.
REFERENCE_POLICY = {
    "elec2": Known(0.753, 17, 10),
    "weather_noaa": Known(0.784, 9, 4),
    "usenet1": Known(0.628, 13, 8),
    "adult_education": Known(0.866, 5, 4),
    "bike_hourly": Known(48.5, 21, 16),
    "hv_sine_abrupt": Known(0.831, 13, 4),
}
# Streams without any drift, and how often they may be retrained on.
STABLE = {"adult_null": 1}
TOLERANCE_POINTS, TOLERANCE_MAE = 0.005, 0.02
ERRORS = 2.0


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """One case with one seed; tolerances are of the difference to the schedule and to never."""

    case: str
    seed: int
    metric: str
    never: float
    live: float
    started: int
    promoted: int
    refused: int
    before_drift: int | None
    schedules: dict[int, tuple[float, int]]
    schedule: float
    schedule_tolerance: float
    never_tolerance: float
    seconds: float

    @property
    def sign(self) -> float:
        """Makes more always better."""
        return -1.0 if self.metric == "mae" else 1.0


class Check(NamedTuple):
    """One promise, kept or not; `by` how far, positive where it is kept beyond need."""

    name: str
    kept: bool
    by: float


def main() -> int:
    asked = _parser().parse_args()
    cases = json.loads((asked.folder / "cases.json").read_text("utf-8"))
    names = asked.case or list(cases)
    work = [_Work(asked.folder, name, cases[name], asked) for name in names]
    found: dict[str, list[Ran]] = {}
    with ProcessPoolExecutor(asked.jobs) as pool:
        for name, runs in zip(names, pool.map(_case, work), strict=True):
            found[name] = runs
            _say("\n".join(_told(name, runs, asked.label_lag)))
    told = {name: _json(name, runs, asked.label_lag) for name, runs in found.items()}
    kept = all(case["kept"] for case in told.values())
    _say(json.dumps({"label_lag": asked.label_lag, "seeds": asked.seeds, "kept": kept, "cases": told}))
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with cases.json and its Parquet files")
    parser.add_argument("--case", action="append", help="only this one; may be repeated (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--label-lag", type=int, default=1, help="windows (default: 1)")
    parser.add_argument("--no-schedules", action="store_true", help="much quicker, and checks less")
    parser.add_argument("--jobs", type=int, default=1, help="cases at once (default: 1)")
    return parser


class _Work(NamedTuple):
    """One case, all seeds."""

    folder: Path
    name: str
    case: dict[str, Any]
    asked: argparse.Namespace


def _case(work: _Work) -> list[Ran]:
    runs: list[Ran] = []
    first: Tried | None = None
    for seed in range(work.asked.seeds):
        options = _options(work.folder, work.name, work.case, work.asked.label_lag, seed)
        with Progress(sys.stderr) as progress:
            if work.asked.no_schedules:
                tried = backtest(options, progress, known=())
            elif first is None:
                tried = backtest(options, progress)
            else:
                tried = backtest(options, progress, known=first.schedules)
                tried = tried if _same_trainer(first, tried) else backtest(options, progress)
        first = first or tried
        runs.append(_ran(work.name, seed, tried))
    return runs


def _same_trainer(one: Tried, other: Tried) -> bool:
    """Whether the seed has no say in training; then schedules need no second fitting."""
    return bool((one.replayed.never.predictions == other.replayed.never.predictions).all())


def _options(folder: Path, name: str, case: dict[str, Any], label_lag: int, seed: int) -> Options:
    regression = case["kind"] == "regression"
    rows = case["window"]
    settings = ModelSettings(
        kind="regression" if regression else "classification",
        reference_rows=case["ref"],
        window=WindowSettings(rows=rows, min_rows=min(WindowSettings().min_rows, rows)),
        gate=GateSettings(metric="mae" if regression else "accuracy"),
        training=TrainingSettings(seed=seed),
    )
    return Options(
        file=folder / f"{name}.parquet",
        settings=FlowSettings(
            model=name,
            settings=settings,
            kafka=KafkaSettings(),
            fields={},
            limits=LimitSettings(),
            registry=RegistrySettings(),
        ),
        kind_stated=True,
        label_lag=label_lag,
        drifts=tuple(case.get("drifts", ())),
    )


def _ran(name: str, seed: int, tried: Tried) -> Ran:
    facts = tried.facts
    live, never = _losses(tried, tried.replayed.said), _losses(tried, tried.replayed.never)
    schedule = _interpolated(tried, never, tried.schedules)
    sign = 1.0 if facts.metric == "mae" else -1.0
    at_schedule = float(schedule.mean()) if sign > 0 else 1.0 - float(schedule.mean())
    assert facts.never is not None and facts.live is not None
    return Ran(
        case=name,
        seed=seed,
        metric=facts.metric,
        never=facts.never,
        live=facts.live,
        started=facts.started,
        promoted=facts.happened.count("promoted"),
        refused=facts.happened.count("refused"),
        before_drift=facts.false_before_first_drift,
        schedules={
            every: (one.metric, one.retrainings)
            for every, one in facts.schedules.items()
            if one.metric is not None
        },
        schedule=at_schedule,
        schedule_tolerance=_tolerance(facts.metric, at_schedule, live - schedule),
        never_tolerance=_tolerance(facts.metric, facts.never, live - never),
        seconds=facts.seconds,
    )


def _losses(tried: Tried, said: Said) -> NDArray[np.float64]:
    """What each live row with a label cost: 0 or 1, or the absolute error."""
    stream = tried.stream
    rows = np.flatnonzero(stream.known[stream.reference_rows :]) + stream.reference_rows
    labels, predictions = stream.labels[rows], said.predictions[rows]
    if tried.facts.metric == "mae":
        return np.abs(numbers(labels) - numbers(predictions))
    return (canonical(labels) != canonical(predictions)).astype(float)


def _interpolated(
    tried: Tried, never: NDArray[np.float64], schedules: Sequence[Schedule]
) -> NDArray[np.float64]:
    """What a schedule with as many retrainings as ours would have cost on each row."""
    points = [(0, never), *((one.retrainings, _losses(tried, one.said)) for one in reversed(schedules))]
    wanted = tried.facts.started
    below = max((point for point in points if point[0] <= wanted), key=lambda point: point[0])
    above = min((p for p in points if p[0] >= wanted), key=lambda p: p[0], default=below)
    if above[0] == below[0]:
        return below[1]
    share = (wanted - below[0]) / (above[0] - below[0])
    return (1.0 - share) * below[1] + share * above[1]


def _tolerance(metric: str, value: float, differences: NDArray[np.float64]) -> float:
    """The larger of half a point (2 % of an error) and two paired standard errors."""
    error = float(differences.std(ddof=1)) / len(differences) ** 0.5
    return max(TOLERANCE_MAE * value if metric == "mae" else TOLERANCE_POINTS, ERRORS * error)


# What was promised


def _checks(run: Ran, label_lag: int) -> Iterator[Check]:
    never = run.sign * (run.live - run.never) + run.never_tolerance
    yield Check("never", never >= 0.0, never)
    if run.case in STABLE:
        spare = STABLE[run.case] - run.started
        yield Check("needless", spare >= 0, float(spare))
        return
    if label_lag != 1 or not run.schedules:
        return
    schedule = run.sign * (run.live - run.schedule) + run.schedule_tolerance
    yield Check("schedule", schedule >= 0.0, schedule)
    known = REFERENCE_POLICY.get(run.case)
    if known is not None:
        least = TOLERANCE_MAE * known.metric if run.metric == "mae" else TOLERANCE_POINTS
        reached = run.sign * (run.live - known.metric) + least
        yield Check("reference policy", reached >= 0.0, reached)
        spare = known.started - run.started
        yield Check("its retrainings", spare >= 0, float(spare))


def _middle(runs: Sequence[Ran]) -> Ran:
    """The run whose live metric is the median one, or next to it."""
    middle = median(run.live for run in runs)
    return min(runs, key=lambda run: abs(run.live - middle))


def _worst(runs: Sequence[Ran]) -> Ran:
    return min(runs, key=lambda run: run.sign * run.live)


# What is said of it


def _told(name: str, runs: Sequence[Ran], label_lag: int) -> Iterator[str]:
    one, worst = _middle(runs), _worst(runs)
    known = REFERENCE_POLICY.get(name)
    yield f"\n{name} ({one.metric}, {len(runs)} seeds, labels {label_lag} windows late)"
    rows = [("never", _shown(one, one.never), "")]
    for every, (value, retrainings) in one.schedules.items():
        rows.append((f"every {every}", _shown(one, value), f"({retrainings})"))
    rows.append(("schedule at ours", _shown(one, one.schedule), f"({one.started})"))
    if known is not None and label_lag == 1:
        rows.append(("reference policy", _shown(one, known.metric), f"({known.started}/{known.promoted})"))
    rows.append(("ours, median", _shown(one, one.live), f"({one.started}/{one.promoted})"))
    rows.append(("ours, worst", _shown(worst, worst.live), f"({worst.started}/{worst.promoted})"))
    yield from columns(rows)
    for which, run in (("median", one), ("worst", worst)):
        checks = [
            f"{check.name} {'kept' if check.kept else 'MISSED'} by {_by(run, check)}"
            for check in _checks(run, label_lag)
        ]
        yield f"  {which}: {', '.join(checks)}"


def _by(run: Ran, check: Check) -> str:
    if check.name in ("needless", "its retrainings"):
        return f"{abs(check.by):.0f}"
    return f"{abs(check.by):.2f}" if run.metric == "mae" else f"{100 * abs(check.by):.2f} points"


def _shown(run: Ran, value: float) -> str:
    return f"{value:.2f}" if run.metric == "mae" else f"{100 * value:.2f}"


def _json(name: str, runs: Sequence[Ran], label_lag: int) -> dict[str, Any]:
    one, worst = _middle(runs), _worst(runs)
    found = {"median": one, "worst": worst}
    checks = {
        which: {
            check.name: {"kept": check.kept, "by": round(check.by, 5)} for check in _checks(run, label_lag)
        }
        for which, run in found.items()
    }
    return {
        "kept": all(check["kept"] for which in checks.values() for check in which.values()),
        **{which: msgspec.to_builtins(run, str_keys=True) for which, run in found.items()},
        "checks": checks,
        "lives": [round(run.live, 5) for run in runs],
        "started": [run.started for run in runs],
    }


if __name__ == "__main__":
    sys.exit(main())
