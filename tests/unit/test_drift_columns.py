"""What the compiled engine makes of records: mixed types, limits of quality, laws that always hold."""

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors.columns import MISSING, Cell, read_counts, read_numbers
from monitors.confirmation import confirm, fall_back
from monitors.drift import DriftReport, Finding
from monitors.drift_engine import compile_reference
from monitors.quality import MAX_NEW_COLUMNS
from monitors.records import Partition, PredictionRecord, Scalar
from monitors.reference import Reference
from monitors.settings import DriftSettings, QualitySettings
from monitors.statistics import METHODS

AT = datetime(2026, 1, 1, tzinfo=UTC)


def record(index: int, features: dict[str, Scalar], prediction: Scalar = None) -> PredictionRecord:
    return PredictionRecord("m", "1", str(index), AT, features, prediction, Partition("log", 0), index)


def judge(
    before: list[PredictionRecord],
    now: list[PredictionRecord],
    drift: DriftSettings | None = None,
    quality: QualitySettings | None = None,
    kind: str = "classification",
) -> DriftReport:
    drift = drift or DriftSettings()
    reference = Reference.from_rows(
        "m", "1", [one.features for one in before], [one.prediction for one in before], drift
    )
    return compile_reference(reference, drift, quality or QualitySettings(), kind).judge(now)


def codes(report: DriftReport) -> list[tuple[str, str, bool]]:
    return [(finding.column, finding.code, finding.broken) for finding in report.findings]


def ages(size: int, start: float = 0.0) -> list[PredictionRecord]:
    return [record(i, {"age": start + i % 90, "plan": "abc"[i % 3]}, i % 2) for i in range(size)]


def test_an_integer_that_no_float_holds_counts_as_infinite() -> None:
    assert read_numbers([10**400, -(10**400), 1]).tally.infinite == 2
    assert read_counts([10**400, 1], frozenset({"number"})).tally.infinite == 1


def test_nan_is_null_and_missing_is_not() -> None:
    cells: list[Cell] = [math.nan, None, MISSING, 1.0]
    for tally in (read_numbers(cells).tally, read_counts(cells, frozenset({"number"})).tally):
        assert (tally.null, tally.missing, tally.usable) == (2, 1, 1)


def test_a_column_of_both_kinds_keeps_one_and_its_text_apart() -> None:
    counts = read_counts([1, "1", True, "x"], frozenset({"number", "text"})).counts
    assert counts == {"1": 2, '"1"': 1, '"x"': 1}


def test_findings_come_with_their_share_and_their_limit() -> None:
    now = ages(1000)
    for i in range(40):
        now[i].features["age"] = "?"
    for i in range(40, 60):
        now[i].features["age"] = math.inf
    for i in range(60, 980):
        now[i].features["plan"] = "d"
    report = judge(ages(1200), now)
    assert codes(report) == [
        ("age", "wrong_type", False),
        ("age", "infinite", True),
        ("age", "unscored", False),
        ("plan", "unseen_category", True),
        ("plan", "unscored", False),
    ]
    assert [finding.share for finding in report.findings] == [0.04, 0.02, 1.0, 0.92, 1.0]
    assert report.broken_columns == ("age", "plan")


def test_numbers_of_another_magnitude_are_out_of_range() -> None:
    assert codes(judge(ages(1200), ages(1000, start=2_000.0)))[0] == ("age", "out_of_range", True)
    calm = judge(ages(1200), ages(1000, start=500.0))
    assert codes(calm) == [] and calm.drifted_columns == ("age",)


def column(values: Sequence[Scalar]) -> list[PredictionRecord]:
    """Rows of one column beside a calm one."""
    return [record(i, {"a": value, "calm": i % 7}, 0) for i, value in enumerate(values)]


def found(before: Sequence[Scalar], now: Sequence[Scalar]) -> tuple[set[str], bool]:
    """The codes of what is broken, and whether that says nothing of the world."""
    report = judge(column(before), column(now))
    return {finding.code for finding in report.findings if finding.broken}, report.damaged


def test_a_constant_is_as_wide_as_it_is_large() -> None:
    small = [0.0035] * 1200
    assert found(small, [3.5] * 1000) == ({"out_of_range"}, True)
    assert found(small, [0.01] * 1000) == (set(), False), "it was set anew"
    assert found([0] * 1200, [7] * 1000) == (set(), False)


def test_categories_that_are_numbers_are_broken_by_another_magnitude_only() -> None:
    days = [i % 7 + 1 for i in range(1200)]
    assert found(days, [day * 1_000 for day in days]) == ({"out_of_range"}, True)
    assert found([1, 2, 3, 4] * 300, [5, 6] * 500) == (set(), False), "the months go on"
    names = [str(day) for day in days]
    assert found(names, [f"{day}000" for day in days]) == ({"unseen_category"}, False), (
        "text has no magnitude"
    )


