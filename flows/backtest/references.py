"""References in memory: what the versions of one replay are held against."""

from collections.abc import Callable, Sequence

from monitors.drift import DriftEngine
from monitors.drift_engine import compile_reference
from monitors.records import PredictionRecord
from monitors.reference import Reference
from monitors.settings import ModelSettings

Look = Callable[[str, str], Reference | None]


class MemoryReferences:
    """The port `References`: those of this replay, else those that `look` finds, and nothing is written."""

    def __init__(self, settings: ModelSettings, look: Look | None = None) -> None:
        self._settings = settings
        self._look = look
        self._kept: dict[str, DriftEngine] = {}

    def keep(self, reference: Reference) -> None:
        """Hold the windows of the reference's version against it from now on."""
        made = self._settings
        self._kept[reference.model_version] = compile_reference(
            reference, made.drift, made.quality, made.kind
        )

    def find(self, model: str, version: str) -> DriftEngine | None:
        if version not in self._kept and self._look is not None:
            found = self._look(model, version)
            if found is not None:
                self.keep(found)
        return self._kept.get(version)

    def learn(self, model: str, version: str, rows: Sequence[PredictionRecord]) -> DriftEngine:
        features, predictions = [row.features for row in rows], [row.prediction for row in rows]
        self.keep(Reference.from_rows(model, version, features, predictions, self._settings.drift))
        return self._kept[version]
