"""From the promotion to the rollback, through the monitor, the gate and the registry's rules of a replay."""

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flows.backtest.file_replay import FileReplay, Replayed
from flows.backtest.stream import Stream
from monitors.events import Kind
from monitors.settings import (
    FlowSettings,
    GateSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    PolicySettings,
    RegistrySettings,
    TrainingSettings,
    WindowSettings,
)

REFERENCE, WINDOW, ROWS = 600, 100, 2000
CHANGE = REFERENCE + 4 * WINDOW
START = datetime(2026, 1, 1, tzinfo=UTC)


def stream(turned_back_at: int = ROWS) -> Stream:
    """From `CHANGE` on the inputs lie elsewhere and mean the opposite; later they mean the same again."""
    random = np.random.default_rng(3)
    values = random.normal(size=(ROWS, 3))
    after = np.arange(ROWS) >= CHANGE
    opposite = after & (np.arange(ROWS) < turned_back_at)
    labels = np.where(opposite, values[:, 0] < 0, values[:, 0] > 0).astype(int)
    values[after] += 2.5 * np.array([0.0, 1.0, 1.0])
    values[after, 0] *= 2.0
    truth = np.empty(ROWS, dtype=object)
    truth[:] = labels.tolist()
    return Stream(
        case="parcels",
        kind="classification",
        features=pd.DataFrame(values, columns=["push", "pull", "load"]),
        labels=truth,
        times=tuple(START + timedelta(minutes=row) for row in range(ROWS)),
        segments=(None,) * ROWS,
        reference_rows=REFERENCE,
    )


# One episode, so that nothing but the probation can move the champion again.
ONE_EPISODE = PolicySettings(method="thresholds", cooldown_seconds=1e9)


def replay(of: Stream, windows: int, policy: PolicySettings = ONE_EPISODE, rise: float = 1.0) -> Replayed:
    model = ModelSettings(
        reference_rows=REFERENCE,
        window=WindowSettings(rows=WINDOW, min_rows=WINDOW),
        policy=policy,
        training=TrainingSettings(parameters={"max_iter": 8, "min_samples_leaf": 5}),
        gate=GateSettings(probation_windows=windows, probation_rise=rise),
    )
    settings = FlowSettings(
        model="parcels",
        settings=model,
        kafka=KafkaSettings(),
        fields={},
        limits=LimitSettings(),
        registry=RegistrySettings(),
    )
    return FileReplay(settings, of, label_lag=1).run()


def probations(replayed: Replayed) -> list[Any]:
    asked = [told.event for told in replayed.happened.events if told.event.kind is Kind.RETRAIN_REQUESTED]
    return [event for event in asked if event.payload["kind"] == "probation"]


@pytest.fixture(scope="module")
def promoted_at() -> int:
    """The first row that the new champion served."""
    (_, promotion, *_) = replay(stream(), 0).promotions
    return promotion[0]


def test_a_champion_that_turns_out_worse_gives_way_to_the_one_before(promoted_at: int) -> None:
    turned_back = stream(turned_back_at=promoted_at)
    replayed = replay(turned_back, 2)
    versions = [version for _, version in replayed.promotions]
    assert versions[0] == versions[2] == "1" != versions[1]
    assert len(probations(replayed)) == 1
    # Two windows of labels, and the one after which the last of these labels came.
    assert replayed.promotions[2][0] == promoted_at + 3 * WINDOW
    assert "1" not in [version for _, version in replay(turned_back, 0).promotions[1:]]


def test_a_champion_that_does_well_is_looked_at_once_and_stays(promoted_at: int) -> None:
    replayed, without = replay(stream(), 2), replay(stream(), 0)
    assert len(probations(replayed)) == 1 and not probations(without)
    assert replayed.promotions == without.promotions
    assert [asked.request for asked in replayed.happened.requests] == [
        asked.request for asked in without.happened.requests
    ]


def test_a_world_that_comes_back_brings_its_champion_back_without_a_retraining() -> None:
    """Nothing is known of it but one window's labels, and nothing is trained."""
    plain = PolicySettings()
    (_, (promoted, version), *_) = replay(stream(), 0, plain).promotions
    turned_back = stream(turned_back_at=promoted + 3 * WINDOW)
    replayed = replay(turned_back, 0, plain)
    assert replayed.promotions[:3] == (
        (REFERENCE, "1"),
        (promoted, version),
        # The window that goes wrong, and the one after which its labels are there.
        (promoted + 5 * WINDOW, "1"),
    )
    (back,) = replayed.happened.came_back
    assert back.outcome.sentence.startswith(
        f"1 is better than {version}, 80% sure, on the {WINDOW} rows since:"
    )
    asked = [one.window for one in replayed.happened.requests]
    assert max(asked) < back.window
    without = replay(turned_back, 0, plain, rise=0.0)
    assert not without.happened.comparisons
    assert dict(without.promotions).get(promoted + 5 * WINDOW) is None


def test_a_comparison_that_keeps_the_champion_changes_nothing() -> None:
    plain = PolicySettings()
    replayed, without = replay(stream(), 0, plain, rise=0.1), replay(stream(), 0, plain, rise=0.0)
    assert {one.outcome.action for one in replayed.happened.comparisons} == {"kept"}
    assert replayed.promotions == without.promotions
    assert [one.request for one in replayed.happened.requests] == [
        one.request for one in without.happened.requests
    ]
