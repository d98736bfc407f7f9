"""Windows: which records belong together, and when a window is done."""

import heapq
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Protocol

import msgspec

from monitors.drift import WindowRows
from monitors.events import OffsetRange
from monitors.records import Partition, PredictionRecord
from monitors.settings import WindowSettings

EPOCH = datetime.fromtimestamp(0, UTC)
MICROSECOND = timedelta(microseconds=1)


class OpenWindow(msgspec.Struct):
    """
    What is remembered of a window beside its rows; `seen` counts them before sampling.

    `filled` is the stream time at which a window of so many rows had them all.
    """

    key: int
    start: datetime
    end: datetime
    seen: int = 0
    spans: dict[Partition, tuple[int, int]] = {}
    filled: datetime | None = None

    def count(self, record: PredictionRecord) -> None:
        """Note that a record belongs here; spans are half-open offset ranges."""
        self.seen += 1
        first, end = self.spans.get(record.partition, (record.offset, record.offset))
        self.spans[record.partition] = (min(first, record.offset), max(end, record.offset + 1))


class ClosedWindow(msgspec.Struct, frozen=True):
    """
    A window that takes no more records.

    `spans` holds exactly its records: reading those offsets again and keeping what falls into
    [start, end) gives the same rows, however the partitions were interleaved.
    """

    key: int
    rows: WindowRows
    seen: int
    spans: tuple[OffsetRange, ...]


class Sample:
    """
    The bottom-k rows by hash of the record id: the same rows in whatever order they come.

    Hashes are only computed once there are more rows than the capacity.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: list[PredictionRecord] = []
        self._heap: list[tuple[int, int, str, int, PredictionRecord]] = []

    def __len__(self) -> int:
        return len(self._heap) or len(self._rows)

    def add(self, record: PredictionRecord) -> PredictionRecord | None:
        """Offer a row; the one that had to go for it is returned, and may be itself."""
        if self._heap:
            return heapq.heappushpop(self._heap, self._ranked(record))[-1]
        self._rows.append(record)
        if len(self._rows) <= self._capacity:
            return None
        self._heap = [self._ranked(row) for row in self._rows]
        self._rows = []
        heapq.heapify(self._heap)
        return heapq.heappop(self._heap)[-1]

    def rows(self) -> list[PredictionRecord]:
        """The rows kept, in no order that means anything."""
        return [entry[-1] for entry in self._heap] or list(self._rows)

    @staticmethod
    def _ranked(record: PredictionRecord) -> tuple[int, int, str, int, PredictionRecord]:
        digest = blake2b(record.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        rank = -int.from_bytes(digest, "big")
        return rank, -record.offset, record.partition.topic, -record.partition.index, record


class Windows(Protocol):
    """The open windows of one model version."""

    late: int

    def add(self, record: PredictionRecord, earlier: datetime) -> None:
        """Take one record; `earlier` is the stream time of its partition before it."""

    def due(self, stream_time: datetime | None) -> list[datetime]:
        """The stream times that `close` has to be called with to give up those that are done, one by one."""

    def close(self, stream_time: datetime | None) -> list[ClosedWindow]:
        """Give up the windows that are done, oldest first; None: no partition has a stream time yet."""

    def state(self) -> "WindowsState": ...
    def restore(self, state: "WindowsState", rows: Mapping[int, Iterable[PredictionRecord]]) -> None: ...
    def take_added(self) -> dict[int, list[PredictionRecord]]:
        """The rows taken since this was last asked for, by window key; what a checkpoint adds."""


class WindowsState(msgspec.Struct, frozen=True):
    """All of the open windows but their rows."""

    open: tuple[OpenWindow, ...] = ()
    closed_until: datetime = EPOCH
    next_key: int = 0
    late: int = 0


class _Collecting:
    """What both kinds of windows share: open windows with a sample each, and what is new in them."""

    def __init__(self, capacity: int) -> None:
        self.late = 0
        self._capacity = capacity
        self._open: dict[int, OpenWindow] = {}
        self._samples: dict[int, Sample] = {}
        # By the identity of the row, so that one that had to go again is let go of at once.
        self._added: dict[int, dict[int, PredictionRecord]] = {}

    def take_added(self) -> dict[int, list[PredictionRecord]]:
        added, self._added = self._added, {}
        return {key: list(rows.values()) for key, rows in added.items() if rows}

    def _collect(self, window: OpenWindow, record: PredictionRecord) -> None:
        window.count(record)
        sample = self._samples.get(window.key)
        if sample is None:
            sample = self._samples[window.key] = Sample(self._capacity)
        gone = sample.add(record)
        if gone is record:
            return
        added = self._added.setdefault(window.key, {})
        added[id(record)] = record
        if gone is not None:
            added.pop(id(gone), None)

    def _give_up(self, window: OpenWindow) -> ClosedWindow:
        del self._open[window.key]
        self._added.pop(window.key, None)
        rows = sorted(
            self._samples.pop(window.key).rows(),
            key=lambda row: (row.event_time, row.partition, row.offset),
        )
        return ClosedWindow(
            key=window.key,
            rows=WindowRows(window.start, window.end, tuple(rows)),
            seen=window.seen,
            spans=tuple(
                OffsetRange(partition.topic, partition.index, start, end)
                for partition, (start, end) in sorted(window.spans.items())
            ),
        )

    def _refill(self, state: WindowsState, rows: Mapping[int, Iterable[PredictionRecord]]) -> None:
        self.late = state.late
        for window in state.open:
            copy = msgspec.structs.replace(window, spans=dict(window.spans))
            sample = Sample(self._capacity)
            for record in rows.get(window.key, ()):
                sample.add(record)
            self._open[window.key], self._samples[window.key] = copy, sample

    def _open_now(self) -> tuple[OpenWindow, ...]:
        return tuple(
            msgspec.structs.replace(window, spans=dict(window.spans)) for window in self._open.values()
        )


class TimeWindows(_Collecting):
    """
    Tumbling windows of event time, aligned to the epoch.

    A record is late if its window was done for its own partition before it, or was closed because
    its partition was idle; so the rows of a window don't depend on how partitions are interleaved.
    """

    def __init__(self, seconds: float, grace_seconds: float, max_rows: int) -> None:
        super().__init__(max_rows)
        self._size = timedelta(seconds=seconds)
        self._grace = timedelta(seconds=grace_seconds)
        self._closed_until = EPOCH

    def add(self, record: PredictionRecord, earlier: datetime) -> None:
        start = _start(record.event_time, self._size)
        end = start + self._size
        if end + self._grace <= earlier or end <= self._closed_until:
            self.late += 1
            return
        key = (start - EPOCH) // MICROSECOND
        window = self._open.get(key)
        if window is None:
            window = self._open[key] = OpenWindow(key, start, end)
        self._collect(window, record)

    def due(self, stream_time: datetime | None) -> list[datetime]:
        if stream_time is None:
            return []
        times = (window.end + self._grace for window in self._open.values())
        return sorted(time for time in times if time <= stream_time)

    def close(self, stream_time: datetime | None) -> list[ClosedWindow]:
        if stream_time is None:
            return []
        done = sorted(key for key, window in self._open.items() if window.end + self._grace <= stream_time)
        closed = [self._give_up(self._open[key]) for key in done]
        if closed:
            self._closed_until = closed[-1].rows.end
        return closed

    def state(self) -> WindowsState:
        return WindowsState(self._open_now(), self._closed_until, 0, self.late)

    def restore(self, state: WindowsState, rows: Mapping[int, Iterable[PredictionRecord]]) -> None:
        self._refill(state, rows)
        self._closed_until = state.closed_until


class CountWindows(_Collecting):
    """Tumbling windows of a fixed number of rows, in offset order of the one partition they come from."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self._next_key = 0

    def add(self, record: PredictionRecord, earlier: datetime) -> None:
        window = self._open.get(self._next_key)
        if window is None:
            window = OpenWindow(self._next_key, record.event_time, record.event_time)
            self._open[window.key] = window
        self._collect(window, record)
        window.start = min(window.start, record.event_time)
        window.end = max(window.end, record.event_time + MICROSECOND)
        if window.seen == self._capacity:
            window.filled = max(earlier, record.event_time)
            self._next_key += 1

    def due(self, stream_time: datetime | None) -> list[datetime]:
        """Of the one partition that the rows come from, whatever time the others have reached."""
        return [_filled(window) for window in self._full()]

    def close(self, stream_time: datetime | None) -> list[ClosedWindow]:
        """Give up the windows that were full by then; None: all that are."""
        done = [one for one in self._full() if stream_time is None or _filled(one) <= stream_time]
        return [self._give_up(window) for window in done]

    def _full(self) -> list[OpenWindow]:
        return [window for key, window in sorted(self._open.items()) if key < self._next_key]

    def state(self) -> WindowsState:
        return WindowsState(self._open_now(), EPOCH, self._next_key, self.late)

    def restore(self, state: WindowsState, rows: Mapping[int, Iterable[PredictionRecord]]) -> None:
        self._refill(state, rows)
        self._next_key = state.next_key


