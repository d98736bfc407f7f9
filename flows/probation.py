"""Probation: the champion beside those before it on the newest labelled rows; surely worse is undone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import msgspec

from flows.audit import AuditRecord, ChampionMoved, Move
from flows.earlier import earlier_champions
from flows.evaluation import baseline_of
from flows.gate import Holdout, judge
from flows.registry import ModelUnloadable, ModelVersion, Registry, RegistryUnavailable
from flows.rows import LabelledRows
from flows.scoring import Answers
from flows.verdict import Verdict
from monitors.baseline import Baseline
from monitors.events import Outcome, RetrainRequest
from monitors.settings import FlowSettings


@dataclass(frozen=True, eq=False)
class Review:
    """How a comparison ended; `record` is that of the rollback, if it came to one."""

    outcome: Outcome
    verdict: Verdict | None = None
    record: AuditRecord | None = None


@dataclass(frozen=True, eq=False)
class _Compared:
    """The verdict on those before; `best` is the version it is about, `baseline` how that one did."""

    verdict: Verdict
    best: str
    baseline: Baseline | None
    asked: int


class _Incomparable(Exception):
    """The message is why the champion is kept."""


def review(
    settings: FlowSettings,
    registry: Registry,
    rows: LabelledRows,
    request: RetrainRequest,
    run: str,
    fence: Callable[[], None],
) -> Review:
    """
    Roll back if a champion of before is better on the rows since `suspected_since`.

    It is the one before the promotion that the request names, or, where it names none, whichever of the
    last ones. It has to show on rows that neither has seen what a challenger has to show the gate, with
    `probation_confidence`.
    Whatever keeps them from being compared keeps the champion.
    """
    if rollback := _own_rollback(registry, request):
        return _rolled_back(rollback)
    try:
        now, before = _rivals(registry, request)
        later = rows.between(rows.first_at(request.suspected_since), len(rows))
        compared = _compared(settings, registry, later, before, now)
    except _Incomparable as reason:
        return _kept(str(reason), run)
    verdict = compared.verdict
    if verdict.action == "refused":
        who = f"of {compared.asked} before it none is" if compared.asked > 1 else f"{compared.best} is not"
        sentence = f"version {now.version} stays, {who} surely better since: {verdict.sentence}"
        return _kept(sentence, run, verdict)
    move = _move(compared, now.version, settings.settings.gate.probation_confidence, request, run)
    try:
        return _rolled_back(registry.move(move, fence), verdict)
    except ChampionMoved as moved:
        return _kept(str(moved), run, verdict)


def _rivals(registry: Registry, request: RetrainRequest) -> tuple[ModelVersion, Sequence[ModelVersion]]:
    """The champion that was asked about, and those that may take its place."""
    champion = registry.champion_version()
    if request.promotion:
        now, before = _promoted(registry, request)
    else:
        now, before = champion, [one.version for one in earlier_champions(registry, champion)]
    present = registry.find(now) if now else None
    if present is None or now != champion or present.model_version != request.model_version:
        raise _Incomparable(f"version {request.model_version} is the champion no more")
    if "trained_until" not in present.tags:
        raise _Incomparable(f"nobody knows which rows version {now} has seen: somebody else registered it")
    found = [version for version in map(registry.find, before) if version is not None]
    if not found:
        raise _Incomparable(f"version {now} stays, there is none before it to compare it with")
    return present, found


def _promoted(registry: Registry, request: RetrainRequest) -> tuple[str, list[str]]:
    """What that promotion put in whose place."""
    for one in registry.audit():
        if one.move.request == request.promotion and one.move.action == "promoted":
            if not one.move.expected:
                raise _Incomparable(
                    f"version {one.move.version} is the first champion, there is none before it"
                )
            return one.move.version, [one.move.expected]
    raise _Incomparable("no audit record tells of the promotion: there is nothing to compare with")


def _own_rollback(registry: Registry, request: RetrainRequest) -> AuditRecord | None:
    """An earlier try of this request died after the alias had moved."""
    return next((one for one in registry.audit() if one.move.request == request.request), None)


def _compared(
    settings: FlowSettings,
    registry: Registry,
    rows: LabelledRows,
    before: Sequence[ModelVersion],
    now: ModelVersion,
) -> _Compared:
    """Those before judged as challengers of the champion."""
    model = settings.settings
    confidence = model.gate.probation_confidence
    gate = msgspec.structs.replace(model.gate, mode="superiority", floor=None, confidence=confidence)
    unseen = rows.between(rows.first_after(now.trained_until), len(rows))
    if len(unseen) < gate.min_holdout_rows:
        raise _Incomparable(
            f"only {len(unseen)} labelled rows since that version {now.version} has not seen,"
            f" {gate.min_holdout_rows} needed"
        )
    try:
        champion = _answers(registry, now, unseen)
        asked = _asked(registry, before, unseen)
    except RegistryUnavailable:
        raise
    except ModelUnloadable as error:
        reason = f"version {now.version} stays, there is nothing to compare it with: {error}"
        raise _Incomparable(reason) from error
    verdict = judge(
        gate,
        model.kind,
        Holdout(unseen.labels, unseen.event_times),
        [answered for _, answered in asked],
        champion,
        trained_until=max(version.trained_until for version in (now, *(version for version, _ in asked))),
        seed=model.training.seed,
    )
    best, answered = asked[verdict.chosen or 0]
    return _Compared(verdict, best.version, baseline_of(model.kind, unseen.labels, answered), len(asked))


def _asked(
    registry: Registry, before: Sequence[ModelVersion], rows: LabelledRows
) -> list[tuple[ModelVersion, Answers]]:
    """What those say that have not seen the rows; the last error where that is nobody."""
    found: list[tuple[ModelVersion, Answers]] = []
    failed = ModelUnloadable("of none before it is it known that it has not seen these rows")
    for version in before:
        if "trained_until" not in version.tags or version.trained_until >= float(rows.event_times[0]):
            continue
        try:
            found.append((version, _answers(registry, version, rows)))
        except ModelUnloadable as error:
            failed = error
    if not found:
        raise failed
    return found


def _answers(registry: Registry, version: ModelVersion, rows: LabelledRows) -> Answers:
    """Without the signature: the old champion may well not know what the new one has learned to read."""
    said = registry.load(version.version).answers(rows.features, f"version {version.version}")
    return replace(said, columns=None, classes=None)


def _move(compared: _Compared, now: str, sure: float, request: RetrainRequest, run: str) -> Move:
    verdict, before = compared.verdict, compared.best
    better = f"{before} is better than {now}, {sure:.0%} sure, on the {verdict.rows} rows since"
    return Move(
        action="rolled-back",
        version=before,
        expected=now,
        reason=f"{better}: {verdict.sentence}",
        baseline=compared.baseline,
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


def _rolled_back(record: AuditRecord, verdict: Verdict | None = None) -> Review:
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
        baseline=move.baseline,
    )
    return Review(outcome, verdict, record)
