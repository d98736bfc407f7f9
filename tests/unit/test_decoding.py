"""What bytes become: a record, or one reason from the list."""

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from monitors.decoding import CODES, JsonDecoder, make_decoder
from monitors.records import InvalidRecord, LabelRecord, Partition, PredictionRecord, RawRecord
from monitors.settings import FieldSettings, LimitSettings

NOW_MS = 1_790_000_000_000
GOOD: dict[str, Any] = {
    "model": "fraud",
    "model_version": "7",
    "id": "a1",
    "event_time": "2026-01-31T12:00:00Z",
    "features": {"amount": 12.5, "country": "PT", "returning": True, "age": None},
    "prediction": 1,
    "probability": 0.75,
    "label": 0,
    "segment": "eu",
}
LABEL: dict[str, Any] = {"model": "fraud", "id": "a1", "label": 1, "event_time": "2026-01-31T12:00:00Z"}
SMALL = LimitSettings(max_record_bytes=2_000, max_features=5)


def raw(value: Any, **fields: Any) -> RawRecord:
    data = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
    return RawRecord(
        Partition("predictions", 2), 41, fields.pop("timestamp_ms", NOW_MS), None, data, **fields
    )


def keyed(value: Any, key: bytes | None, *headers: tuple[str, bytes | None]) -> RawRecord:
    return msgspec.structs.replace(raw(value), key=key, headers=headers)


def decoder(labels: bool = False, limits: LimitSettings = SMALL, **fields: Any) -> JsonDecoder:
    return JsonDecoder(FieldSettings(**fields), {"fraud", "churn"}, limits, labels)


def reason(record: RawRecord, by: JsonDecoder | None = None) -> str:
    with pytest.raises(InvalidRecord) as caught:
        (by or decoder()).decode(record)
    assert caught.value.code in CODES
    return caught.value.code


