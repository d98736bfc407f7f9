"""Triage: broken data is told of, a shift without a loss watched, a loss retrained on; and it is said why."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from flows.backtest.file_replay import FileReplay
from flows.backtest.happened import Happened
from flows.backtest.stream import Stream
from monitors.settings import (
    FlowSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    PolicySettings,
    RegistrySettings,
    TrainingSettings,
    WindowSettings,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
REFERENCE, WINDOW, WINDOWS = 600, 100, 9
ROWS = REFERENCE + WINDOW * WINDOWS
COLUMNS = ("price", "demand", "tariff", "bonus", "weekday")
ON_ROWS = ModelSettings(
    reference_rows=REFERENCE,
    window=WindowSettings(rows=WINDOW, min_rows=WINDOW),
    training=TrainingSettings(parameters={"max_iter": 8, "min_samples_leaf": 5}),
)


def market(seed: int = 5) -> pd.DataFrame:
    """Two that wander, a small constant, one that is zero as a rule, and categories that are numbers."""
    random = np.random.default_rng(seed)
    noise = random.normal(size=(ROWS, 2))
    walks = noise.copy()
    for row in range(1, ROWS):
        walks[row] = 0.6 * walks[row - 1] + 0.8 * noise[row]
    return pd.DataFrame(
        {
            "price": walks[:, 0],
            "demand": walks[:, 1] * 0.1 + 0.5,
            "tariff": 0.0035,
            "bonus": np.where(np.arange(ROWS) % 5 == 0, random.integers(1, 50, ROWS), 0).astype(float),
            "weekday": np.arange(ROWS) // 20 % 7 + 1,
        }
    )


def replayed(features: pd.DataFrame, labels: Sequence[int]) -> Happened:
    truth = np.empty(ROWS, dtype=object)
    truth[:] = labels
    stream = Stream(
        case="market",
        kind="classification",
        features=features,
        labels=truth,
        times=tuple(START + timedelta(minutes=row) for row in range(ROWS)),
        segments=(None,) * ROWS,
        reference_rows=REFERENCE,
    )
    settings = FlowSettings(
        model="market",
        settings=ON_ROWS,
        kafka=KafkaSettings(),
        fields={},
        limits=LimitSettings(),
        registry=RegistrySettings(),
    )
    return FileReplay(settings, stream, 1).run().happened


def truth_of(features: pd.DataFrame) -> list[int]:
    return (features["price"] + features["demand"] - 0.5 > 0).astype(int).tolist()


def spoilt(values: pd.Series, how: str, rows: slice) -> pd.Series:
    found = values.astype(object)
    found.iloc[rows] = None if how == "gone null" else values.iloc[rows] * 1_000
    return found if how == "gone null" else found.astype(values.dtype)


def test_a_market_that_is_sound_is_left_alone() -> None:
    happened = replayed(market(), truth_of(market()))
    assert (happened.events, happened.requests) == ([], [])


@pytest.mark.parametrize("how", ["times a thousand", "gone null"])
@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_that_breaks_is_told_of_and_mended_and_nothing_is_retrained(column: str, how: str) -> None:
    """From the middle of a window on, whose other half was sound, and up to the middle of another."""
    sound = market()
    rows = slice(REFERENCE + 2 * WINDOW + 50, REFERENCE + 5 * WINDOW + 50)
    happened = replayed(sound.assign(**{column: spoilt(sound[column], how, rows)}), truth_of(sound))
    (broken, mended) = happened.events
    assert (broken.event.kind, broken.window) == ("retrain-daemon.data.broken", 2)
    assert (mended.event.kind, mended.window) == ("retrain-daemon.data.mended", 6)
    assert happened.requests == []
    assert [one["column"] for one in broken.event.payload["broken"]] == [column]
    assert broken.event.payload["action"] == "none: broken data is no reason to retrain"
    assert broken.event.payload["clause"] == f"data broken in {column}"
    decided = [(one.judged.decision.verdict, one.judged.decision.clause) for one in happened.windows]
    assert decided[2:6] == [("broken", f"data broken in {column}")] * 4
    assert {verdict for verdict, _ in decided[:2] + decided[6:]} == {"calm"}


def test_categories_that_nobody_has_seen_are_told_of_and_left_to_the_labels() -> None:
    sound = market()
    names = sound["weekday"].map("day {}".format)
    other = names.where(sound.index < REFERENCE + 4 * WINDOW, names.str.upper())
    happened = replayed(sound.assign(weekday=other), truth_of(sound))
    (broken,) = happened.events
    assert (broken.event.kind, broken.window) == ("retrain-daemon.data.broken", 4)
    assert broken.event.payload["action"].startswith("none, unless labels tell of a loss")
    assert happened.requests == []
    assert [one.sound for one in happened.performances] == [True] * (WINDOWS - 1)


# As a loop writes it


BY_BUDGET = ModelSettings(
    reference_rows=200,
    label_horizon_seconds=1_000_000.0,
    window=WindowSettings(seconds=100.0, grace_seconds=0.0, min_rows=10, max_rows=100),
    policy=PolicySettings(
        windows_between_false_retrainings=10.0, baseline_windows=2, first_attempt_windows=2
    ),
)


class Service:
    """A service that logs a row a second, and of which the labels come at once when they are told."""

    def __init__(self, watched: Any) -> None:
        watched.model = BY_BUDGET
        self.world, self.member, self._row = watched, watched.member(), 0

    def windows(self, count: int, shift: float = 0.0, wrong: int = 10) -> None:
        """So many windows, and the labels; one answer of `wrong` is wrong."""
        first, self._row = self._row, self._row + 100 * count
        for number in range(first, self._row):
            features = {"x": number * 7 % 50 + shift, "y": number * 3 % 40}
            body = {"model_version": "1", "id": f"r{number}", "features": features, "prediction": 1}
            self.world.write("predictions", number, body)
        self.member.cycles(2)
        for number in range(first, self._row):
            label = int(number % wrong != 0)
            self.world.write("labels", number, {"id": f"r{number}", "label": label})
        self.member.cycles(2)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The payloads, as they wait to be delivered."""
        return [
            json.loads(row["body"])["payload"]
            for row in self.member.ledger.events()
            if row["kind"] == f"retrain-daemon.{kind}"
        ]

    def decided(self) -> list[tuple[str, str]]:
        """What the ledger holds of each window: the verdict, and the first words of why."""
        return [
            (str(one.decision.verdict), one.decision.clause) for one in self.member.ledger.evidence("fraud")
        ]


