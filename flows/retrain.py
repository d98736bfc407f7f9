"""The retraining flow: claim, extract, train, evaluate, promote, announce."""

import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import gettempdir
from traceback import format_exception
from typing import Any

import msgspec
import structlog
from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from daemon.wire.names import FLOW
from daemon.wire.prefect import PrefectApi, PrefectNotConfigured
from flows import probation, promotion
from flows.announcements import announce_outcome
from flows.audit import AuditRecord, ChampionMoved
from flows.claims import Claim, Claims, FolderVariables, Variables, beating
from flows.data import extract
from flows.errors import Fenced, FlowError, NotRetrainable
from flows.evaluation import Evaluation, evaluate, made_of
from flows.mlflow_registry import located, public, registered_name
from flows.model_card import Card
from flows.registry import ModelVersion, Registry, open_registry
from flows.rows import LabelledRows
from flows.steps import Step, as_task, in_process, patiently
from flows.verdict import Verdict
from monitors.events import NAMESPACE, Outcome, RetrainRequest
from monitors.settings import FlowSettings

log = structlog.get_logger()

# How often a challenger is judged again because the champion was another one by then.
_JUDGEMENTS = 3


@dataclass(frozen=True, eq=False)
class Job:
    """One run's work, and what it works with; `api` is None without a Prefect server."""

    settings: FlowSettings
    request: RetrainRequest | None
    request_id: str
    run: str
    registry: Registry
    variables: Variables
    open_variables: Callable[[], AbstractContextManager[Variables]]
    api: PrefectApi | None = None
    step: Step = in_process
    publish: Callable[[str], None] = field(default=lambda markdown: None)

    @property
    def claims(self) -> Claims:
        """The claims, on this thread's connection."""
        return Claims(self.variables)


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What the steps came to, before anybody is told."""

    outcome: Outcome
    verdict: Verdict | None = None
    version: ModelVersion | None = None
    record: AuditRecord | None = None


def run_name() -> str:
    """`fraud: episode 3, attempt 1`, or `fraud: manual`."""
    parameters = flow_run.parameters
    model, request = parameters["settings"]["model"], parameters.get("request")
    if not request:
        return f"{model}: manual"
    if request.get("kind") == "probation":
        return f"{model}: probation of version {request['model_version']}"
    return f"{model}: episode {request['episode_number']}, attempt {request['attempt']}"


@flow(name=FLOW, flow_run_name=run_name, persist_result=False)
def retrain(settings: dict[str, Any], request: dict[str, Any] | None = None) -> State[Any]:
    """Retrain one model, and promote the challenger if the gate says so."""
    run = str(flow_run.id)
    try:
        flow_settings = msgspec.convert(settings, FlowSettings)
        asked = msgspec.convert(request, RetrainRequest) if request else None
    except msgspec.ValidationError as error:
        return Failed(message=f"the run's parameters are not those of a retraining: {error}; deploy again")
    with PrefectApi() as api:
        job = Job(
            settings=flow_settings,
            request=asked,
            request_id=asked.request if asked else manual_request(run),
            run=run,
            registry=open_registry(flow_settings),
            variables=api,
            open_variables=PrefectApi,
            api=api,
            step=as_task,
            publish=lambda markdown: _publish(flow_settings.model, markdown),
        )
        return final_state(act(job))


def run_now(settings: FlowSettings) -> Outcome:
    """Retrain in this process: as a Prefect run if a server is configured, else under a file lock."""
    try:
        PrefectApi().close()
    except PrefectNotConfigured:
        return _run_alone(settings)
    state = retrain(msgspec.to_builtins(settings), return_state=True)
    with PrefectApi() as api:
        run = str(state.state_details.flow_run_id)
        claim = Claims(api).holder(manual_request(run))
    if claim is None or claim.outcome is None:
        raise FlowError(f"run {run} ended {state.name} without an outcome: {state.message}")
    return claim.outcome


def manual_request(run: str) -> str:
    """The request of a run that nobody but a person asked for; the same when it's retried."""
    return str(uuid.uuid5(NAMESPACE, f"manual|{run}"))


