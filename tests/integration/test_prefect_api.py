"""The Prefect client against a real server: events, variables, runs, and what its errors say."""

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from daemon.wire.local_prefect import LocalPrefectServer
from daemon.wire.prefect import (
    PrefectApi,
    PrefectNotConfigured,
    PrefectRefused,
    PrefectUnavailable,
    created_by_automation,
)
from monitors.events import Event, Kind

pytestmark = pytest.mark.prefect


def wait_for(answer: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := answer()):
        assert time.monotonic() < deadline, f"nothing came within {seconds} s"
        time.sleep(0.1)
    return found


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4()}"


@pytest.fixture
def deployment_id(prefect_api: PrefectApi, name: str) -> str:
    flow = prefect_api.call("POST", "/flows/", {"name": "somebody-elses"})["id"]
    return str(prefect_api.call("POST", "/deployments/", {"name": name, "flow_id": flow})["id"])


def test_a_posted_event_is_in_the_feed_under_its_own_id(prefect_api: PrefectApi, name: str) -> None:
    event = Event(
        kind=Kind.DRIFT_DETECTED, model=name, subject=name, payload={"share": 0.5, "columns": ["a"]}
    )
    prefect_api.post_event(event.body(datetime.now(UTC)))
    found = wait_for(lambda: prefect_api.events({"resource": {"id": [f"retrain-daemon.model.{name}"]}}))
    assert [one["id"] for one in found] == [str(event.id)]
    assert found[0]["payload"] == {"schema": 1, "share": 0.5, "columns": ["a"]}


def test_the_feed_is_read_past_its_page(prefect_api: PrefectApi, name: str) -> None:
    for number in range(60):
        event = Event(kind=Kind.HEARTBEAT, model=name, subject=name, payload={}, sequence=number)
        prefect_api.post_event(event.body(datetime.now(UTC)))
    wanted = {"resource": {"id": [f"retrain-daemon.model.{name}"]}}
    wait_for(lambda: len(prefect_api.events(wanted, limit=100)) == 60)
    assert len({event["id"] for event in prefect_api.events(wanted, limit=100)}) == 60
    assert len(prefect_api.events(wanted, limit=55)) == 55


def test_an_event_that_the_server_would_drop_without_a_word_is_refused(prefect_api: PrefectApi) -> None:
    event = Event(kind=Kind.DRIFT_DETECTED, model="m", subject="s", payload={"text": "ä" * 800_000})
    with pytest.raises(PrefectRefused, match=r"drift\.detected has \d+ bytes"):
        prefect_api.post_event(event.body(datetime.now(UTC)))


def test_an_event_as_large_as_we_let_through_arrives(prefect_api: PrefectApi, name: str) -> None:
    event = Event(kind=Kind.DRIFT_DETECTED, model=name, subject=name, payload={"text": "x" * 1_494_000})
    prefect_api.post_event(event.body(datetime.now(UTC)))
    assert wait_for(lambda: prefect_api.events({"id": {"id": [str(event.id)]}}))


def test_only_the_first_creation_of_a_variable_succeeds(prefect_api: PrefectApi, name: str) -> None:
    assert prefect_api.read_variable(name) is None
    assert prefect_api.create_variable(name, {"run": "a", "fence": 1, "outcome": None}) is True
    assert prefect_api.create_variable(name, {"run": "b"}) is False
    assert prefect_api.read_variable(name) == {"run": "a", "fence": 1, "outcome": None}


def test_of_many_who_create_a_variable_at_once_one_succeeds(
    prefect_server: LocalPrefectServer, patient_api: Callable[..., PrefectApi], name: str
) -> None:
    def claim(number: int) -> bool:
        with patient_api(prefect_server.url) as api:
            return api.create_variable(name, number)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(claim, range(8))) == 1


