"""Both forms of the registry keep the same promises; MLflow's also through crashes and tampering."""

import itertools
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flows.audit import ChampionMoved, Move, NoEarlierChampion, previous_champion
from flows.errors import Fenced
from flows.mlflow_registry import MlflowRegistry
from flows.registry import MemoryRegistry, ModelUnloadable, NewModel, Registry, UntrustedTypes
from flows.schema import Schema
from monitors.settings import RegistrySettings

ROOT = Path(__file__).parents[2]
_NUMBERS = itertools.count(1)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
SCHEMA = Schema({"amount": "numeric", "country": "categorical"})


def fitted(constant: int = 1) -> Any:
    """The default trainer's model; `constant` is the rarer class, so that two models differ."""
    from flows.rows import LabelledRows
    from flows.training import fit_span
    from monitors.settings import ModelSettings, TrainingSettings

    rows = 200
    features = pd.DataFrame({"amount": [float(i % 7) for i in range(rows)], "country": ["de", "fr"] * 100})
    labels = [constant if i % 7 > 3 else 0 for i in range(rows)]
    nothing: list[Any] = [None] * rows
    settings = ModelSettings(training=TrainingSettings(parameters={"max_iter": 3}))
    labelled = LabelledRows.sorted(features, labels, [float(i) for i in range(rows)], nothing, nothing)
    return fit_span(settings, labelled).estimator


