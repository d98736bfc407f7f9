"""`retrain-daemon deploy`: what must stand on the Prefect server, compared, then created or mended."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import msgspec

from daemon.wire.names import FLOW, block_name, deployment_name, full_deployment_name
from daemon.wire.prefect import PrefectApi, PrefectError, PrefectRefused
from flows.automations import ROLES, RUN_HEARTBEAT_SECONDS, Automation, automation_name, automations_of
from monitors.settings import FlowSettings, ModelSettings, PrefectSettings

# A module path has no colon: some of Prefect's loaders take what has one for the path of a file.
ENTRYPOINT = "flows.retrain.retrain"
_NOWHERE = "00000000-0000-0000-0000-000000000000"
SCHEDULE = "retrain-daemon-schedule"
POOL_DESCRIPTION = "Runs the retrainings of retrain-daemon. Made by `retrain-daemon deploy`."
PARAMETERS_SCHEMA = {
    "title": "Parameters",
    "type": "object",
    "properties": {
        "settings": {
            "title": "settings",
            "description": "The model's settings, as `retrain-daemon deploy` found them.",
            "position": 0,
            "type": "object",
        },
        "request": {
            "title": "request",
            "description": "The daemon's request; nothing for a run by hand or by schedule.",
            "position": 1,
            "anyOf": [{"type": "object"}, {"type": "null"}],
            "default": None,
        },
    },
    "required": ["settings"],
}


class WebhookUnreadable(PrefectError):
    """The file that should hold the webhook's address cannot be read."""

    exit_code = 2


class Change(msgspec.Struct, frozen=True):
    """One thing on the server, and what was done (or, on a dry run, would be done) with it."""

    kind: Literal["work pool", "deployment", "automation", "webhook"]
    name: str
    action: Literal["created", "updated", "unchanged", "removed"]
    detail: str = ""


def deploy(
    flows: Sequence[FlowSettings], prefect: PrefectSettings, *, remove: bool = False, dry_run: bool = False
) -> list[Change]:
    """
    Make the server hold what these models need, or with `remove` nothing of it any more.

    What is right already is not touched: an automation that is written again forgets what it has
    seen. Whatever an operator switched off (automation, deployment, schedule) stays off. Things of
    other models are neither read nor changed.
    """
    with PrefectApi(prefect.api_url, retries=3) as api:
        hand = _Hand(api, dry_run)
        if remove:
            changes = [change for flow in flows for change in _removed(hand, flow.model)]
            return [*changes, *_pool_removed(hand, prefect.work_pool, flows)]
        pool = _pool(hand, prefect.work_pool)
        return [pool, *(change for flow in flows for change in _deployed(hand, flow, prefect))]


class _Hand:
    """Reads always, writes unless this is a dry run."""

    def __init__(self, api: PrefectApi, dry_run: bool) -> None:
        self.api = api
        self.dry_run = dry_run

    def create(self, path: str, body: Mapping[str, Any]) -> str:
        """The id of what was created; on a dry run one that nothing on a server has."""
        return _NOWHERE if self.dry_run else str(self.api.call("POST", path, body)["id"])

    def update(self, path: str, body: Mapping[str, Any], *, whole: bool = False) -> None:
        if not self.dry_run:
            self.api.call("PUT" if whole else "PATCH", path, body)

    def delete(self, path: str) -> None:
        """What is gone already is as good as deleted."""
        if self.dry_run:
            return
        try:
            self.api.call("DELETE", path)
        except PrefectRefused as error:
            if error.status != 404:
                raise


def _deployed(hand: _Hand, flow: FlowSettings, prefect: PrefectSettings) -> Iterator[Change]:
    model = flow.model
    deployment_id, change = _deployment(hand, flow, prefect)
    yield change
    webhook_id: str | None = None
    if url := webhook_url(prefect):
        webhook_id, change = _webhook(hand, model, url, prefect.webhook_allow_private)
        yield change
    wanted = automations_of(model, deployment_id, prefect, webhook_id)
    for automation in wanted:
        yield from _automation(hand, automation)
    names = {automation["name"] for automation in wanted}
    yield from _automations_removed(
        hand, (name for role in ROLES if (name := automation_name(model, role)) not in names)
    )
    if webhook_id is None:
        yield from _webhook_removed(hand, model)


def webhook_url(prefect: PrefectSettings) -> str:
    """The webhook's address from the settings or the file that they name; empty if there is none."""
    if not prefect.webhook_url_file:
        return prefect.webhook_url
    try:
        return Path(prefect.webhook_url_file).read_text().strip()
    except OSError as error:
        raise WebhookUnreadable(
            f"prefect.webhook_url_file: cannot read {prefect.webhook_url_file} ({error.strerror})"
        ) from error


# Work pool


