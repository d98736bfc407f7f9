"""`deploy` against a real Prefect server: what it makes, mends and leaves alone, and that it works."""

import json
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, Queue
from threading import Thread
from typing import Any

import msgspec
import pytest

from daemon.wire.names import full_deployment_name
from daemon.wire.prefect import PrefectApi, created_by_automation
from flows.automations import (
    DAEMON_SILENT,
    RETRAIN,
    RUN_FAILED,
    RUN_SILENT,
    VERDICT,
    automation_name,
    crash_silent_run,
)
from flows.deploy import Change, deploy
from monitors.events import Event, Kind, OffsetRange, RetrainRequest
from monitors.settings import (
    FieldSettings,
    FlowSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    PrefectSettings,
    RegistrySettings,
)

pytestmark = pytest.mark.prefect
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def model() -> str:
    return f"fraud {uuid.uuid4()}"


@pytest.fixture
def prefect(prefect_api: PrefectApi) -> PrefectSettings:
    """A pool of the test's own, so that tests do not see each other."""
    return PrefectSettings(work_pool=f"pool-{uuid.uuid4()}")


def flow_of(model: str, **stated: Any) -> FlowSettings:
    return FlowSettings(
        model=model,
        settings=ModelSettings(**stated),
        kafka=KafkaSettings(sasl_password="never-on-the-server"),
        fields={"predictions": FieldSettings()},
        limits=LimitSettings(),
        registry=RegistrySettings(),
    )


def request_of(model: str) -> RetrainRequest:
    return RetrainRequest(
        request=str(uuid.uuid4()),
        episode=str(uuid.uuid4()),
        episode_number=3,
        attempt=1,
        model=model,
        model_version="007",
        reason='drift in "amount" {{ and }} <others> ü',
        suspected_since=NOON,
        window_start=NOON,
        window_end=NOON,
        offsets=(OffsetRange("predictions", 0, 5, 9),),
        drift_share=1.0,
        drifted_columns=("amount", "age"),
    )


def event_of(request: RetrainRequest) -> Event:
    return Event(
        kind=Kind.RETRAIN_REQUESTED,
        model=request.model,
        subject=request.request,
        payload=msgspec.to_builtins(request),
        episode=request.episode,
        request=request.request,
    )


def actions(changes: list[Change]) -> set[str]:
    return {change.action for change in changes}


def changed(changes: list[Change]) -> list[tuple[str, str, str]]:
    return [(one.name, one.action, one.detail) for one in changes if one.action != "unchanged"]


def only_automation(api: PrefectApi, model: str, role: str) -> dict[str, Any]:
    (automation,) = api.automations(automation_name(model, role))
    return automation


def wait_for(answer: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := answer()):
        assert time.monotonic() < deadline, f"nothing came within {seconds} s"
        time.sleep(0.1)
    return found


