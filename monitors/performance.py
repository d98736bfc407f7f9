"""Performance: how right the predictions of a closed window turned out to be, once labels are there."""

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from math import isfinite
from typing import Literal

import msgspec
import numpy as np

from monitors.events import OffsetRange
from monitors.records import LabelRecord, PredictionRecord, Scalar
from monitors.segments import Segments
from monitors.statistics import long_run_deviation


class PendingWindow(msgspec.Struct):
    """
    A window whose predictions wait for their labels, by record id.

    `segments` are of the predictions in their order; of a window that waited before they were kept, none.
    """

    version: str
    key: int
    end: datetime
    predictions: dict[str, Scalar]
    labels: dict[str, Scalar] = {}
    start: datetime | None = None
    spans: tuple[OffsetRange, ...] = ()
    sound: bool = True
    segments: Segments = Segments()


class SegmentLoss(msgspec.Struct, frozen=True, array_like=True):
    """The labelled rows of one segment of a window, and their mean loss."""

    segment: str
    rows: int
    loss: float


class Performance(msgspec.Struct, frozen=True):
    """
    The second judgement of a window; `score` is None where no label came.

    `loss` is the mean loss of the labelled rows, `deviation` the long-run standard deviation of one
    row's; of a window that is not `sound`, whose data was broken, they say nothing of the model. A
    window that waited since before these were kept has no `start`. `expired` predictions had no label
    when the window was given up, before its labels were due.
    """

    version: str
    key: int
    metric: Literal["accuracy", "mae"]
    score: float | None
    labelled: int
    unlabelled: int
    expired: int = 0
    loss: float | None = None
    deviation: float = 0.0
    start: datetime | None = None
    end: datetime | None = None
    spans: tuple[OffsetRange, ...] = ()
    sound: bool = True
    segments: tuple[SegmentLoss, ...] = ()


class Patience(msgspec.Struct, frozen=True):
    """
    How long predictions wait for labels.

    A window is judged when it has all its labels, or when the labels have passed its end by `horizon`. It
    is given up, and judged on the labels that came, when the predictions have passed its end by `longest`
    (the labels may have fallen silent), or when it is the oldest and more than `rows` predictions wait.
    """

    horizon: timedelta
    longest: timedelta
    rows: int


class EarlyLabel(msgspec.Struct, frozen=True):
    """A label whose prediction is not in a closed window (yet); `earlier` as in `Labels.add`."""

    id: str
    label: Scalar
    earlier: datetime | None


class LabelChanges(msgspec.Struct, frozen=True):
    """
    What a checkpoint must add to the one before it.

    `expected` are whole windows, `matched` labels to add to windows by (version, key), `judged` the
    windows to forget. `early` are labels that came before their window closed; they were numbered
    up to `early_end`, and those numbered below `early_start` are forgotten.
    """

    expected: tuple[PendingWindow, ...]
    matched: dict[tuple[str, int], dict[str, Scalar]]
    judged: tuple[tuple[str, int], ...]
    early: tuple[EarlyLabel, ...]
    early_start: int
    early_end: int


