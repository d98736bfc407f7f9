"""A reference: types fixed once, the same bytes for the same rows, and the rows back again."""

import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitors.records import Scalar
from monitors.reference import InvalidReference, Reference, ReferenceColumn
from monitors.settings import DriftSettings


def made(column: list[Scalar], **settings: object) -> ReferenceColumn:
    rows = [{"x": value} for value in column]
    drift = msgspec.convert(settings, DriftSettings)
    return Reference.from_rows("m", "1", rows, [0] * len(rows), drift).columns[0]


@pytest.mark.parametrize(
    ("column", "type_"),
    [
        ([True, False, None], "categorical"),
        (["a", "b", "a", "b"], "categorical"),
        (["a", "b", "c", "a"], None),
        ([1, 2, None, 2], "categorical"),
        (list(range(10)) * 2, "categorical"),
        (list(range(11)), "numeric"),
        ([1.0, 1.0], "numeric"),
        ([1, 2.5], "numeric"),
        ([10**400, *range(11)], "numeric"),
        ([None, float("nan")], None),
        ([1, "1"], None),
        ([1, True], None),
    ],
)
def test_types_follow_from_the_values(column: list[Scalar], type_: str | None) -> None:
    fixed = made(column)
    assert fixed.type == type_ and bool(fixed.detail) == (type_ is None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "column",
    [
        [True, False] * 9,
        ["a", "b"] * 9,
        [f"id{i}" for i in range(20)],
        list(range(10)) * 2,
        list(range(11)) * 2,
        [1.0, 2.0] * 9,
        [0.5, None] * 9,
    ],
)
def test_types_are_evidently_s_own(column: list[Scalar]) -> None:
    import pandas as pd
    from evidently.core.datasets import infer_column_type

    names = {"numeric": "num", "categorical": "cat", None: "text"}
    assert names[made(column).type] == infer_column_type(pd.Series(column)).value


def test_stated_types_overrule_the_values() -> None:
    assert made([1, 2, 3], types={"x": "numeric"}).type == "numeric"
    assert made(["a", "b", "c"], types={"x": "categorical"}).type == "categorical"
    words = made(["a", "b"], types={"x": "numeric"})
    assert (words.type, words.detail) == (None, "stated as numeric, but the reference holds no numbers")


def test_what_a_training_frame_holds_becomes_json() -> None:
    column = made([np.int64(3), np.float64("nan"), np.int32(4), None])  # type: ignore[list-item]
    assert column.values() == [3, None, 4, None] and column.type == "categorical"
    assert made([np.str_("a"), np.bool_(True)]).values() == ["a", True]  # type: ignore[list-item]


def test_rows_come_back_as_they_went_in() -> None:
    rows: list[dict[str, Scalar]] = [{"a": 1, "b": "x"}, {"a": None, "b": "y", "c": 2.5}, {"b": None, "c": 1}]
    reference = Reference.from_rows("m", "1", rows, ["p", "q", "p"], DriftSettings())
    assert reference.to_rows() == [
        {"a": 1, "b": "x", "c": None},
        {"a": None, "b": "y", "c": 2.5},
        {"a": None, "b": None, "c": 1.0},
    ]
    assert reference.predictions.values() == ["p", "q", "p"] and reference.rows == 3


def test_ignored_columns_are_not_kept_but_remembered() -> None:
    rows: list[dict[str, Scalar]] = [{"a": 1, "secret": "s"}] * 3
    reference = Reference.from_rows("m", "1", rows, [0] * 3, DriftSettings(ignore=("secret",)))
    assert [column.name for column in reference.columns] == ["a"] and reference.ignored == ("secret",)
    assert b'"s"' not in reference.to_bytes()


def test_unscored_columns_are_listed_with_the_reason() -> None:
    rows: list[dict[str, Scalar]] = [{"id": f"{i}", "a": float(i)} for i in range(9)]
    reference = Reference.from_rows("m", "1", rows, [0] * 9, DriftSettings())
    assert [(finding.column, finding.code) for finding in reference.unscored] == [("id", "unscored")]


@pytest.mark.parametrize(
    ("rows", "predictions", "message"),
    [
        ([], [], "1 to 200000 rows, not 0"),
        ([{"a": 1}], [], "1 rows came with 0 predictions"),
        ([{}] * 200_001, [], "not 200001"),
    ],
)
def test_rows_that_make_no_reference_are_refused(
    rows: list[dict[str, Scalar]], predictions: list[Scalar], message: str
) -> None:
    with pytest.raises(InvalidReference, match=message):
        Reference.from_rows("m", "1", rows, predictions, DriftSettings())


def test_bytes_that_are_no_reference_are_refused() -> None:
    good = Reference.from_rows("m", "1", [{"a": 1.0}] * 5, [0] * 5, DriftSettings())
    later = msgspec.structs.replace(good, schema=2)
    torn = msgspec.structs.replace(good, predictions=ReferenceColumn("prediction", None, texts=(1,)))
    for data, message in (
        (b"", "not a reference"),
        (b"{}", "not a reference"),
        (good.to_bytes()[:-1], "not a reference"),
        (later.to_bytes(), "schema 2, this retrain-daemon reads 1"),
        (torn.to_bytes(), "differ in length"),
    ):
        with pytest.raises(InvalidReference, match=message):
            Reference.from_bytes(data)


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4))
tables = st.lists(st.dictionaries(st.text(max_size=3), scalars, max_size=4), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None)
@given(rows=tables, ignored=st.text(max_size=3))
def test_any_rows_survive_the_bytes(rows: list[dict[str, Scalar]], ignored: str) -> None:
    reference = Reference.from_rows("m", "1", rows, [0] * len(rows), DriftSettings(ignore=(ignored,)))
    again = Reference.from_bytes(reference.to_bytes())
    assert again == reference and again.digest == reference.digest
    assert Reference.from_rows("m", "1", rows, [0] * len(rows), DriftSettings(ignore=(ignored,))) == reference


@settings(max_examples=200, deadline=None)
@given(column=st.lists(st.one_of(st.none(), st.integers(-(2**70), 2**70), st.booleans()), min_size=1))
def test_values_come_back_equal(column: list[Scalar]) -> None:
    back = made(column).values()
    for value, again in zip(column, back, strict=True):
        exact = type(value) is not int or -(2**63) <= value < 2**64
        assert again == value if exact else again == float(value)  # type: ignore[arg-type]


def test_neither_pandas_nor_scipy_stats_is_imported_for_a_score() -> None:
    script = (
        "import sys, monitors.drift_engine, daemon.evidently_worker, daemon.wire.references\n"
        "print([name for name in ('pandas', 'scipy.stats', 'evidently', 'fsspec') if name in sys.modules])"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ
    )
    assert said.stdout.strip() == "[]"
