"""Quick reading: a mapping compiled into one typed C decode, for the records that are as they should be."""

from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Annotated, Any

import msgspec

from monitors.careful_reader import (
    EPOCH,
    MAX_DEPTH,
    MAX_ID,
    MAX_INTEGER,
    MAX_NAME,
    MIN_INTEGER,
    CarefulReader,
    checked_time,
)
from monitors.records import InvalidRecord, LabelRecord, PredictionRecord, RawRecord
from monitors.sources import is_required

_Integer = Annotated[int, msgspec.Meta(ge=MIN_INTEGER, le=MAX_INTEGER)]
_Scalar = bool | _Integer | float | str | None
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID)]
_TYPES: dict[str, Any] = {
    "model": _Name,
    "model_version": _Name | _Integer,
    "id": _Id | _Integer,
    "features": dict[_Name, _Scalar],
    "prediction": _Scalar,
    "probability": float | None,
    "label": _Scalar,
    "segment": _Name | _Integer | None,
}
_TIMES: dict[str, Any] = {"rfc3339": datetime, "seconds": int | float, "milliseconds": int | float}


class QuickReader:
    """
    Reads what is as it should be, and gives None for the careful reader to decide.

    A property test holds the two together: a record read here is the one that careful reading gives.
    """

    def __init__(
        self, careful: CarefulReader, payload: type, paths: list[str], models: Collection[str], labels: bool
    ) -> None:
        self._careful = careful
        self._models = frozenset(models)
        self._unit = careful.unit
        limits = careful.limits
        self._max_bytes, self._max_features = limits.max_record_bytes, limits.max_features
        self._max_ahead_seconds = limits.max_ahead_seconds
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(payload).decode
        self._values = attrgetter(*paths)
        self._build = self._label if labels else self._prediction
        self._outside = [
            (slot, name)
            for slot, name in enumerate(careful.names)
            if careful.sources[name].kind in ("key", "header", "timestamp")
        ]

    def read(self, raw: RawRecord) -> PredictionRecord | LabelRecord | None:
        """The record, or None if anything about it is unusual."""
        value = raw.value
        if value is None or len(value) > self._max_bytes or _may_be_deep(value):
            return None
        try:
            if not value.isascii():
                value.decode()
            values: Sequence[Any] = self._values(self._decode(value))
            if self._outside:
                values = self._with_outside(values, raw)
            return self._build(values, value, raw)
        except (msgspec.MsgspecError, InvalidRecord, ValueError, RecursionError, OverflowError):
            return None

    def _with_outside(self, values: Sequence[Any], raw: RawRecord) -> list[Any]:
        filled = list(values)
        for slot, name in self._outside:
            filled[slot] = self._careful.value(name, {}, raw)
        return filled

    def _prediction(self, values: Sequence[Any], value: bytes, raw: RawRecord) -> PredictionRecord | None:
        model, version, record_id, time, features, prediction, probability, label, segment = values
        if model not in self._models or not f"{version}{record_id}{segment}".isprintable():
            return None
        if len(features) > self._max_features:
            return None
        # Only an escape can bring a control character into a name.
        if b"\\" in value and not "".join(features).isprintable():
            return None
        return PredictionRecord(
            model,
            version if version.__class__ is str else str(version),
            record_id if record_id.__class__ is str else str(record_id),
            self._time(time, raw),
            features,
            prediction,
            raw.partition,
            raw.offset,
            probability,
            label,
            segment if segment is None or segment.__class__ is str else str(segment),
        )

    def _label(self, values: Sequence[Any], value: bytes, raw: RawRecord) -> LabelRecord | None:
        model, record_id, label, time = values
        if model not in self._models or label is None or not f"{record_id}".isprintable():
            return None
        return LabelRecord(model, str(record_id), label, self._time(time, raw), raw.partition, raw.offset)

    def _time(self, found: Any, raw: RawRecord) -> datetime:
        if found.__class__ is not datetime:
            found = EPOCH + timedelta(**{self._unit: found})
        return checked_time(found, raw, self._max_ahead_seconds)


def compile_reader(careful: CarefulReader, models: Collection[str], labels: bool) -> "QuickReader | None":
    """A quick reader for the mapping; None where two fields want the same place and so have no one type."""
    types = _TYPES | {"event_time": _TIMES[careful.unit]}
    tree = _Branch()
    constants: dict[str, Any] = {}
    paths: list[str] = []
    for slot, name in enumerate(careful.names):
        source = careful.sources[name]
        if source.kind != "payload":
            paths.append(f"constant_{slot}")
            constants[paths[-1]] = source.name if source.kind == "fixed" else None
        elif path := tree.plant(source.path, types[name], is_required(name, labels)):
            paths.append(path)
        else:
            return None
    return QuickReader(careful, tree.struct(constants), paths, models, labels)


class _Leaf:
    def __init__(self, type_: Any, required: bool) -> None:
        self.type, self.required = type_, required


class _Branch:
    """One object of the payload, growing as paths are planted in it."""

    def __init__(self) -> None:
        self._children: dict[str, _Leaf | _Branch] = {}

    @property
    def required(self) -> bool:
        return any(child.required for child in self._children.values())

    def plant(self, path: tuple[str, ...], type_: Any, required: bool) -> str:
        """The attribute path of the new leaf; empty if the place is taken."""
        name, rest = path[0], path[1:]
        if not rest:
            if name in self._children:
                return ""
            self._children[name] = _Leaf(type_, required)
            return self._attribute(name)
        child = self._children.setdefault(name, _Branch())
        inner = child.plant(rest, type_, required) if isinstance(child, _Branch) else ""
        return f"{self._attribute(name)}.{inner}" if inner else ""

    def struct(self, constants: dict[str, Any] | None = None) -> type:
        """The object's type. Attributes are numbered, as names of a payload need not be Python's."""
        return msgspec.defstruct(
            "Payload",
            [self._field(name, child) for name, child in self._ordered()],
            rename={self._attribute(name): name for name in self._children},
            namespace=constants or {},
            gc=False,
        )

    def _attribute(self, name: str) -> str:
        return f"field_{list(self._children).index(name)}"

    def _ordered(self) -> "list[tuple[str, _Leaf | _Branch]]":
        return sorted(self._children.items(), key=lambda item: not item[1].required)

    def _field(self, name: str, child: "_Leaf | _Branch") -> Any:
        type_ = child.type if isinstance(child, _Leaf) else child.struct()
        if child.required:
            return (self._attribute(name), type_)
        default = None if isinstance(child, _Leaf) else msgspec.field(default_factory=type_)
        return (self._attribute(name), type_, default)


def _may_be_deep(value: bytes) -> bool:
    """Counts brackets, as C decoders stop at a depth that depends on the caller's stack."""
    return value.count(b"{") + (value.count(b"[") if b"[" in value else 0) > MAX_DEPTH
