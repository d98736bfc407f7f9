"""An earlier champion comes back where its world does, on rows that it has not seen."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flows.audit import Move
from flows.earlier import again, is_earlier, origin
from flows.errors import NotRetrainable
from flows.evaluation import evaluate, made_of
from flows.registry import LoadedModel, MemoryRegistry, ModelUnloadable, NewModel
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

SETTINGS = FlowSettings(
    model="fraud",
    settings=ModelSettings(training=TrainingSettings(parameters={"max_iter": 10}), reference_rows=800),
    kafka=KafkaSettings(),
    fields={},
    limits=LimitSettings(),
    registry=RegistrySettings(),
)
TURNS = (800, 1600)
BACK = datetime.fromtimestamp(TURNS[1], UTC)


def stream(rows: int) -> LabelledRows:
    """Rows a second apart; between the turns the label means the opposite. A tenth of them is wrong."""
    random = np.random.default_rng(4)
    amount = random.normal(size=rows)
    turned = (np.arange(rows) >= TURNS[0]) & (np.arange(rows) < TURNS[1])
    labels = ((amount > 0) ^ turned ^ (random.random(rows) < 0.1)).astype(int)
    nothing: list[Any] = [None] * rows
    times = [float(place) for place in range(rows)]
    return LabelledRows.sorted(pd.DataFrame({"amount": amount}), labels.tolist(), times, nothing, nothing)


def promote(registry: MemoryRegistry, made: Challenger, request: str) -> str:
    tags = {
        "span": made.span,
        "training_rows": str(made.rows),
        "trained_from": repr(made.trained_from),
        "trained_until": repr(made.trained_until),
    }
    version = registry.register(NewModel(made.estimator, made.schema, request, "", tags)).version
    now, before = datetime.now(UTC), registry.champion_version()
    move = Move(action="promoted", version=version, expected=before, reason="", at=now, request=request)
    registry.move(move, lambda: None)
    return version


@pytest.fixture
def registry() -> MemoryRegistry:
    """Version 1 knows the world before the first turn, and version 2, the champion, the one after it."""
    registry = MemoryRegistry()
    for name, start, end in (("first", 0, TURNS[0]), ("second", *TURNS)):
        promote(registry, fit_span(SETTINGS.settings, stream(1700).between(start, end)), name)
    return registry


def test_the_model_of_a_world_that_is_back_is_promoted_again(registry: MemoryRegistry) -> None:
    rows = stream(1660)
    found = evaluate(SETTINGS, registry, rows, BACK)
    assert (found.verdict.action, found.span) == ("promoted", "version 1")
    back = made_of(registry, SETTINGS.settings, rows, found.span, BACK)
    version = promote(registry, back, "third")
    old, new = (registry.load(number).answers(rows.features).predictions for number in ("1", version))
    assert (old == new).all()
    made = registry.find(version)
    assert made is not None
    assert (origin(made), made.trained_until) == ("1", float(TURNS[0] - 1))


def test_it_is_no_candidate_against_itself(registry: MemoryRegistry) -> None:
    promote(registry, again(registry, "version 1"), "third")
    found = evaluate(SETTINGS, registry, stream(1800), BACK)
    assert "version 1" not in [one.span for one in found.candidates]


def test_a_model_that_was_worse_on_the_rows_before_the_holdout_is_not_asked() -> None:
    registry = MemoryRegistry()
    for name, start, end in (("first", 0, TURNS[0]), ("second", TURNS[0], 1200)):
        promote(registry, fit_span(SETTINGS.settings, stream(1700).between(start, end)), name)
    found = evaluate(SETTINGS, registry, stream(1700).between(0, TURNS[1]), None)
    assert found.candidates
    assert not [one.span for one in found.candidates if is_earlier(one.span)]


def test_a_model_that_has_seen_the_holdout_is_not_asked(registry: MemoryRegistry) -> None:
    seen = fit_span(SETTINGS.settings, stream(1700).between(TURNS[1], 1655))
    promote(registry, seen, "third")
    promote(registry, fit_span(SETTINGS.settings, stream(1700).between(*TURNS)), "fourth")
    asked = [one.span for one in evaluate(SETTINGS, registry, stream(1660), BACK).candidates]
    assert "version 3" not in asked
    assert "version 1" in asked


class Forgetful(MemoryRegistry):
    """One that has lost the files of version 1."""

    def load(self, version: str) -> LoadedModel:
        if version == "1":
            raise ModelUnloadable("version 1 has no files")
        return super().load(version)


def test_one_that_is_lost_is_left_out_and_the_rest_are_judged() -> None:
    lost = Forgetful()
    for name, start, end in (("first", 0, TURNS[0]), ("second", *TURNS)):
        promote(lost, fit_span(SETTINGS.settings, stream(1700).between(start, end)), name)
    found = evaluate(SETTINGS, lost, stream(1660), BACK)
    assert [one.span for one in found.candidates if is_earlier(one.span)] == []
    assert found.candidates
    with pytest.raises(NotRetrainable, match="version 1 was chosen before"):
        evaluate(SETTINGS, lost, stream(1660), BACK, only="version 1")


def test_a_second_judgement_is_of_the_one_that_was_chosen(registry: MemoryRegistry) -> None:
    found = evaluate(SETTINGS, registry, stream(1660), BACK, only="version 1")
    assert [one.span for one in found.candidates] == ["version 1"]
