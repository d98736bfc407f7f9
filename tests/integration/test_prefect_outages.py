"""The Prefect server goes away and comes back, on real processes: each event once, each request one run."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from daemon.wire.local_prefect import LocalPrefectServer
from daemon.wire.names import full_deployment_name
from daemon.wire.prefect import PrefectApi
from flows.automations import RETRAIN, RUN_SILENT, automation_name
from monitors.events import Kind

pytestmark = [pytest.mark.kafka, pytest.mark.prefect]

OUTAGE_SECONDS = 75.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPrefectServer]:
    """A server that the tests may stop and kill."""
    with LocalPrefectServer(tmp_path_factory.mktemp("outages")) as server:
        yield server


@pytest.fixture
def site(site_of: Any, server: LocalPrefectServer) -> Any:
    made = site_of(server)
    made.deploy()
    return made


@pytest.fixture
def api(server: LocalPrefectServer, patient_api: Callable[..., PrefectApi]) -> Iterator[PrefectApi]:
    with patient_api(server.url) as api:
        yield api


def ended(site: Any) -> bool:
    requests = site.requests()
    return bool(requests) and requests[0].state == "ended"


def all_posted(site: Any) -> bool:
    return all(one["posted"] for one in site.told())


def feed(api: PrefectApi, site: Any) -> list[dict[str, Any]]:
    """Our events of the site's model as the server has them, heartbeats left out."""
    names = [str(kind) for kind in Kind if kind is not Kind.HEARTBEAT]
    resource = f"retrain-daemon.model.{site.model}"
    return api.events({"event": {"name": names}, "resource": {"id": [resource]}}, limit=200)


def told_once(api: PrefectApi, site: Any) -> bool:
    """Whether what the daemon told is in the feed, each once, as it was first written down."""
    ours = {str(Kind(one["kind"])) for one in site.told()}
    found = sorted((one["id"], one["event"]) for one in feed(api, site) if one["event"] in ours)
    return found == sorted((one["id"], one["event"]) for one in site.told())


def runs(api: PrefectApi, site: Any) -> list[dict[str, Any]]:
    """The runs of the site's deployment, whoever created them."""
    deployment = api.deployment(full_deployment_name(site.model))
    assert deployment is not None
    return api.runs_of(deployment["id"], datetime(2026, 1, 1, tzinfo=UTC))


def test_a_server_out_of_reach_stops_no_reading_and_loses_no_event(
    site_of: Any,
    prefect_server: LocalPrefectServer,
    prefect_api: PrefectApi,
    gate_to: Callable[[str], Any],
) -> None:
    gate = gate_to(prefect_server.url)
    site = site_of(prefect_server, api_url=gate.url, start_deadline_seconds=3_600.0)
    site.deploy()
    gate.shut()
    began = datetime.now(UTC)
    site.start_daemon()
    site.predict(10)
    site.predict(3, shift=60.0)
    site.eventually(lambda: site.windows() == 13)
    kept = site.told()
    assert [one["kind"] for one in kept] == [Kind.DRIFT_DETECTED, Kind.RETRAIN_REQUESTED]
    site.eventually(lambda: site.metric("outbox_waiting_events") == 2)
    assert site.metric("prefect_reachable") == 0 and site.page("/readyz") == "ready: owner\n"
    gate.open()
    site.eventually(lambda: all_posted(site) and told_once(prefect_api, site))
    assert site.told() == [one | {"posted": True} for one in kept]
    for one in feed(prefect_api, site):
        assert began <= datetime.fromisoformat(one["occurred"]) <= datetime.now(UTC)
    site.eventually(lambda: site.metric("prefect_reachable") == 1)
    site.eventually(lambda: runs(prefect_api, site))
    (run,) = runs(prefect_api, site)
    assert run["parameters"]["request"]["request"] == site.requests()[0].id


@pytest.mark.slow
def test_a_server_that_is_away_for_minutes_costs_nothing(site: Any, api: PrefectApi) -> None:
    site.start_daemon()
    site.predict(10)
    site.eventually(lambda: site.windows() == 10)

    site.server.stop()
    since, began = time.monotonic(), datetime.now(UTC)
    site.predict(5, shift=60.0)
    site.eventually(lambda: site.windows() == 15)
    written = datetime.now(UTC)
    site.predict(2, broken=True)
    site.eventually(lambda: site.windows() == 17)
    site.eventually(lambda: site.metric("prefect_reachable") == 0)
    while time.monotonic() - since < OUTAGE_SECONDS:
        assert site.page("/healthz") == "ok\n" and site.page("/readyz") == "ready: owner\n"
        assert site.metric("outbox_waiting_events") == 3
        time.sleep(2.0)
    kept = site.told()
    assert [one["kind"] for one in kept] == [Kind.DRIFT_DETECTED, Kind.RETRAIN_REQUESTED, Kind.DATA_BROKEN]

    site.server.start()
    site.start_worker()
    site.eventually(lambda: ended(site))
    site.eventually(lambda: all_posted(site) and told_once(api, site))
    (request,) = site.requests()
    assert site.acted() == [request.id] and request.outcome.action == "refused"
    assert site.told()[:3] == [one | {"posted": True} for one in kept], "what was written is what was posted"
    by_id = {one["id"]: one for one in feed(api, site)}
    for one in kept:
        assert datetime.fromisoformat(by_id[one["id"]]["occurred"]) == datetime.fromisoformat(one["occurred"])
    detected, *_ = kept
    assert began <= datetime.fromisoformat(detected["occurred"]) <= written, "when it was first written down"


