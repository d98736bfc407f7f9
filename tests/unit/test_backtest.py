"""A backtest does what the daemon and its flows would have done, and knows nothing before its time."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from flows.backtest.facts import facts_of
from flows.backtest.file_replay import FileReplay, Replayed
from flows.backtest.page import page
from flows.backtest.schedules import MOST_FITS, Schedules, intervals
from flows.backtest.stream import Stream
from flows.backtest.told import table
from monitors.events import Kind
from monitors.settings import (
    FlowSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    RegistrySettings,
    TrainingSettings,
    WindowSettings,
)

REFERENCE, WINDOW, WINDOWS = 600, 100, 14
ROWS = REFERENCE + WINDOW * WINDOWS
CHANGE = REFERENCE + 4 * WINDOW
START = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = ModelSettings(
    reference_rows=REFERENCE,
    window=WindowSettings(rows=WINDOW, min_rows=WINDOW),
    training=TrainingSettings(parameters={"max_iter": 8, "min_samples_leaf": 5}),
)


def settings(model: ModelSettings = SETTINGS) -> FlowSettings:
    return FlowSettings(
        model="parcels",
        settings=model,
        kafka=KafkaSettings(),
        fields={},
        limits=LimitSettings(),
        registry=RegistrySettings(),
    )


def stream(rows: int = ROWS, change: int = CHANGE, seed: int = 3) -> Stream:
    """From `change` on the inputs lie elsewhere, and mean the opposite."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(rows, 3))
    after = np.arange(rows) >= change
    labels = np.where(after, values[:, 0] < 0, values[:, 0] > 0).astype(int)
    values[after] += 2.5 * np.array([0.0, 1.0, 1.0])
    values[after, 0] *= 2.0
    return made_of(pd.DataFrame(values, columns=["push", "pull", "load"]), labels.tolist())


def made_of(features: pd.DataFrame, labels: list[Any]) -> Stream:
    truth = np.empty(len(labels), dtype=object)
    truth[:] = labels
    return Stream(
        case="parcels",
        kind="classification",
        features=features,
        labels=truth,
        times=tuple(START + timedelta(minutes=row) for row in range(len(labels))),
        segments=(None,) * len(labels),
        reference_rows=REFERENCE,
    )


def replay(of: Stream, label_lag: int = 1, model: ModelSettings = SETTINGS) -> Replayed:
    return FileReplay(settings(model), of, label_lag).run()


def told_by(replayed: Replayed, row: int) -> list[Any]:
    """Everything that had been decided when this row was about to be answered."""
    happened = replayed.happened
    closed = [window for window in happened.windows if window.end_row <= row]
    requests = [asked for asked in happened.requests if asked.window < len(closed)]
    events = [told.event for told in happened.events if told.window < len(closed)]
    return [closed, requests, events, [one for one in replayed.promotions if one[0] <= row]]


@pytest.mark.parametrize("label_lag", [0, 1])
def test_a_label_has_no_say_before_its_time(label_lag: int) -> None:
    whole = stream()
    honest = replay(whole, label_lag)
    assert honest.happened.count("promoted"), "the stream must make it retrain, or this shows nothing"
    differed = 0
    for asked in honest.happened.requests:
        # The oldest window that a retraining at this moment may know nothing of.
        window = asked.window - label_lag + 1
        start = REFERENCE + window * WINDOW
        # Known when the window `label_lag` later has closed; the rows after that one may know it.
        known = start + (1 + label_lag) * WINDOW
        wrong = whole.labels.copy()
        wrong[start:] = 1 - wrong[start:].astype(int)
        other = replay(made_of(whole.features, wrong.tolist()), label_lag)
        assert list(other.said.predictions[:known]) == list(honest.said.predictions[:known]), window
        assert told_by(other, known - 1) == told_by(honest, known - 1), window
        differed += list(other.said.predictions[known:]) != list(honest.said.predictions[known:])
    assert differed, "wrong labels that change nothing afterwards either show nothing"


def test_rows_are_answered_by_the_champion_of_that_moment() -> None:
    whole = stream()
    replayed = replay(whole)
    served = [version for _, version in replayed.promotions]
    assert served[0] == "1" and len(served) > 1
    promoted = [asked for asked in replayed.happened.requests if asked.outcome.action == "promoted"]
    assert [asked.outcome.model_version for asked in promoted] == served[1:]
    first = replayed.promotions[1][0]
    assert first == replayed.happened.windows[promoted[0].window].end_row
    before = slice(REFERENCE, first)
    assert list(replayed.said.predictions[before]) == list(replayed.never.predictions[before])
    after = slice(first, first + WINDOW)
    assert list(replayed.said.predictions[after]) != list(replayed.never.predictions[after])