def _pool(hand: _Hand, name: str) -> Change:
    found = hand.api.find(f"/work_pools/{quote(name, safe='')}")
    if found:
        kind = "" if found["type"] == "process" else f"of type {found['type']}"
        paused = "paused by an operator" if found["is_paused"] else ""
        return Change("work pool", name, "unchanged", ", ".join(filter(None, (kind, paused))))
    from prefect.workers.process import ProcessWorker

    body = {
        "name": name,
        "type": "process",
        "description": POOL_DESCRIPTION,
        "base_job_template": ProcessWorker.get_default_base_job_template(),
    }
    try:
        hand.create("/work_pools/", body)
    except PrefectRefused as error:
        if error.status != 409:
            raise
        return Change("work pool", name, "unchanged", "made by somebody else just now")
    return Change("work pool", name, "created")


def _pool_removed(hand: _Hand, name: str, flows: Sequence[FlowSettings]) -> list[Change]:
    """Only a pool that we made, and only when no deployment but those just removed uses it."""
    found = hand.api.find(f"/work_pools/{quote(name, safe='')}")
    if found is None or found["description"] != POOL_DESCRIPTION:
        return []
    gone = {deployment_name(flow.model) for flow in flows}
    users = hand.api.pages("/deployments/filter", {"work_pools": {"name": {"any_": [name]}}})
    if any(user["name"] not in gone or FLOW not in user["tags"] for user in users):
        return []
    hand.delete(f"/work_pools/{quote(name, safe='')}")
    return [Change("work pool", name, "removed")]


# Deployment


def _deployment(hand: _Hand, flow: FlowSettings, prefect: PrefectSettings) -> tuple[str, Change]:
    name = full_deployment_name(flow.model)
    wanted = _wanted_deployment(flow, prefect)
    current = hand.api.deployment(name)
    if current is None:
        flow_id = hand.create("/flows/", {"name": FLOW})
        schedules = [_schedule(flow.settings)] if flow.settings.schedule else []
        body = {
            "name": deployment_name(flow.model),
            "flow_id": flow_id,
            "schedules": schedules,
            **wanted,
        }
        return hand.create("/deployments/", body), Change("deployment", name, "created")
    parts = [part for part in wanted if wanted[part] != _current_part(current, part)]
    if parts:
        hand.update(f"/deployments/{current['id']}", {part: wanted[part] for part in parts})
    changed = (*parts, *_scheduled(hand, current, flow.settings))
    paused = "paused by an operator" if current["paused"] else ""
    return current["id"], _compared("deployment", name, changed, paused)


def _wanted_deployment(flow: FlowSettings, prefect: PrefectSettings) -> dict[str, Any]:
    return {
        "description": f"Retrains {flow.model} when the daemon asks for it. Kept by `retrain-daemon deploy`.",
        "tags": [FLOW],
        "entrypoint": ENTRYPOINT,
        "path": None,
        "pull_steps": None,
        "work_pool_name": prefect.work_pool,
        "parameters": {"settings": _builtins(flow), "request": None},
        "parameter_openapi_schema": PARAMETERS_SCHEMA,
        "enforce_parameter_schema": True,
        "job_variables": _job_variables(),
        # One retraining of a model at a time; the next request waits for its turn.
        "concurrency_limit": 1,
        "concurrency_options": {"collision_strategy": "ENQUEUE", "grace_period_seconds": None},
    }


def _job_variables() -> dict[str, Any]:
    """
    Make a worker run our packages, whatever `flows/` or `daemon/` lies in the folder it was started in.

    Prefect puts a run's working folder first on the path, safe path or not. Without one, also where
    the pool has a default, each run gets an empty folder of its own.
    """
    environment = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(RUN_HEARTBEAT_SECONDS)}
    return {"env": environment, "working_dir": None}


def _builtins(flow: FlowSettings) -> Any:
    """As JSON has it. A password never goes to the server: workers have their own environment."""
    kafka = msgspec.structs.replace(flow.kafka, sasl_password="")
    return msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(flow, kafka=kafka)))


def _current_part(current: Mapping[str, Any], part: str) -> Any:
    if part == "concurrency_limit":
        return (current["global_concurrency_limit"] or {}).get("limit")
    return current.get(part)


def _schedule(model: ModelSettings) -> dict[str, Any]:
    return {"slug": SCHEDULE, "schedule": {"cron": model.schedule, "timezone": "UTC", "day_or": True}}


def _scheduled(hand: _Hand, deployment: Mapping[str, Any], model: ModelSettings) -> tuple[str, ...]:
    """Mend our schedule, leave those that somebody else added; the parts that differed."""
    path = f"/deployments/{deployment['id']}/schedules"
    ours = [schedule for schedule in deployment["schedules"] if schedule["slug"] == SCHEDULE]
    if not model.schedule:
        for schedule in ours:
            hand.delete(f"{path}/{schedule['id']}")
        return ("schedule",) if ours else ()
    wanted = _schedule(model)
    if not ours:
        if not hand.dry_run:
            hand.api.call("POST", path, [{**wanted, "active": True}])
        return ("schedule",)
    if ours[0]["schedule"] == wanted["schedule"]:
        return ()
    hand.update(f"{path}/{ours[0]['id']}", {"schedule": wanted["schedule"]})
    return ("schedule",)


