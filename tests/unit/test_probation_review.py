"""A champion that turns out worse than the one before it is undone; whatever is not sure keeps it."""

import uuid
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from flows.audit import Move
from flows.errors import Fenced
from flows.probation import review
from flows.registry import MemoryRegistry, NewModel
from flows.rows import LabelledRows
from flows.training import fit_span
from monitors.events import RetrainRequest
from monitors.settings import (
    FlowSettings,
    GateSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    RegistrySettings,
    TrainingSettings,
)

SETTINGS = FlowSettings(
    model="fraud",
    settings=ModelSettings(training=TrainingSettings(parameters={"max_iter": 10})),
    kafka=KafkaSettings(),
    fields={},
    limits=LimitSettings(),
    registry=RegistrySettings(),
)
SERVED_FROM = 2000.0


def world(rows: int, turned: bool, start: float, seed: int) -> LabelledRows:
    """Rows a second apart; in the turned world the label means the opposite. A tenth of them is wrong."""
    random = np.random.default_rng(seed)
    amount = random.normal(size=rows)
    labels = ((amount > 0) ^ turned ^ (random.random(rows) < 0.1)).astype(int)
    nothing: list[Any] = [None] * rows
    times = [start + index for index in range(rows)]
    return LabelledRows.sorted(pd.DataFrame({"amount": amount}), labels.tolist(), times, nothing, nothing)


def register(registry: MemoryRegistry, rows: LabelledRows, request: str) -> str:
    made = fit_span(SETTINGS.settings, rows)
    tags = {"trained_from": repr(made.trained_from), "trained_until": repr(made.trained_until)}
    return registry.register(NewModel(made.estimator, made.schema, request, "", tags)).version


def move(registry: MemoryRegistry, version: str, expected: str, request: str) -> None:
    registry.move(
        Move(
            action="promoted",
            version=version,
            expected=expected,
            reason="",
            at=datetime.now(UTC),
            request=request,
        ),
        lambda: None,
    )


@pytest.fixture
def registry() -> MemoryRegistry:
    """Version 1 knows the world as it was, and version 2, the champion, one that has turned."""
    registry = MemoryRegistry()
    for version, turned, expected in (("1", False, ""), ("2", True, "1")):
        assert register(registry, world(800, turned, 0.0, seed=int(version)), f"request-{version}") == version
        move(registry, version, expected, f"request-{version}")
    return registry


def asked(promotion: str = "request-2") -> RetrainRequest:
    since = datetime.fromtimestamp(SERVED_FROM, UTC)
    return RetrainRequest(
        request=str(uuid.uuid5(uuid.NAMESPACE_OID, promotion)),
        kind="probation",
        promotion=promotion,
        episode="",
        episode_number=0,
        attempt=1,
        model="fraud",
        model_version="2",
        reason="labels of 4 windows that version 2 served are there",
        suspected_since=since,
        window_start=since,
        window_end=since,
        offsets=(),
        drift_share=0.0,
        drifted_columns=(),
    )


def test_the_old_champion_comes_back_where_it_is_surely_better(registry: MemoryRegistry) -> None:
    found = review(SETTINGS, registry, world(600, False, SERVED_FROM, 3), asked(), "run-a", lambda: None)
    assert (found.outcome.action, found.outcome.registry_version) == ("rolled-back", "1")
    assert (found.outcome.champion_before, registry.champion_version()) == ("2", "1")
    assert found.outcome.sentence.startswith("1 is better than 2, 80% sure, on the 600 rows since: 0.")
    assert registry.audit()[-1].move.action == "rolled-back"
    again = review(SETTINGS, registry, world(600, False, SERVED_FROM, 3), asked(), "run-b", lambda: None)
    assert again.outcome == found.outcome
    assert len(registry.audit()) == 3


def test_a_champion_that_does_as_promised_stays(registry: MemoryRegistry) -> None:
    found = review(SETTINGS, registry, world(600, True, SERVED_FROM, 3), asked(), "run-a", lambda: None)
    assert (found.outcome.action, registry.champion_version()) == ("kept", "2")
    assert found.outcome.sentence.startswith("version 2 stays, 1 is not surely better since: 0.")
    assert found.outcome.champion_score is not None and found.outcome.champion_score > 0.8


def test_rows_from_before_the_promotion_have_no_say(registry: MemoryRegistry) -> None:
    before = world(900, False, 1000.0, 4)
    later = world(200, True, SERVED_FROM, 5)
    rows = LabelledRows.sorted(
        pd.concat([before.features, later.features], ignore_index=True),
        [*before.labels, *later.labels],
        [*before.event_times, *later.event_times],
        [None] * 1100,
        [None] * 1100,
    )
    assert review(SETTINGS, registry, rows, asked(), "run-a", lambda: None).outcome.action == "kept"


def test_too_few_rows_keep_it(registry: MemoryRegistry) -> None:
    found = review(SETTINGS, registry, world(24, False, SERVED_FROM, 3), asked(), "run-a", lambda: None)
    assert found.outcome.sentence == "only 24 labelled rows since that version 2 has not seen, 25 needed"
    assert registry.champion_version() == "2"


