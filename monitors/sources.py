"""Sources: where one field of a record is found, as one string of the config says it."""

from typing import Literal

import msgspec

from monitors.settings import FieldSettings

PREDICTION_FIELDS = (
    "model",
    "model_version",
    "id",
    "event_time",
    "features",
    "prediction",
    "probability",
    "label",
    "segment",
)
LABEL_FIELDS = ("model", "id", "label", "event_time")
OPTIONAL = frozenset({"probability", "label", "segment"})


class Source(msgspec.Struct, frozen=True):
    """`path` leads through the payload's objects; `name` is a header's name or a fixed value."""

    kind: Literal["payload", "key", "header", "timestamp", "fixed", "absent"]
    path: tuple[str, ...] = ()
    name: str = ""

    @property
    def place(self) -> str:
        """The source as a person would point at it."""
        match self.kind:
            case "payload":
                return f"payload `{'.'.join(self.path)}`"
            case "key":
                return "Kafka key"
            case "header":
                return f"header `{self.name}`"
            case "timestamp":
                return "Kafka timestamp"
            case "fixed":
                return "fixed"
        return "not mapped"


def parse_source(text: str) -> Source:
    """
    Read one source; ValueError says what is wrong with it.

    >>> parse_source("meta.served_at").path
    ('meta', 'served_at')
    >>> parse_source("@header:model").name
    'model'
    """
    if not text:
        return Source("absent")
    if text == "@key":
        return Source("key")
    if text == "@timestamp":
        return Source("timestamp")
    if text.startswith("@"):
        return _named_source(text)
    path = tuple(text.split("."))
    if "" in path:
        raise ValueError(f"{text!r} is no path; write names joined by single dots")
    return Source("payload", path)


def _named_source(text: str) -> Source:
    kind, colon, name = text[1:].partition(":")
    if colon and name and kind == "header":
        return Source("header", name=name)
    if colon and name and kind == "fixed":
        return Source("fixed", name=name)
    raise ValueError(f"{text!r} is no source; use a path, @key, @header:NAME, @timestamp or @fixed:VALUE")


def record_fields(labels: bool) -> tuple[str, ...]:
    """The fields of a label record or of a prediction record."""
    return LABEL_FIELDS if labels else PREDICTION_FIELDS


def is_required(field: str, labels: bool) -> bool:
    """Whether a record without this field is invalid; a label record is nothing without its label."""
    return labels or field not in OPTIONAL


def mapping_problems(fields: FieldSettings, labels: bool) -> list[tuple[str, str]]:
    """
    What is wrong with a mapping, as (field, problem) pairs.

    >>> mapping_problems(FieldSettings(id="@timestamp"), labels=False)
    [('id', '@timestamp is a time; only event_time can come from it')]
    """
    problems: list[tuple[str, str]] = []
    sources: dict[str, Source] = {}
    for field in record_fields(labels):
        try:
            sources[field] = parse_source(getattr(fields, field))
        except ValueError as error:
            problems.append((field, str(error)))
    for field, source in sources.items():
        if problem := _misfit(field, source, labels):
            problems.append((field, problem))
    return problems + _overlaps(sources)


def _misfit(field: str, source: Source, labels: bool) -> str:
    if source.kind == "absent" and is_required(field, labels):
        return "must have a source; every record needs it"
    if source.kind == "timestamp" and field != "event_time":
        return "@timestamp is a time; only event_time can come from it"
    if field == "features" and source.kind != "payload":
        return "features are an object of the payload; give its path"
    if source.kind == "fixed" and field not in ("model", "model_version", "segment"):
        return "cannot be the same for every record; give a path, @key or @header:NAME"
    return ""


def _overlaps(sources: dict[str, Source]) -> list[tuple[str, str]]:
    features = sources.get("features", Source("absent")).path
    if not features:
        return []
    return [
        (field, "lies inside features and would be taken for one; move it out of that object")
        for field, source in sources.items()
        if field != "features" and source.path[: len(features)] == features
    ]