# Webhook


def _webhook(hand: _Hand, model: str, url: str, allow_private: bool) -> tuple[str, Change]:
    """The block that keeps the address secret on the server; no message of ours ever shows it."""
    name = block_name(model)
    wanted = {
        "method": "POST",
        "url": url,
        "headers": {"Content-Type": "application/json"},
        "allow_private_urls": allow_private,
        "verify": True,
    }
    current = hand.api.find(f"/block_types/slug/webhook/block_documents/name/{name}?include_secrets=true")
    if current is None:
        body = {"name": name, "data": wanted, **_webhook_type(hand.api)}
        try:
            return hand.create("/block_documents/", body), Change("webhook", name, "created")
        except PrefectRefused as error:
            if error.status != 409:
                raise
            # Another deploy created it just now.
            return _webhook(hand, model, url, allow_private)
    parts = [part for part in wanted if wanted[part] != current["data"].get(part)]
    if parts:
        hand.update(f"/block_documents/{current['id']}", {"data": wanted, "merge_existing_data": False})
    return current["id"], _compared("webhook", name, parts)


def _webhook_type(api: PrefectApi) -> dict[str, str]:
    kind = api.call("GET", "/block_types/slug/webhook")["id"]
    schemas = api.pages("/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind]}}})
    newest = max(schemas, key=lambda schema: str(schema["created"]))
    return {"block_type_id": kind, "block_schema_id": newest["id"]}


def _webhook_removed(hand: _Hand, model: str) -> list[Change]:
    name = block_name(model)
    current = hand.api.find(f"/block_types/slug/webhook/block_documents/name/{name}")
    if current is None:
        return []
    hand.delete(f"/block_documents/{current['id']}")
    return [Change("webhook", name, "removed")]


# Automations


def _automation(hand: _Hand, wanted: Automation) -> Iterator[Change]:
    name = wanted["name"]
    found = hand.api.automations(name)
    if not found:
        hand.create("/automations/", wanted)
        yield Change("automation", name, "created")
    else:
        parts = _differing(_normal(wanted), _normal(found[0]))
        if parts:
            body = {**wanted, "enabled": found[0]["enabled"]}
            hand.update(f"/automations/{found[0]['id']}", body, whole=True)
        off = "" if found[0]["enabled"] else "switched off by an operator"
        yield _compared("automation", name, parts, off)
    # Read again: names are not unique, and another deploy may have created the same just now.
    yield from _duplicates_removed(hand, name)


def _duplicates_removed(hand: _Hand, name: str) -> Iterator[Change]:
    for younger in hand.api.automations(name)[1:]:
        hand.delete(f"/automations/{younger['id']}")
        yield Change("automation", name, "removed", "a duplicate; the oldest is kept")


def _automations_removed(hand: _Hand, names: Iterable[str]) -> Iterator[Change]:
    for name in names:
        for automation in hand.api.automations(name):
            hand.delete(f"/automations/{automation['id']}")
            yield Change("automation", name, "removed")


def _normal(automation: Mapping[str, Any]) -> dict[str, Any]:
    """With Prefect's own defaults filled in, without ids, and with sets in one order."""
    from prefect.events.schemas.automations import AutomationCore

    full = AutomationCore.model_validate(dict(automation)).model_dump(mode="json")
    trigger = full["trigger"]
    for part in ("after", "expect", "for_each"):
        if isinstance(trigger.get(part), list):
            trigger[part] = sorted(trigger[part])
    parts = ("description", "tags", "actions", "actions_on_trigger", "actions_on_resolve")
    return {
        **{part: full[part] for part in parts},
        **{f"trigger.{part}": value for part, value in trigger.items() if part != "id"},
    }


def _differing(wanted: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    return sorted(part for part in wanted.keys() | current.keys() if wanted.get(part) != current.get(part))


def _compared(
    kind: Literal["deployment", "automation", "webhook"], name: str, parts: Sequence[str], note: str = ""
) -> Change:
    detail = ", ".join(filter(None, (*parts, note)))
    return Change(kind, name, "updated" if parts else "unchanged", detail)


# Removal


def _removed(hand: _Hand, model: str) -> Iterator[Change]:
    """Automations first, so that none is left that points at nothing."""
    yield from _automations_removed(hand, (automation_name(model, role) for role in ROLES))
    name = full_deployment_name(model)
    if deployment := hand.api.deployment(name):
        hand.delete(f"/deployments/{deployment['id']}")
        yield Change("deployment", name, "removed")
    yield from _webhook_removed(hand, model)
