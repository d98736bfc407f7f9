"""A replay goes on from the registry as it was when its log began, and writes nothing to it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flows.audit import Move
from flows.backtest.history import history_of
from flows.earlier import earlier_champions
from flows.registry import MemoryRegistry, NewModel, open_registry
from flows.rows import LabelledRows
from flows.training import Challenger, fit_span
from monitors.settings import (
    FlowSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    RegistrySettings,
    TrainingSettings,
)

BEFORE = datetime(2020, 1, 1, tzinfo=UTC)


def settings_at(folder: Path) -> FlowSettings:
    return FlowSettings(
        model="fraud",
        settings=ModelSettings(training=TrainingSettings(parameters={"max_iter": 3})),
        kafka=KafkaSettings(),
        fields={},
        limits=LimitSettings(),
        registry=RegistrySettings(tracking_uri=f"sqlite:///{folder / 'registry' / 'mlflow.db'}"),
    )


def fitted(settings: FlowSettings) -> Challenger:
    amount = np.random.default_rng(1).normal(size=600)
    nothing: list[Any] = [None] * 600
    labels, times = (amount > 0).astype(int).tolist(), [float(row) for row in range(600)]
    rows = LabelledRows.sorted(pd.DataFrame({"amount": amount}), labels, times, nothing, nothing)
    return fit_span(settings.settings, rows)


def new(made: Challenger, request: str) -> NewModel:
    tags = {"trained_from": repr(made.trained_from), "trained_until": repr(made.trained_until)}
    return NewModel(made.estimator, made.schema, request, "", tags)


def moved(version: str, expected: str, at: datetime) -> Move:
    return Move(action="promoted", version=version, expected=expected, reason="", at=at, request="")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> FlowSettings:
    """Its champions were versions 1, 2, 1 again and 3, by clocks that went wrong (0) and right (days)."""
    settings = settings_at(tmp_path_factory.mktemp("history"))
    registry, made, at = open_registry(settings), fitted(settings_at(Path())), datetime.now(UTC)
    for number in range(1, 4):
        registry.register(new(made, f"request-{number}"))
    for days, (version, expected) in enumerate([("1", ""), ("2", "1"), ("1", "2"), ("3", "1")]):
        registry.move(moved(version, expected, at + timedelta(days=days)), lambda: None)
    return settings


def moves_of(registry: MemoryRegistry) -> list[str]:
    return [record.move.version for record in registry.audit()]


def test_it_is_as_it_was_when_its_champion_was_last_moved_before_the_log(settings: FlowSettings) -> None:
    third_day = datetime.now(UTC) + timedelta(days=2, hours=1)
    begun = history_of(settings, "1", third_day)()
    assert (begun.champion_version(), moves_of(begun)) == ("1", ["1", "2", "1"])


def test_event_times_that_know_nothing_of_the_clock_mean_the_first_time(settings: FlowSettings) -> None:
    begun = history_of(settings, "1", BEFORE)()
    assert (begun.champion_version(), moves_of(begun)) == ("1", ["1"])


def test_what_a_replay_adds_is_numbered_on_and_stays_in_its_memory(settings: FlowSettings) -> None:
    begin = history_of(settings, "2", BEFORE)
    begun = begin()
    added = begun.register(new(fitted(settings), "a replay's request"))
    assert (added.version, added.model_version) == ("3", "3"), "version 3 of then is not there yet"
    begun.move(moved("3", "2", BEFORE), lambda: None)
    assert [one.version for one in earlier_champions(begun, "3")] == ["2", "1"]
    answers = begun.load("1").predict(pd.DataFrame({"amount": [-1.0, 1.0]}))
    assert [int(answer) for answer in answers] == [0, 1]
    registry = open_registry(settings)
    assert registry.find_request("a replay's request") is None
    assert [record.move.version for record in registry.audit()] == ["1", "2", "1", "3"]
    assert moves_of(begin()) == ["1", "2"], "begun anew, it knows nothing of what was added"


@pytest.mark.parametrize(("serving", "added"), [("7", "8"), ("a name", "1")])
def test_a_champion_that_nobody_registered_is_only_numbered_after(
    settings: FlowSettings, serving: str, added: str
) -> None:
    begun = history_of(settings, serving, BEFORE)()
    assert begun.champion_version() == ""
    assert begun.register(new(fitted(settings), "r")).version == added


def test_a_registry_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    assert history_of(settings_at(tmp_path), "1", BEFORE)().champion_version() == ""
    assert list(tmp_path.iterdir()) == []
