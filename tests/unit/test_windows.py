"""Windows: which records they take, when they close, and what of them is kept."""

import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitors.events import OffsetRange
from monitors.records import Partition, PredictionRecord
from monitors.settings import WindowSettings
from monitors.windows import EPOCH, CountWindows, Sample, StreamTimes, TimeWindows, make_windows

START = datetime(2026, 1, 1, tzinfo=UTC)
P0, P1 = Partition("predictions", 0), Partition("predictions", 1)


def record(seconds: float, offset: int = 0, partition: Partition = P0, name: str = "") -> PredictionRecord:
    time = START + timedelta(seconds=seconds)
    return PredictionRecord("fraud", "1", name or f"r{offset}", time, {}, 1, partition, offset)


def test_a_window_closes_once_stream_time_has_passed_its_end_and_the_grace() -> None:
    windows = TimeWindows(60, 10, 100)
    windows.add(record(5), EPOCH)
    assert windows.close(START + timedelta(seconds=69)) == []
    (closed,) = windows.close(START + timedelta(seconds=70))
    assert (closed.rows.start, closed.rows.end) == (START, START + timedelta(seconds=60))


def test_intervals_are_half_open() -> None:
    windows = TimeWindows(60, 0, 100)
    windows.add(record(0, 0), EPOCH)
    windows.add(record(60, 1), EPOCH)
    first, second = windows.close(START + timedelta(seconds=200))
    assert [row.offset for row in first.rows.records] == [0]
    assert [row.offset for row in second.rows.records] == [1]


def test_a_record_is_late_by_the_stream_time_of_its_own_partition() -> None:
    windows = TimeWindows(60, 0, 100)
    windows.add(record(5, 0), START + timedelta(seconds=60))
    windows.add(record(6, 0, P1), START + timedelta(seconds=59))
    assert windows.late == 1
    (closed,) = windows.close(START + timedelta(seconds=60))
    assert [row.partition for row in closed.rows.records] == [P1]


def test_a_window_that_was_closed_without_an_idle_partition_takes_nothing_more() -> None:
    windows = TimeWindows(60, 0, 100)
    windows.add(record(5, 0), EPOCH)
    windows.close(START + timedelta(seconds=60))
    windows.add(record(6, 0, P1), EPOCH)
    assert (windows.late, windows.close(START + timedelta(seconds=120))) == (1, [])


def test_spans_hold_exactly_the_records_of_the_window() -> None:
    windows = TimeWindows(60, 0, 100)
    for offset in (3, 4, 7):
        windows.add(record(offset, offset), EPOCH)
    windows.add(record(1, 2, P1), EPOCH)
    (closed,) = windows.close(START + timedelta(seconds=60))
    assert closed.spans == (OffsetRange("predictions", 0, 3, 8), OffsetRange("predictions", 1, 2, 3))


def test_count_windows_hold_as_many_rows_as_asked() -> None:
    windows = CountWindows(3)
    for offset in range(7):
        windows.add(record(offset, offset), EPOCH)
    first, second = windows.close(None)
    assert [row.offset for row in first.rows.records] == [0, 1, 2]
    assert [row.offset for row in second.rows.records] == [3, 4, 5]
    assert windows.state().open[0].seen == 1


def test_rows_make_count_windows_and_seconds_make_time_windows() -> None:
    assert isinstance(make_windows(WindowSettings(rows=5)), CountWindows)
    assert isinstance(make_windows(WindowSettings(seconds=5.0)), TimeWindows)


@given(st.permutations(range(40)), st.integers(1, 39))
def test_a_sample_keeps_the_same_rows_in_whatever_order_they_come(order: list[int], capacity: int) -> None:
    straight, shuffled = Sample(capacity), Sample(capacity)
    for number in range(40):
        straight.add(record(0, number))
    for number in order:
        shuffled.add(record(0, number))
    assert {row.offset for row in shuffled.rows()} == {row.offset for row in straight.rows()}
    assert len(shuffled) == capacity


def test_a_sample_is_spread_over_all_rows() -> None:
    sample = Sample(1_000)
    for number in range(10_000):
        sample.add(record(0, number))
    early = sum(row.offset < 5_000 for row in sample.rows())
    assert 430 <= early <= 570, "1000 rows drawn evenly from two halves"


def test_rows_added_since_the_last_checkpoint_are_told_once() -> None:
    windows = TimeWindows(60, 0, 100)
    windows.add(record(1, 1), EPOCH)
    assert [row.offset for rows in windows.take_added().values() for row in rows] == [1]
    windows.add(record(2, 2), EPOCH)
    assert [row.offset for rows in windows.take_added().values() for row in rows] == [2]
    assert windows.take_added() == {}


def test_a_row_that_had_to_go_is_not_told_of_as_added() -> None:
    windows = TimeWindows(600, 0, 5)
    for offset in range(50):
        windows.add(record(offset, offset), EPOCH)
    (added,) = windows.take_added().values()
    (closed,) = windows.close(START + timedelta(days=1))
    assert sorted(row.offset for row in added) == sorted(row.offset for row in closed.rows.records)
    assert len(added) == 5


@pytest.mark.parametrize("make", [lambda: TimeWindows(60, 5, 10), lambda: CountWindows(10)])
def test_restored_windows_go_on_as_if_nothing_had_happened(make: object) -> None:
    chance = random.Random(3)
    records = [record(chance.uniform(0, 300), offset) for offset in range(200)]
    records.sort(key=lambda row: row.event_time)
    whole, first = make(), make()  # type: ignore[operator]
    kept: dict[int, list[PredictionRecord]] = {}
    for index, row in enumerate(records):
        whole.add(row, EPOCH)
        if index < 90:
            first.add(row, EPOCH)
    for key, rows in first.take_added().items():
        kept.setdefault(key, []).extend(rows)
    closed = first.close(records[89].event_time)
    second = make()  # type: ignore[operator]
    second.restore(first.state(), kept)
    for row in records[90:]:
        second.add(row, EPOCH)
    end = START + timedelta(seconds=1_000)
    assert closed + second.close(end) == whole.close(end)


def test_stream_time_is_the_least_of_the_partitions_that_count() -> None:
    times = StreamTimes()
    assert times.passed([P0]) is None
    times.advance(P0, START + timedelta(seconds=9))
    assert times.passed([P0, P1]) is None, "a partition nothing was read from holds everything back"
    times.advance(P1, START + timedelta(seconds=4))
    times.advance(P1, START)
    assert times.passed([P0, P1]) == START + timedelta(seconds=4)
    assert times.passed([]) is None, "nobody counts: nothing moves"
