"""Outbox and watcher against a real Prefect server: told once, proved, and held where an operator says so."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from daemon.delivery import Delivery
from daemon.ledger import Checkpoint, Ledger, RequestRow, now
from daemon.ledger_metrics import LedgerMetrics
from daemon.loop import ChampionMoved, News, RequestEnded
from daemon.outbox import Outbox
from daemon.ownership import Ownership
from daemon.status import ledger_status
from daemon.watcher import Watcher
from daemon.wire.local_prefect import LocalPrefectServer
from daemon.wire.names import champion_variable, claim_variable, full_deployment_name
from daemon.wire.prefect import PrefectApi, PrefectRefused, PrefectUnavailable, created_by_automation
from flows.automations import RETRAIN, automation_name
from flows.deploy import deploy
from monitors.events import Event, Kind, OffsetRange, Outcome, RetrainRequest
from monitors.settings import (
    FlowSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    PrefectSettings,
    RegistrySettings,
)

pytestmark = pytest.mark.prefect

START = datetime(2026, 1, 1, tzinfo=UTC)


class Delivering:
    """A model that is deployed, a request in the ledger, and the daemon's two hands."""

    def __init__(self, api: PrefectApi, folder: Path, model: str) -> None:
        self.api = api
        self.model = model
        self.settings = PrefectSettings(work_pool="delivery-pool", start_deadline_seconds=0.0)
        flow = FlowSettings(
            model=model,
            settings=ModelSettings(),
            kafka=KafkaSettings(),
            fields={},
            limits=LimitSettings(),
            registry=RegistrySettings(),
        )
        self.flow = flow
        deploy([flow], self.settings)
        self.ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
        self.ledger.take_over("g", "m")
        self.request = f"{model}-request"
        self.ledger.checkpoint(Checkpoint(positions={}, models={}, events=[self._asked()]))
        self.news: list[News] = []
        self.watcher = Watcher(self.ledger, api, self.settings, {model: None}, self.news.append)
        self.outbox = Outbox(self.ledger, api.post_event)

    def row(self) -> RequestRow:
        (row,) = self.ledger.requests(self.model)
        return row

    def runs(self) -> list[dict[str, Any]]:
        """The runs that carry this request."""
        deployment = self.api.deployment(full_deployment_name(self.model))
        assert deployment is not None
        return self.api.runs_of(deployment["id"], now() - timedelta(hours=1))

    def claim(self, run: str, outcome: Outcome | None = None, fence: int = 1) -> None:
        value = {
            "request": self.request,
            "run": run,
            "fence": fence,
            "heartbeat": now().isoformat(),
            "outcome": None if outcome is None else msgspec.to_builtins(outcome),
        }
        self.api.set_variable(claim_variable(self.request, fence), value)

    def end(self, run: str, state: str) -> None:
        body = {"state": {"type": state, "message": "its machine is gone"}, "force": True}
        self.api.call("POST", f"/flow_runs/{run}/set_state", body)

    def unconfirmed(self) -> list[dict[str, Any]]:
        return [
            msgspec.json.decode(row["body"])["payload"]
            for row in self.ledger.events()
            if row["kind"] == Kind.RETRAIN_UNCONFIRMED
        ]

    def _asked(self) -> Event:
        payload = RetrainRequest(
            request=self.request,
            episode="e1",
            episode_number=1,
            attempt=1,
            model=self.model,
            model_version="1",
            reason="a clause",
            suspected_since=START,
            window_start=START,
            window_end=START,
            offsets=(OffsetRange("predictions", 0, 0, 100),),
            drift_share=1.0,
            drifted_columns=("x",),
        )
        return Event(
            kind=Kind.RETRAIN_REQUESTED,
            model=self.model,
            subject=self.request,
            episode="e1",
            request=self.request,
            payload=msgspec.to_builtins(payload),
        )


@pytest.fixture
def delivering(
    prefect_api: PrefectApi, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Delivering]:
    made = Delivering(prefect_api, tmp_path, request.node.name.replace("_", "-")[5:45])
    yield made
    made.ledger.close()