@pytest.fixture(scope="module")
def estimator() -> Any:
    return fitted()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all tests, because making one takes seconds; each has a model of its own."""
    return tmp_path_factory.mktemp("registry")


@pytest.fixture
def mlflow(folder: Path) -> MlflowRegistry:
    return opened(folder, f"fraud-{next(_NUMBERS)}")


@pytest.fixture(params=["memory", "mlflow"])
def registry(request: pytest.FixtureRequest) -> Registry:
    if request.param == "memory":
        return MemoryRegistry()
    real: MlflowRegistry = request.getfixturevalue("mlflow")
    return real


def opened(folder: Path, model: str, trusted: Sequence[str] = ()) -> MlflowRegistry:
    settings = RegistrySettings(tracking_uri=f"sqlite:///{folder}/deep/mlflow.db")
    return MlflowRegistry(settings, model, trusted)


def new(estimator: Any, request: str = "r1", **more: Any) -> NewModel:
    tags = {"trained_from": "0.0", "trained_until": "1.5", "offsets": "[]"}
    return NewModel(estimator, SCHEMA, request, "run-1", tags, {"max_iter": 3}, **more)


def promoted(version: str, expected: str, request: str = "", action: Any = "promoted") -> Move:
    return Move(action=action, version=version, expected=expected, reason="why", at=NOW, request=request)


def unfenced() -> None:
    """Nobody has taken over."""


def test_registering_is_idempotent_by_the_request(registry: Registry, estimator: Any) -> None:
    first = registry.register(new(estimator))
    assert registry.register(new(estimator)) == first
    assert registry.register(new(estimator, "r2")).version != first.version
    assert registry.find_request("r1") == first
    assert registry.find_request("r3") is None


def test_a_version_calls_itself_by_its_number_unless_told_otherwise(
    registry: Registry, estimator: Any
) -> None:
    plain = registry.register(new(estimator))
    named = registry.register(new(estimator, "r2", model_version="2026-01"))
    assert (plain.model_version, named.model_version) == (plain.version, "2026-01")
    assert registry.find(named.version) == named
    assert registry.find("77") is None


def test_a_loaded_model_answers_as_it_did_and_tags_are_kept(registry: Registry, estimator: Any) -> None:
    made = registry.register(new(estimator))
    frame = pd.DataFrame({"country": ["de", "xx", None], "amount": [6.0, 1.0, None], "more": 1})
    model = registry.load(made.version)
    assert (
        model.predict(frame).tolist()[:2] == estimator.predict(SCHEMA.arrange(frame)).tolist()[:2] == [1, 0]
    )
    assert (made.trained_from, made.trained_until, made.tags["run"]) == (0.0, 1.5, "run-1")
    registry.describe(made.version, {"verdict": "refused"}, "# card")
    described = registry.find(made.version)
    assert described is not None and described.tags["verdict"] == "refused"
    with pytest.raises(ModelUnloadable, match="version 9"):
        registry.load("9")


def test_the_champion_moves_only_from_the_expected_one(registry: Registry, estimator: Any) -> None:
    for request in ("r1", "r2", "r3"):
        registry.register(new(estimator, request))
    assert registry.champion_version() == ""
    registry.move(promoted("1", "", "r1"), unfenced)
    registry.move(promoted("2", "1", "r2"), unfenced)
    with pytest.raises(ChampionMoved, match="champion is version 2"):
        registry.move(promoted("3", "1", "r3"), unfenced)
    assert registry.champion_version() == "2"
    moves = [(one.sequence, one.move.version, one.previous_model_version) for one in registry.audit()]
    assert moves == [(1, "1", ""), (2, "2", "1")]


def test_a_request_promotes_once_even_after_a_rollback(registry: Registry, estimator: Any) -> None:
    for request in ("r1", "r2"):
        registry.register(new(estimator, request))
    registry.move(promoted("1", "", "r1"), unfenced)
    record = registry.move(promoted("2", "1", "r2"), unfenced)
    registry.move(promoted("1", "2", action="rolled-back"), unfenced)
    assert registry.move(promoted("2", "1", "r2"), unfenced) == record
    assert registry.champion_version() == "1"


def test_a_fenced_run_moves_nothing(registry: Registry, estimator: Any) -> None:
    registry.register(new(estimator))

    def fenced() -> None:
        raise Fenced("run b has taken over")

    with pytest.raises(Fenced):
        registry.move(promoted("1", "", "r1"), fenced)
    assert (registry.champion_version(), registry.audit()) == ("", ())


def test_of_many_at_once_one_is_promoted(registry: Registry, estimator: Any) -> None:
    for number in range(6):
        registry.register(new(estimator, f"r{number}"))
    ended: list[str] = []

    def attempt(number: int) -> None:
        try:
            registry.move(promoted(str(number + 1), "", f"r{number}"), unfenced)
            ended.append("promoted")
        except ChampionMoved:
            ended.append("refused")

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == ["promoted"] + ["refused"] * 5
    assert len(registry.audit()) == 1


def test_a_version_that_is_not_there_never_becomes_champion(registry: Registry, estimator: Any) -> None:
    registry.register(new(estimator))
    with pytest.raises(ModelUnloadable, match="version 5"):
        registry.move(promoted("5", "", "r5"), unfenced)


def test_rolling_back_twice_goes_back_two_champions(registry: Registry, estimator: Any) -> None:
    for request in ("r1", "r2", "r3"):
        registry.register(new(estimator, request))
    for version, before in (("1", ""), ("2", "1"), ("3", "2")):
        registry.move(promoted(version, before, f"r{version}"), unfenced)
    for expected in ("2", "1"):
        champion = registry.champion_version()
        target = previous_champion(registry.audit(), champion)
        assert target == expected
        registry.move(promoted(target, champion, action="rolled-back"), unfenced)
    with pytest.raises(NoEarlierChampion, match="first champion"):
        previous_champion(registry.audit(), registry.champion_version())


# MLflow's own troubles

_DYING = """
import os, sys
from pathlib import Path
from datetime import datetime, UTC
from flows.mlflow_registry import MlflowRegistry
from flows.audit import Move
from monitors.settings import RegistrySettings
settings = RegistrySettings(tracking_uri=f"sqlite:///{sys.argv[1]}/deep/mlflow.db")
registry = MlflowRegistry(settings, sys.argv[3])
move = Move(action="promoted", version="2", expected="1", reason="why", at=datetime.now(UTC), request="r2")
if sys.argv[2] == "before the alias":
    registry.move(move, lambda: os._exit(9))
