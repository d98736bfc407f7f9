"""Careful reading: what each field of a record is, or the exact reason why the record is invalid."""

import json
import re
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NoReturn

import msgspec

from monitors.records import InvalidRecord, RawRecord, Scalar
from monitors.settings import FieldSettings, LimitSettings
from monitors.sources import Source, is_required, parse_source, record_fields

CODES = {
    "tombstone": "the record has no value",
    "too_large": "the value has more than limits.max_record_bytes",
    "invalid_json": "the value is not JSON in UTF-8",
    "too_deep": "the value is nested more than 64 deep",
    "not_an_object": "the value is JSON, but not an object",
    "missing_field": "a required field is not there or null",
    "invalid_field": "a field is of a wrong type, empty, too long or not printable",
    "unknown_model": "the model is not one of the configured ones",
    "naive_event_time": "event_time has no UTC offset",
    "invalid_event_time": "event_time is no time between the years 1970 and 2199",
    "too_far_ahead": "event_time is later than the Kafka timestamp by more than limits.max_ahead_seconds",
    "too_many_features": "there are more features than limits.max_features",
}
"""Every reason a record can be invalid for. Codes are promises; more may come."""

MAX_DEPTH = 64
MAX_ID = 500
MAX_NAME = 200
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**63 - 1
EPOCH = datetime.fromtimestamp(0, UTC)

_CONSTANTS = {"NaN": None, "Infinity": float("inf"), "-Infinity": float("-inf")}
_END_OF_TIME = datetime(2200, 1, 1, tzinfo=UTC).timestamp()
# Beyond it two integers are one float, and two records would share an id.
_EXACT_FLOAT = 2.0**53
_NUMERIC = frozenset({bool, int, float, type(None)})
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NAME_CONTROL = re.compile(r"[\x00-\x1f]")
_Number = Annotated[int, msgspec.Meta(ge=MIN_INTEGER, le=MAX_INTEGER)] | float


class FieldMapping(msgspec.Struct, frozen=True):
    """How one field was found; `code` and `detail` say why it makes the record a dead letter, if it does."""

    field: str
    source: str
    found: str
    code: str = ""
    detail: str = ""