def test_a_second_deploy_finds_everything_unchanged(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    flow = flow_of(model, schedule="0 3 * * *")
    settings = msgspec.structs.replace(prefect, webhook_url="http://127.0.0.1:9/hook")
    planned = deploy([flow], settings, dry_run=True)
    first = deploy([flow], settings)
    assert planned == first
    assert actions(first) == {"created"}
    assert [change.kind for change in first] == ["work pool", "deployment", "webhook", *["automation"] * 5]
    before = only_automation(prefect_api, model, RETRAIN)["trigger"]["id"]
    assert actions(deploy([flow], settings)) == {"unchanged"}
    assert actions(deploy([flow], settings, dry_run=True)) == {"unchanged"}
    assert only_automation(prefect_api, model, RETRAIN)["trigger"]["id"] == before


def test_a_dry_run_changes_nothing(prefect_api: PrefectApi, prefect: PrefectSettings, model: str) -> None:
    deploy([flow_of(model)], prefect, dry_run=True)
    assert prefect_api.deployment(full_deployment_name(model)) is None
    deploy([flow_of(model)], prefect)
    deploy([flow_of(model)], prefect, remove=True, dry_run=True)
    assert actions(deploy([flow_of(model)], prefect)) == {"unchanged"}


def test_the_deployment_runs_one_retraining_at_a_time_with_our_settings(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    deploy([flow_of(model, reference_rows=42)], prefect)
    deployment = prefect_api.deployment(full_deployment_name(model))
    assert deployment
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    settings = msgspec.convert(deployment["parameters"]["settings"], FlowSettings)
    assert settings.settings.reference_rows == 42
    assert "never-on-the-server" not in json.dumps(deployment)


def test_a_tampered_automation_is_mended_and_says_which_part(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    deploy([flow_of(model)], prefect)
    name = automation_name(model, RETRAIN)
    found = only_automation(prefect_api, model, RETRAIN)
    tampered = {
        "name": name,
        "description": found["description"],
        "tags": found["tags"],
        "trigger": {**found["trigger"], "within": 5, "match_related": {"prefect.resource.id": "x"}},
        "actions": found["actions"],
    }
    prefect_api.call("PUT", f"/automations/{found['id']}", tampered)
    assert changed(deploy([flow_of(model)], prefect)) == [
        (name, "updated", "trigger.match_related, trigger.within")
    ]
    assert actions(deploy([flow_of(model)], prefect)) == {"unchanged"}


def test_of_duplicates_the_oldest_stays(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    deploy([flow_of(model)], prefect)
    oldest = only_automation(prefect_api, model, RETRAIN)
    body = {part: oldest[part] for part in ("name", "description", "tags", "trigger", "actions")}
    for _ in range(2):
        prefect_api.call("POST", "/automations/", body)
    removed = changed(deploy([flow_of(model)], prefect))
    assert [action for _, action, _ in removed] == ["removed", "removed"]
    assert only_automation(prefect_api, model, RETRAIN)["id"] == oldest["id"]


def test_deploys_at_the_same_time_leave_one_of_each(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    settings = msgspec.structs.replace(prefect, webhook_url="http://127.0.0.1:9/hook")
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: deploy([flow_of(model)], settings), range(3)))
    assert len(everything_of(prefect_api, model)) == 6
    assert actions(deploy([flow_of(model)], settings)) == {"unchanged"}


def test_changed_settings_update_the_deployment_alone(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    deploy([flow_of(model)], prefect)
    name = full_deployment_name(model)
    flow = flow_of(model, reference_rows=7, schedule="0 3 * * *")
    assert changed(deploy([flow], prefect)) == [(name, "updated", "parameters, schedule")]
    flow = flow_of(model, reference_rows=7, schedule="0 4 * * *")
    assert changed(deploy([flow], prefect)) == [(name, "updated", "parameters, schedule")]
    deployment = prefect_api.deployment(name)
    assert deployment and [one["schedule"]["cron"] for one in deployment["schedules"]] == ["0 4 * * *"]
    removed = changed(deploy([flow_of(model, reference_rows=7)], prefect))
    assert removed == [(name, "updated", "parameters, schedule")]
    assert actions(deploy([flow_of(model, reference_rows=7)], prefect)) == {"unchanged"}
    deployment = prefect_api.deployment(name)
    assert deployment and deployment["schedules"] == []


def test_what_an_operator_switched_off_stays_off(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    deploy([flow_of(model)], prefect)
    automation = only_automation(prefect_api, model, RETRAIN)
    deployment = prefect_api.deployment(full_deployment_name(model))
    assert deployment
    prefect_api.call("PATCH", f"/automations/{automation['id']}", {"enabled": False})
    prefect_api.call("PATCH", f"/deployments/{deployment['id']}", {"paused": True})
    prefect_api.call("PATCH", f"/deployments/{deployment['id']}", {"tags": []})
    silent = only_automation(prefect_api, model, DAEMON_SILENT)
    prefect_api.call("PATCH", f"/automations/{silent['id']}", {"enabled": False})
    faster = msgspec.structs.replace(prefect, heartbeat_seconds=5)
    details = {change.name: (change.action, change.detail) for change in deploy([flow_of(model)], faster)}
    assert details[automation["name"]] == ("unchanged", "switched off by an operator")
    assert details[silent["name"]][0] == "updated"
    assert details[full_deployment_name(model)] == ("updated", "tags, paused by an operator")
    assert only_automation(prefect_api, model, RETRAIN)["enabled"] is False
    assert only_automation(prefect_api, model, DAEMON_SILENT)["enabled"] is False
    after = prefect_api.deployment(full_deployment_name(model))
    assert after and after["paused"] is True


def test_another_models_deploy_and_removal_touch_nothing_of_the_first(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    # The second model's name begins like the first's, as a prefix search would confuse.
    other = f"{model}: {RETRAIN}"
    settings = msgspec.structs.replace(prefect, webhook_url="http://127.0.0.1:9/hook")
    deploy([flow_of(model)], settings)
    before = everything_of(prefect_api, model)
    deploy([flow_of(other)], settings)
    assert everything_of(prefect_api, model) == before
    removed = deploy([flow_of(other)], settings, remove=True)
    assert "work pool" not in {change.kind for change in removed}
    assert everything_of(prefect_api, model) == before


def everything_of(api: PrefectApi, model: str) -> list[Any]:
    roles = (RETRAIN, DAEMON_SILENT, RUN_SILENT, RUN_FAILED, VERDICT)
    return [
        api.deployment(full_deployment_name(model)),
        *(only_automation(api, model, role) for role in roles),
    ]


def test_removal_takes_all_that_deploy_made(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    settings = msgspec.structs.replace(prefect, webhook_url="http://127.0.0.1:9/hook")
    made = deploy([flow_of(model)], settings)
    removed = deploy([flow_of(model)], settings, remove=True)
    assert {(one.kind, one.name) for one in removed} == {(one.kind, one.name) for one in made}
    assert actions(removed) == {"removed"}
    assert deploy([flow_of(model)], settings, remove=True) == []
    assert prefect_api.deployment(full_deployment_name(model)) is None


def test_a_pool_that_somebody_else_made_stays(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    prefect_api.call("POST", "/work_pools/", {"name": prefect.work_pool, "type": "kubernetes"})
    assert deploy([flow_of(model)], prefect)[0] == Change(
        "work pool", prefect.work_pool, "unchanged", "of type kubernetes"
    )
    deploy([flow_of(model)], prefect, remove=True)
    assert prefect_api.find(f"/work_pools/{prefect.work_pool}")


def test_without_a_webhook_its_automations_and_its_secret_go(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    deploy([flow_of(model)], msgspec.structs.replace(prefect, webhook_url="http://127.0.0.1:9/hook"))
    changes = changed(deploy([flow_of(model)], prefect))
    assert {(name.rpartition(": ")[2], action) for name, action, _ in changes if ": " in name} == {
        (DAEMON_SILENT, "updated"),
        (RUN_FAILED, "removed"),
        (VERDICT, "removed"),
    }
    assert [action for name, action, _ in changes if ": " not in name] == ["removed"]


def test_a_request_becomes_one_run_with_its_payload_intact(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    began = datetime.now(UTC)
    deploy([flow_of(model)], prefect)
    deployment = prefect_api.deployment(full_deployment_name(model))
    assert deployment
    request = request_of(model)
    body = event_of(request).body(began)
    prefect_api.post_event(body)
    (run,) = wait_for(lambda: prefect_api.runs_of(deployment["id"], began))
    assert created_by_automation(run)
    assert run["parameters"]["request"] == json.loads(json.dumps(body["payload"]))
    assert msgspec.convert(run["parameters"]["request"], RetrainRequest, strict=True) == request
    assert run["parameters"]["settings"] == deployment["parameters"]["settings"]
    (result,) = wait_for(lambda: prefect_api.action_results(str(event_of(request).id)))
    assert (result.succeeded, result.run) == (True, run["id"])

    again = {**body, "id": str(uuid.uuid4())}
    prefect_api.post_event(body)
    prefect_api.post_event(again)
    other = event_of(request_of(model)).body(datetime.now(UTC))
    prefect_api.post_event(other)
    wait_for(lambda: len(requests_run(prefect_api, model, began)) == 2)
    time.sleep(2)
    assert requests_run(prefect_api, model, began) == sorted([request.request, other["payload"]["request"]])


def test_a_request_runs_the_deployment_of_its_own_model_alone(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    began = datetime.now(UTC)
    models = (f"{model}-2", model)
    deploy([flow_of(one) for one in models], prefect)
    requests = [request_of(one) for one in models]
    for request in requests:
        prefect_api.post_event(event_of(request).body(began))
    wait_for(lambda: requests_run(prefect_api, model, began))
    time.sleep(2)
    assert [requests_run(prefect_api, one, began) for one in models] == [[one.request] for one in requests]


def requests_run(api: PrefectApi, model: str, since: datetime) -> list[str]:
    deployment = api.deployment(full_deployment_name(model))
    assert deployment
    return sorted(run["parameters"]["request"]["request"] for run in api.runs_of(deployment["id"], since))


def test_a_failed_action_tells_its_reason(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    deploy([flow_of(model)], prefect)
    event = msgspec.structs.replace(event_of(request_of(model)), payload={})
    body = {**event.body(datetime.now(UTC)), "payload": {}}
    deployment = prefect_api.deployment(full_deployment_name(model))
    assert deployment
    prefect_api.call("DELETE", f"/deployments/{deployment['id']}")
    prefect_api.post_event(body)
    (result,) = wait_for(lambda: prefect_api.action_results(str(event.id)))
    assert result.succeeded is False
    assert result.reason


def test_the_webhook_hears_of_verdicts_and_failed_runs(
    prefect_api: PrefectApi, prefect: PrefectSettings
) -> None:
    model = f'we"ird {{{{ 1 }}}} {{% %}} \\ {uuid.uuid4()}'
    with sink() as (url, heard):
        settings = msgspec.structs.replace(prefect, webhook_url=url, webhook_allow_private=True)
        deploy([flow_of(model)], settings)
        sentence = '0.931 against 0.874, "CI" <+.03>'
        event = Event(kind=Kind.CHALLENGER_REFUSED, model=model, subject="r", payload={"sentence": sentence})
        prefect_api.post_event(event.body(datetime.now(UTC)))
        message = heard.get(timeout=120)
        assert message["text"] == f"{model}: challenger refused. {sentence}"
        assert message["model"] == model
        assert message["payload"] == {"schema": 1, "sentence": sentence}

        deployment = prefect_api.deployment(full_deployment_name(model))
        assert deployment
        run = prefect_api.create_run(deployment["id"], {}, "fails")
        state = {"type": "FAILED", "message": "on purpose"}
        prefect_api.call("POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
        message = heard.get(timeout=120)
        assert message["text"] == f"{model}: run {run['name']} is Failed"
        assert message["resource"] == f"prefect.flow-run.{run['id']}"
        with pytest.raises(Empty):
            heard.get(timeout=1)


def test_a_private_webhook_is_not_called_unless_allowed(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    with sink() as (url, heard):
        deploy([flow_of(model)], msgspec.structs.replace(prefect, webhook_url=url))
        event = Event(kind=Kind.CHALLENGER_PROMOTED, model=model, subject="r", payload={})
        prefect_api.post_event(event.body(datetime.now(UTC)))
        (result,) = wait_for(lambda: prefect_api.action_results(str(event.id)))
        assert result.succeeded is False
        assert heard.empty()


@pytest.mark.slow
def test_silence_of_the_daemon_and_of_a_run_is_noticed(
    prefect_api: PrefectApi, prefect: PrefectSettings, model: str
) -> None:
    """Both take Prefect's shortest window of ten seconds, so they share one test."""
    with sink() as (url, heard):
        settings = msgspec.structs.replace(
            prefect, webhook_url=url, webhook_allow_private=True, heartbeat_seconds=1
        )
        deploy([flow_of(model)], settings)
        deployment = prefect_api.deployment(full_deployment_name(model))
        assert deployment
        shorter = crash_silent_run(model, deployment["id"], within_seconds=10)
        automation = only_automation(prefect_api, model, RUN_SILENT)
        prefect_api.call("PUT", f"/automations/{automation['id']}", {**shorter, "enabled": True})
        run = prefect_api.create_run(deployment["id"], {}, "dies")
        for state in ("PENDING", "RUNNING"):
            prefect_api.call("POST", f"/flow_runs/{run['id']}/set_state", {"state": {"type": state}})
        for number in range(4):
            beat(prefect_api, model, run["id"], deployment["id"], number)
            time.sleep(4)
        alive = prefect_api.run(run["id"])
        assert alive and alive["state_type"] == "RUNNING"
        assert heard.empty()
        texts = {heard.get(timeout=120)["text"] for _ in range(2)}
        assert texts == {
            f"{model}: run {run['name']} is Crashed",
            f"{model} has sent no heartbeat for 10 seconds: is the daemon running?",
        }
        dead = prefect_api.run(run["id"])
        assert dead and dead["state_type"] == "CRASHED"


def beat(api: PrefectApi, model: str, run: str, deployment: str, number: int) -> None:
    """One heartbeat of the daemon, and one of the run as Prefect's engine sends it."""
    now = datetime.now(UTC)
    heartbeat = Event(kind=Kind.HEARTBEAT, model=model, subject=model, payload={}, sequence=number)
    api.post_event(heartbeat.body(now))
    related = {
        "prefect.resource.id": f"prefect.deployment.{deployment}",
        "prefect.resource.role": "deployment",
    }
    api.post_event(
        {
            "id": str(uuid.uuid4()),
            "occurred": now.isoformat(),
            "event": "prefect.flow-run.heartbeat",
            "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
            "related": [related],
        }
    )


@contextmanager
def sink() -> Iterator[tuple[str, "Queue[dict[str, Any]]"]]:
    """A web server that keeps the JSON it is sent."""
    heard: Queue[dict[str, Any]] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", heard
    finally:
        server.shutdown()
        server.server_close()
