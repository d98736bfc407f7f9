"""Extraction: the newest labelled rows of a model, from the topics, a folder or the user's function."""

import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from daemon.wire.kafka import log_bounds, read_ranges
from flows.callables import load_callable
from flows.errors import FlowError, NotRetrainable
from flows.rows import LabelledRows
from monitors.decoding import make_decoder
from monitors.events import OffsetRange, RetrainRequest
from monitors.records import (
    Decoder,
    InvalidRecord,
    LabelRecord,
    Partition,
    PredictionRecord,
    Scalar,
)
from monitors.settings import FlowSettings, KafkaSettings

if TYPE_CHECKING:
    import pandas as pd

log = structlog.get_logger()

# Columns of a folder or of a user's frame that are no features.
LABEL, PREDICTION, PROBABILITY, EVENT_TIME = "label", "prediction", "probability", "event_time"
SEGMENT = "segment"
_BESIDE = (LABEL, PREDICTION, PROBABILITY, EVENT_TIME, SEGMENT, "id", "model", "model_version")
# How many records may be read to find one labelled row of this model among all the others.
_READ_PER_ROW = 50


class UnreadableRows(FlowError):
    """The place that should hold labelled rows doesn't."""


def extract(settings: FlowSettings, request: RetrainRequest | None) -> LabelledRows:
    """
    The newest labelled rows in event-time order, at most `data.max_rows`.

    Fewer than `data.min_rows` are a reason to refuse the request, not an error.
    """
    data = settings.settings.data
    if data.source == "topics":
        rows = from_topics(settings, request.model_version if request else "")
    elif data.source == "folder":
        rows = from_frame(read_folder(Path(data.path)), settings, f"data.path = {data.path}")
    else:
        function = load_callable(data.callable, f"models.{settings.model}.data.callable")
        rows = from_frame(function(settings, request), settings, f"data.callable = {data.callable}")
    log.info("rows_extracted", model=settings.model, source=data.source, rows=len(rows))
    if len(rows) < data.min_rows:
        raise NotRetrainable(f"only {len(rows)} labelled rows, {data.min_rows} needed")
    return rows


# Folders and frames


def read_folder(path: Path) -> "pd.DataFrame":
    """A Parquet or CSV file, or all of a folder in the order of their names."""
    import pandas as pd

    found = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in found if file.suffix in (".parquet", ".csv")]
    if not files or not files[0].exists():
        raise UnreadableRows(f"no .parquet or .csv file at data.path = {path}")
    return pd.concat([_read_file(file) for file in files], ignore_index=True)


def _read_file(file: Path) -> "pd.DataFrame":
    import pandas as pd

    try:
        return pd.read_csv(file) if file.suffix == ".csv" else pd.read_parquet(file)
    except ImportError as error:
        raise UnreadableRows(f"{file}: Parquet needs `pip install retrain-daemon[parquet]`") from error
    except (OSError, ValueError) as error:
        raise UnreadableRows(f"{file} can't be read: {error}") from error


def from_frame(frame: "pd.DataFrame", settings: FlowSettings, place: str) -> LabelledRows:
    """
    Labelled rows of a frame with a column `label`.

    Optional beside it: `event_time` (without it the rows' order is their time), `prediction` and
    `probability` as the serving model logged them, and `segment`, for which the gate judges apart;
    `id`, `model` and `model_version` are left out. Every other column is a feature. Rows of other
    models, if `model` says so, and rows without a label are dropped.
    """
    if LABEL not in frame:
        raise UnreadableRows(f"{place}: no column {LABEL!r} among {sorted(map(str, frame.columns))[:20]}")
    kept = frame[_known(frame[LABEL], settings)]
    if "model" in kept:
        kept = kept[kept["model"] == settings.model]
    kept = kept.reset_index(drop=True)
    nothing: list[Any] = [None] * len(kept)
    return LabelledRows.sorted(
        kept[[name for name in kept.columns if name not in _BESIDE]],
        [plain_scalar(value) for value in kept[LABEL].tolist()],
        _seconds(kept, place),
        [plain_scalar(value) for value in kept[PREDICTION].tolist()] if PREDICTION in kept else nothing,
        kept[PROBABILITY].tolist() if PROBABILITY in kept else nothing,
        newest=settings.settings.data.max_rows,
        segments=[plain_scalar(value) for value in kept[SEGMENT].tolist()] if SEGMENT in kept else None,
    )


def _known(labels: "pd.Series", settings: FlowSettings) -> "pd.Series":
    import numpy as np
    import pandas as pd

    if settings.settings.kind == "classification":
        return labels.notna()
    numbers = pd.to_numeric(labels, errors="coerce").astype(float)
    return pd.Series(np.isfinite(numbers), index=labels.index)


