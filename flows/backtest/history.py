"""History: what a model's registry held when a log began, for a replay to go on from."""

from collections.abc import Callable, Sequence
from datetime import datetime

from flows.audit import AuditRecord
from flows.mlflow_registry import sqlite_file
from flows.registry import LoadedModel, MemoryRegistry, ModelVersion, Registry, open_registry
from monitors.settings import FlowSettings

# A registry of the replay's own, for each time that it is begun anew.
Begin = Callable[[], MemoryRegistry]


class HistoryRegistry(MemoryRegistry):
    """The versions that were champion before, which are only read, and in memory those that a replay adds."""

    def __init__(self, registry: Registry, moves: Sequence[AuditRecord], numbers_before: int) -> None:
        super().__init__(numbers_before)
        self._registry = registry
        self._before = frozenset(record.move.version for record in moves)
        self._audit = tuple(moves)
        self._champion = moves[-1].move.version
        self._found: dict[str, ModelVersion | None] = {}
        self._loaded: dict[str, LoadedModel] = {}

    def find(self, version: str) -> ModelVersion | None:
        """The version, of then or of now, if it exists."""
        if version not in self._before:
            return super().find(version)
        if version not in self._found:
            self._found[version] = self._registry.find(version)
        return self._found[version]

    def load(self, version: str) -> LoadedModel:
        """The model, ready to answer; one of then is read once."""
        if version not in self._before:
            return super().load(version)
        if version not in self._loaded:
            self._loaded[version] = self._registry.load(version)
        return self._loaded[version]


def history_of(settings: FlowSettings, serving: str, at: datetime) -> Begin:
    """
    The registry as it was when the version that calls itself `serving` answered the log's first record.

    A version that was champion more than once is taken as it was last before `at`, by the clock of whoever
    moved the alias; in a log whose event times know nothing of that clock, as it was first. Where the
    registry knows no such champion, a replay begins without one, and numbers on after `serving`.
    """
    if (registry := _existing(settings)) is not None:
        moves = registry.audit()
        found = [place for place, record in enumerate(moves) if record.model_version == serving]
        if found:
            place = next((one for one in reversed(found) if moves[one].move.at <= at), found[0])
            before = moves[: place + 1]
            numbers = [int(one.move.version) for one in before if one.move.version.isdecimal()]
            return lambda: HistoryRegistry(registry, before, max(numbers, default=0))
    numbers_before = int(serving) if serving.isdecimal() else 0
    return lambda: MemoryRegistry(numbers_before)


def _existing(settings: FlowSettings) -> Registry | None:
    """The registry, if there is one: MLflow would make the file that it is to look at."""
    file = sqlite_file(settings.registry.tracking_uri)
    return None if file is not None and not file.exists() else open_registry(settings)
