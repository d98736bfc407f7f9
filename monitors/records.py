"""Records: what one line of the prediction log or the label log says, and where it was read."""

from datetime import datetime
from typing import Protocol

import msgspec

Scalar = bool | int | float | str | None


class Partition(msgspec.Struct, frozen=True, order=True, gc=False):
    """One partition of a Kafka topic."""

    topic: str
    index: int


class RawRecord(msgspec.Struct, frozen=True):
    """Bytes as they came from the log; `timestamp_ms` is Kafka's, in milliseconds since the epoch."""

    partition: Partition
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()


class PredictionRecord(msgspec.Struct, frozen=True):
    """One prediction that a model served; `event_time` is aware and in UTC."""

    model: str
    model_version: str
    id: str
    event_time: datetime
    features: dict[str, Scalar]
    prediction: Scalar
    partition: Partition
    offset: int
    probability: float | None = None
    label: Scalar = None
    segment: str | None = None


class LabelRecord(msgspec.Struct, frozen=True):
    """The truth about one prediction, known at `event_time`."""

    model: str
    id: str
    label: Scalar
    event_time: datetime
    partition: Partition
    offset: int


class InvalidRecord(ValueError):
    """The bytes are not a record; `code` says why, from a short fixed list, and never holds a value."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class Decoder(Protocol):
    """Bytes to record. Raises `InvalidRecord`, and nothing else, for whatever bytes it is given."""

    def decode(self, raw: RawRecord) -> PredictionRecord | LabelRecord: ...
