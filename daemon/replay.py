"""Replay: the rows of judged windows, read from the log again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from monitors.drift import WindowRows
from monitors.episodes import Judged
from monitors.events import OffsetRange
from monitors.records import Decoder, InvalidRecord, Partition, PredictionRecord, RawRecord
from monitors.windows import OpenWindow, Sample

Read = Callable[[Sequence[OffsetRange]], Iterator[RawRecord]]


class Log(Protocol):
    """A log that is read once more, without taking part in a group; in Kafka, or in memory."""

    def read(self, ranges: Sequence[OffsetRange]) -> Iterator[RawRecord]:
        """The records of these ranges, one range of a partition, each partition's in order."""

    def bounds(self, topic: str) -> Mapping[Partition, tuple[int, int]]:
        """The first offset left and the next to be written; empty for a topic that is not there."""

    def cluster_id(self) -> str: ...


class Reread(msgspec.Struct, frozen=True):
    """A window as the log has it now; `spans` and `seen` as they were counted when it was open."""

    rows: WindowRows
    seen: int
    spans: tuple[OffsetRange, ...]


def rows_of(judged: Judged, read: Read, decoder: Decoder, capacity: int) -> WindowRows:
    """
    The same rows, in the same order, as when the window was judged.

    Its spans begin and end with its own records, so what lies in [start, end) within them is it;
    fewer rows than `judged.sampled` mean that the log has lost some since.
    """
    return reread([(judged, capacity)], read, decoder)[0].rows


def reread(windows: Sequence[tuple[Judged, int]], read: Read, decoder: Decoder) -> list[Reread]:
    """Several windows, each with its capacity, in one reading of the log."""
    open_windows = [_Again(judged, capacity) for judged, capacity in windows]
    for raw in read(_covering([judged for judged, _ in windows])):
        takers = [window for window in open_windows if window.reaches(raw)]
        if not takers:
            continue
        try:
            record = decoder.decode(raw)
        except InvalidRecord:
            continue
        if isinstance(record, PredictionRecord):
            for window in takers:
                window.offer(record)
    return [window.closed() for window in open_windows]


def _covering(windows: Sequence[Judged]) -> list[OffsetRange]:
    """One range of each partition that covers all spans in it."""
    found: dict[tuple[str, int], OffsetRange] = {}
    for span in (span for judged in windows for span in judged.spans):
        known = found.get((span.topic, span.partition), span)
        found[span.topic, span.partition] = OffsetRange(
            span.topic, span.partition, min(known.start, span.start), max(known.end, span.end)
        )
    return [found[place] for place in sorted(found)]


class _Again:
    """One window that is filled once more."""

    def __init__(self, judged: Judged, capacity: int) -> None:
        self._judged = judged
        self._spans = {Partition(span.topic, span.partition): span for span in judged.spans}
        self._open = OpenWindow(judged.key, judged.start, judged.end, spans={})
        self._sample = Sample(capacity)

    def reaches(self, raw: RawRecord) -> bool:
        span = self._spans.get(raw.partition)
        return span is not None and span.start <= raw.offset < span.end

    def offer(self, record: PredictionRecord) -> None:
        judged = self._judged
        if (
            record.model == judged.model
            and record.model_version == judged.version
            and judged.start <= record.event_time < judged.end
        ):
            self._open.count(record)
            self._sample.add(record)

    def closed(self) -> Reread:
        rows = sorted(self._sample.rows(), key=lambda row: (row.event_time, row.partition, row.offset))
        spans = tuple(
            OffsetRange(partition.topic, partition.index, start, end)
            for partition, (start, end) in sorted(self._open.spans.items())
        )
        return Reread(WindowRows(self._judged.start, self._judged.end, tuple(rows)), self._open.seen, spans)
