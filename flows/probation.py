"""Probation: the new champion beside the old one on the rows since the promotion; surely worse is undone."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from flows.audit import AuditRecord, ChampionMoved, Move
from flows.gate import Holdout, judge
from flows.registry import ModelUnloadable, Registry, RegistryUnavailable
from flows.rows import LabelledRows
from flows.scoring import Answers
from flows.verdict import Verdict
from monitors.events import Outcome, RetrainRequest
from monitors.settings import FlowSettings


@dataclass(frozen=True, eq=False)
class Review:
    """How a probation ended; `record` is that of the rollback, if it came to one."""

    outcome: Outcome
    verdict: Verdict | None = None
    record: AuditRecord | None = None


def review(
    settings: FlowSettings,
    registry: Registry,
    rows: LabelledRows,
    request: RetrainRequest,
    run: str,
    fence: Callable[[], None],
) -> Review:
    """
    Roll back if the old champion is surely better on the rows that the new one was there for.

    The old champion has to show there what a challenger has to show the gate. Whatever keeps the two
    from being compared keeps the new one.
    """
    promotion = _promotion(registry, request)
    if promotion is None:
        return _kept("no audit record tells of the promotion: there is nothing to compare with", run)
    if rollback := _own_rollback(registry, request):
        return _rolled_back(rollback, None)
    now, before = promotion.move.version, promotion.move.expected
    if registry.champion_version() != now:
        return _kept(f"version {now} is the champion no more", run)
    if not before:
        return _kept(f"version {now} is the first champion, there is none before it", run)
    later = rows.between(rows.first_at(request.suspected_since), len(rows))
    verdict = _compared(settings, registry, later, before, now)
    if isinstance(verdict, str):
        return _kept(verdict, run)
    if verdict.action == "refused":
        sentence = f"version {now} stays, {before} is not surely better since: {verdict.sentence}"
        return _kept(sentence, run, verdict)
    move = _move(verdict, before, now, request, run)
    try:
        return _rolled_back(registry.move(move, fence), verdict)
    except ChampionMoved as moved:
        return _kept(str(moved), run, verdict)


def _promotion(registry: Registry, request: RetrainRequest) -> AuditRecord | None:
    moves = (one for one in registry.audit() if one.move.request == request.promotion)
    return next((one for one in moves if one.move.action == "promoted"), None)


def _own_rollback(registry: Registry, request: RetrainRequest) -> AuditRecord | None:
    """An earlier try of this request died after the alias had moved."""
    return next((one for one in registry.audit() if one.move.request == request.request), None)


def _compared(
    settings: FlowSettings, registry: Registry, rows: LabelledRows, before: str, now: str
) -> Verdict | str:
    """The old champion judged as a challenger of the new one, or why that can't be done."""
    model = settings.settings
    gate = msgspec.structs.replace(model.gate, mode="superiority", floor=None)
    if len(rows) < gate.min_holdout_rows:
        return f"only {len(rows)} labelled rows since the promotion, {gate.min_holdout_rows} needed"
    try:
        old, new = _answers(registry, before, rows), _answers(registry, now, rows)
    except RegistryUnavailable:
        raise
    except ModelUnloadable as error:
        return f"version {now} stays, there is nothing to compare it with: {error}"
    trained = [version.trained_until for version in map(registry.find, (before, now)) if version]
    return judge(
        gate,
        model.kind,
        Holdout(rows.labels, rows.event_times),
        [old],
        new,
        trained_until=max(trained),
        seed=model.training.seed,
    )


def _answers(registry: Registry, version: str, rows: LabelledRows) -> Answers:
    """Without the signature: the old champion may well not know what the new one has learned to read."""
    said = registry.load(version).answers(rows.features, f"version {version}")
    return Answers(said.source, said.predictions, said.probabilities)


def _move(verdict: Verdict, before: str, now: str, request: RetrainRequest, run: str) -> Move:
    return Move(
        action="rolled-back",
        version=before,
        expected=now,
        reason=f"{before} is surely better than {now} on the {verdict.rows} rows since: {verdict.sentence}",
        at=datetime.now(UTC),
        request=request.request,
        run=run,
        metric=verdict.metric,
        challenger_score=verdict.challenger_score,
        champion_score=verdict.champion_score,
    )


def _kept(sentence: str, run: str, verdict: Verdict | None = None) -> Review:
    outcome = Outcome(
        action="kept",
        sentence=sentence,
        run=run,
        metric=verdict.metric if verdict else "",
        challenger_score=verdict.challenger_score if verdict else None,
        champion_score=verdict.champion_score if verdict else None,
    )
    return Review(outcome, verdict)


def _rolled_back(record: AuditRecord, verdict: Verdict | None) -> Review:
    move = record.move
    outcome = Outcome(
        action="rolled-back",
        sentence=move.reason,
        run=move.run,
        registry_version=move.version,
        model_version=record.model_version,
        champion_before=move.expected,
        metric=move.metric,
        challenger_score=move.challenger_score,
        champion_score=move.champion_score,
    )
    return Review(outcome, verdict, record)
