"""Retraining in memory: what a request leads to, by the flow's own training, gate and registry rules."""

from dataclasses import dataclass
from datetime import UTC, datetime

from flows.audit import Move
from flows.backtest.references import MemoryReferences
from flows.errors import NotRetrainable
from flows.evaluation import evaluate, made_of, own_baseline
from flows.probation import Review, review
from flows.promotion import make_reference, reference_rows
from flows.registry import LoadedModel, MemoryRegistry, ModelVersion, NewModel
from flows.rows import LabelledRows
from flows.training import Challenger, fit_span
from flows.verdict import Verdict
from monitors.baseline import Baseline
from monitors.events import Outcome, RetrainRequest
from monitors.settings import FlowSettings

FIRST = "the first champion"


@dataclass(frozen=True, eq=False)
class Retrained:
    """How a request ended; `champion` is the new one where it was promoted."""

    outcome: Outcome
    verdict: Verdict | None = None
    champion: LoadedModel | None = None


class Retrainer:
    """The one place where a replay's requests are carried out; `registry` is this replay's own."""

    def __init__(
        self, settings: FlowSettings, references: MemoryReferences, registry: MemoryRegistry
    ) -> None:
        self._settings = settings
        self._references = references
        self._registry = registry

    def first(self, rows: LabelledRows) -> LoadedModel:
        """Train the first champion on these rows, which are its reference too."""
        made = self._register(fit_span(self._settings.settings, rows), FIRST)
        return self._promote(made, rows, FIRST, "", own_baseline(self._settings.settings, rows))

    def carry_out(self, request: RetrainRequest, rows: LabelledRows) -> Retrained:
        """Train on the rows known by now, and promote what the gate lets through."""
        try:
            return self._judged(request, rows)
        except NotRetrainable as refusal:
            outcome = Outcome(
                action="refused", sentence=str(refusal), champion_before=self._registry.champion_version()
            )
            return Retrained(outcome)

    def review(self, request: RetrainRequest, rows: LabelledRows) -> tuple[Review, LoadedModel | None]:
        """Compare with champions of before; with the one that is champion again, if any is."""
        found = review(self._settings, self._registry, rows, request, "", lambda: None)
        record = found.record
        return found, self._registry.load(record.move.version) if record else None

    def _judged(self, request: RetrainRequest, rows: LabelledRows) -> Retrained:
        settings = self._settings.settings
        if len(rows) < settings.data.min_rows:
            raise NotRetrainable(f"only {len(rows)} labelled rows, {settings.data.min_rows} needed")
        evaluation = evaluate(self._settings, self._registry, rows, request.suspected_since)
        verdict = evaluation.verdict
        made = champion = None
        if verdict.action == "promoted":
            challenger = made_of(self._registry, settings, rows, evaluation.span, request.suspected_since)
            made = self._register(challenger, request.request)
            champion = self._promote(made, rows, verdict.sentence, request.request, evaluation.baseline)
        outcome = Outcome(
            action=verdict.action,
            sentence=verdict.sentence,
            registry_version=made.version if made else "",
            model_version=made.model_version if made else "",
            champion_before=evaluation.champion,
            metric=verdict.metric,
            challenger_score=verdict.challenger_score,
            champion_score=verdict.champion_score,
            baseline=evaluation.reached,
            surety=verdict.surety,
        )
        return Retrained(outcome, verdict, champion)

    def _register(self, challenger: Challenger, request: str) -> ModelVersion:
        tags = {
            "span": challenger.span,
            "training_rows": str(challenger.rows),
            "trained_from": repr(challenger.trained_from),
            "trained_until": repr(challenger.trained_until),
        }
        new = NewModel(
            estimator=challenger.estimator,
            schema=challenger.schema,
            request=request,
            run="",
            tags=tags,
            parameters=challenger.parameters,
        )
        return self._registry.register(new)

    def _promote(
        self, made: ModelVersion, rows: LabelledRows, reason: str, request: str, baseline: Baseline | None
    ) -> LoadedModel:
        """The reference first, as the flow does it."""
        model = self._registry.load(made.version)
        newest = reference_rows(self._settings.settings, made, rows)
        predictions = model.predict(newest.features)
        self._references.keep(
            make_reference(self._settings, made.model_version, newest, predictions, baseline)
        )
        move = Move(
            action="promoted",
            version=made.version,
            expected=self._registry.champion_version(),
            reason=reason,
            at=datetime.now(UTC),
            request=request,
        )
        self._registry.move(move, lambda: None)
        return model