def test_a_variable_is_overwritten_and_listed_by_the_start_of_its_name(
    prefect_api: PrefectApi, name: str
) -> None:
    prefect_api.set_variable(f"{name}-1", 1)
    prefect_api.set_variable(f"{name}-1", "one")
    prefect_api.set_variable(f"{name}-2", [2])
    prefect_api.set_variable(f"x-{name}-3", 3)
    assert prefect_api.variables(f"{name}-") == {f"{name}-1": "one", f"{name}-2": [2]}
    with pytest.raises(PrefectRefused, match="404: Variable not found"):
        prefect_api.update_variable(f"{name}-9", 9)


def test_a_value_too_long_for_a_variable_is_refused(prefect_api: PrefectApi, name: str) -> None:
    assert prefect_api.create_variable(name, "x" * 4_998)
    with pytest.raises(PrefectRefused, match="5001 characters"):
        prefect_api.update_variable(name, "x" * 4_999)


def test_all_runs_of_a_deployment_are_found_past_a_page(
    prefect_api: PrefectApi, deployment_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.wire.prefect.PAGE", 10)
    began = datetime.now(UTC) - timedelta(seconds=5)
    made = {prefect_api.create_run(deployment_id, {}, str(number))["id"] for number in range(23)}
    runs = prefect_api.runs_of(deployment_id, began)
    assert {run["id"] for run in runs} == made
    assert len(runs) == len(made)
    assert not any(map(created_by_automation, runs))
    assert prefect_api.runs_of(deployment_id, datetime.now(UTC) + timedelta(hours=1)) == []


def test_a_run_is_created_once_for_one_key(prefect_api: PrefectApi, deployment_id: str) -> None:
    first = prefect_api.create_run(deployment_id, {"n": 1}, "key")
    again = prefect_api.create_run(deployment_id, {"n": 2}, "key")
    assert again["id"] == first["id"]
    run = prefect_api.run(first["id"])
    assert run and run["parameters"] == {"n": 1}
    assert prefect_api.run(str(uuid.uuid4())) is None


def test_an_unknown_deployment_is_none(prefect_api: PrefectApi, name: str) -> None:
    assert prefect_api.deployment(f"retrain-daemon/{name}") is None
    assert prefect_api.deployment("re train/100%/ä?") is None
    assert prefect_api.automations(name) == []


def test_a_server_that_is_down_is_unavailable_and_named() -> None:
    with (
        PrefectApi("http://user:secret@127.0.0.1:9/api") as api,
        pytest.raises(PrefectUnavailable, match=r"http://127\.0\.0\.1:9/api") as caught,
    ):
        api.read_variable("x")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_in_trouble_is_unavailable(status: int) -> None:
    with (
        answering(status, b"{}") as url,
        PrefectApi(url, retries=0) as api,
        pytest.raises(PrefectUnavailable),
    ):
        api.read_variable("x")


def test_what_is_not_prefect_is_refused_with_a_hint() -> None:
    with (
        answering(200, b"<html>") as url,
        PrefectApi(url) as api,
        pytest.raises(PrefectRefused, match="/api"),
    ):
        api.read_variable("x")


def test_a_refusal_does_not_repeat_what_was_sent(prefect_api: PrefectApi) -> None:
    with pytest.raises(PrefectRefused, match="422: body") as caught:
        prefect_api.call("POST", "/block_documents/", {"data": {"url": "https://secret.example"}})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["127.0.0.1:4200", "ftp://here/api", "http:///api"])
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(PrefectNotConfigured, match=r"prefect\.api_url"):
        PrefectApi(url)


def test_without_an_address_no_server_is_started_in_the_background(
    prefect_server: LocalPrefectServer,
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(PrefectNotConfigured, match="config set"),
    ):
        PrefectApi()


def test_the_ui_is_beside_the_api(prefect_api: PrefectApi, prefect_server: LocalPrefectServer) -> None:
    assert prefect_api.url == prefect_server.url
    assert prefect_api.ui_url == prefect_server.url.removesuffix("/api")


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server that always says the same."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/api"
    finally:
        server.shutdown()
        server.server_close()
