"""
The traps of Evidently 0.7.23 that this project met, each by its symptom: none of them bites silently.

Three are about Evidently's own machinery and have their tests elsewhere, named here at their place.
"""

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from monitors.drift import DriftReport, Finding
from monitors.drift_engine import compile_reference
from monitors.records import Partition, PredictionRecord, Scalar
from monitors.reference import Reference
from monitors.settings import DriftSettings, QualitySettings
from monitors.statistics import METHODS, UnknownMethod

Rows = Sequence[dict[str, Scalar]]


def records(rows: Rows, predictions: Sequence[Scalar] | None = None) -> list[PredictionRecord]:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    outputs = predictions or [index % 2 for index in range(len(rows))]
    return [
        PredictionRecord("m", "1", str(index), at, dict(row), output, Partition("log", 0), index)
        for index, (row, output) in enumerate(zip(rows, outputs, strict=True))
    ]


def judged(before: Rows, now: Rows, drift: DriftSettings = DriftSettings()) -> DriftReport:  # noqa: B008 - frozen
    reference = Reference.from_rows("m", "1", before, [index % 2 for index in range(len(before))], drift)
    return compile_reference(reference, drift, QualitySettings(), "classification").judge(records(now))


def rows(size: int, value: Callable[[int], Scalar]) -> list[dict[str, Scalar]]:
    return [{"x": value(index), "calm": float(index % 50)} for index in range(size)]


def finding(report: DriftReport, code: str, column: str = "x") -> Finding:
    found = [one for one in report.findings if (one.code, one.column) == (code, column)]
    assert len(found) == 1, report.findings
    return found[0]


def scored(report: DriftReport) -> dict[str, bool]:
    return {score.column: score.drifted for score in report.scores}


def test_trap_1_one_infinity_changes_no_verdict_and_is_a_finding() -> None:
    def value(index: int) -> Scalar:
        return float(index % 100)

    now = rows(1000, value)
    now[7]["x"] = math.inf
    report = judged(rows(1200, value), now)
    assert scored(report) == {"x": False, "calm": False} and report.drift_share == 0.0
    assert finding(report, "infinite") == Finding("x", "infinite", 0.001, False)


def test_trap_2_a_missing_column_is_broken_and_a_new_one_is_told() -> None:
    now: Rows = [{"calm": float(index % 50), "y": 1} for index in range(1000)]
    report = judged(rows(1200, float), now)
    assert finding(report, "missing") == Finding("x", "missing", 1.0, True)
    assert finding(report, "unscored").detail == "broken: missing"
    assert finding(report, "new", "y") == Finding("y", "new", 1.0, False)
    assert scored(report) == {"calm": False}


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        (lambda index: None, "empty in the reference"),
        (lambda index: "a" if index % 2 else 1, "mixes int, str in the reference"),
        (lambda index: datetime(2026, 1, 1, tzinfo=UTC), "holds datetime values"),
        (lambda index: [1, 2], "holds list values"),
    ],
)
def test_trap_3_a_column_that_cannot_be_scored_says_so(value: Callable[[int], Scalar], detail: str) -> None:
    report = judged(rows(1200, value), rows(1000, lambda index: 1))
    assert detail in finding(report, "unscored").detail
    assert scored(report) == {"calm": False}


def test_trap_4_the_reference_fixes_the_type_whatever_the_window_holds() -> None:
    eleven, ten = rows(1200, lambda index: index % 11), rows(1000, lambda index: index % 10)
    assert judged(eleven, ten).scores[0].method == "wasserstein"
    assert judged(ten + ten, eleven).scores[0].method == "jensenshannon"


def test_trap_4_the_choice_by_distinct_values_stays_evidently_s_and_is_named() -> None:
    before = rows(1200, lambda index: [0.0, 1.0, 2.0, 3.0][index % 4])
    now = rows(1000, lambda index: [0.0, 1.0, 2.0, 3.0, 4.0, 5.0][index % 6])
    assert judged(before, before).scores[0].implementation == "evidently-0.7.23/jensenshannon"
    assert judged(before, now).scores[0].implementation == "evidently-0.7.23/wasserstein"


def test_trap_5_an_empty_column_or_window_costs_only_itself() -> None:
    report = judged(rows(1200, float), rows(1000, lambda index: None))
    assert finding(report, "null_share") == Finding(
        "x", "null_share", 1.0, True, "null share 0.0000 in the reference"
    )
    assert scored(report) == {"calm": False}
    nothing = judged(rows(1200, float), [])
    assert (
        nothing.scores == () and finding(nothing, "unscored").detail == "only 0 of 0 rows have a usable value"
    )


def test_trap_6_a_rising_null_share_is_broken_not_drifted() -> None:
    report = judged(rows(1200, float), rows(1000, lambda index: float(index) if index % 20 == 0 else None))
    assert finding(report, "null_share").broken and finding(report, "unscored")
    assert report.drifted_columns == ()


def test_trap_6_a_remnant_of_a_sparse_column_is_not_scored() -> None:
    def sparse(index: int) -> Scalar:
        return float(index) if index % 20 == 0 else None

    report = judged(rows(4000, sparse), rows(1000, sparse))
    assert not finding(report, "null_share").broken
    assert finding(report, "unscored").detail == "only 50 of 1000 rows have a usable value"


def test_trap_6_nulls_that_vanish_are_told() -> None:
    report = judged(rows(1200, lambda index: float(index % 60) if index % 2 else None), rows(1000, float))
    assert finding(report, "null_share") == Finding(
        "x", "null_share", 0.0, False, "null share 0.5000 in the reference"
    )