def with_(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


def test_a_good_record_becomes_a_prediction_with_its_coordinates() -> None:
    assert decoder().decode(raw(GOOD)) == PredictionRecord(
        model="fraud",
        model_version="7",
        id="a1",
        event_time=datetime(2026, 1, 31, 12, tzinfo=UTC),
        features={"amount": 12.5, "country": "PT", "returning": True, "age": None},
        prediction=1,
        partition=Partition("predictions", 2),
        offset=41,
        probability=0.75,
        label=0,
        segment="eu",
    )


def test_a_good_label_becomes_a_label() -> None:
    assert decoder(labels=True).decode(raw(LABEL)) == LabelRecord(
        "fraud", "a1", 1, datetime(2026, 1, 31, 12, tzinfo=UTC), Partition("predictions", 2), 41
    )


@pytest.mark.parametrize("name", ["probability", "label", "segment"])
def test_what_is_optional_may_be_absent_or_null(name: str) -> None:
    for record in (without(name), with_(**{name: None})):
        assert getattr(decoder().decode(raw(record)), name) is None


def test_an_empty_segment_is_none_at_all() -> None:
    record = decoder().decode(raw(with_(segment="")))
    assert isinstance(record, PredictionRecord)
    assert record.segment is None


@pytest.mark.parametrize(("sent", "read"), [(7, "7"), (-3, "-3"), ("7", "7"), (7.0, "7")])
def test_versions_ids_and_segments_may_be_integers(sent: Any, read: str) -> None:
    record = decoder().decode(raw(with_(model_version=sent, id=sent, segment=sent)))
    assert isinstance(record, PredictionRecord)
    assert (record.model_version, record.id, record.segment) == (read, read, read)


def test_event_times_come_out_in_utc() -> None:
    record = decoder().decode(raw(with_(event_time="2026-01-31T12:00:00.25+05:30")))
    assert record.event_time == datetime(2026, 1, 31, 6, 30, 0, 250_000, tzinfo=UTC)
    assert record.event_time.tzinfo is UTC


@pytest.mark.parametrize(
    ("unit", "sent"), [("seconds", 1769860800.25), ("milliseconds", 1769860800250), ("seconds", 1769860800)]
)
def test_event_times_may_be_numbers_of_a_stated_unit(unit: str, sent: float) -> None:
    record = decoder(event_time_unit=unit).decode(raw(with_(event_time=sent)))
    assert record.event_time.replace(microsecond=0) == datetime(2026, 1, 31, 12, tzinfo=UTC)


def test_what_python_writes_for_nan_is_null_and_infinity_stays() -> None:
    value = json.dumps(
        with_(features={"a": float("nan"), "b": float("inf"), "c": 1.5}, probability=float("nan"))
    )
    record = decoder().decode(raw(value.encode()))
    assert isinstance(record, PredictionRecord)
    assert record.features == {"a": None, "b": float("inf"), "c": 1.5}
    assert record.probability is None


def test_integers_outside_of_64_bits_are_floats_as_every_column_can_hold_them() -> None:
    value = raw(with_(features={"a": 2**63, "b": 2**63 - 1, "c": -(10**400), "d": 1}))
    features = decoder().decode(value).features  # type: ignore[union-attr]
    assert features == {"a": float(2**63), "b": 2**63 - 1, "c": float("-inf"), "d": 1}
    assert [type(value) for value in features.values()] == [float, int, float, int]


def test_every_source_can_feed_a_field() -> None:
    value = {"in": {"x": {"amount": 1}}, "out": {"score": 0.5}}
    mapped = decoder(
        model="@fixed:fraud",
        model_version="@header:version",
        id="@key",
        event_time="@timestamp",
        features="in.x",
        prediction="out.score",
        probability="",
        label="@header:label",
        segment="out.where",
    )
    record = keyed(value, b"k9", ("version", b"1"), ("version", b"2"), ("label", b"1"))
    assert mapped.decode(record) == PredictionRecord(
        "fraud",
        "2",
        "k9",
        datetime.fromtimestamp(NOW_MS / 1000, UTC),
        {"amount": 1},
        0.5,
        Partition("predictions", 2),
        41,
        label=1,
    )


@pytest.mark.parametrize("outputs", [None, {}, {"truth": None}, {"truth": {}}])
def test_an_optional_path_may_end_early(outputs: Any) -> None:
    record = decoder(label="outputs.truth.value").decode(raw(with_(outputs=outputs)))
    assert isinstance(record, PredictionRecord)
    assert record.label is None


def test_two_fields_may_share_a_place() -> None:
    record = decoder(prediction="score", probability="score").decode(raw(with_(score=0.5)))
    assert isinstance(record, PredictionRecord)
    assert (record.prediction, record.probability) == (0.5, 0.5)


@pytest.mark.parametrize("name", ["model", "model_version", "id", "event_time", "features", "prediction"])
def test_required_fields_are_missed_by_name(name: str) -> None:
    with pytest.raises(InvalidRecord, match=f"{name} is missing") as caught:
        decoder().decode(raw(without(name)))
    assert caught.value.code == "missing_field"


@pytest.mark.parametrize("name", ["model", "id", "label", "event_time"])
def test_a_label_record_needs_all_of_its_fields(name: str) -> None:
    assert reason(raw({**LABEL, name: None}), decoder(labels=True)) == "missing_field"


def test_a_null_prediction_is_one() -> None:
    record = decoder().decode(raw(with_(prediction=None)))
    assert isinstance(record, PredictionRecord)
    assert record.prediction is None


DEEP = 3_000
INVALID = [
    (None, "tombstone"),
    (b"", "invalid_json"),
    (b"\xff\xfe", "invalid_json"),
    (b'{"model": "fraud"', "invalid_json"),
    (json.dumps(GOOD).encode("utf-16"), "invalid_json"),
    (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "invalid_json"),
    (json.dumps(GOOD).encode()[:-1] + b', "x": "\xff"}', "invalid_json"),
    (json.dumps(GOOD).encode() + b"{}", "invalid_json"),
    ([GOOD], "not_an_object"),
    (b"3", "not_an_object"),
    (b'{"a":' + b"[" * 70 + b"]" * 70 + b"}", "too_deep"),
    (with_(padding="x" * 2_000), "too_large"),
    (with_(model="unheard-of"), "unknown_model"),
    (with_(model=["fraud"]), "invalid_field"),
    (with_(model_version=1.5), "invalid_field"),
    (with_(model_version=True), "invalid_field"),
    (with_(model_version=""), "invalid_field"),
    (with_(model_version="v" * 201), "invalid_field"),
    (with_(model_version="a\x1b[2J"), "invalid_field"),
    (with_(id=10**30), "invalid_field"),
    (with_(id=-(2**63) - 1), "invalid_field"),
    (with_(id=1e17), "invalid_field"),
    (with_(id="a\x00b"), "invalid_field"),
    (with_(id="\ud800"), "invalid_field"),
    (with_(segment=["eu"]), "invalid_field"),
    (with_(features=[1, 2]), "invalid_field"),
    (with_(features={"a": [1]}), "invalid_field"),
    (with_(features={"a": {"b": 1}}), "invalid_field"),
    (with_(features={"": 1}), "invalid_field"),
    (with_(features={"n" * 201: 1}), "invalid_field"),
    (with_(features={"a\nb": 1}), "invalid_field"),
    (with_(features={"a": "\udfff"}), "invalid_field"),
    (with_(features={f"f{n}": 1 for n in range(6)}), "too_many_features"),
    (with_(prediction=[0.1, 0.9]), "invalid_field"),
    (with_(probability="0.5"), "invalid_field"),
    (with_(probability=True), "invalid_field"),
    (with_(label={}), "invalid_field"),
    (with_(event_time="2026-01-31T12:00:00"), "naive_event_time"),
    (with_(event_time="yesterday"), "invalid_event_time"),
    (with_(event_time="2026-02-30T12:00:00Z"), "invalid_event_time"),
    (with_(event_time=1769860800), "invalid_event_time"),
    (with_(event_time="0001-01-01T00:00:00+14:00"), "invalid_event_time"),
    (with_(event_time="9999-12-31T23:59:59-14:00"), "invalid_event_time"),
    (with_(event_time="1969-12-31T23:59:59Z"), "invalid_event_time"),
    (with_(event_time="2200-01-01T00:00:00Z"), "invalid_event_time"),
    (with_(event_time="2199-01-01T00:00:00Z"), "too_far_ahead"),
]


@pytest.mark.parametrize(("value", "code"), INVALID)
def test_what_is_no_record_has_one_reason(value: Any, code: str) -> None:
    assert reason(raw(value)) == code


def test_every_code_is_seen_in_these_tests() -> None:
    assert {code for _, code in INVALID} | {"missing_field"} == set(CODES)


@pytest.mark.parametrize("depth", [65, 500, 900, 1_100, 100_000])
def test_depth_is_refused_alike_however_close_to_the_recursion_limit(depth: int) -> None:
    wide = LimitSettings()
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        value = json.dumps(GOOD).encode()[:-1] + b',"x":' + opening * depth + b"1" + closing * depth + b"}"
        assert reason(raw(value), decoder(limits=wide)) == "too_deep"


def test_a_payload_with_many_brackets_is_not_deep() -> None:
    decoder().decode(raw(with_(other=[{} for _ in range(100)])))


@pytest.mark.parametrize("unit", ["seconds", "milliseconds"])
@pytest.mark.parametrize("sent", [1e300, -1, 10**40, "2026-01-31T12:00:00Z", True, b"Infinity", b"1e999"])
def test_numbers_that_are_no_time_are_refused(unit: str, sent: Any) -> None:
    value = json.dumps(with_(event_time="HERE"))
    text = sent.decode() if isinstance(sent, bytes) else json.dumps(sent)
    record = raw(value.replace('"HERE"', text).encode())
    assert reason(record, decoder(event_time_unit=unit)) == "invalid_event_time"


def test_a_number_under_rfc3339_tells_which_key_to_set() -> None:
    with pytest.raises(InvalidRecord, match="event_time_unit"):
        decoder().decode(raw(with_(event_time=1769860800)))


def test_no_record_is_further_ahead_of_its_kafka_timestamp_than_allowed() -> None:
    at = int(datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp() * 1000)
    decoder().decode(raw(GOOD, timestamp_ms=at - 3_600_000))
    assert reason(raw(GOOD, timestamp_ms=at - 3_600_001)) == "too_far_ahead"
    assert reason(raw(GOOD, timestamp_ms=-1)) == "too_far_ahead"


@pytest.mark.parametrize("key", [None, b"\xff", b"", b"x" * 501])
def test_a_key_that_is_no_id_is_refused(key: bytes | None) -> None:
    assert reason(keyed(GOOD, key), decoder(id="@key")) in ("missing_field", "invalid_field")


def test_header_times_follow_the_unit() -> None:
    assert decoder(event_time="@header:at").decode(
        keyed(GOOD, None, ("at", b"2026-01-31T12:00:00Z"))
    ).event_time == datetime(2026, 1, 31, 12, tzinfo=UTC)
    seconds = decoder(event_time="@header:at", event_time_unit="seconds")
    assert seconds.decode(keyed(GOOD, None, ("at", b"1769860800"))).event_time.year == 2026
    for bad in (b"\xff", b"soon", b"1_000", None):
        assert reason(keyed(GOOD, None, ("at", bad)), seconds) in ("invalid_event_time", "missing_field")


@pytest.mark.parametrize(
    "fields",
    [
        {"id": ""},
        {"id": "@timestamp"},
        {"id": "@fixed:1"},
        {"features": "@key"},
        {"label": "features.y"},
        {"model": "@header:"},
        {"model": "@nowhere"},
        {"model": "a..b"},
    ],
)
def test_a_mapping_that_cannot_work_is_refused_at_once(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"fields.{next(iter(fields))}: "):
        decoder(**fields)


def test_topics_have_mappings_of_their_own() -> None:
    fields = {"predictions": FieldSettings(), "labels": FieldSettings(id="prediction_id")}
    both = make_decoder(fields, "labels", {"fraud"}, SMALL)
    label = msgspec.structs.replace(raw({**LABEL, "prediction_id": "z"}), partition=Partition("labels", 0))
    assert isinstance(both.decode(raw(GOOD)), PredictionRecord)
    assert both.decode(label).id == "z"
    with pytest.raises(InvalidRecord):
        both.decode(msgspec.structs.replace(label, partition=Partition("elsewhere", 0)))


def test_explain_shows_sources_types_and_the_reason() -> None:
    rows = decoder(id="@key").explain(raw(with_(probability="high")))
    by_field = {row.field: row for row in rows}
    assert (by_field["features"].source, by_field["features"].found) == (
        "payload `features`",
        "an object of 4",
    )
    assert by_field["id"].code == "missing_field"
    assert by_field["probability"].code == "invalid_field"
    assert [row.field for row in rows if not row.code][:2] == ["model", "model_version"]
    assert decoder().explain(raw(None))[0].code == "tombstone"


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.integers(2**62, 2**66),
    st.just("\ud800"),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
TIMES = st.sampled_from(
    ["2026-01-31T12:00:00Z", "2026-01-31 12:00:00.5+02:00", "2026-01-31T12:00:00", "1600-01-01T00:00:00Z"]
)
NEARLY = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["fraud", "churn", "other"]) | JSON,
        "model_version": JSON,
        "id": JSON,
        "event_time": TIMES | JSON,
        "features": st.dictionaries(
            st.text() | st.sampled_from(["a", "\u00a0", "a\x7f"]), SCALARS, max_size=7
        )
        | JSON,
        "prediction": SCALARS | JSON,
        "probability": st.floats() | JSON,
        "label": SCALARS | JSON,
        "segment": JSON,
        "other": JSON,
    },
)
CHANGES = st.dictionaries(st.sampled_from([*GOOD, "other"]), JSON, max_size=2)
MAPPINGS = [
    FieldSettings(),
    FieldSettings(id="@key", model_version="@fixed:3", event_time="@timestamp", label="other.label"),
    FieldSettings(event_time_unit="seconds", prediction="probability"),
]