class CarefulReader:
    """
    Reads any bytes field by field. Slow, exact, and what the quick reader is measured against.

    What Python producers write as NaN is null here, and Infinity stays infinite. Of a name that is
    there twice the last one counts. Integers outside of 64 bits are floats.
    """

    def __init__(self, fields: FieldSettings, models: Collection[str], limits: LimitSettings, labels: bool):
        self.names = record_fields(labels)
        self.sources = {name: parse_source(getattr(fields, name)) for name in self.names}
        self._labels = labels
        self._models = frozenset(models)
        self.limits = limits
        self.unit = fields.event_time_unit
        self._convert: dict[str, Callable[[str, Any, RawRecord], Any]] = {
            "model": self._model,
            "model_version": self._text,
            "id": self._text,
            "event_time": self._event_time,
            "features": self._features,
            "prediction": self._scalar,
            "probability": self._number,
            "label": self._scalar,
            "segment": self._segment,
        }

    def read(self, raw: RawRecord) -> list[Any]:
        """The values of all fields in order, or `InvalidRecord`."""
        payload = self.payload(raw)
        return [self.value(name, payload, raw) for name in self.names]

    def explain(self, raw: RawRecord) -> list[FieldMapping]:
        """How each field was mapped; one row alone where the payload could not be read at all."""
        try:
            payload = self.payload(raw)
        except InvalidRecord as error:
            return [FieldMapping("record", "payload", "no object", error.code, error.detail)]
        return [self._explained(name, payload, raw) for name in self.names]

    def payload(self, raw: RawRecord) -> dict[str, Any]:
        """The payload as plain values."""
        if raw.value is None:
            raise InvalidRecord("tombstone", "the record has no value")
        if len(raw.value) > self.limits.max_record_bytes:
            raise InvalidRecord(
                "too_large", f"{len(raw.value)} bytes, max_record_bytes is {self.limits.max_record_bytes}"
            )
        payload = _parse(raw.value)
        if not isinstance(payload, dict):
            raise InvalidRecord("not_an_object", f"the payload is {_kind(payload)}; expected an object")
        return payload

    def value(self, name: str, payload: dict[str, Any], raw: RawRecord) -> Any:
        """One field's value, converted."""
        found = _find(self.sources[name], payload, raw)
        if found is msgspec.UNSET or (found is None and name != "prediction"):
            if is_required(name, self._labels):
                raise InvalidRecord(
                    "missing_field", f"{name} is missing or null at {self.sources[name].place}"
                )
            return None
        return self._convert[name](name, found, raw)

    def _explained(self, name: str, payload: dict[str, Any], raw: RawRecord) -> FieldMapping:
        source, found = self.sources[name], "nothing"
        try:
            found = _kind(_find(source, payload, raw))
            self.value(name, payload, raw)
        except InvalidRecord as error:
            return FieldMapping(name, source.place, found, error.code, error.detail)
        return FieldMapping(name, source.place, found)

    def _model(self, name: str, found: Any, raw: RawRecord) -> str:
        model = self._text(name, found, raw)
        if model not in self._models:
            raise InvalidRecord("unknown_model", f"{self.sources[name].place} names no configured model")
        return model

    def _text(self, name: str, found: Any, raw: RawRecord) -> str:
        if isinstance(found, bytes):
            found = self._decoded(name, found)
        if isinstance(found, float) and found.is_integer():
            if abs(found) > _EXACT_FLOAT:
                self._refuse(name, "an integer that JSON numbers do not keep exactly; send it as text")
            found = int(found)
        if isinstance(found, int) and not isinstance(found, bool):
            return str(found)
        if not isinstance(found, str):
            self._refuse(name, f"{_kind(found)}; expected text or an integer")
        limit = MAX_ID if name == "id" else MAX_NAME
        if not 0 < len(found) <= limit:
            self._refuse(name, f"{len(found)} characters long; expected 1 to {limit}")
        if _CONTROL.search(found) or not _encodable(found):
            self._refuse(name, "text with control characters or half a surrogate pair")
        return found

    def _segment(self, name: str, found: Any, raw: RawRecord) -> str | None:
        return self._text(name, found, raw) if found not in ("", b"") else None

    def _event_time(self, name: str, found: Any, raw: RawRecord) -> datetime:
        place = self.sources[name].place
        if self.sources[name].kind == "timestamp":
            moment = _since_epoch(found, "milliseconds", place)
        elif self.unit == "rfc3339":
            moment = _rfc3339(found, place)
        else:
            moment = _since_epoch(_plain_number(found), self.unit, place)
        return checked_time(moment, raw, self.limits.max_ahead_seconds)

    def _features(self, name: str, found: Any, raw: RawRecord) -> dict[str, Scalar]:
        if not isinstance(found, dict):
            self._refuse(name, f"{_kind(found)}; expected an object of scalars")
        if len(found) > self.limits.max_features:
            raise InvalidRecord(
                "too_many_features", f"{len(found)} features, max_features is {self.limits.max_features}"
            )
        for column, value in found.items():
            if not _is_name(column):
                self._refuse(
                    name, f"an object with a name that is empty, not printable or over {MAX_NAME} characters"
                )
            if value.__class__ not in _NUMERIC:
                self._plain_scalar(f"feature `{column}`", value, name)
        return found

    def _scalar(self, name: str, found: Any, raw: RawRecord) -> Scalar:
        if isinstance(found, bytes):
            found = _typed(self._decoded(name, found))
        return self._plain_scalar(name, found, name)

    def _plain_scalar(self, what: str, found: Any, name: str) -> Scalar:
        if isinstance(found, str):
            if _encodable(found):
                return found
            raise InvalidRecord("invalid_field", f"{what} is text with half a surrogate pair")
        if found is None or isinstance(found, bool | int | float):
            return found
        expected = "expected a number, text, true, false or null"
        raise InvalidRecord(
            "invalid_field", f"{what} is {_kind(found)} at {self.sources[name].place}; {expected}"
        )

    def _number(self, name: str, found: Any, raw: RawRecord) -> float:
        number = _plain_number(found)
        if isinstance(number, bool) or not isinstance(number, int | float):
            self._refuse(name, f"{_kind(found)}; expected a number")
        return float(number)

    def _decoded(self, name: str, found: bytes) -> str:
        try:
            return found.decode()
        except UnicodeDecodeError:
            self._refuse(name, "not UTF-8")

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise InvalidRecord("invalid_field", f"{name} at {self.sources[name].place} is {what}")


def checked_time(moment: datetime, raw: RawRecord, max_ahead_seconds: float) -> datetime:
    """An event time in UTC that no window can trip over, or `InvalidRecord`."""
    if moment.tzinfo is None:
        raise InvalidRecord("naive_event_time", "event_time has no UTC offset; end it with Z or +hh:mm")
    seconds = moment.timestamp()
    if not 0 <= seconds < _END_OF_TIME:
        raise InvalidRecord("invalid_event_time", "event_time is outside of the years 1970 to 2199")
    if seconds * 1000 > raw.timestamp_ms + max_ahead_seconds * 1000:
        raise InvalidRecord(
            "too_far_ahead",
            f"event_time is more than {max_ahead_seconds:g} seconds after the Kafka timestamp",
        )
    return moment if moment.tzinfo is UTC else moment.astimezone(UTC)