def _filled(window: OpenWindow) -> datetime:
    """As far as is known: checkpoints of older releases don't say."""
    return window.filled or window.end - MICROSECOND


def closing_time(settings: WindowSettings, event_time: datetime) -> datetime:
    """
    The stream time that closes the window of an event time.

    Where windows are counted in rows nothing tells beforehand, and it is the event time itself.

    >>> noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    >>> str(closing_time(WindowSettings(seconds=600.0, grace_seconds=5.0), noon))
    '2026-01-01 12:10:05+00:00'
    """
    if settings.rows is not None:
        return event_time
    size, grace = timedelta(seconds=_seconds(settings)), timedelta(seconds=settings.grace_seconds)
    return _start(event_time, size) + size + grace


def make_windows(settings: WindowSettings) -> Windows:
    """
    The windows that a model's settings ask for.

    >>> type(make_windows(WindowSettings(rows=500))).__name__
    'CountWindows'
    """
    if settings.rows is not None:
        return CountWindows(settings.rows)
    return TimeWindows(_seconds(settings), settings.grace_seconds, settings.max_rows)


def _seconds(settings: WindowSettings) -> float:
    return settings.seconds or 3_600.0


def _start(event_time: datetime, size: timedelta) -> datetime:
    return EPOCH + (event_time - EPOCH) // size * size


class StreamTimes:
    """Stream time: the largest event time read from each partition, never of all of them together."""

    def __init__(self) -> None:
        self._times: dict[Partition, datetime] = {}

    def advance(self, partition: Partition, event_time: datetime) -> datetime:
        """Note an event time; returns the stream time of its partition before it."""
        earlier = self._times.get(partition, EPOCH)
        if event_time > earlier:
            self._times[partition] = event_time
        return earlier

    def passed(self, partitions: Iterable[Partition]) -> datetime | None:
        """The time that all of these partitions have reached; None if one has none, or there is none."""
        times = [self._times.get(partition) for partition in partitions]
        known = [time for time in times if time is not None]
        return min(known) if known and len(known) == len(times) else None

    def of(self, partition: Partition) -> datetime | None:
        """The stream time of one partition, if it has any."""
        return self._times.get(partition)

    def restore(self, partition: Partition, stream_time: datetime) -> None:
        """Go on from a checkpoint."""
        self._times[partition] = stream_time