@pytest.fixture
def service(watched: Any) -> Service:
    return Service(watched)


def test_broken_data_asks_for_nothing_though_its_answers_are_wrong(service: Service) -> None:
    service.windows(6)
    service.windows(4, shift=60_000.0, wrong=1)
    service.windows(2)
    (broken,), (mended,) = service.events("data.broken"), service.events("data.mended")
    assert broken["action"] == "none: broken data is no reason to retrain"
    assert broken["clause"] == "data broken in x" and mended["action"] == "watch"
    assert service.decided()[6:10] == [("broken", "data broken in x")] * 4
    assert service.events("drift.detected") == service.member.ledger.requests() == []


def test_a_shift_without_a_loss_is_watched_until_labels_are_worth_a_look(service: Service) -> None:
    service.windows(6)
    service.windows(4, shift=30.0)
    (opened,) = service.events("drift.detected")
    assert (opened["signal"], opened["action"]) == ("data drift", "watch until labels tell")
    assert opened["columns"][0]["column"] == opened["moved"][0]["column"] == "x"
    verdict, clause = service.decided()[6]
    assert verdict == "drifted" and clause == opened["clause"] and clause.startswith("data drift: evidence")
    # By then 150 labelled rows have come since, 0.75 of the reference.
    (request,) = service.member.ledger.requests()
    asked = json.loads(request.payload)
    assert asked["signal"] == "data drift" and "labelled rows since the last look" in asked["reason"]


def test_a_loss_asks_for_a_retraining_though_the_inputs_are_as_ever(service: Service) -> None:
    service.windows(6)
    service.windows(5, wrong=2)
    (opened,) = service.events("drift.detected")
    assert opened["signal"] == "performance" and opened["clause"].startswith(
        "performance: loss 0.5 against 0.1"
    )
    assert opened["action"] in ("retrain", "wait: 1 of 2 labelled windows since the change")
    assert opened["change_point"] == (START + timedelta(seconds=600)).isoformat()
    (request,) = service.member.ledger.requests()
    asked = json.loads(request.payload)
    assert (asked["signal"], asked["basis"]) == ("performance", "labels")
    assert asked["reason"].startswith("performance: loss 0.5")
    (episode,) = service.member.ledger.episodes("fraud")
    assert msgspec.json.decode(episode["state"])["signal"] == "performance"
    assert {verdict for verdict, _ in service.decided()} == {"learning", "calm"}