class Labels:
    """
    Joins the labels of one model to its sampled predictions, whichever comes first.

    Of the labels that find no closed window the newest `capacity` are kept. A label counts for a
    window if its own partition had not passed the window's horizon before it, and if a row was still
    without one. A window is judged at the very label that completes it, and what was judged is handed
    out in that order by `take_judged`: so it depends on the order of what this is told, and on nothing else.
    """

    def __init__(self, kind: Literal["classification", "regression"], capacity: int, patience: Patience):
        self._metric: Literal["accuracy", "mae"] = "accuracy" if kind == "classification" else "mae"
        self._capacity = capacity
        self._patience = patience
        self._pending: dict[tuple[str, int], PendingWindow] = {}
        self._oldest: list[tuple[datetime, str, int]] = []  # a heap; some of these are judged already
        self._waiting = 0
        self._home: dict[str, tuple[str, int]] = {}
        self._early: OrderedDict[str, EarlyLabel] = OrderedDict()
        self._early_end = 0
        self._performances: list[Performance] = []
        self._expected: list[tuple[str, int]] = []
        self._matched: dict[tuple[str, int], dict[str, Scalar]] = {}
        self._judged: list[tuple[str, int]] = []
        self._early_added: list[EarlyLabel] = []

    def expect(
        self,
        version: str,
        key: int,
        start: datetime,
        end: datetime,
        rows: Sequence[PredictionRecord],
        spans: tuple[OffsetRange, ...] = (),
        sound: bool = True,
    ) -> None:
        """A window closed: its sampled predictions wait from now on."""
        predictions = {row.id: row.prediction for row in rows}
        segments = Segments.of(list({row.id: row.segment for row in rows}.values()))
        window = PendingWindow(version, key, end, predictions, {}, start, spans, sound, segments)
        for row in rows:
            early = self._early.get(row.id)
            if row.label is not None:
                window.labels[row.id] = row.label
            elif early is not None and self._in_time(window, early.earlier):
                window.labels[row.id] = early.label
        self._await(window)
        self._expected.append((version, key))
        self._judge_if_complete(window)

    def add(self, record: LabelRecord, earlier: datetime | None) -> None:
        """A label came; `earlier` is the stream time of its partition before it."""
        home = self._home.get(record.id)
        if home is None:
            self._keep(EarlyLabel(record.id, record.label, earlier))
            self._early_added.append(self._early[record.id])
        elif self._in_time(self._pending[home], earlier):
            self._pending[home].labels[record.id] = record.label
            self._matched.setdefault(home, {})[record.id] = record.label
            self._judge_if_complete(self._pending[home])

    def pass_labels(self, label_time: datetime) -> None:
        """The labels have come so far in event time: judge the windows whose labels are due, oldest first."""
        while (window := self._first()) and window.end + self._patience.horizon <= label_time:
            self._judge(window)

    def pass_predictions(self, prediction_time: datetime) -> None:
        """The predictions have: give up the oldest windows, of those that waited too long or are too many."""
        while (window := self._first()) and (
            window.end + self._patience.longest <= prediction_time or self._waiting > self._patience.rows
        ):
            self._judge(window, given_up=True)

    def take_judged(self) -> list[Performance]:
        """What was judged since this was last asked for, in order."""
        judged, self._performances = self._performances, []
        return judged

    def take_changes(self) -> LabelChanges:
        """What happened since this was last asked for."""
        live = [self._pending[home] for home in self._expected if home in self._pending]
        changes = LabelChanges(
            expected=tuple(msgspec.structs.replace(window, labels=dict(window.labels)) for window in live),
            matched={home: labels for home, labels in self._matched.items() if home in self._pending},
            judged=tuple(self._judged),
            early=tuple(self._early_added),
            early_start=self._early_end - self._capacity,
            early_end=self._early_end,
        )
        self._expected, self._matched, self._judged, self._early_added = [], {}, [], []
        return changes

    def restore(self, windows: Iterable[PendingWindow], early: Iterable[EarlyLabel], early_end: int) -> None:
        """Go on from a checkpoint; each window with the labels that were matched to it."""
        for label in early:
            self._keep(label)
        self._early_end = early_end
        for window in windows:
            self._await(window)
            self._judge_if_complete(window)

    def _await(self, window: PendingWindow) -> None:
        home = window.version, window.key
        self._pending[home] = window
        self._waiting += len(window.predictions)
        self._home.update(dict.fromkeys(window.predictions, home))
        heapq.heappush(self._oldest, (window.end, *home))

    def _first(self) -> PendingWindow | None:
        """The oldest window that waits."""
        while self._oldest and self._oldest[0][1:] not in self._pending:
            heapq.heappop(self._oldest)
        return self._pending[self._oldest[0][1:]] if self._oldest else None

    def _keep(self, label: EarlyLabel) -> None:
        self._early.pop(label.id, None)
        self._early[label.id] = label
        self._early_end += 1
        if len(self._early) > self._capacity:
            self._early.popitem(last=False)

    def _in_time(self, window: PendingWindow, earlier: datetime | None) -> bool:
        return earlier is None or earlier < window.end + self._patience.horizon

    def _judge_if_complete(self, window: PendingWindow) -> None:
        if len(window.labels) == len(window.predictions):
            self._judge(window)

    def _judge(self, window: PendingWindow, given_up: bool = False) -> None:
        del self._pending[window.version, window.key]
        self._waiting -= len(window.predictions)
        self._judged.append((window.version, window.key))
        for record_id in window.predictions:
            self._home.pop(record_id, None)
        costs = [
            loss(self._metric, prediction, window.labels[record_id]) if record_id in window.labels else None
            for record_id, prediction in window.predictions.items()
        ]
        losses = [cost for cost in costs if cost is not None]
        mean = math.fsum(losses) / len(losses) if losses else None
        performance = Performance(
            version=window.version,
            key=window.key,
            metric=self._metric,
            score=mean if mean is None or self._metric == "mae" else 1.0 - mean,
            labelled=len(losses),
            unlabelled=len(window.predictions) - len(losses),
            expired=len(window.predictions) - len(window.labels) if given_up else 0,
            loss=mean,
            deviation=long_run_deviation(np.array(losses)) if losses else 0.0,
            start=window.start,
            end=window.end,
            spans=window.spans,
            sound=window.sound,
            segments=tuple(_by_segment(window.segments, costs)),
        )
        self._performances.append(performance)


def _by_segment(segments: Segments, costs: Sequence[float | None]) -> Iterator[SegmentLoss]:
    for segment, rows in segments.parts():
        known = [cost for row in rows if (cost := costs[row]) is not None]
        if known:
            yield SegmentLoss(segment, len(known), math.fsum(known) / len(known))


def loss(metric: Literal["accuracy", "mae"], prediction: Scalar, label: Scalar) -> float | None:
    """
    What one prediction cost: 0 or 1 for classes, the absolute error for numbers (None if one isn't).

    Classes are compared as they are written, so that 1, 1.0 and "1" are one class.

    >>> loss("accuracy", 1, "1"), loss("mae", 2.5, 4)
    (0.0, 1.5)
    """
    if metric == "mae":
        one, other = _number(prediction), _number(label)
        return None if one is None or other is None else abs(one - other)
    return 0.0 if same_class(prediction, label) else 1.0


def same_class(one: Scalar, other: Scalar) -> bool:
    """Whether two logged values name the same class."""
    return one == other or _class_name(one) == _class_name(other)


def _class_name(value: Scalar) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _number(value: Scalar) -> float | None:
    return float(value) if isinstance(value, int | float) and isfinite(value) else None