@pytest.mark.slow
def test_a_server_that_is_killed_as_it_acknowledges_loses_no_request(
    site_of: Any, server: LocalPrefectServer, api: PrefectApi, gate_to: Callable[[str], Any]
) -> None:
    gate = gate_to(server.url)
    site = site_of(server, api_url=gate.url)
    site.deploy()
    site.start_worker()
    site.start_daemon()
    acknowledged = []

    def die() -> None:
        server.kill()
        acknowledged.append(True)

    gate.drop(str(Kind.RETRAIN_REQUESTED).encode(), then=die)
    site.predict(10)
    site.predict(3, shift=60.0)
    site.eventually(lambda: acknowledged)
    server.start()
    site.eventually(lambda: ended(site))
    (request,) = site.requests()
    assert site.acted() == [request.id]
    # What it acknowledged just before may have died with it; only requests are proved.
    site.eventually(lambda: all_posted(site))
    found = [one["id"] for one in feed(api, site) if one["event"] != Kind.CHALLENGER_REFUSED]
    assert len(found) == len(set(found)) and set(found) <= {one["id"] for one in site.told()}


@pytest.mark.slow
def test_an_event_that_is_lost_after_it_was_acknowledged_leads_to_one_run_all_the_same(
    site: Any, api: PrefectApi
) -> None:
    """No event reaches the automation: it is enabled, and listens to another name."""
    (automation,) = api.automations(automation_name(site.model, RETRAIN))
    kept = {
        name: automation[name] for name in ("name", "description", "enabled", "tags", "trigger", "actions")
    }
    deaf = kept | {"trigger": kept["trigger"] | {"expect": ["nothing.of-the-kind"]}}
    api.call("PUT", f"/automations/{automation['id']}", deaf)
    site.start_worker()
    site.start_daemon()
    site.predict(10)
    site.predict(3, shift=60.0)
    site.eventually(lambda: "created directly" in site.unconfirmed())
    site.kill_daemon()
    site.start_daemon()
    site.eventually(lambda: ended(site))
    (request,) = site.requests()
    assert (request.posts, request.created_by) == (2, "direct")
    assert site.acted() == [request.id]
    assert [run["idempotency_key"] for run in runs(api, site)] == [request.id]


@pytest.mark.slow
def test_a_run_that_ends_while_the_server_is_away_brings_its_outcome_home(site: Any, api: PrefectApi) -> None:
    # A server that takes long to come back would take the run for dead, and another would be created.
    (automation,) = api.automations(automation_name(site.model, RUN_SILENT))
    api.call("PATCH", f"/automations/{automation['id']}", {"enabled": False})
    site.hold_runs()
    site.start_worker()
    site.start_daemon()
    site.predict(10)
    site.predict(3, shift=60.0)
    site.eventually(lambda: site.requests() and site.requests()[0].state == "confirmed")
    site.eventually(site.acted)
    site.server.kill()
    site.let_runs_go()
    time.sleep(45.0)
    site.server.start()
    site.eventually(lambda: ended(site), seconds=400.0)
    (request,) = site.requests()
    assert request.outcome.action == "refused"
    assert site.acted() == [request.id]


@pytest.mark.slow
def test_an_operator_who_switches_off_is_obeyed_until_it_is_switched_on_again(
    site: Any, api: PrefectApi
) -> None:
    (automation,) = api.automations(automation_name(site.model, RETRAIN))
    api.call("PATCH", f"/automations/{automation['id']}", {"enabled": False})
    site.start_worker()
    site.start_daemon()
    site.predict(10)
    site.predict(3, shift=60.0)
    site.eventually(lambda: site.metric("held_requests") == 1)
    site.predict(3, shift=60.0)
    site.eventually(lambda: site.windows() == 16)
    assert site.unconfirmed() == ["held"] and site.acted() == [] and runs(api, site) == []
    site.kill_daemon()
    api.call("PATCH", f"/automations/{automation['id']}", {"enabled": True})
    site.start_daemon()
    site.eventually(lambda: ended(site))
    (request,) = site.requests()
    assert site.acted() == [request.id] and request.held is None
    site.eventually(lambda: site.metric("held_requests") == 0)
