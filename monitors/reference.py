"""Reference: the rows that a model version was trained on or first served, which drift is measured from."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import chain
from types import NoneType
from typing import Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from monitors.baseline import Baseline
from monitors.columns import Kind, as_floats, kind_of
from monitors.drift import Finding
from monitors.records import Scalar
from monitors.seasons import Season, Slots, microseconds_of
from monitors.segments import Segments
from monitors.settings import DriftSettings
from monitors.statistics import ColumnType, Floats

Rows = npt.NDArray[np.int64]

SCHEMA: Final = 1
MAX_ROWS = 200_000
PREDICTION = "prediction"
"""What the prediction is called beside the features, in scores, findings and settings."""

_FEW_INTEGERS = 10
_EXACT_INTEGERS = 2**53
_SCALARS = frozenset({bool, int, float, str, NoneType})
_NULLS_OF_PANDAS = frozenset({"NAType", "NaTType"})


class InvalidReference(ValueError):
    """These rows, or these bytes, make no reference; the message says why and what to do."""


class ReferenceColumn(msgspec.Struct, frozen=True):
    """
    One column, row by row: numbers as little-endian float64 with NaN for null, or the values themselves.

    `type` is None for a column that is not scored, and `detail` then says why. `foreign` names the
    types of values that no JSON record can hold; they are kept as null.
    """

    name: str
    type: ColumnType | None
    detail: str = ""
    numbers: bytes | None = None
    integers: bool = False
    texts: tuple[Scalar, ...] = ()
    foreign: tuple[str, ...] = ()

    def values(self) -> list[Scalar]:
        """The column as it came; integers among floats have become floats."""
        if self.numbers is None:
            return list(self.texts)
        floats = np.frombuffer(self.numbers, dtype="<f8").tolist()
        if self.integers:
            return [None if number != number else int(number) for number in floats]
        return [None if number != number else number for number in floats]

    @property
    def rows(self) -> int:
        """How many rows the column has, nulls included."""
        return len(self.texts) if self.numbers is None else len(self.numbers) // 8

    def kinds(self) -> frozenset[Kind]:
        """Whether it holds numbers, text or both; empty if it holds nothing."""
        if self.numbers is not None:
            return frozenset({"number"})
        return frozenset(kind for value in self.texts if (kind := kind_of(value)) is not None)

    def retyped(self, stated: ColumnType | None) -> "ReferenceColumn":
        """The same values under the type that the settings state now; None leaves it as it is."""
        if stated is None or stated == self.type:
            return self
        type, detail = _type_of(self.values(), stated, self.foreign)
        return msgspec.structs.replace(self, type=type, detail=detail)


class Reference(msgspec.Struct, frozen=True):
    """
    Immutable, self-describing, and the same bytes for the same rows in every process.

    `baseline` is how well the version did on rows that it was not trained on. `times` are the rows' event
    times, little-endian int64 microseconds since the epoch; references of before they were kept, and of rows
    without a time, have none. `segments` are of its rows; references of before they were kept, and of rows
    that name none, have none.
    """

    model: str
    model_version: str
    columns: tuple[ReferenceColumn, ...]
    predictions: ReferenceColumn
    ignored: tuple[str, ...] = ()
    baseline: Baseline | None = None
    format: Literal["retrain-daemon.reference"] = "retrain-daemon.reference"
    schema: int = SCHEMA
    times: bytes | msgspec.UnsetType = msgspec.UNSET
    segments: Segments | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def from_rows(
        cls,
        model: str,
        version: str,
        rows: Sequence[Mapping[str, Scalar]],
        predictions: Sequence[Scalar],
        settings: DriftSettings,
        times: Sequence[datetime] | None = None,
        *,
        segments: Sequence[str | None] = (),
    ) -> "Reference":
        """
        Fixes the columns, in order of first appearance, and their types. `times` are the rows' event times.

        >>> rows = [{"age": 31.5, "plan": "free"}, {"age": 44.0, "plan": "free"}]
        >>> reference = Reference.from_rows("churn", "7", rows, [0, 1], DriftSettings())
        >>> [(column.name, column.type) for column in reference.columns], reference.rows
        ([('age', 'numeric'), ('plan', 'categorical')], 2)
        >>> Reference.from_bytes(reference.to_bytes()) == reference
        True
        """
        if not 0 < len(rows) <= MAX_ROWS:
            raise InvalidReference(
                f"a reference has 1 to {MAX_ROWS} rows, not {len(rows)}: see models.{model}.reference_rows"
            )
        if len(rows) != len(predictions):
            raise InvalidReference(f"{len(rows)} rows came with {len(predictions)} predictions")
        if times is not None and len(times) != len(rows):
            raise InvalidReference(f"{len(rows)} rows came with {len(times)} event times")
        if len(segments) not in (0, len(rows)):
            raise InvalidReference(f"{len(rows)} rows came with {len(segments)} segments")
        names = [name for name in dict.fromkeys(chain(*rows)) if name not in settings.ignore]
        return cls(
            model,
            version,
            tuple(_column(name, [row.get(name) for row in rows], settings.types.get(name)) for name in names),
            _column(PREDICTION, predictions, None),
            tuple(settings.ignore),
            times=msgspec.UNSET if times is None else microseconds_of(times).astype("<i8").tobytes(),
            segments=Segments.of(segments) if any(segments) else msgspec.UNSET,
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Reference":
        """What `to_bytes` wrote, or `InvalidReference`."""
        try:
            reference = _DECODER.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidReference(
                "these bytes are not a reference of this version of retrain-daemon"
            ) from error
        if reference.schema != SCHEMA:
            raise InvalidReference(
                f"the reference has schema {reference.schema}, this retrain-daemon reads {SCHEMA}"
            )
        lengths = {column.rows for column in reference.columns}
        if reference.times is not msgspec.UNSET:
            lengths.add(len(reference.times) // 8)
        if lengths - {reference.rows}:
            raise InvalidReference(
                "the reference's columns differ in length: it was cut or put together by hand"
            )
        if reference.segments and len(reference.segments.places) != reference.rows:
            raise InvalidReference("the reference's segments are not those of its rows")
        return reference

    def to_bytes(self) -> bytes:
        """Self-contained MessagePack; equal references give equal bytes."""
        return msgspec.msgpack.encode(self)

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def rows(self) -> int:
        """How many rows it was made from."""
        return self.predictions.rows

    def slots(self, season: Season | None) -> Slots | None:
        """Each row's slot of the season; None without a season, or where the times are not known."""
        if season is None or self.times is msgspec.UNSET:
            return None
        return season.slots_of(np.frombuffer(self.times, dtype="<i8"))

    @property
    def unscored(self) -> tuple[Finding, ...]:
        """The feature columns that drift cannot be measured on, and why."""
        return tuple(unscored(column.name, column.detail) for column in self.columns if column.type is None)

    def to_rows(self) -> list[dict[str, Scalar]]:
        """The feature rows again; a column that a row did not have is null there now."""
        names = [column.name for column in self.columns]
        values = [column.values() for column in self.columns]
        if not names:
            return [{} for _ in range(self.rows)]
        return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