def test_a_floor_of_the_gate_is_no_reason_to_keep_a_worse_champion(registry: MemoryRegistry) -> None:
    gate = GateSettings(floor=0.99, mode="non_inferiority", margin=0.3)
    model = msgspec.structs.replace(SETTINGS.settings, gate=gate)
    settings = msgspec.structs.replace(SETTINGS, settings=model)
    rows = world(600, False, SERVED_FROM, 3)
    assert review(settings, registry, rows, asked(), "a", lambda: None).outcome.action == "rolled-back"


def test_another_champion_by_now_is_left_alone(registry: MemoryRegistry) -> None:
    register(registry, world(800, True, 0.0, 9), "request-3")
    move(registry, "3", "2", "request-3")
    found = review(SETTINGS, registry, world(600, False, SERVED_FROM, 3), asked(), "run-a", lambda: None)
    assert (found.outcome.action, found.outcome.sentence) == ("kept", "version 2 is the champion no more")


def test_without_an_earlier_champion_or_an_audit_record_nothing_is_undone(registry: MemoryRegistry) -> None:
    rows = world(600, False, SERVED_FROM, 3)
    unknown = review(SETTINGS, registry, rows, asked("never heard of"), "run-a", lambda: None)
    assert unknown.outcome.action == "kept" and "no audit record" in unknown.outcome.sentence
    first = MemoryRegistry()
    register(first, world(800, True, 0.0, 2), "request-2")
    move(first, "1", "", "request-2")
    assert (
        "is the first champion" in review(SETTINGS, first, rows, asked(), "a", lambda: None).outcome.sentence
    )


@pytest.fixture
def three(registry: MemoryRegistry) -> MemoryRegistry:
    """Version 3, the champion, knows a turned world as version 2 does; version 1 knows the other one."""
    register(registry, world(800, True, 0.0, 9), "request-3")
    move(registry, "3", "2", "request-3")
    return registry


def standing() -> RetrainRequest:
    """A window of version 3 lost too much: does any champion of before do better?"""
    return msgspec.structs.replace(asked(""), request="a window", model_version="3")


def test_of_all_champions_before_the_one_that_knows_the_world_comes_back(three: MemoryRegistry) -> None:
    rows = world(600, False, SERVED_FROM, 3)
    found = review(SETTINGS, three, rows, standing(), "run-a", lambda: None)
    assert (found.outcome.action, found.outcome.registry_version) == ("rolled-back", "1")
    assert found.outcome.sentence.startswith("1 is better than 3, 80% sure, on the 600 rows since: 0.")
    # What it loses there is the level from now on, however often the run is entered.
    assert found.outcome.baseline is not None and found.outcome.baseline.loss < 0.2
    again = review(SETTINGS, three, rows, standing(), "run-b", lambda: None)
    assert again.outcome == found.outcome and len(three.audit()) == 4


def test_where_none_before_is_surely_better_the_champion_stays(three: MemoryRegistry) -> None:
    found = review(SETTINGS, three, world(600, True, SERVED_FROM, 3), standing(), "a", lambda: None)
    assert (found.outcome.action, three.champion_version()) == ("kept", "3")
    assert found.outcome.sentence.startswith(
        "version 3 stays, of 2 before it none is surely better since: 0."
    )


def test_what_a_person_took_out_of_service_does_not_come_back_by_itself(three: MemoryRegistry) -> None:
    by_hand = Move(action="rolled-back", version="2", expected="3", reason="", at=datetime.now(UTC))
    three.move(by_hand, lambda: None)
    by_hand = Move(action="rolled-back", version="1", expected="2", reason="", at=datetime.now(UTC))
    three.move(by_hand, lambda: None)
    request = msgspec.structs.replace(standing(), model_version="1")
    found = review(SETTINGS, three, world(600, True, SERVED_FROM, 3), request, "a", lambda: None)
    assert found.outcome.sentence == "version 1 stays, there is none before it to compare it with"


def test_rows_that_a_champion_of_before_was_trained_on_leave_it_out(three: MemoryRegistry) -> None:
    rows = world(600, False, SERVED_FROM, 3)
    again = register(three, world(800, False, SERVED_FROM - 700.0, 5), "request-4")
    move(three, again, "3", "request-4")
    newest = register(three, world(800, True, 0.0, 6), "request-5")
    move(three, newest, again, "request-5")
    request = msgspec.structs.replace(standing(), model_version=newest)
    assert review(SETTINGS, three, rows, request, "a", lambda: None).outcome.registry_version == "1"


def test_a_run_that_was_taken_over_undoes_nothing(registry: MemoryRegistry) -> None:
    def fence() -> None:
        raise Fenced("another run has it")

    with pytest.raises(Fenced):
        review(SETTINGS, registry, world(600, False, SERVED_FROM, 3), asked(), "run-a", fence)
    assert registry.champion_version() == "2"