def outcome(decode: Any, record: RawRecord) -> Any:
    try:
        return decode(record)
    except InvalidRecord as error:
        assert error.code in CODES
        return error.code, error.detail


@settings(max_examples=300, deadline=None)
@given(st.binary(), st.binary() | st.none(), st.integers(-(2**63), 2**63 - 1))
@example(b"[" * 100_000, None, 0)
@example(b'{"model":' + b"9" * 5_000 + b"}", None, 0)
def test_arbitrary_bytes_are_a_record_or_invalid(value: bytes, key: bytes | None, timestamp_ms: int) -> None:
    record = RawRecord(Partition("t", 0), 0, timestamp_ms, key, value)
    for mapping in MAPPINGS:
        for labels in (False, True):
            outcome(JsonDecoder(mapping, {"fraud"}, LimitSettings(), labels).decode, record)


@settings(max_examples=400, deadline=None)
@given(NEARLY | CHANGES.map(lambda changes: {**GOOD, **changes}), st.booleans(), st.sampled_from(MAPPINGS))
def test_the_quick_way_gives_what_the_careful_way_gives(
    value: dict[str, Any], ascii_only: bool, mapping: FieldSettings
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    record = msgspec.structs.replace(raw(text), key=b"k")
    for labels in (False, True):
        both = JsonDecoder(mapping, {"fraud", "churn"}, SMALL, labels)
        quick, careful = outcome(both.decode, record), outcome(both.decode_carefully, record)
        assert repr(quick) == repr(careful)
        faults = [row.code for row in both.explain(record) if row.code]
        assert faults[:1] == ([] if not isinstance(careful, tuple) else [careful[0]])


@settings(max_examples=200, deadline=None)
@given(CHANGES)
def test_no_reason_holds_a_value(changes: dict[str, Any]) -> None:
    secret = "s3cr3t-value"
    value = {**GOOD, "model": secret, "id": [secret], "event_time": secret, **changes}
    for row in decoder().explain(raw(value)):
        assert secret not in row.detail + row.found


@pytest.mark.parametrize("value", [GOOD, with_(segment=None), without("label"), with_(model_version=7)])
def test_usual_records_go_the_quick_way(value: dict[str, Any]) -> None:
    quick = decoder()._quick
    assert quick is not None
    assert quick.read(raw(value)) is not None
