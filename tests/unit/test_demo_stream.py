"""The demo's streams: the staged one, and one read from a file."""

import csv
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.demo.parcels import ACTS, parcels
from flows.demo.stream import Row, Stream
from flows.demo.table import UnusableTable, read_table
from monitors.settings import LimitSettings


def _csv(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    small = {"reference_rows": 30, "window_rows": 10}
    assert parcels(seed=1, **small) == parcels(seed=1, **small)
    assert parcels(seed=1, **small).live != parcels(seed=2, **small).live


def test_acts_follow_each_other_over_whole_windows_to_the_last_row() -> None:
    stream = parcels(reference_rows=30, window_rows=10)
    assert [act.expect for act in stream.acts] == ["silence", "refused", "promoted", "killed"]
    assert stream.acts[0].start == 0
    assert stream.acts[-1].end == len(stream.live)
    assert all(one.end == other.start for one, other in zip(stream.acts, stream.acts[1:], strict=False))
    assert all(act.start % 10 == 0 for act in stream.acts)


def test_the_harmless_shift_moves_no_column_that_decides() -> None:
    calm = ACTS[0].scenes[0].regime
    shifted = ACTS[1].scenes[0].regime
    assert not set(shifted.shifts) & set(calm.weights)
    assert (shifted.weights, shifted.carriers, shifted.carrier_delay) == (
        calm.weights,
        calm.carriers,
        calm.carrier_delay,
    )


def test_event_times_rise_and_are_long_past_whatever_the_length() -> None:
    row = Row({"a": 1}, 0)
    huge = Stream(
        model="m", source="", kind="classification", window_rows=1, reference=(row,), live=(row,) * 10
    )
    assert huge.event_time(1) - huge.event_time(0) == timedelta(seconds=60)
    assert huge.event_time(-1) < huge.event_time(0)
    crowded = Stream(
        model="m", source="", kind="classification", window_rows=1, reference=(), live=(row,) * 1_000_000
    )
    ahead = timedelta(seconds=LimitSettings().max_ahead_seconds)
    assert crowded.event_time(999_999) < datetime(2024, 12, 1, tzinfo=UTC) - ahead
    assert crowded.event_time(1) > crowded.event_time(0)


def test_columns_that_are_ignored_are_no_features_and_absent_ones_are_fine(tmp_path: Path) -> None:
    path = _csv(tmp_path / "a.csv", ["ts", "x", "label"], [[i, i * 0.5, i % 2] for i in range(20)])
    stream = read_table(path, label="label", ignore=("ts", "segment"), reference_rows=10, window_rows=5)
    assert stream.reference[3] == Row({"x": 1.5}, 1)
    assert (len(stream.reference), len(stream.live)) == (10, 10)
    assert not stream.acts


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([0, 1], "classification"),
        ([0.0, 1.0], "classification"),
        (["yes", "no"], "classification"),
        (["True", "False"], "classification"),
        ([0.5, 1.0], "regression"),
        (list(range(50)), "regression"),
    ],
)
def test_the_label_column_decides_what_is_learned(tmp_path: Path, labels: list[object], kind: str) -> None:
    rows = [[i, labels[i % len(labels)]] for i in range(100)]
    stream = read_table(
        _csv(tmp_path / "a.csv", ["x", "y"], rows), label="y", ignore=(), reference_rows=60, window_rows=10
    )
    assert stream.kind == kind


def test_values_are_such_as_json_holds(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame(
        {
            "small": pandas.Series([0.1, float("inf"), float("nan")] * 4, dtype="float32"),
            "when": pandas.to_datetime(["2024-01-01", None, "2024-01-02"] * 4, utc=True),
            "kind": pandas.Series(["a", None, "b"] * 4, dtype="category"),
            "flag": [True, False, True] * 4,
            "label": [1, 0, 1] * 4,
        }
    )
    path = tmp_path / "frame.parquet"
    frame.to_parquet(path)
    rows = read_table(path, label="label", ignore=(), reference_rows=6, window_rows=3).reference
    assert rows[0].features == {"small": 0.1, "when": 1704067200.0, "kind": "a", "flag": True}
    assert rows[1].features == {"small": None, "when": None, "kind": None, "flag": False}


@pytest.mark.parametrize(
    ("label", "ignore", "reference_rows", "said"),
    [
        ("target", (), 5, "--label"),
        ("label", ("x",), 5, "no feature columns"),
        ("label", (), 500, "--reference-rows"),
    ],
)
def test_an_unusable_table_says_what_to_change(
    tmp_path: Path, label: str, ignore: tuple[str, ...], reference_rows: int, said: str
) -> None:
    path = _csv(tmp_path / "a.csv", ["x", "label"], [[i, i % 2] for i in range(20)])
    with pytest.raises(UnusableTable, match=said):
        read_table(path, label=label, ignore=ignore, reference_rows=reference_rows, window_rows=5)


def test_a_file_that_is_not_there_or_no_parquet_is_unusable(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR?")
    for path in (tmp_path / "absent.csv", broken):
        with pytest.raises(UnusableTable, match=path.name):
            read_table(path, label="label", ignore=(), reference_rows=1, window_rows=1)