def test_trap_7_a_score_that_is_no_number_is_unscored_never_calm() -> None:
    settings = DriftSettings(types={"x": "categorical"}, methods={"x": "chisquare"})
    report = judged(rows(800, lambda index: 5), rows(500, lambda index: 5), settings)
    assert finding(report, "unscored").detail == "chisquare gave no finite number"
    assert "x" not in scored(report)


def test_trap_7_numbers_too_large_to_measure_are_unscored() -> None:
    report = judged(
        rows(1200, lambda index: 1e300 * (index % 97)), rows(1000, lambda index: 1e300 * (index % 89))
    )
    assert finding(report, "unscored").detail == "wasserstein gave no finite number"


def test_trap_8_one_unseen_category_drifts_by_chi_square_and_is_told() -> None:
    now = rows(500, lambda index: "abc"[index % 3])
    now[0]["x"] = "d"
    report = judged(rows(900, lambda index: "abc"[index % 3]), now)
    assert report.scores[0].score == 0.0 and report.scores[0].drifted
    assert finding(report, "unseen_category").share == 0.002
    larger = judged(rows(1200, lambda index: "abc"[index % 3]), now)
    assert not larger.scores[0].drifted and finding(larger, "unseen_category")


def test_trap_9_text_among_integer_categories_is_a_wrong_type_not_drift() -> None:
    report = judged(rows(1200, lambda index: index % 3), rows(1000, lambda index: str(index % 3)))
    assert finding(report, "wrong_type") == Finding("x", "wrong_type", 1.0, True)
    assert scored(report) == {"calm": False}
    report = judged(rows(1200, lambda index: str(index % 3)), rows(1000, lambda index: index % 3))
    assert finding(report, "wrong_type").broken


def test_trap_9_numbers_and_booleans_that_are_equal_are_one_category() -> None:
    report = judged(rows(1200, lambda index: index % 2), rows(1000, lambda index: bool(index % 2)))
    assert scored(report)["x"] is False and report.findings == ()
    report = judged(rows(1200, lambda index: index % 3), rows(1000, lambda index: float(index % 3)))
    assert scored(report)["x"] is False and report.findings == ()


def test_trap_10_numbers_that_arrive_as_text_are_a_wrong_type() -> None:
    report = judged(
        rows(1200, float), rows(1000, lambda index: str(index) if index % 10 == 0 else float(index))
    )
    assert finding(report, "wrong_type") == Finding("x", "wrong_type", 0.1, True)


def test_trap_10_a_few_wrong_values_are_left_out_of_the_score() -> None:
    def value(index: int) -> Scalar:
        return float(index % 97)

    now = rows(1000, value)
    now[3]["x"], now[4]["x"] = "?", True
    report = judged(rows(1200, value), now)
    assert finding(report, "wrong_type") == Finding("x", "wrong_type", 0.002, False)
    assert report.scores[0].current_rows == 998 and not report.scores[0].drifted


# Trap 11 (string index, duplicate or non-text column names, only dates) cannot occur: records have no index,
# their feature names are the unique text keys of a JSON object, and frames are built without an index.


def test_trap_12_ids_are_unscored_and_named_as_such() -> None:
    report = judged(rows(1200, lambda index: f"id-{index}"), rows(1000, lambda index: f"other-{index}"))
    assert finding(report, "unscored").detail.startswith("looks like free text or ids")
    assert scored(report) == {"calm": False}


def test_trap_13_a_constant_that_moves_a_hair_drifts_but_is_told() -> None:
    report = judged(rows(1200, lambda index: 5.0), rows(1000, lambda index: 5.0001))
    assert scored(report)["x"] is True
    assert finding(report, "out_of_range") == Finding(
        "x", "out_of_range", 1.0, False, "constant in the reference: any other value scores as drift"
    )
    far = judged(rows(1200, lambda index: 5.0), rows(1000, lambda index: 500.0))
    assert finding(far, "out_of_range").broken and "x" not in scored(far)


def test_trap_14_a_method_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(
        UnknownMethod, match=r"drift\.methods\.x: no method is called 'Wassertein'; nearest: wass"
    ):
        judged(rows(1200, float), rows(1000, float), DriftSettings(methods={"x": "Wassertein"}))


def test_trap_14_a_method_of_the_other_type_is_unscored_with_the_remedy() -> None:
    report = judged(rows(1200, float), rows(1000, float), DriftSettings(methods={"x": "chisquare"}))
    assert finding(report, "unscored").detail == (
        "chisquare is for categorical columns, this one is numeric: state another method or drift.types.x"
    )
    declared = DriftSettings(methods={"x": "chisquare"}, types={"x": "categorical"})
    assert (
        scored(judged(rows(900, lambda i: i % 7 / 2), rows(500, lambda i: i % 7 / 2), declared))["x"] is False
    )


# Trap 15 (a date column or index changes the plots; metadata integers come back as text) cannot occur: frames
# have neither, and no metadata is stored in or read back from a report.


def test_trap_16_hellinger_which_changes_its_inputs_is_not_on_offer() -> None:
    assert "hellinger" not in METHODS
    with pytest.raises(UnknownMethod, match="there are ks, wasserstein"):
        judged(rows(1200, float), rows(1000, float), DriftSettings(methods={"x": "hellinger"}))


def test_trap_17_pandas_stays_below_the_version_that_evidently_cannot_import() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert '"pandas>=2.2,<3.1"' in project.read_text()
