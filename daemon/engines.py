"""Engines: which reference a version's windows are held against, and who scores them."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec
import structlog

from daemon.evidently_worker import EvidentlyEngine, EvidentlyWorker
from daemon.grounds import Grounds
from daemon.wire.references import ReferenceStore
from monitors.baseline import Baseline
from monitors.confirmation import fall_back
from monitors.drift import DriftEngine, DriftReport, SegmentShift
from monitors.drift_engine import compile_reference
from monitors.records import PredictionRecord
from monitors.reference import PREDICTION, Reference
from monitors.settings import ModelSettings

log = structlog.get_logger()

# A stream of made-up versions must not become a stream of look-ups in an object store.
FREE_LOOKUPS = 64
LOOKUP_SECONDS = 1.0


class TrustedEngine:
    """The compiled engine, but for the columns on which Evidently was seen to disagree."""

    def __init__(self, compiled: DriftEngine, evidently: EvidentlyEngine, digest: str) -> None:
        self.digest = digest
        self.evidently = evidently
        self.distrusted: frozenset[str] = frozenset()
        self._compiled = compiled

    @property
    def baseline(self) -> Baseline | None:
        return self._compiled.baseline

    def judge(self, records: Sequence[PredictionRecord]) -> DriftReport:
        report = self._compiled.judge(records)
        if not self.distrusted:
            return report
        theirs = self.evidently.judge(records)
        report = fall_back(report, theirs, self.distrusted)
        if PREDICTION not in self.distrusted:
            return report
        return msgspec.structs.replace(report, prediction=theirs.prediction)

    def locate(self, records: Sequence[PredictionRecord], columns: Sequence[str]) -> tuple[SegmentShift, ...]:
        return self._compiled.locate(records, columns)


class StoredEngines:
    """The port `References` on a reference store, and what reviews need to ask Evidently."""

    def __init__(
        self,
        store: ReferenceStore,
        models: Mapping[str, ModelSettings],
        engine: Literal["compiled", "evidently"],
        worker: EvidentlyWorker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._models = models
        self._engine = engine
        self._worker = worker
        self._clock = clock
        self._made: dict[tuple[str, str], TrustedEngine] = {}
        self._lookups: dict[str, tuple[int, float]] = {}

    def find(self, model: str, version: str) -> DriftEngine | None:
        if not self._may_look(model):
            return None
        found = self._store.read(model, version)
        if found is None:
            return None
        data, digest = found
        log.info("reference_read", model=model, version=version, digest=digest[:12])
        return self._make(model, version, Reference.from_bytes(data), digest)

    def learn(self, model: str, version: str, rows: Sequence[PredictionRecord]) -> DriftEngine:
        settings = self._models[model]
        reference = Reference.from_rows(
            model,
            version,
            [row.features for row in rows],
            [row.prediction for row in rows],
            settings.drift,
            [row.event_time for row in rows],
            segments=[row.segment for row in rows],
        )
        digest = self._store.write(model, version, reference.to_bytes())
        log.info("reference_learned", model=model, version=version, rows=len(rows), digest=digest[:12])
        return self._make(model, version, reference, digest)

    def grounds(self, model: str, version: str, rows: str, settings: str) -> Grounds:
        """What a window of this version is judged from; a version that still learns has no reference."""
        engine = self._made.get((model, version))
        if engine is None:
            return Grounds(rows, settings)
        return Grounds(rows, settings, engine.digest, self._engine, tuple(sorted(engine.distrusted)))

    def distrust(self, model: str, version: str, columns: Sequence[str]) -> None:
        """Score these columns by Evidently itself until the process is started anew."""
        engine = self._made[model, version]
        engine.distrusted |= frozenset(columns)

    def evidently(self, model: str, version: str) -> EvidentlyEngine | None:
        """Evidently bound to this version's reference, if the version has one."""
        engine = self._made.get((model, version))
        return None if engine is None else engine.evidently

    def _make(self, model: str, version: str, reference: Reference, digest: str) -> DriftEngine:
        settings = self._models[model]
        compiled = compile_reference(reference, settings.drift, settings.quality, settings.kind)
        evidently = EvidentlyEngine(
            self._worker, reference.to_bytes(), settings.drift, settings.quality, settings.kind
        )
        for finding in compiled.unscored:
            log.warning(
                "column_unscored", model=model, version=version, column=finding.column, why=finding.detail
            )
        engine = self._made[model, version] = TrustedEngine(compiled, evidently, digest)
        return evidently if self._engine == "evidently" else engine

    def _may_look(self, model: str) -> bool:
        count, last = self._lookups.get(model, (0, 0.0))
        now = self._clock()
        if count >= FREE_LOOKUPS and now - last < LOOKUP_SECONDS:
            return False
        self._lookups[model] = (count + 1, now)
        return True
