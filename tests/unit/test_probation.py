"""A new champion is compared with the old one once enough of its labels are there, and only once."""

from datetime import UTC, datetime, timedelta

import msgspec

from monitors.events import Kind, OffsetRange, Outcome, RetrainRequest
from monitors.probation import Probation, Served, begin, on_champion, on_labels, on_outcome, on_window

START = datetime(2026, 1, 1, tzinfo=UTC)
PROMOTED = Outcome(action="promoted", sentence="", model_version="5", champion_before="4")


def started(windows: int = 3) -> Probation:
    probation = begin("fraud", "request-1", PROMOTED, windows)
    assert probation is not None
    return probation


def window(number: int, version: str = "5") -> Served:
    start = START + timedelta(hours=number)
    spans = (OffsetRange("predictions", 0, 100 * number, 100 * number + 100),)
    return Served(version, start, start + timedelta(hours=1), spans)


def labelled(probation: Probation, rows: int = 90, version: str = "5") -> tuple[Probation, int]:
    probation, events = on_labels(probation, version, rows)
    return probation, len(events)


def test_only_a_promotion_over_another_champion_begins_one() -> None:
    assert begin("fraud", "r", msgspec.structs.replace(PROMOTED, champion_before=""), 3) is None
    assert begin("fraud", "r", Outcome(action="refused", sentence="", champion_before="4"), 3) is None
    assert begin("fraud", "r", PROMOTED, 0) is None
    assert started().version == "5"


def test_the_last_window_that_is_needed_asks_for_the_comparison_once() -> None:
    probation, told = started(), []
    for number in (1, 2, 3, 4, 5):
        probation = on_window(probation, window(number))
        probation, events = on_labels(probation, "5", 90)
        told += [(number, event) for event in events]
    ((number, event),) = told
    asked = msgspec.convert(event.payload, RetrainRequest)
    assert (number, event.kind, event.request) == (3, Kind.RETRAIN_REQUESTED, asked.request)
    assert (asked.kind, asked.promotion, asked.model_version) == ("probation", "request-1", "5")
    assert (asked.suspected_since, asked.window_end) == (window(1).start, window(3).end)
    assert asked.offsets == window(3).spans


def test_windows_of_other_versions_and_windows_without_labels_do_not_count() -> None:
    probation = on_window(started(2), window(0, version="4"))
    assert probation.since is None
    probation = on_window(probation, window(1))
    for rows, version, asks in ((90, "4", 0), (0, "5", 0), (90, "5", 0), (90, "5", 1)):
        probation, count = labelled(probation, rows, version)
        assert count == asks
    assert probation.since == window(1).start


def test_the_same_promotion_asks_for_the_same_comparison() -> None:
    requests = {labelled(on_window(started(1), window(number)))[0].request for number in (1, 7)}
    assert len(requests) == 1 and requests != {""}


def test_it_ends_with_its_own_outcome_or_with_another_champion() -> None:
    asked, _ = labelled(on_window(started(1), window(1)))
    assert on_outcome(asked, "another request") == asked
    assert on_outcome(asked, asked.request) is None
    assert on_outcome(started(), "") is not None
    assert on_champion(asked, "5") == asked
    assert on_champion(asked, "4") is None
