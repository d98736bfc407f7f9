"""References in memory: what the versions of one replay are held against."""

from collections.abc import Callable, Collection, Sequence

from monitors.drift import DriftEngine
from monitors.drift_engine import compile_reference
from monitors.records import PredictionRecord
from monitors.reference import Reference
from monitors.settings import ModelSettings

Look = Callable[[str, str], Reference | None]


class StoredReference(Exception):
    """A version has a reference that is not what these records teach: start again, and use it."""

    def __init__(self, version: str) -> None:
        super().__init__(f"version {version} has a stored reference")
        self.version = version


class MemoryReferences:
    """
    The port `References`: those of this replay, and nothing is written.

    What `look` finds counts for the versions in `stored`. Any other version learns its reference, for
    whoever read this log before may have learned it from just these records; `StoredReference` says
    that it was not so.
    """

    def __init__(
        self, settings: ModelSettings, look: Look | None = None, stored: Collection[str] = ()
    ) -> None:
        self._settings = settings
        self._look = look
        self._stored = frozenset(stored)
        self._kept: dict[str, DriftEngine] = {}

    def keep(self, reference: Reference) -> None:
        """Hold the windows of the reference's version against it from now on."""
        made = self._settings
        self._kept[reference.model_version] = compile_reference(
            reference, made.drift, made.quality, made.kind
        )

    def find(self, model: str, version: str) -> DriftEngine | None:
        if version not in self._kept and version in self._stored and self._look is not None:
            found = self._look(model, version)
            if found is not None:
                self.keep(found)
        return self._kept.get(version)

    def learn(self, model: str, version: str, rows: Sequence[PredictionRecord]) -> DriftEngine:
        features, predictions = [row.features for row in rows], [row.prediction for row in rows]
        times, segments = [row.event_time for row in rows], [row.segment for row in rows]
        learned = Reference.from_rows(
            model, version, features, predictions, self._settings.drift, times, segments=segments
        )
        found = self._look(model, version) if self._look else None
        if found is not None and found.digest != learned.digest:
            raise StoredReference(version)
        self.keep(learned)
        return self._kept[version]