def test_the_windows_after_a_promotion_are_those_of_the_new_version() -> None:
    replayed = replay(stream())
    switches = dict(replayed.promotions[1:])
    served = "1"
    for window in replayed.happened.windows:
        assert window.version == served
        served = switches.get(window.end_row, served)
    assert served != "1"


def test_a_stable_stream_is_left_alone() -> None:
    replayed = replay(stream(change=ROWS))
    assert replayed.happened.requests == []
    assert [window.number for window in replayed.happened.windows] == list(range(WINDOWS))
    assert list(replayed.said.predictions) == list(replayed.never.predictions)


def test_the_same_stream_gives_the_same_backtest() -> None:
    one, other = replay(stream()), replay(stream())
    assert told_by(one, ROWS) == told_by(other, ROWS)
    assert list(one.said.predictions) == list(other.said.predictions)


def test_labels_that_never_come_are_not_waited_for() -> None:
    whole = stream(change=ROWS)
    holes: list[Any] = whole.labels.tolist()
    for row in range(REFERENCE, ROWS, 3):
        holes[row] = None
    performances = replay(made_of(whole.features, holes)).happened.performances
    assert [one.key for one in performances] == list(range(WINDOWS - 2))
    assert all(0 < one.unlabelled < one.labelled for one in performances)


@pytest.mark.parametrize("label_lag", [0, 1, 4])
def test_performance_is_judged_when_the_labels_are_known(label_lag: int) -> None:
    performances = replay(stream(change=ROWS), label_lag).happened.performances
    assert [(one.key, one.unlabelled) for one in performances] == [
        (key, 0) for key in range(WINDOWS - label_lag)
    ]


def test_windows_of_time_close_by_the_event_times() -> None:
    timed = msgspec.structs.replace(
        SETTINGS, window=WindowSettings(seconds=60.0 * WINDOW, grace_seconds=0.0, min_rows=10)
    )
    replayed = replay(stream(), model=timed)
    lengths = {(one.judged.end - one.judged.start).total_seconds() for one in replayed.happened.windows}
    assert lengths == {60.0 * WINDOW}
    assert replayed.happened.count("promoted")


# Schedules


def test_less_frequent_schedules_cost_nothing_more() -> None:
    whole = stream()
    ends = [REFERENCE + (number + 1) * WINDOW for number in range(WINDOWS)]
    schedules = Schedules(SETTINGS, whole, ends, 1)
    fits: list[int] = []
    found = schedules.run(fits.append)
    assert [(one.every, one.retrainings) for one in found] == [(1, 13), (2, 6), (4, 3), (8, 1)]
    assert sum(fits) == schedules.cost == 13


def test_schedules_stay_within_what_they_may_cost() -> None:
    assert intervals(60) == [1, 2, 4, 8, 16, 32]
    assert intervals(0) == []
    for windows in (99, 100, 101, 1_600):
        assert windows // intervals(windows)[0] <= MOST_FITS


@pytest.mark.parametrize("label_lag", [0, 1, 3])
def test_a_schedule_knows_a_label_from_its_time_on(label_lag: int) -> None:
    whole = stream()
    ends = [REFERENCE + (number + 1) * WINDOW for number in range(WINDOWS)]
    start = REFERENCE + 5 * WINDOW
    wrong = whole.labels.copy()
    wrong[start:] = 1 - wrong[start:].astype(int)
    lied_to = made_of(whole.features, wrong.tolist())
    honest, other = (
        Schedules(SETTINGS, of, ends, label_lag).run()[0].said.predictions for of in (whole, lied_to)
    )
    known = start + (1 + label_lag) * WINDOW
    assert list(honest[:known]) == list(other[:known])
    assert list(honest[known : known + WINDOW]) != list(other[known : known + WINDOW])


# Broken data


