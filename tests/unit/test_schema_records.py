"""The published JSON Schemas accept what the decoder accepts, under the default mapping."""

import json
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st

from monitors.decoding import JsonDecoder
from monitors.records import InvalidRecord, Partition, RawRecord
from monitors.settings import FieldSettings, LimitSettings

# What a schema cannot say, and says in its $comment.
BEYOND_A_SCHEMA = {"too_large", "too_deep", "too_many_features", "unknown_model", "too_far_ahead"}
GOOD: dict[str, Any] = {
    "model": "fraud",
    "model_version": "7",
    "id": "a1",
    "event_time": "2026-01-31T12:00:00Z",
    "features": {"amount": 12.5},
    "prediction": 1,
}


def schema(kind: str) -> dict[str, Any]:
    text = files("monitors").joinpath(f"schema/{kind}-record.schema.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


VALIDATORS = {kind: jsonschema.Draft202012Validator(schema(kind)) for kind in ("prediction", "label")}
DECODERS = {
    kind: JsonDecoder(FieldSettings(), {"fraud", "5"}, LimitSettings(), labels=kind == "label")
    for kind in VALIDATORS
}

TEXTS = st.text(max_size=8) | st.sampled_from(["", "a\n", "a\nb", "\x7f", "\x85", "é", "x" * 200, "x" * 201])
NUMBERS = (
    st.integers(-3, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([2**63, 2**63 - 1, -(2**63), -(2**63) - 1, 1e30, 10**40, 7.0, float(2**63)])
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(TEXTS, SCALARS, max_size=3)
TIMES = st.from_regex(
    schema("label")["properties"]["event_time"]["pattern"].removesuffix(r"(?!\n)"),
    alphabet=st.characters(codec="ascii"),
)
TIMES = TIMES | st.sampled_from(
    ["2026-01-31T12:00:00", "2026-01-31", "2026-01-31T12:00:00Z\n", "2026-01-31T12:60:00Z"]
)
FIELDS = {
    "model": st.sampled_from(["fraud", 5, 5.0]) | VALUES,
    "model_version": VALUES,
    "id": VALUES | st.sampled_from(["x" * 500, "x" * 501]),
    "event_time": TIMES | VALUES,
    "features": VALUES,
    "prediction": VALUES,
    "probability": VALUES,
    "label": VALUES,
    "segment": VALUES,
    "unknown": VALUES,
}
# Two fields at most are odd, so that the odd one decides.
RECORDS = st.dictionaries(st.sampled_from(sorted(FIELDS)), st.none(), max_size=2).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names}).map(
        lambda odd: {**GOOD, **odd}
    )
)


def verdict(kind: str, record: Any, timestamp_ms: int = 7_300_000_000_000) -> str:
    raw = RawRecord(Partition("t", 0), 0, timestamp_ms, None, json.dumps(record).encode())
    try:
        DECODERS[kind].decode(raw)
    except InvalidRecord as error:
        return error.code
    return "valid"


@pytest.mark.parametrize("kind", VALIDATORS)
def test_the_schemas_are_schemas(kind: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema(kind))


def inexact(record: Any) -> bool:
    """Whether an integer is written in a way that a schema takes for one, and that does not keep it."""
    names = ("model", "model_version", "id", "segment")
    values = [record.get(name) for name in names] if isinstance(record, dict) else []
    return any(isinstance(value, float) and abs(value) > 2**53 for value in values)


@pytest.mark.parametrize("kind", VALIDATORS)
@example(record={**GOOD, "id": -(2**63) - 1})
@example(record={**GOOD, "id": -(2**63)})
@settings(max_examples=400, deadline=None)
@given(record=RECORDS | VALUES)
def test_schema_and_decoder_agree(kind: str, record: Any) -> None:
    code = verdict(kind, record)
    accepted = VALIDATORS[kind].is_valid(record)
    assume(not inexact(record))
    assume(code not in BEYOND_A_SCHEMA)
    # A day that does not exist, or one that an offset carries past the edge, is beyond a pattern.
    assume(not (accepted and code == "invalid_event_time"))
    event(f"{kind}: {code}")
    assert accepted == (code == "valid")


@pytest.mark.parametrize("name", sorted(GOOD))
def test_both_miss_a_required_field(name: str) -> None:
    record = {key: value for key, value in GOOD.items() if key != name}
    assert not VALIDATORS["prediction"].is_valid(record)
    assert verdict("prediction", record) == "missing_field"


@settings(max_examples=300, deadline=None)
@given(TIMES)
def test_times_that_the_schema_accepts_fail_only_for_the_calendar(time: str) -> None:
    record = {**GOOD, "event_time": time}
    code = verdict("prediction", record)
    if not VALIDATORS["prediction"].is_valid(record):
        assert code in ("invalid_event_time", "naive_event_time")
    elif code != "valid":
        assert code == "invalid_event_time"
        assert time[8:10] in ("29", "30", "31") or time[:4] in ("1970", "2199")
