"""A champion is held against those before it: once its labels are there, and whenever it loses too much."""

from datetime import UTC, datetime, timedelta
from typing import Literal

import msgspec

from monitors.events import Event, Kind, OffsetRange, Outcome, RetrainRequest
from monitors.performance import Performance
from monitors.probation import Probation, Served, begin, on_champion, on_labels, on_outcome, on_window
from monitors.settings import GateSettings

START = datetime(2026, 1, 1, tzinfo=UTC)
PROMOTED = Outcome(action="promoted", sentence="", model_version="5", champion_before="4")
KEPT = Outcome(action="kept", sentence="")
ORIGIN = "cluster|group"
ONCE = GateSettings(probation_windows=3, probation_rise=0.0)
ALWAYS = GateSettings(probation_rise=1.0)


def started(gate: GateSettings = ONCE) -> Probation:
    probation = begin("fraud", "request-1", PROMOTED, gate)
    assert probation is not None
    return probation


def window(number: int, version: str = "5") -> Served:
    start = START + timedelta(hours=number)
    spans = (OffsetRange("predictions", 0, 100 * number, 100 * number + 100),)
    return Served(version, start, start + timedelta(hours=1), spans)


def performance(number: int, version: str = "5", rows: int = 90) -> Performance:
    served = window(number, version)
    return Performance(
        version=version,
        key=number,
        metric="accuracy",
        score=0.8,
        labelled=rows,
        unlabelled=10,
        loss=0.2,
        start=served.start,
        end=served.end,
        spans=served.spans,
    )


def heard(
    probation: Probation, gate: GateSettings, number: int, rise: float | None = None, version: str = "5"
) -> tuple[Probation, list[RetrainRequest]]:
    probation, events = on_labels(probation, gate, ORIGIN, performance(number, version), rise)
    return probation, [asked(event) for event in events]


def asked(event: Event) -> RetrainRequest:
    request = msgspec.convert(event.payload, RetrainRequest)
    assert (event.kind, event.request) == (Kind.RETRAIN_REQUESTED, request.request)
    return request


def test_only_a_promotion_over_another_champion_begins_one() -> None:
    assert begin("fraud", "r", msgspec.structs.replace(PROMOTED, champion_before=""), ONCE) is None
    assert begin("fraud", "r", Outcome(action="refused", sentence="", champion_before="4"), ONCE) is None
    assert begin("fraud", "r", PROMOTED, GateSettings(probation_rise=0.0)) is None
    assert started().version == started(ALWAYS).version == "5"


def test_the_last_window_that_is_needed_asks_for_the_comparison_once() -> None:
    probation, told = started(), []
    for number in (1, 2, 3, 4, 5):
        probation = on_window(probation, window(number))
        probation, requests = heard(probation, ONCE, number)
        told += [(number, request) for request in requests]
    ((number, request),) = told
    assert number == 3
    assert (request.kind, request.promotion, request.model_version) == ("probation", "request-1", "5")
    assert (request.suspected_since, request.window_end) == (window(1).start, window(3).end)
    assert request.offsets == window(3).spans


def test_windows_of_other_versions_and_windows_without_labels_do_not_count() -> None:
    gate = GateSettings(probation_windows=2, probation_rise=0.0)
    probation = on_window(started(gate), window(0, version="4"))
    assert probation.since is None
    probation = on_window(probation, window(1))
    for rows, version, asks in ((90, "4", 0), (0, "5", 0), (90, "5", 0), (90, "5", 1)):
        probation, events = on_labels(probation, gate, ORIGIN, performance(1, version, rows), None)
        assert len(events) == asks
    assert probation.since == window(1).start


def test_the_same_promotion_asks_for_the_same_comparison() -> None:
    gate = GateSettings(probation_windows=1, probation_rise=0.0)
    requests = {heard(on_window(started(gate), window(n)), gate, n)[0].request for n in (1, 7)}
    assert len(requests) == 1 and requests != {""}