def wandering(rows: int, seed: int = 5) -> pd.DataFrame:
    """Autocorrelated inputs that keep to where they are."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(rows, 4))
    values = noise.copy()
    for row in range(1, rows):
        values[row] = 0.6 * values[row - 1] + 0.8 * noise[row]
    return pd.DataFrame(values, columns=["price", "demand", "supply", "flow"])


@pytest.mark.parametrize("how", ["times a thousand", "gone null"])
def test_a_broken_column_is_told_of_and_mended_and_nothing_is_retrained(how: str) -> None:
    features = wandering(ROWS)
    labels = (features["price"] + features["demand"] > 0).astype(int).tolist()
    broken = slice(REFERENCE + 4 * WINDOW, REFERENCE + 7 * WINDOW)
    price = features["price"].to_numpy().copy()
    price[broken] = price[broken] * 1_000 if how == "times a thousand" else np.nan
    whole = made_of(features.assign(price=price), labels)
    replayed = replay(whole)
    happened = replayed.happened

    windows = [window.number for window in happened.windows if "price" in window.broken]
    assert windows == [4, 5, 6]
    told = [(told.window, told.event.kind) for told in happened.events if "data." in told.event.kind]
    assert told == [(4, Kind.DATA_BROKEN), (7, Kind.DATA_MENDED)]
    broken_column = happened.events[0].event.payload["broken"][0]
    assert broken_column["column"] == "price"
    assert happened.requests == []

    facts = facts_of(whole, "accuracy", replayed, (), (), 0.0)
    (breakage,) = happened.breakages()
    assert (breakage.first, breakage.last, breakage.mended) == (4, 6, 7)
    assert facts.rows_of(breakage) == (broken.start, broken.stop)
    code = "out_of_range" if how == "times a thousand" else "null_share"
    assert list(table(facts))[-1] == (
        f"  windows 4 to 6  rows 1,000 to 1,300  price ({code})  mended with window 7"
    )
    text = page(facts)
    assert f"<td>1,000 to 1,300</td><td>4 to 6</td><td>price ({code})</td><td>7</td>" in text
    assert text.count('class="spoilt"') == 2, "in the chart and in its legend"


def test_data_that_is_not_mended_is_broken_to_the_end() -> None:
    features = wandering(ROWS)
    labels = (features["price"] + features["demand"] > 0).astype(int).tolist()
    features.loc[REFERENCE + 10 * WINDOW :, "flow"] = np.nan
    (breakage,) = replay(made_of(features, labels)).happened.breakages()
    assert (breakage.first, breakage.last, breakage.mended) == (10, WINDOWS - 1, None)


def test_a_reason_is_in_times_where_the_stream_has_any_and_else_in_rows() -> None:
    features = wandering(ROWS)
    labels = (features["price"] > 0).astype(int)
    labels[CHANGE:] = 1 - labels[CHANGE:]
    whole = made_of(features, labels.tolist())
    replayed = replay(whole)
    timed = facts_of(whole, "accuracy", replayed, (), (), 0.0)
    assert list(timed.reasons) == [asked.reason for asked in replayed.happened.requests]
    at = f"since {whole.times[CHANGE].isoformat()}"
    assert at in timed.reasons[0]
    untimed = facts_of(replace(whole, timed=False), "accuracy", replayed, (), (), 0.0)
    assert f"since row {CHANGE:,}" in untimed.reasons[0] and at not in untimed.reasons[0]


# Facts


def test_the_facts_are_those_of_the_replay() -> None:
    whole = stream()
    replayed = replay(whole)
    ends = [window.end_row for window in replayed.happened.windows]
    schedules = Schedules(SETTINGS, whole, ends, 1).run()
    facts = facts_of(whole, "accuracy", replayed, schedules, (CHANGE,), 1.5)
    live = slice(REFERENCE, ROWS)
    assert facts.live == pytest.approx((replayed.said.predictions[live] == whole.labels[live]).mean())
    assert facts.never == pytest.approx((replayed.never.predictions[live] == whole.labels[live]).mean())
    assert facts.windows[0] == (REFERENCE, REFERENCE + WINDOW)
    assert facts.live_windows[0] == facts.never_windows[0]
    assert facts.false_before_first_drift == 0
    assert facts.started == len(replayed.happened.requests) > 0
    told = facts.json_object()
    episode = told["episodes"][0]
    assert episode["action"] == "promoted"
    assert CHANGE - WINDOW <= episode["change_point"] <= CHANGE + WINDOW


def test_without_a_known_drift_no_retraining_is_called_false() -> None:
    whole = stream()
    facts = facts_of(whole, "accuracy", replay(whole), (), (), 0.0)
    assert facts.false_before_first_drift is None