_DECODER = msgspec.msgpack.Decoder(Reference)


def unscored(column: str, detail: str) -> Finding:
    """The finding that takes the place of a score; `detail` never holds a value."""
    return Finding(column, "unscored", 1.0, False, detail)


def _column(name: str, raw: Sequence[object], stated: ColumnType | None) -> ReferenceColumn:
    foreign: set[str] = set()
    values = [_scalar(value, foreign) for value in raw]
    types = {type(value) for value in values if value is not None}
    type_, detail = _type_of(values, stated, tuple(sorted(foreign)))
    if types and types <= {int, float} and _exact(values):
        floats = as_floats([np.nan if value is None else value for value in values])  # type: ignore[misc]
        return ReferenceColumn(
            name, type_, detail, floats.astype("<f8").tobytes(), types == {int}, (), tuple(sorted(foreign))
        )
    storable = tuple(_storable(value) for value in values)
    return ReferenceColumn(name, type_, detail, texts=storable, foreign=tuple(sorted(foreign)))


def _scalar(value: object, foreign: set[str]) -> Scalar:
    """A JSON scalar for whatever a DataFrame may hold; NaN is null, and so is what JSON has no word for."""
    if type(value) not in _SCALARS and hasattr(value, "item"):
        value = value.item()
    if value is None or value != value or type(value).__name__ in _NULLS_OF_PANDAS:
        return None
    for scalar in (bool, str, int, float):
        if isinstance(value, scalar):
            return scalar(value)
    foreign.add(type(value).__name__)
    return None


def _exact(values: Sequence[Scalar]) -> bool:
    return all(type(value) is not int or abs(value) <= _EXACT_INTEGERS for value in values)


def _storable(value: Scalar) -> Scalar:
    """MessagePack has no integers beyond 64 bits; scoring takes them for floats anyway."""
    if type(value) is int and not -(2**63) <= value < 2**64:
        return float(as_floats([value])[0])
    return value


def _type_of(
    values: Sequence[Scalar], stated: ColumnType | None, foreign: tuple[str, ...]
) -> tuple[ColumnType | None, str]:
    usable = [value for value in values if value is not None]
    if foreign:
        return None, f"holds {', '.join(foreign)} values: make them numbers or text, or ignore the column"
    if not usable:
        return None, "empty in the reference"
    types = {type(value) for value in usable}
    if stated == "categorical":
        return "categorical", ""
    if stated == "numeric":
        if types & {int, float}:
            return "numeric", ""
        return None, "stated as numeric, but the reference holds no numbers"
    return _inferred(usable, types)


def _inferred(usable: Sequence[Scalar], types: set[type]) -> tuple[ColumnType | None, str]:
    """Evidently's rules, decided once by the reference and not again by each window."""
    if types == {bool}:
        return "categorical", ""
    if types == {str}:
        if len(set(usable)) > 0.5 * len(usable):
            return None, "looks like free text or ids: more than half of the values differ"
        return "categorical", ""
    if types == {int}:
        return ("categorical" if len(set(usable)) <= _FEW_INTEGERS else "numeric"), ""
    if types <= {int, float}:
        return "numeric", ""
    names = ", ".join(sorted(type.__name__ for type in types))
    return None, f"mixes {names} in the reference: state its type in drift.types"


def finite_floats(column: ReferenceColumn) -> tuple[Floats, Rows]:
    """The numbers of a numeric column that a score is computed from, and their rows, in row order."""
    if column.numbers is not None:
        floats = np.frombuffer(column.numbers, dtype="<f8")
        rows = np.arange(floats.size)
    else:
        numbers = [(row, value) for row, value in enumerate(column.texts) if type(value) in (int, float)]
        floats = as_floats([value for _, value in numbers])  # type: ignore[misc]
        rows = np.array([row for row, _ in numbers], dtype=np.int64)
    finite = np.isfinite(floats)
    return floats[finite].astype(np.float64), rows[finite]
