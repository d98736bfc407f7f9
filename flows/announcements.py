"""Announcements: what Prefect is told of a retraining's end, so that daemon and people learn of it."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog

from daemon.wire.names import champion_variable
from daemon.wire.prefect import PrefectApi, PrefectError, PrefectNotConfigured
from flows.audit import AuditRecord
from monitors.events import Event, Kind, Outcome, Related, RetrainRequest
from monitors.settings import FlowSettings

log = structlog.get_logger()


_KINDS = {
    "promoted": Kind.CHALLENGER_PROMOTED,
    "rolled-back": Kind.MODEL_ROLLED_BACK,
    "kept": Kind.PROBATION_ENDED,
}


def announce_outcome(
    api: PrefectApi,
    settings: FlowSettings,
    request_id: str,
    request: RetrainRequest | None,
    outcome: Outcome,
    record: AuditRecord | None,
) -> None:
    """Post the event, and leave the champion's notice where a promotion is the present champion's."""
    if record is not None:
        api.set_variable(champion_variable(settings.model), notice(settings.model, record))
    occurred = record.move.at if record else datetime.now(UTC)
    api.post_event(outcome_event(settings.model, request_id, request, outcome).body(occurred))
    log.info("outcome_announced", model=settings.model, action=outcome.action, request=request_id)


def outcome_event(model: str, request_id: str, request: RetrainRequest | None, outcome: Outcome) -> Event:
    """Its id follows from the request, so that a run that enters again tells it once."""
    moved = outcome.action in ("promoted", "rolled-back")
    related = [Related(f"prefect.flow-run.{outcome.run}", "flow-run")] if outcome.run else []
    if outcome.registry_version:
        related.append(_version(model, outcome.registry_version))
    return Event(
        kind=_KINDS.get(outcome.action, Kind.CHALLENGER_REFUSED),
        model=model,
        subject=request_id,
        payload={
            **msgspec.to_builtins(outcome),
            "request": request_id,
            "attempt": request.attempt if request else None,
        },
        version=outcome.model_version if moved else "",
        episode=request.episode if request else "",
        request=request_id,
        related=tuple(related),
    )


def notice(model: str, record: AuditRecord) -> dict[str, Any]:
    """What the daemon reads to know which version it should soon meet in the log."""
    return {
        "model": model,
        "model_version": record.model_version,
        "registry_version": record.move.version,
        "previous_model_version": record.previous_model_version,
        "action": record.move.action,
        "request": record.move.request,
        "run": record.move.run,
        "at": record.move.at.isoformat(),
    }


def announce_rollback(
    settings: FlowSettings, record: AuditRecord, connect: Callable[[], PrefectApi] = PrefectApi
) -> bool:
    """Tell Prefect if one is configured and answers; the rollback holds either way."""
    try:
        with connect() as api:
            api.set_variable(champion_variable(settings.model), notice(settings.model, record))
            api.post_event(rollback_event(settings.model, record).body(record.move.at))
    except PrefectNotConfigured:
        return False
    except PrefectError as error:
        log.warning("rollback_unannounced", model=settings.model, reason=str(error))
        return False
    return True


def rollback_event(model: str, record: AuditRecord) -> Event:
    """Its id follows from the place of the rollback among the moves."""
    return Event(
        kind=Kind.MODEL_ROLLED_BACK,
        model=model,
        subject=f"{model}|{record.move.version}",
        sequence=record.sequence,
        payload={**notice(model, record), "reason": record.move.reason},
        version=record.model_version,
        related=(_version(model, record.move.version),),
    )


def _version(model: str, version: str) -> Related:
    return Related(f"retrain-daemon.model-version.{model}.{version}", "model-version")