def test_a_window_that_loses_too_much_asks_whether_one_before_does_better() -> None:
    probation, requests = heard(started(ALWAYS), ALWAYS, 7, rise=0.9)
    assert not requests
    probation, (request,) = heard(probation, ALWAYS, 8, rise=1.0)
    assert (request.kind, request.promotion, request.model_version) == ("probation", "", "5")
    assert (request.suspected_since, request.window_end) == (window(8).start, window(8).end)
    assert request.offsets == window(8).spans
    assert request.reason == "a window lost 0.2, 1.0 deviations above what can be reached"


def test_one_comparison_is_in_flight_at_a_time_and_the_next_is_another() -> None:
    probation, (first,) = heard(started(ALWAYS), ALWAYS, 1, rise=3.0)
    probation, requests = heard(probation, ALWAYS, 2, rise=3.0)
    assert not requests
    after = on_outcome(probation, ALWAYS, first.request, KEPT)
    assert after is not None
    _, (second,) = heard(after, ALWAYS, 2, rise=3.0)
    assert second.request != first.request
    elsewhere, _ = on_labels(started(ALWAYS), ALWAYS, "another group", performance(1), 3.0)
    assert elsewhere.request != first.request


def test_after_comparisons_that_failed_more_and_more_windows_rest() -> None:
    """A run that cannot work would be asked for with each window of a bad week."""
    probation, waited, number = started(ALWAYS), [], 0
    actions: tuple[Literal["failed", "kept"], ...] = ("failed", "failed", "failed", "kept", "failed")
    for action in actions:
        before, requests = number, []
        while not requests:
            number += 1
            probation, requests = heard(probation, ALWAYS, number, rise=3.0)
        waited.append(number - before)
        ended = on_outcome(probation, ALWAYS, requests[0].request, Outcome(action=action, sentence=""))
        assert ended is not None
        probation = ended
    assert waited == [1, 3, 5, 9, 1]


def test_labels_of_who_served_before_are_a_reason_too_and_none_is_where_nothing_may_be_asked() -> None:
    assert heard(started(ALWAYS), ALWAYS, 1, rise=2.0, version="4")[1]
    assert not heard(started(ALWAYS), ALWAYS, 1, rise=None)[1]
    assert not heard(started(), ONCE, 1, rise=9.0)[1]


def test_who_comes_back_is_watched_as_well() -> None:
    probation, (request,) = heard(started(ALWAYS), ALWAYS, 1, rise=3.0)
    back = Outcome(action="rolled-back", sentence="", model_version="4", champion_before="5")
    after = on_outcome(probation, ALWAYS, request.request, back)
    assert after is not None and (after.version, after.request) == ("4", "")
    _, (again,) = heard(after, ALWAYS, 2, rise=3.0)
    assert again.model_version == "4"


def test_the_comparison_with_the_one_before_waits_for_another_in_flight() -> None:
    gate = GateSettings(probation_windows=2, probation_rise=1.0)
    probation, (first,) = heard(on_window(started(gate), window(1)), gate, 1, rise=2.0)
    probation, requests = heard(probation, gate, 2)
    assert not requests
    after = on_outcome(probation, gate, first.request, KEPT)
    assert after is not None
    after, (second,) = heard(after, gate, 3)
    assert second.promotion == "request-1"
    ended = on_outcome(after, gate, second.request, KEPT)
    assert ended is not None and not heard(ended, gate, 4)[1]


def test_it_ends_with_its_own_outcome_or_with_another_champion() -> None:
    gate = GateSettings(probation_windows=1, probation_rise=0.0)
    probation, _ = heard(on_window(started(gate), window(1)), gate, 1)
    assert on_outcome(probation, gate, "another request", KEPT) == probation
    assert on_outcome(probation, gate, probation.request, KEPT) is None
    assert on_outcome(started(), ONCE, "", KEPT) is not None
    assert on_champion(probation, "5") == probation
    assert on_champion(probation, "4") is None
