"""The automations of a model: what Prefect does by itself when something is said of it."""

import json
from typing import Any

from daemon.wire.names import FLOW
from monitors.events import RESOURCE_PREFIX, Kind
from monitors.settings import PrefectSettings

REQUEST_LABEL = "retrain-daemon.request"
DEDUPLICATION_SECONDS = 86_400.0
RUN_HEARTBEAT_SECONDS = 30
# Four heartbeats: a shorter outage of the server must not crash a run that is well.
RUN_SILENCE_SECONDS = 120.0
# What Prefect allows at least for a proactive trigger.
SHORTEST_SILENCE_SECONDS = 10.0

RETRAIN = "retrain on request"
DAEMON_SILENT = "daemon silent"
RUN_SILENT = "crash a silent run"
RUN_FAILED = "notify of failed runs"
VERDICT = "notify of verdicts"
ROLES = (RETRAIN, DAEMON_SILENT, RUN_SILENT, RUN_FAILED, VERDICT)

Automation = dict[str, Any]


def automation_name(model: str, role: str) -> str:
    """Begins like nobody else's, and holds the model: one model's automations are never another's."""
    return f"{FLOW}/{model}: {role}"


def automations_of(
    model: str, deployment_id: str, prefect: PrefectSettings, webhook_id: str | None
) -> tuple[Automation, ...]:
    """All that the model should have; with a webhook, it is told of what a person should know."""
    always = (
        retrain_on_request(model, deployment_id),
        report_silent_daemon(model, prefect.heartbeat_seconds, webhook_id),
        crash_silent_run(model, deployment_id),
    )
    if webhook_id is None:
        return always
    return (
        *always,
        notify_of_failed_runs(model, deployment_id, webhook_id),
        notify_of_verdicts(model, webhook_id),
    )


def retrain_on_request(model: str, deployment_id: str) -> Automation:
    """The loop's middle: a request becomes a run, and the same request told twice stays one run."""
    return _automation(
        model,
        RETRAIN,
        "Runs the retraining deployment once for each request of the daemon.",
        {
            "posture": "Reactive",
            "expect": [str(Kind.RETRAIN_REQUESTED)],
            "match": _resource(model),
            "for_each": [REQUEST_LABEL],
            "within": DEDUPLICATION_SECONDS,
        },
        {
            "type": "run-deployment",
            "source": "selected",
            "deployment_id": deployment_id,
            # One template and no more: a payload without a field would fail the whole action.
            "parameters": {"request": "{{ event.payload }}"},
        },
    )


def report_silent_daemon(model: str, heartbeat_seconds: float, webhook_id: str | None) -> Automation:
    """Fires once when heartbeats stop, and is armed again by the next one."""
    within = max(SHORTEST_SILENCE_SECONDS, 3 * heartbeat_seconds)
    text = f"' has sent no heartbeat for {within:g} seconds: is the daemon running?'"
    return _automation(
        model,
        DAEMON_SILENT,
        "Fires once when the daemon's heartbeats stop.",
        {
            "posture": "Proactive",
            "after": [str(Kind.HEARTBEAT)],
            "expect": [str(Kind.HEARTBEAT)],
            "match": _resource(model),
            "for_each": ["prefect.resource.id"],
            "within": within,
        },
        {"type": "do-nothing"} if webhook_id is None else _webhook(model, webhook_id, text),
    )


def crash_silent_run(
    model: str, deployment_id: str, within_seconds: float = RUN_SILENCE_SECONDS
) -> Automation:
    """Without it a run whose machine died would be Running for ever and keep the only slot."""
    ends = ("Completed", "Failed", "Cancelled", "Cancelling", "Crashed", "Suspended", "Paused")
    return _automation(
        model,
        RUN_SILENT,
        "Crashes a retraining run whose heartbeats stopped, so that the next can start.",
        {
            "posture": "Proactive",
            "after": ["prefect.flow-run.heartbeat"],
            "expect": ["prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in ends)],
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "match_related": _deployment(deployment_id),
            "for_each": ["prefect.resource.id"],
            "within": within_seconds,
        },
        {
            "type": "change-flow-run-state",
            "state": "CRASHED",
            "message": f"No heartbeat for {within_seconds:g} seconds.",
        },
    )


def notify_of_failed_runs(model: str, deployment_id: str, webhook_id: str) -> Automation:
    """Failed and Crashed runs of the deployment, whoever started them."""
    text = "': run ' ~ event.resource.name ~ ' is ' ~ event.event.rsplit('.', 1)[-1]"
    return _automation(
        model,
        RUN_FAILED,
        "Tells the webhook of Failed and Crashed retraining runs.",
        {
            "posture": "Reactive",
            "expect": ["prefect.flow-run.Crashed", "prefect.flow-run.Failed"],
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "match_related": _deployment(deployment_id),
            "within": 0,
        },
        _webhook(model, webhook_id, text),
    )


def notify_of_verdicts(model: str, webhook_id: str) -> Automation:
    """Promoted and refused challengers, with the gate's sentence."""
    text = "': challenger ' ~ event.event.rsplit('.', 1)[-1] ~ '. ' ~ (event.payload.sentence | default(''))"
    return _automation(
        model,
        VERDICT,
        "Tells the webhook of promoted and refused challengers.",
        {
            "posture": "Reactive",
            "expect": [str(Kind.CHALLENGER_PROMOTED), str(Kind.CHALLENGER_REFUSED)],
            "match": _resource(model),
            "within": 0,
        },
        _webhook(model, webhook_id, text),
    )


def _automation(
    model: str, role: str, description: str, trigger: dict[str, Any], action: dict[str, Any]
) -> Automation:
    return {
        "name": automation_name(model, role),
        "description": f"{description} Kept by `retrain-daemon deploy`.",
        "tags": [FLOW],
        "trigger": {"type": "event", "threshold": 1, **trigger},
        "actions": [action],
    }


def _resource(model: str) -> dict[str, str]:
    return {"prefect.resource.id": f"{RESOURCE_PREFIX}{model}"}


def _deployment(deployment_id: str) -> dict[str, str]:
    return {
        "prefect.resource.role": "deployment",
        "prefect.resource.id": f"prefect.deployment.{deployment_id}",
    }


def _webhook(model: str, webhook_id: str, text: str) -> dict[str, Any]:
    """A JSON message with `text` (which chat services show) and the event itself beside it."""
    # In a template a brace could begin an expression, and a model's name is only a name.
    name = json.dumps(model).replace("{", "\\u007b")
    payload = (
        '{"text": {{ (' + _literal(model) + " ~ " + text + ') | tojson }}, "model": ' + name + ","
        ' "event": {{ event.event | tojson }}, "resource": {{ event.resource.id | tojson }},'
        ' "payload": {{ event.payload | tojson }}}'
    )
    return {"type": "call-webhook", "block_document_id": webhook_id, "payload": payload}


def _literal(text: str) -> str:
    """As a string in a template's expression; its letters cannot end it."""
    return json.dumps(text).replace("{", "\\u007b").replace("}", "\\u007d").replace("%", "\\u0025")