def plain_scalar(value: Any) -> Scalar:
    """One of JSON's scalars; whatever is missing in pandas' many ways is None."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or type(value).__name__ == "NAType" or value != value:
        return None
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _seconds(frame: "pd.DataFrame", place: str) -> list[float]:
    import pandas as pd

    if EVENT_TIME not in frame:
        return [float(index) for index in range(len(frame))]
    try:
        times = pd.to_datetime(frame[EVENT_TIME], utc=True)
    except (ValueError, TypeError) as error:
        raise UnreadableRows(f"{place}: column {EVENT_TIME!r} has no times: {error}") from error
    if times.isna().any():
        raise UnreadableRows(f"{place}: {int(times.isna().sum())} rows have no {EVENT_TIME}")
    return [moment.timestamp() for moment in times.dt.to_pydatetime()]


# Topics


def from_topics(settings: FlowSettings, serving: str = "") -> LabelledRows:
    """
    Join predictions with their labels, from the ends of the topics backwards.

    Of several records with one id (a shadow model beside the serving one), the one of version
    `serving` counts, else the newest.
    """
    wanted = settings.settings.data.max_rows
    kind, kafka = settings.settings.kind, settings.kafka
    decoder = make_decoder(settings.fields, kafka.labels_topic, {settings.model}, settings.limits)
    labels, label_ranges = _labels(settings, decoder) if kafka.labels_topic else ({}, [])
    tail = _Tail(kafka, kafka.topics, wanted)
    rows: dict[str, PredictionRecord] = {}
    while len(rows) < wanted and tail.left:
        for record in _of_model(settings, decoder, tail.read()):
            if not isinstance(record, PredictionRecord) or not usable(truth(record, labels), kind):
                continue
            held = rows.get(record.id)
            if held is None or rank(record, serving) >= rank(held, serving):
                rows[record.id] = record
    return joined(rows.values(), labels, tuple(label_ranges) + tuple(tail.ranges), wanted)


def _labels(settings: FlowSettings, decoder: Decoder) -> tuple[dict[str, Scalar], list[OffsetRange]]:
    """The newest labels by id; of two about one id the later one in the log is right."""
    tail = _Tail(settings.kafka, (settings.kafka.labels_topic,), settings.settings.data.max_rows)
    labels: dict[str, Scalar] = {}
    while len(labels) < settings.settings.data.max_rows and tail.left:
        older = {
            record.id: record.label
            for record in _of_model(settings, decoder, tail.read())
            if isinstance(record, LabelRecord)
        }
        labels = {**older, **labels}
    return labels, tail.ranges


class _Tail:
    """Reads topics backwards, each time a larger piece before the last one, up to a bound."""

    def __init__(self, kafka: KafkaSettings, topics: Iterable[str], piece: int) -> None:
        self._kafka = kafka
        self._first: dict[Partition, int] = {}
        self._end: dict[Partition, int] = {}
        self._next: dict[Partition, int] = {}
        for topic in topics:
            for partition, (first, end) in log_bounds(kafka, topic).items():
                self._first[partition], self._end[partition] = first, end
        self._next |= self._end
        self._piece = max(piece, 1_000)
        self._budget = self._piece * _READ_PER_ROW

    @property
    def left(self) -> bool:
        """Whether there is more to read, within the bound."""
        return self._budget > 0 and any(self._next[which] > self._first[which] for which in self._next)

    @property
    def ranges(self) -> list[OffsetRange]:
        """What has been read so far, as one range per partition."""
        return [
            OffsetRange(which.topic, which.index, self._next[which], self._end[which])
            for which in sorted(self._next)
            if self._next[which] < self._end[which]
        ]

    def read(self) -> Iterator[Any]:
        """The records of the next piece, spread over the partitions that have any left."""
        open_ones = [which for which in sorted(self._next) if self._next[which] > self._first[which]]
        share = -(-self._piece // len(open_ones))
        ranges = []
        for which in open_ones:
            start = max(self._first[which], self._next[which] - share)
            ranges.append(OffsetRange(which.topic, which.index, start, self._next[which]))
            self._next[which] = start
            self._budget -= ranges[-1].end - start
        self._piece *= 2
        return iter(read_ranges(self._kafka, ranges))


def _of_model(
    settings: FlowSettings, decoder: Decoder, raw_records: Iterable[Any]
) -> Iterator[PredictionRecord | LabelRecord]:
    for raw in raw_records:
        try:
            record = decoder.decode(raw)
        except InvalidRecord:
            # The daemon keeps these as dead letters; here they're only not rows.
            continue
        if record.model == settings.model:
            yield record


def truth(record: PredictionRecord, labels: Mapping[str, Scalar]) -> Scalar:
    joined = labels.get(record.id)
    return record.label if joined is None else joined


def rank(record: PredictionRecord, serving: str) -> tuple[bool, datetime, int]:
    return record.model_version == serving, record.event_time, record.offset


def usable(label: Scalar, kind: str) -> bool:
    if label is None or kind == "classification":
        return label is not None
    return isinstance(label, (bool, int, float)) and math.isfinite(label)


def joined(
    records: Iterable[PredictionRecord],
    labels: Mapping[str, Scalar],
    offsets: tuple[OffsetRange, ...],
    newest: int,
) -> LabelledRows:
    import pandas as pd

    ordered = sorted(records, key=lambda record: (record.event_time, record.partition, record.offset))
    return LabelledRows.sorted(
        pd.DataFrame.from_records([record.features for record in ordered]),
        [truth(record, labels) for record in ordered],
        [record.event_time.timestamp() for record in ordered],
        [record.prediction for record in ordered],
        [record.probability for record in ordered],
        offsets,
        newest,
        [record.segment for record in ordered],
    )