registry._commit = lambda record: os._exit(9) if record.sequence == 2 else None
registry.move(move, lambda: None)
"""


@pytest.mark.parametrize("died", ["before the alias", "after the alias"])
def test_a_move_cut_short_took_place_if_the_alias_moved(
    folder: Path, mlflow: MlflowRegistry, estimator: Any, died: str
) -> None:
    for request in ("r1", "r2", "r3"):
        mlflow.register(new(estimator, request))
    mlflow.move(promoted("1", "", "r1"), unfenced)
    ended = subprocess.run(
        [sys.executable, "-c", _DYING, str(folder), died, mlflow.name], timeout=120, check=False
    )
    assert ended.returncode == 9
    moved = died == "after the alias"
    assert mlflow.champion_version() == ("2" if moved else "1")
    assert [record.move.version for record in mlflow.audit()] == (["1", "2"] if moved else ["1"])
    mlflow.move(promoted("3", "2" if moved else "1", "r3"), unfenced)
    versions = [record.move.version for record in mlflow.audit()]
    assert versions == (["1", "2", "3"] if moved else ["1", "3"])
    assert [record.sequence for record in mlflow.audit()] == list(range(1, len(versions) + 1))


def test_an_alias_moved_by_another_hand_is_not_rolled_back(
    folder: Path, mlflow: MlflowRegistry, estimator: Any
) -> None:
    for request in ("r1", "r2"):
        mlflow.register(new(estimator, request))
    mlflow.move(promoted("1", "", "r1"), unfenced)
    mlflow._client.set_registered_model_alias(mlflow.name, "champion", "2")
    with pytest.raises(NoEarlierChampion, match="another hand"):
        previous_champion(mlflow.audit(), mlflow.champion_version())


@pytest.mark.parametrize("tamper", ["changed", "added"])
def test_files_that_are_not_those_registered_are_not_loaded(
    folder: Path, mlflow: MlflowRegistry, estimator: Any, tamper: str
) -> None:
    mlflow.register(new(estimator))
    (skops,) = (folder / "deep" / "mlflow-artifacts" / mlflow.name).rglob("model.skops")
    if tamper == "changed":
        skops.write_bytes(skops.read_bytes()[:-1] + b"x")
    else:
        (skops.parent / "more.py").write_text("import os")
    with pytest.raises(ModelUnloadable, match="not those that were registered"):
        mlflow.load("1")


class Theirs:
    """A model that nobody knows."""

    def predict(self, rows: Any) -> Any:
        return [0 for _ in rows]


def test_types_that_nobody_allowed_are_named(folder: Path, mlflow: MlflowRegistry) -> None:
    with pytest.raises(UntrustedTypes, match=r"Theirs.*training\.trusted_types"):
        mlflow.register(new(Theirs()))
    allowing = opened(folder, mlflow.name, [f"{Theirs.__module__}.Theirs"])
    assert allowing.load(allowing.register(new(Theirs())).version).version == "1"
    with pytest.raises(UntrustedTypes):
        mlflow.load("1")


def test_a_version_registered_by_others_is_no_champion_to_load(
    folder: Path, mlflow: MlflowRegistry, estimator: Any
) -> None:
    mlflow.register(new(estimator))
    made = mlflow._client.create_model_version(mlflow.name, source="runs:/none/model")
    with pytest.raises(ModelUnloadable, match="was not registered by retrain-daemon"):
        mlflow.load(str(made.version))


def test_a_run_that_died_while_registering_is_ended_by_the_next(
    folder: Path, mlflow: MlflowRegistry, estimator: Any
) -> None:
    client = mlflow._client
    orphan = client.create_run(mlflow._experiment(), tags={"retrain_daemon.request": "r1"})
    mlflow.register(new(estimator))
    assert client.get_run(orphan.info.run_id).info.status == "KILLED"


def test_a_place_that_is_no_registry_is_named(tmp_path: Path) -> None:
    from flows.registry import RegistryUnavailable

    (tmp_path / "mlflow.db").write_text("no database")
    settings = RegistrySettings(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(RegistryUnavailable, match=r"mlflow\.db"):
        MlflowRegistry(settings, "fraud").champion_version()


def test_a_version_is_called_what_the_naming_says_of_its_number(registry: Registry, estimator: Any) -> None:
    made = registry.register(new(estimator, naming=lambda number: f"{number}-again"))
    assert made.model_version == f"{made.version}-again"
    assert registry.find_request("r1") == made
    assert registry.register(new(estimator, "r2")).model_version != made.model_version