@pytest.mark.parametrize("kind", [float, int])
def test_a_change_of_unit_is_seen_in_what_is_not_zero(kind: type) -> None:
    """Zeros stay zeros whatever the unit: of a gain that one in twenty has, only those are moved."""
    gains = [kind(i % 3 + 1 if i % 20 == 0 else 0) for i in range(1200)]
    assert found(gains, [gain * 1_000 for gain in gains]) == ({"out_of_range"}, True)
    rare = [kind(900 if i % 240 == 0 else gain) for i, gain in enumerate(gains)]
    assert found(gains, rare) == (set(), False), "five outliers among sixty gains"
    few = [kind(0) if i >= 180 else gain * 1_000 for i, gain in enumerate(gains)]
    assert found(gains, few) == (set(), False), "nine values make no unit"


def test_missing_counts_beyond_the_nulls_of_the_reference_only() -> None:
    before = [record(i, {"age": float(i) if i % 10 == 0 else None, "b": i % 2}, 0) for i in range(2000)]
    now = [record(i, {"b": i % 2} | ({"age": float(i)} if i % 10 == 0 else {}), 0) for i in range(2000)]
    report = judge(before, now)
    assert codes(report) == [("age", "missing", False)]


def test_the_prediction_is_scored_apart_and_by_the_kind_of_model() -> None:
    before = [record(i, {"a": float(i % 50)}, float(i % 7)) for i in range(1200)]
    now = [record(i, {"a": float(i % 50)}, float(i % 7) + 3) for i in range(1000)]
    as_classes, as_numbers = judge(before, now), judge(before, now, kind="regression")
    assert as_classes.prediction is not None and as_classes.prediction.method == "jensenshannon"
    assert as_numbers.prediction is not None and as_numbers.prediction.method == "wasserstein"
    assert as_numbers.prediction.drifted and as_numbers.drift_share == 0.0
    assert [score.column for score in as_numbers.scores] == ["a"]


def test_predictions_that_are_scores_are_not_taken_for_classes() -> None:
    before = [record(i, {"a": float(i % 50)}, i / 1200) for i in range(1200)]
    report = judge(before, before)
    assert report.prediction is None and report.findings[-1].column == "prediction"
    assert 'State kind = "regression"' in report.findings[-1].detail


def test_ignored_columns_are_neither_scored_nor_new() -> None:
    report = judge(ages(1200), ages(1000), DriftSettings(ignore=("age",)))
    assert [score.column for score in report.scores] == ["plan"] and report.findings == ()


def test_stated_types_hold_even_for_a_reference_made_before_them() -> None:
    reference = Reference.from_rows(
        "m", "1", [{"a": i % 5} for i in range(1200)], [0] * 1200, DriftSettings()
    )
    now = [record(i, {"a": i % 5 + 20}, 0) for i in range(1000)]
    stated = DriftSettings(types={"a": "numeric"}, thresholds={"a": 0.7}, methods={"a": "wasserstein"})
    score = compile_reference(reference, stated, QualitySettings(), "classification").judge(now).scores
    assert [(one.method, one.threshold, one.drifted) for one in score] == [("wasserstein", 0.7, True)]


def test_hostile_rows_cannot_make_the_report_long() -> None:
    now = [
        record(i, {f"{i}-{n}" + "x" * 500: 1 for n in range(20)} | ages(1)[0].features, 0) for i in range(200)
    ]
    news = [finding for finding in judge(ages(1200), now).findings if finding.code == "new"]
    assert len(news) == MAX_NEW_COLUMNS + 1
    assert max(len(finding.column) for finding in news) <= 120
    assert news[-1] == Finding("*", "new", 1.0, False, f"and {200 * 20 - MAX_NEW_COLUMNS} more new columns")


def test_no_finding_holds_a_value() -> None:
    before = [record(i, {"age": 77.125, "plan": "SECRET-A"}, 0) for i in range(1200)]
    now = [record(i, {"age": "SECRET-B", "plan": "SECRET-C"}, "SECRET-D") for i in range(1000)]
    said = str(judge(before, now).findings)
    assert "SECRET" not in said and "77.125" not in said


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["a", "b", "1", ""])
)
columns = st.sampled_from(["n", "c", "t", "new"])
feature_rows = st.lists(st.dictionaries(columns, scalars, max_size=4), max_size=40)