def eventually(what: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
    return found


def unanswered(watcher: Watcher) -> bool:
    """Whether Prefect left the look without an answer; like the daemon, look again then."""
    try:
        watcher.look()
    except PrefectUnavailable:
        return True
    return False


def test_a_request_is_confirmed_by_its_claim_and_ends_with_its_outcome(delivering: Delivering) -> None:
    delivering.outbox.deliver()
    (run,) = eventually(delivering.runs)
    assert run["parameters"]["request"]["request"] == delivering.request
    assert delivering.row().state == "posted", "a run that exists has not started"
    delivering.claim(run["id"])
    delivering.watcher.look()
    assert (delivering.row().state, delivering.row().created_by) == ("confirmed", "automation")
    outcome = Outcome(action="refused", sentence="no better", run=run["id"])
    delivering.claim(run["id"], outcome)
    delivering.watcher.look()
    delivering.watcher.look()
    assert delivering.news == [RequestEnded(delivering.model, delivering.request, outcome)], "told once"


def test_what_belongs_to_another_member_is_left_to_it(delivering: Delivering) -> None:
    assert delivering.outbox.deliver({"another-model"}) == 0
    assert delivering.outbox.deliver({delivering.model}) == 1
    delivering.claim(str(uuid.uuid4()), Outcome(action="refused", sentence="no better"))
    delivering.watcher.look({"another-model"})
    assert delivering.news == []
    delivering.watcher.look({delivering.model})
    assert len(delivering.news) == 1


def test_an_outcome_that_was_lost_with_a_term_is_told_again(delivering: Delivering) -> None:
    """A member that is fenced, or given other partitions, drops what it has not written down."""
    outcome = Outcome(action="refused", sentence="no better", run=str(uuid.uuid4()))
    delivering.outbox.deliver()
    delivering.claim(outcome.run, outcome)
    owner, news = Ownership(), SimpleQueue[News]()
    models = {delivering.model: None}
    delivery = Delivery(delivering.ledger, delivering.settings, models, owner, news.put, 3_600.0)
    delivery.start()
    try:
        owner.begin()
        assert news.get(timeout=120) == RequestEnded(delivering.model, delivering.request, outcome)
        owner.begin()  # so soon that nobody saw it end
        assert news.get(timeout=120) == RequestEnded(delivering.model, delivering.request, outcome)
    finally:
        delivery.close()


def test_an_event_that_got_lost_is_posted_again_as_it_was(delivering: Delivering) -> None:
    posted: list[dict[str, Any]] = []
    Outbox(delivering.ledger, posted.append).deliver()  # acknowledged, and then the server died
    delivering.watcher.look()
    assert [told["action"] for told in delivering.unconfirmed()] == ["posted again"]

    def post(body: dict[str, Any]) -> None:
        posted.append(body)
        delivering.api.post_event(body)

    Outbox(delivering.ledger, post).deliver()
    (run,) = eventually(delivering.runs)
    first, *others = [body for body in posted if body["event"] == Kind.RETRAIN_REQUESTED]
    assert others == [first], "same id, same body, same `occurred`"
    assert run["created_by"]["type"] == "AUTOMATION"


def test_the_last_resort_is_one_run_of_our_own(delivering: Delivering) -> None:
    lost: list[dict[str, Any]] = []
    outbox = Outbox(delivering.ledger, lost.append)
    for _ in range(4):
        outbox.deliver()
        delivering.watcher.look()
    (run,) = delivering.runs()
    assert run["idempotency_key"] == delivering.request
    assert not created_by_automation(run)
    assert [told["action"] for told in delivering.unconfirmed()] == [
        "posted again",
        "created directly",
        "held",
    ]


def test_a_disabled_automation_is_respected_and_told_of(delivering: Delivering) -> None:
    (automation,) = delivering.api.automations(automation_name(delivering.model, RETRAIN))
    delivering.api.call("PATCH", f"/automations/{automation['id']}", {"enabled": False})
    delivering.outbox.deliver()
    for _ in range(3):
        delivering.watcher.look()
    (told,) = delivering.unconfirmed()
    assert told["action"] == "held" and "disabled" in told["reason"]
    assert delivering.runs() == [] and delivering.row().posts == 1


def test_a_paused_deployment_is_respected_and_told_of(delivering: Delivering) -> None:
    deployment = delivering.api.deployment(full_deployment_name(delivering.model))
    assert deployment is not None
    delivering.api.call("POST", f"/deployments/{deployment['id']}/pause_deployment")
    Outbox(delivering.ledger, lambda body: None).deliver()
    for _ in range(3):
        delivering.watcher.look()
    (told,) = delivering.unconfirmed()
    assert told["action"] == "held" and "paused" in told["reason"]
    assert delivering.runs() == []


def test_a_run_that_nobody_starts_is_told_of_and_not_doubled(delivering: Delivering) -> None:
    delivering.outbox.deliver()
    eventually(delivering.runs)
    for _ in range(3):
        delivering.watcher.look()
    (told,) = delivering.unconfirmed()
    assert told["action"] == "held" and "worker" in told["reason"]
    assert len(delivering.runs()) == 1


def test_a_run_that_died_is_carried_on_by_one_more(delivering: Delivering) -> None:
    delivering.outbox.deliver()
    (run,) = eventually(delivering.runs)
    delivering.claim(run["id"])
    delivering.end(run["id"], "CRASHED")
    delivering.watcher.look()
    assert len(delivering.runs()) == 1, "it might have ended between two questions"
    with capture_logs() as logs:
        for _ in range(3):
            delivering.watcher.look()
    assert [line["event"] for line in logs].count("run_created_directly") == 1, "one line for one run"
    (again,) = [other for other in delivering.runs() if other["id"] != run["id"]]
    delivering.claim(again["id"], Outcome(action="promoted", sentence="yes", run=again["id"]), fence=2)
    delivering.watcher.look()
    (told,) = delivering.news
    assert isinstance(told, RequestEnded) and told.outcome.action == "promoted"


def test_a_request_whose_runs_died_has_failed_and_can_promote_no_more(delivering: Delivering) -> None:
    delivering.outbox.deliver()
    (run,) = eventually(delivering.runs)
    delivering.claim(run["id"])
    delivering.end(run["id"], "CRASHED")
    delivering.watcher.look()
    delivering.watcher.look()
    assert delivering.news == []
    for other in delivering.runs():
        delivering.end(other["id"], "CRASHED")
    delivering.watcher.look()
    (told,) = delivering.news
    assert isinstance(told, RequestEnded) and told.outcome.action == "failed"
    raised = delivering.api.read_variable(claim_variable(delivering.request, 2))
    assert raised is not None and raised["outcome"]["action"] == "failed"


def test_events_wait_for_a_server_that_is_down(
    prefect_server: LocalPrefectServer, delivering: Delivering
) -> None:
    with PrefectApi("http://127.0.0.1:9/api", retries=0) as nobody:
        outbox = Outbox(delivering.ledger, nobody.post_event)
        assert outbox.deliver() == 0 and outbox.retry_seconds == 1.0
        assert outbox.deliver() == 0 and outbox.retry_seconds == 2.0
    (waiting,) = delivering.ledger.waiting_events()
    assert waiting.failures == 2
    assert delivering.outbox.deliver() == 1
    (event,) = eventually(lambda: delivering.api.events({"id": {"id": [waiting.id]}}))
    first = datetime.fromisoformat(msgspec.json.decode(waiting.body)["occurred"])
    assert datetime.fromisoformat(event["occurred"]) == first


def test_what_is_written_is_delivered_at_once_and_nobody_asks_in_between(delivering: Delivering) -> None:
    hours = msgspec.structs.replace(delivering.settings, poll_seconds=3_600.0, heartbeat_seconds=3_600.0)
    owner, models = Ownership(), {delivering.model: None}
    owner.begin()
    delivery = Delivery(delivering.ledger, hours, models, owner, delivering.news.append, 86_400.0)
    delivery.start()
    try:
        eventually(lambda: delivering.row().state == "posted")
        delivering.ledger.add_events(
            [Event(kind=Kind.DATA_LOST, model=delivering.model, subject="later", payload={})]
        )
        eventually(lambda: delivering.ledger.waiting_count() == 0)
    finally:
        delivery.close(timeout_seconds=60.0)
    assert not delivery._thread.is_alive(), "closing does not wait for the next look"


# --- an operator's hand, and what is wrong with one request ------------------------------------------


def held(delivering: Delivering) -> str:
    """What the request waits for, as status and metrics have it."""
    models = {delivering.model: ModelSettings()}
    (request,) = ledger_status(delivering.ledger, models)["models"][delivering.model]["requests"]
    owner = Ownership()
    owner.begin()
    metrics = LedgerMetrics(delivering.ledger, models, 0.0, owner, lambda: True)
    (family,) = [one for one in metrics.collect() if one.name == "retrain_daemon_held_requests"]
    (sample,) = family.samples
    assert sample.value == (request["held"] is not None)
    return request["held"] or ""


def assert_it_goes_on(delivering: Delivering) -> None:
    """By the event, or by a run of our own where Prefect has seen the event and does no more about it."""
    delivering.watcher.look()
    assert held(delivering) == ""
    delivering.outbox.deliver()
    delivering.watcher.look()
    runs = eventually(delivering.runs)
    assert {run["parameters"]["request"]["request"] for run in runs} == {delivering.request}
    direct = [run["idempotency_key"] for run in runs if not created_by_automation(run)]
    assert direct in ([], [delivering.request])


def test_what_waited_for_its_automation_goes_on_once_it_is_enabled(delivering: Delivering) -> None:
    (automation,) = delivering.api.automations(automation_name(delivering.model, RETRAIN))
    delivering.api.call("PATCH", f"/automations/{automation['id']}", {"enabled": False})
    delivering.outbox.deliver()
    delivering.watcher.look()
    assert "disabled: enable it in Prefect" in held(delivering) and delivering.runs() == []
    delivering.api.call("PATCH", f"/automations/{automation['id']}", {"enabled": True})
    assert_it_goes_on(delivering)


def test_its_deployment_resumed_a_request_goes_on(delivering: Delivering) -> None:
    deployment = delivering.api.deployment(full_deployment_name(delivering.model))
    assert deployment is not None
    delivering.api.call("POST", f"/deployments/{deployment['id']}/pause_deployment")
    Outbox(delivering.ledger, lambda body: None).deliver()
    delivering.watcher.look()
    assert "paused: resume it in Prefect" in held(delivering)
    delivering.api.call("POST", f"/deployments/{deployment['id']}/resume_deployment")
    assert_it_goes_on(delivering)


def test_a_deployment_that_is_gone_is_told_of_and_waited_for(delivering: Delivering) -> None:
    deployment = delivering.api.deployment(full_deployment_name(delivering.model))
    assert deployment is not None
    delivering.api.call("DELETE", f"/deployments/{deployment['id']}")
    delivering.outbox.deliver()
    for _ in range(3):
        delivering.watcher.look()
    (told,) = delivering.unconfirmed()
    assert told["action"] == "held" and told["reason"] == held(delivering)
    assert "does not exist: run `retrain-daemon deploy`" in told["reason"]
    deploy([delivering.flow], delivering.settings)
    assert_it_goes_on(delivering)


def test_a_run_that_died_waits_for_its_deployment_like_a_first_one(delivering: Delivering) -> None:
    delivering.outbox.deliver()
    (run,) = eventually(delivering.runs)
    delivering.claim(run["id"])
    delivering.watcher.look()
    deployment = delivering.api.deployment(full_deployment_name(delivering.model))
    assert deployment is not None
    # Its runs go with it.
    delivering.api.call("DELETE", f"/deployments/{deployment['id']}")
    for _ in range(3):
        delivering.watcher.look()
    assert "its run died, and deployment" in held(delivering) and delivering.news == []
    deploy([delivering.flow], delivering.settings)
    delivering.watcher.look()
    assert held(delivering) == ""
    assert [other["idempotency_key"] for other in delivering.runs()] == [f"{delivering.request}-again"]


def test_an_unanswered_creation_of_a_run_creates_one(
    delivering: Delivering, gate_to: Callable[[str], Any]
) -> None:
    outbox = Outbox(delivering.ledger, lambda body: None)
    outbox.deliver()
    delivering.watcher.look()
    outbox.deliver()
    gate = gate_to(delivering.api.url)
    reached = threading.Event()
    gate.drop(b"/create_flow_run", then=reached.set)
    with PrefectApi(gate.url, retries=0) as api:
        watcher = Watcher(delivering.ledger, api, delivering.settings, {}, delivering.news.append)
        eventually(lambda: unanswered(watcher) and reached.is_set())
        eventually(lambda: not unanswered(watcher))
    assert [run["idempotency_key"] for run in delivering.runs()] == [delivering.request]


def test_a_created_run_that_ended_without_a_claim_is_followed_by_another(delivering: Delivering) -> None:
    outbox = Outbox(delivering.ledger, lambda body: None)
    outbox.deliver()
    delivering.watcher.look()
    outbox.deliver()
    delivering.watcher.look()
    (run,) = delivering.runs()
    delivering.end(run["id"], "CANCELLED")
    for _ in range(3):
        delivering.watcher.look()
    keys = {other["idempotency_key"] for other in delivering.runs()}
    assert keys == {delivering.request, f"{delivering.request}-2"}


def test_an_event_that_is_refused_for_good_does_not_end_its_request(delivering: Delivering) -> None:
    def refuse(body: Any) -> None:
        raise PrefectRefused("it is too large")

    outbox = Outbox(delivering.ledger, refuse)
    for _ in range(2):
        outbox.deliver()
        delivering.watcher.look()
    assert [told["action"] for told in delivering.unconfirmed()] == ["posted again", "created directly"]
    (run,) = delivering.runs()
    assert run["idempotency_key"] == delivering.request


def test_a_spoilt_claim_holds_up_its_request_and_no_other(delivering: Delivering) -> None:
    name = claim_variable(delivering.request, 1)
    delivering.api.set_variable(name, {"spoilt": True})
    delivering.api.set_variable(champion_variable(delivering.model), {"model_version": "7"})
    delivering.outbox.deliver()
    delivering.watcher.look()
    assert f"mend variable {name}" in held(delivering)
    assert delivering.news == [ChampionMoved(delivering.model, "7", "promoted")]


def test_the_outcome_of_a_request_is_told_before_the_alias_that_it_moved(delivering: Delivering) -> None:
    notice = {"model_version": "4", "action": "rolled-back", "request": delivering.request}
    delivering.outbox.deliver()
    (run,) = eventually(delivering.runs)
    delivering.claim(run["id"])
    delivering.api.set_variable(champion_variable(delivering.model), notice)
    delivering.watcher.look()
    assert delivering.news == []
    outcome = Outcome(action="rolled-back", sentence="4 is better", run=run["id"], model_version="4")
    delivering.claim(run["id"], outcome)
    delivering.watcher.look()
    assert delivering.news == [
        RequestEnded(delivering.model, delivering.request, outcome),
        ChampionMoved(delivering.model, "4", "rolled-back"),
    ]


def test_looking_tells_whether_somebody_waits_for_what_is_next(delivering: Delivering) -> None:
    assert delivering.watcher.look(), "a request is open"
    outcome = Outcome(action="promoted", sentence="better", run="r", model_version="2")
    ended = Checkpoint(positions={}, models={}, events=[], ended=[(delivering.request, outcome)])
    delivering.ledger.checkpoint(ended)
    assert delivering.watcher.look(), "nobody serves what was promoted yet"
    delivering.ledger.mark_served(delivering.request, "yes")
    assert not delivering.watcher.look()


def test_looks_are_rare_while_it_is_quiet_and_what_comes_in_line_ends_the_quiet(
    delivering: Delivering,
) -> None:
    outcome = Outcome(action="refused", sentence="no better", run="r")
    first = [(delivering.request, outcome)]
    delivering.ledger.checkpoint(Checkpoint(positions={}, models={}, events=[], ended=first))
    owner = Ownership()
    owner.begin()
    settings = msgspec.structs.replace(delivering.settings, poll_seconds=5.0, heartbeat_seconds=3_600.0)
    models = {delivering.model: None}
    delivery = Delivery(delivering.ledger, settings, models, owner, delivering.news.append, 1e9)
    delivery.start()
    try:
        eventually(lambda: delivery._quiet)
        delivering.request = f"{delivering.request}-2"
        delivering.ledger.checkpoint(Checkpoint(positions={}, models={}, events=[delivering._asked()]))
        eventually(lambda: not delivery._quiet and not delivering.ledger.waiting_events())
    finally:
        delivery.close()


def test_delivery_outlives_what_nobody_thought_of(delivering: Delivering) -> None:
    delivering.api.set_variable(champion_variable(delivering.model), {"model_version": "7"})
    told: list[News] = []

    def tell(news: News) -> None:
        told.append(news)
        if len(told) == 1:
            raise RuntimeError("nobody thought of this")

    owner, models = Ownership(), {delivering.model: None}
    delivery = Delivery(delivering.ledger, delivering.settings, models, owner, tell, 86_400.0)
    delivery.start()
    owner.begin()
    try:
        eventually(lambda: len(told) == 2)
        eventually(lambda: delivery.reachable)
    finally:
        delivery.close(timeout_seconds=60.0)
    assert told == [ChampionMoved(delivering.model, "7", "promoted")] * 2