def _parse(value: bytes) -> Any:
    try:
        payload = json.loads(value.decode(), parse_constant=_CONSTANTS.__getitem__, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise InvalidRecord("invalid_json", f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise InvalidRecord("too_deep", f"nested more than {MAX_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        raise InvalidRecord("invalid_json", f"not JSON at character {error.pos}") from None
    if _deeper_than(payload, MAX_DEPTH):
        raise InvalidRecord("too_deep", f"nested more than {MAX_DEPTH} deep")
    return payload


def _integer(digits: str) -> int | float:
    if len(digits) < 19 or (len(digits) < 21 and MIN_INTEGER <= int(digits) <= MAX_INTEGER):
        return int(digits)
    return float(digits)


def _deeper_than(payload: Any, limit: int) -> bool:
    level = [payload]
    for _ in range(limit):
        level = [inner for value in level if isinstance(value, dict | list) for inner in _inside(value)]
        if not level:
            return False
    return any(isinstance(value, dict | list) for value in level)


def _inside(value: dict[str, Any] | list[Any]) -> Collection[Any]:
    return value.values() if isinstance(value, dict) else value


def _find(source: Source, payload: dict[str, Any], raw: RawRecord) -> Any:
    match source.kind:
        case "payload":
            return _walk(payload, source.path)
        case "key":
            return msgspec.UNSET if raw.key is None else raw.key
        case "header":
            return _last_header(raw, source.name)
        case "timestamp":
            return raw.timestamp_ms
        case "fixed":
            return source.name
    return msgspec.UNSET


def _last_header(raw: RawRecord, name: str) -> Any:
    """Kafka lets a header repeat; its own convention is that the last one counts."""
    values = [value for other, value in raw.headers if other == name and value is not None]
    return values[-1] if values else msgspec.UNSET


def _walk(payload: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if payload is None:
            return msgspec.UNSET
        if not isinstance(payload, dict):
            raise InvalidRecord(
                "invalid_field",
                f"`{name}` of `{'.'.join(path)}` lies in {_kind(payload)}; expected an object",
            )
        payload = payload.get(name, msgspec.UNSET)
        if payload is msgspec.UNSET:
            return payload
    return payload


def _rfc3339(found: Any, place: str) -> datetime:
    if isinstance(found, bytes):
        found = found.decode("utf-8", "replace")
    if isinstance(found, int | float) and not isinstance(found, bool):
        hint = "set event_time_unit to seconds or milliseconds"
        raise InvalidRecord("invalid_event_time", f"event_time at {place} is a number; {hint}")
    try:
        return msgspec.convert(found, datetime)
    except (msgspec.ValidationError, UnicodeEncodeError):
        problem = f"event_time at {place} is {_kind(found)}, not RFC 3339 like 2026-01-31T12:00:00Z"
        raise InvalidRecord("invalid_event_time", problem) from None


def _since_epoch(found: Any, unit: str, place: str) -> datetime:
    if isinstance(found, bool) or not isinstance(found, int | float):
        hint = "set event_time_unit to rfc3339 if it is one"
        raise InvalidRecord(
            "invalid_event_time", f"event_time at {place} is {_kind(found)}, not a number of {unit}; {hint}"
        )
    try:
        return EPOCH + timedelta(**{unit: found})
    except (OverflowError, ValueError):
        problem = f"event_time at {place} is outside of the years 1970 to 2199 in {unit}"
        raise InvalidRecord("invalid_event_time", problem) from None


def _plain_number(found: Any) -> Any:
    """The number that a key or a header spells; anything else as it is."""
    if isinstance(found, bytes):
        try:
            return msgspec.json.decode(found, type=_Number)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return found
    return found


def _typed(text: str) -> Scalar:
    """Keys and headers are text; what reads as a number, true or false is one."""
    try:
        return msgspec.json.decode(text, type=bool | _Number)
    except msgspec.MsgspecError:
        return text


def _is_name(column: str) -> bool:
    if not 0 < len(column) <= MAX_NAME:
        return False
    return column.isprintable() or (not _NAME_CONTROL.search(column) and _encodable(column))


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", bytes: "text"}


def _kind(found: Any) -> str:
    """The type of a value in words; never the value."""
    if found is msgspec.UNSET:
        return "nothing"
    if found is None:
        return "null"
    if isinstance(found, dict):
        return f"an object of {len(found)}"
    if isinstance(found, list):
        return f"an array of {len(found)}"
    return _KINDS[type(found)]