def act(job: Job) -> Outcome:
    """Claim the request and see it through, once; whatever happens has an outcome."""
    claim = job.step(_claim, job)
    if claim.run != job.run:
        return _duplicate(job, claim.run)
    if claim.outcome is not None and claim.outcome.action != "failed":
        # A retry of a run that ended between its outcome and its terminal state.
        return claim.outcome
    try:
        with beating(claim, job.open_variables):
            outcome = _told(job, _decided(job, claim))
    except Fenced as error:
        log.info("run_fenced", model=job.settings.model, request=job.request_id, reason=str(error))
        holder = job.claims.holder(job.request_id)
        return _duplicate(job, holder.run if holder else "unknown")
    except Exception as error:  # noqa: BLE001 - a run without an outcome would keep the daemon waiting
        outcome = Outcome(action="failed", sentence=_reason(error), run=job.run)
        log.error("retraining_failed", model=job.settings.model, reason=outcome.sentence, **_where(error))
    job.step(_finish, job, claim, outcome)
    return outcome


def final_state(outcome: Outcome) -> State[Any]:
    """Named for how it ended, so that a list of runs tells it; the sentence is the message."""
    if outcome.action == "failed":
        return Failed(message=outcome.sentence)
    return Completed(name=outcome.action.capitalize(), message=outcome.sentence)


# The steps


def _claim(job: Job) -> Claim:
    return job.claims.claim(job.request_id, job.run)


def _decided(job: Job, claim: Claim) -> Result:
    """Everything up to the promotion or the refusal, or to the end of a probation."""
    if job.request is not None and job.request.kind == "probation":
        return _reviewed(job, claim, job.request)
    if record := _own_promotion(job):
        # An earlier try, of this run or another, died after the alias had moved.
        return _promoted(job, record)
    try:
        rows = job.step(_extract, job)
        return _judged(job, claim, rows)
    except NotRetrainable as refusal:
        champion = job.registry.champion_version()
        return Result(
            outcome=Outcome(action="refused", sentence=str(refusal), run=job.run, champion_before=champion)
        )


def _reviewed(job: Job, claim: Claim, request: RetrainRequest) -> Result:
    try:
        rows = job.step(_extract, job)
    except NotRetrainable as refusal:
        return Result(outcome=Outcome(action="kept", sentence=str(refusal), run=job.run))
    review = job.step(_review, job, claim, request, rows)
    return Result(outcome=review.outcome, verdict=review.verdict, record=review.record)


def _review(job: Job, claim: Claim, request: RetrainRequest, rows: LabelledRows) -> probation.Review:
    return probation.review(
        job.settings, job.registry, rows, request, job.run, lambda: job.claims.require(claim)
    )


def _extract(job: Job) -> LabelledRows:
    return extract(job.settings, job.request)


def _judged(job: Job, claim: Claim, rows: LabelledRows) -> Result:
    """Judge, register and promote; again where the champion was another one by then."""
    span = ""
    for _ in range(_JUDGEMENTS):
        evaluation = job.step(_evaluate, job, rows, span)
        version = job.step(_train, job, rows, evaluation)
        span = version.tags["span"]
        if span != evaluation.span:
            # An earlier try registered another candidate: that one is judged, too.
            evaluation = job.step(_evaluate, job, rows, span)
        if evaluation.verdict.action == "refused":
            return _refused(job, evaluation, version)
        try:
            record = job.step(_promote, job, claim, version, rows, evaluation)
            return _promoted(job, record, evaluation.verdict)
        except ChampionMoved as moved:
            log.info("challenger_judged_again", model=job.settings.model, reason=str(moved))
    raise ChampionMoved(
        f"the champion changed {_JUDGEMENTS} times while version {version.version} was judged:"
        " something else moves the alias; run the retraining again"
    )


def _evaluate(job: Job, rows: LabelledRows, span: str) -> Evaluation:
    return evaluate(job.settings, job.registry, rows, _since(job), span)


def _train(job: Job, rows: LabelledRows, evaluation: Evaluation) -> ModelVersion:
    """Fit the chosen span up to now and register it, unless an earlier try of the request already has."""
    if known := job.registry.find_request(job.request_id):
        return known
    challenger = made_of(job.registry, job.settings.settings, rows, evaluation.span, _since(job))
    version = promotion.register(
        job.settings, job.registry, challenger, rows, job.request_id, job.run, evaluation
    )
    log.info("challenger_registered", model=job.settings.model, version=version.version, rows=challenger.rows)
    return version


def _since(job: Job) -> datetime | None:
    return job.request.suspected_since if job.request else None


def _promote(
    job: Job, claim: Claim, version: ModelVersion, rows: LabelledRows, evaluation: Evaluation
) -> AuditRecord:
    return promotion.promote(
        job.settings,
        job.registry,
        version,
        rows,
        evaluation,
        job.request_id,
        job.run,
        lambda: patiently(lambda: job.claims.require(claim)),
    )