@settings(max_examples=150, deadline=None)
@given(before=feature_rows.filter(bool), now=feature_rows, seed=st.randoms(use_true_random=False))
def test_any_rows_give_a_report_that_their_order_does_not_change(
    before: list[dict[str, Scalar]], now: list[dict[str, Scalar]], seed: object
) -> None:
    reference = Reference.from_rows("m", "1", before, [0] * len(before), DriftSettings())
    engine = compile_reference(reference, DriftSettings(), QualitySettings(), "classification")
    records = [record(i, row, i % 2) for i, row in enumerate(now)]
    report = engine.judge(records)
    seed.shuffle(records)  # type: ignore[attr-defined]
    assert engine.judge(records) == report
    assert all(math.isfinite(score.score) for score in report.scores)
    accounted = {one.column for one in (*report.scores, *report.findings)}
    assert {column.name for column in reference.columns} <= accounted


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([200, 1_000, 1_001, 3_000]),
    method=st.sampled_from([None, "psi", "jensenshannon", "kl_div"]),
)
def test_a_reference_does_not_drift_from_itself(seed: int, size: int, method: str | None) -> None:
    rng = np.random.default_rng(seed)
    drawn = zip(
        rng.normal(size=size).tolist(),
        rng.integers(0, 5, size).tolist(),
        rng.choice(["x", "y"], size).tolist(),
        strict=True,
    )
    same = [record(i, {"a": a, "b": b, "c": c}, b) for i, (a, b, c) in enumerate(drawn)]
    methods = {name: method for name in "abc"} if method else {}
    report = judge(same, same, DriftSettings(methods=methods))
    assert len(report.scores) == 3 and report.prediction is not None
    assert report.drift_share == 0.0 and not report.prediction.drifted and report.findings == ()


SCRIPT = """
import random
from datetime import UTC, datetime
from monitors.drift_engine import compile_reference
from monitors.records import Partition, PredictionRecord
from monitors.reference import Reference
from monitors.settings import DriftSettings, QualitySettings
from monitors.statistics import METHODS
dice = random.Random(1)
def rows(n, p): return [
    {"w": f"w{int(dice.expovariate(p) * 9)}", "v": dice.gauss(p, 1), "u": dice.gauss(0, p)} for _ in range(n)
]
drift = DriftSettings(methods={"u": "psi"})
reference = Reference.from_rows("m", "1", rows(1500, 1.0), [i % 3 for i in range(1500)], drift)
now = [
    PredictionRecord("m", "1", str(i), datetime.now(UTC), row, i % 2, Partition("t", 0), i)
    for i, row in enumerate(rows(900, 1.2))
]
report = compile_reference(reference, drift, QualitySettings(), "classification").judge(now)
print([score.score.hex() for score in (*report.scores, report.prediction)], report.findings)
"""


def test_scores_are_the_same_to_the_last_bit_in_every_process() -> None:
    said = Counter(
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "77", "4242")
    )
    assert len(said) == 1 and "0x1." in next(iter(said))


def test_confirmation_names_the_column_and_what_differs() -> None:
    ours = judge(ages(1200), ages(1000, start=30.0))
    first = ours.scores[0]
    for change, about in (
        ({"score": first.score * 1.001}, "score"),
        ({"drifted": not first.drifted}, "verdict"),
        ({"method": "ks"}, "method"),
    ):
        theirs = msgspec.structs.replace(
            ours, scores=(msgspec.structs.replace(first, **change), *ours.scores[1:])
        )
        assert [(one.column, one.about) for one in confirm(ours, theirs)] == [("age", about)]
        assert fall_back(ours, theirs, {"age"}).scores == theirs.scores
        assert fall_back(ours, theirs, {"plan"}).scores == ours.scores
    absent = msgspec.structs.replace(ours, scores=ours.scores[1:], prediction=None)
    assert [(one.column, one.about) for one in confirm(ours, absent)] == [
        ("age", "presence"),
        ("prediction", "presence"),
    ]
    assert confirm(ours, ours) == ()


@pytest.mark.parametrize("types", [{"types": {"age": "numeric"}}, {}])
def test_few_rows_in_a_short_window_are_scored_if_complete(types: dict[str, dict[str, str]]) -> None:
    report = judge(ages(1200), ages(60), DriftSettings(**types))  # type: ignore[arg-type]
    assert {score.column for score in report.scores} == {"age", "plan"}


def test_a_score_on_the_threshold_is_judged_as_evidently_judges_it() -> None:
    assert {name: method.says_drift(0.05, 0.05) for name, method in METHODS.items()} == {
        "ks": True,
        "wasserstein": True,
        "psi": True,
        "jensenshannon": True,
        "kl_div": True,
        "chisquare": False,
        "z": False,
    }