def _announce(job: Job, result: Result) -> None:
    """Card, notice and event; telling them twice is telling them once."""
    version, verdict = result.version, result.verdict
    card = _card(job, result).markdown()
    if version is not None and verdict is not None:
        tags = {"verdict": verdict.action, "sentence": verdict.sentence}
        job.registry.describe(version.version, tags, card)
    if (api := job.api) is not None:
        # A notice of a champion that is none any more would send the daemon looking for it.
        current = result.outcome.registry_version == job.registry.champion_version()
        record = result.record if current else None
        told = (job.settings, job.request_id, job.request, result.outcome, record)
        patiently(lambda: announce_outcome(api, *told))
    job.publish(card)


def _finish(job: Job, claim: Claim, outcome: Outcome) -> Claim:
    return patiently(lambda: job.claims.finish(claim, outcome))


# Outcomes


def _told(job: Job, result: Result) -> Outcome:
    """Announce; a failure to do so changes nothing about what has been done."""
    try:
        job.step(_announce, job, result)
    except Exception as error:  # noqa: BLE001 - Prefect's own client raises whatever its libraries do
        log.warning("outcome_unannounced", model=job.settings.model, reason=_reason(error))
    return result.outcome


def _duplicate(job: Job, acting: str) -> Outcome:
    return Outcome(action="duplicate", sentence=f"run {acting} acts on request {job.request_id}", run=job.run)


def _own_promotion(job: Job) -> AuditRecord | None:
    records = (record for record in job.registry.audit() if record.move.request == job.request_id)
    return next(records, None)


def _promoted(job: Job, record: AuditRecord, verdict: Verdict | None = None) -> Result:
    move = record.move
    version = job.registry.find(move.version)
    outcome = Outcome(
        action="promoted",
        sentence=move.reason,
        run=move.run,
        registry_version=move.version,
        model_version=record.model_version,
        champion_before=move.expected,
        metric=move.metric,
        challenger_score=move.challenger_score,
        champion_score=move.champion_score,
        baseline=promotion.baseline_in(version.tags) if version else None,
    )
    return Result(outcome=outcome, verdict=verdict, version=version, record=record)


def _refused(job: Job, evaluation: Evaluation, version: ModelVersion) -> Result:
    verdict = evaluation.verdict
    outcome = Outcome(
        action="refused",
        sentence=verdict.sentence,
        run=job.run,
        registry_version=version.version,
        champion_before=evaluation.champion,
        metric=verdict.metric,
        challenger_score=verdict.challenger_score,
        champion_score=verdict.champion_score,
        baseline=evaluation.reached,
        surety=verdict.surety,
    )
    return Result(outcome=outcome, verdict=verdict, version=version)


def _reason(error: Exception) -> str:
    """Our own errors say it all; of any other the kind matters too."""
    if hasattr(error, "exit_code"):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _where(error: Exception) -> dict[str, str]:
    """The traceback of an error that isn't ours; as plain text, for a pretty one shows the rows, too."""
    return {} if hasattr(error, "exit_code") else {"traceback": "".join(format_exception(error))}


# Telling


def _card(job: Job, result: Result) -> Card:
    version = job.registry.find(result.version.version) if result.version else None
    return Card(
        settings=job.settings,
        outcome=result.outcome,
        request_id=job.request_id,
        request=job.request,
        verdict=result.verdict,
        version=version.version if version else "",
        tags=version.tags if version else {},
        run_url=f"{job.api.ui_url}/runs/flow-run/{job.run}" if job.api else "",
        tracking_uri=public(located(job.settings.registry.tracking_uri)),
        registered_name=registered_name(job.settings.model),
    )


def _publish(model: str, markdown: str) -> None:
    from prefect.artifacts import create_markdown_artifact

    create_markdown_artifact(markdown, key=artifact_key(model), description=f"The retraining of {model}")


def artifact_key(model: str) -> str:
    """`retrain-` and the model, in the letters that artifact keys may have."""
    from daemon.wire.names import variable_slug

    return f"retrain-{variable_slug(model).replace('_', '-')}"


def _run_alone(settings: FlowSettings) -> Outcome:
    path = located(settings.registry.tracking_uri).removeprefix("sqlite:///")
    folder = Path(gettempdir() if "://" in path else Path(path).parent) / "claims"
    variables = FolderVariables(folder)
    run = str(uuid.uuid4())
    with variables.only_run_here(settings.model):
        return act(
            Job(
                settings=settings,
                request=None,
                request_id=manual_request(run),
                run=run,
                registry=open_registry(settings),
                variables=variables,
                open_variables=lambda: FolderVariables(folder),
            )
        )
