"""The watcher: proves that each request led to a run that acts, and learns how it ended."""

from collections.abc import Callable, Collection, Mapping
from datetime import datetime, timedelta
from typing import Any, Literal, Protocol

import msgspec
import structlog

from daemon.ledger import Ledger, RequestRow, now
from daemon.loop import ChampionMoved, News, RequestEnded
from daemon.wire.names import champion_variable, claim_variable, full_deployment_name
from daemon.wire.prefect import PrefectRefused, created_by_automation
from monitors.events import Event, Kind, Outcome
from monitors.settings import PrefectSettings

log = structlog.get_logger()

TERMINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})
# The automation that `deploy` makes; its name is part of what the two sides share.
RETRAIN_AUTOMATION = "retrain-daemon/{model}: retrain on request"


class Prefect(Protocol):
    """What the watcher asks of Prefect; `daemon.wire.prefect.PrefectApi` is the real form."""

    def create_variable(self, name: str, value: Any) -> bool: ...
    def read_variable(self, name: str) -> Any | None: ...
    def deployment(self, full_name: str) -> dict[str, Any] | None: ...
    def automations(self, name: str) -> list[dict[str, Any]]: ...
    def runs_of(self, deployment_id: str, since: datetime) -> list[dict[str, Any]]: ...
    def run(self, run_id: str) -> dict[str, Any] | None: ...
    def create_run(
        self, deployment_id: str, parameters: Mapping[str, Any], idempotency_key: str
    ) -> dict[str, Any]: ...


class Claim(msgspec.Struct, frozen=True):
    """What the run that acts has written down; the highest fence counts."""

    request: str
    run: str
    fence: int
    heartbeat: str
    outcome: Outcome | None = None


class Watcher:
    """
    Looks at every open request once per call.

    A request is confirmed by its claim alone: a run that exists has not started, and one that
    started may be a second one.
    """

    def __init__(
        self,
        ledger: Ledger,
        prefect: Prefect,
        settings: PrefectSettings,
        models: Mapping[str, object],
        tell: Callable[[News], None],
    ) -> None:
        self._ledger = ledger
        self._prefect = prefect
        self._settings = settings
        self._models = models
        self._tell = tell
        self._told: set[str] = set()
        self._created: set[str] = set()
        self._champions: dict[str, object] = {}
        self._failing: dict[str, int] = {}

    def look(self, models: Collection[str] | None = None) -> bool:
        """
        One round (of these models): open requests, champions, promotions that nobody serves.

        Returns whether there was anything whose next step somebody waits for.
        """

        def ours(model: str) -> bool:
            return models is None or model in models

        open_requests = self._ledger.requests(open_only=True)
        for request in open_requests:
            if ours(request.model) and request.state != "waiting" and request.id not in self._told:
                self._look_alone(request)
        in_flight = {request.id for request in open_requests} - self._told
        for model in filter(ours, self._models):
            self._look_at_champion(model, in_flight)
        unserved = self._ledger.unserved_promotions()
        for request in unserved:
            if ours(request.model):
                self._look_at_serving(request)
        return bool(open_requests or unserved)

    def forget(self) -> None:
        """Look at everything anew: another member was the owner, or what was told was lost with a term."""
        self._told.clear()
        self._champions.clear()

    # --- requests --------------------------------------------------------------------------------

    def _look_alone(self, request: RequestRow) -> None:
        """What is wrong with one request holds up that one, and is told; the others go on."""
        try:
            self._look_at(request)
        except PrefectRefused as error:
            self._unconfirmed(request, f"Prefect refuses what it needs: {error}", "held")
        except msgspec.ValidationError as error:
            name = claim_variable(request.id, 1)
            self._unconfirmed(request, f"its claim cannot be read ({error}): mend variable {name}", "held")

    def _look_at(self, request: RequestRow) -> None:
        claim = self._claim(request.id)
        if claim is None:
            self._unclaimed(request)
            return
        if request.state != "confirmed" or request.run != claim.run:
            self._confirm(request, claim)
        if claim.outcome is not None:
            self._end(request, claim.outcome)
        else:
            self._look_after(request, claim)

    def _claim(self, request: str) -> Claim | None:
        """The claim with the highest fence; fences are created one after the other."""
        latest, fence = None, 1
        while (value := self._prefect.read_variable(claim_variable(request, fence))) is not None:
            latest = msgspec.convert(value, Claim)
            fence += 1
        return latest

    def _confirm(self, request: RequestRow, claim: Claim) -> None:
        run = self._prefect.run(claim.run)
        how = "unknown" if run is None else "automation" if created_by_automation(run) else "direct"
        self._ledger.confirm(request.id, claim.run, how)
        log.info("request_confirmed", model=request.model, request=request.id, run=claim.run, created_by=how)

    def _end(self, request: RequestRow, outcome: Outcome) -> None:
        self._tell(RequestEnded(request.model, request.id, outcome))
        self._told.add(request.id)

    def _look_after(self, request: RequestRow, claim: Claim) -> None:
        """
        A claim whose run is over without an outcome is carried on by one more run, then it has failed.

        It may have died with the alias moved and nobody told: only a run of the same request can know.
        Twice seen, because a run may end between our two questions.
        """
        run = self._prefect.run(claim.run)
        if _state_of(run) not in TERMINAL:
            self._failing.pop(request.id, None)
            self._note_hold(request, None)
            return
        self._failing[request.id] = self._failing.get(request.id, 0) + 1
        if self._failing[request.id] >= 2 and not self._carried_on(request):
            self._fail(request, claim, run)

    def _carried_on(self, request: RequestRow) -> bool:
        """Whether another run is to take the claim over; it is created once, whoever asks how often."""
        name = full_deployment_name(request.model)
        deployment = self._prefect.deployment(name)
        if (held := _closed(name, deployment)) is not None:
            self._unconfirmed(request, f"its run died, and {held}", "held")
            return True
        assert deployment is not None
        self._note_hold(request, None)
        run = self._create_run(deployment, request, f"{request.id}-again")
        return _state_of(run) not in TERMINAL

    def _fail(self, request: RequestRow, claim: Claim, run: Mapping[str, Any] | None) -> None:
        """Raise the fence before it is said: a process that outlived its run can promote no more."""
        sentence = f"the run ended {_state_of(run)} without an outcome: {_message_of(run)}"
        outcome = Outcome(action="failed", sentence=sentence, run=claim.run)
        fence = claim.fence + 1
        raised = self._prefect.create_variable(
            claim_variable(request.id, fence),
            msgspec.to_builtins(
                Claim(request.id, claim.run, fence, now().isoformat(), outcome), str_keys=True
            ),
        )
        if raised:
            self._end(request, outcome)

    def _create_run(self, deployment: Mapping[str, Any], request: RequestRow, key: str) -> dict[str, Any]:
        """The same run for the same key, however often it is asked for."""
        run = self._prefect.create_run(
            deployment["id"], {"request": msgspec.json.decode(request.payload)}, key
        )
        if key not in self._created:
            self._created.add(key)
            log.warning("run_created_directly", model=request.model, request=request.id, run=run["id"])
        return run

    def _unclaimed(self, request: RequestRow) -> None:
        assert request.posted_at is not None
        if now() - request.posted_at < timedelta(seconds=self._settings.start_deadline_seconds):
            return
        deployment = self._prefect.deployment(full_deployment_name(request.model))
        if (held := self._held_by(request, deployment)) is not None:
            self._unconfirmed(request, held, "held")
            return
        assert deployment is not None
        if request.posts < 2:
            self._unconfirmed(request, "no run claimed it in time", "posted again")
            self._ledger.post_again(request.id)
            return
        self._unconfirmed(request, "no run claimed it after it was posted again", "created directly")
        self._create_until_one_waits(deployment, request)

    def _create_until_one_waits(self, deployment: Mapping[str, Any], request: RequestRow) -> None:
        """
        One run, and another whenever the last one ended without a claim and had its deadline.

        Prefect cancels a run, for one, whose place in the queue it lost with its server.
        """
        number, key = 1, request.id
        while True:
            run = self._create_run(deployment, request, key)
            age = now() - datetime.fromisoformat(run["created"])
            patience = timedelta(seconds=self._settings.start_deadline_seconds)
            if _state_of(run) not in TERMINAL or age < patience:
                return
            number += 1
            key = f"{request.id}-{number}"

    def _held_by(self, request: RequestRow, deployment: dict[str, Any] | None) -> str | None:
        """What keeps us from asking again: an operator's decision, or a run that waits already."""
        if (closed := _closed(full_deployment_name(request.model), deployment)) is not None:
            return closed
        assert deployment is not None
        automations = self._prefect.automations(RETRAIN_AUTOMATION.format(model=request.model))
        if not automations:
            return f"the automation of {request.model} does not exist: run `retrain-daemon deploy`"
        if not any(automation.get("enabled") for automation in automations):
            return f"the automation of {request.model} is disabled: enable it in Prefect"
        waiting = self._waiting_run(request, deployment["id"])
        return None if waiting is None else f"run {waiting} exists and has not started: is a worker running?"

    def _waiting_run(self, request: RequestRow, deployment_id: str) -> str | None:
        assert request.posted_at is not None
        since = request.posted_at - timedelta(seconds=2 * self._settings.start_deadline_seconds + 60)
        for run in self._prefect.runs_of(deployment_id, since):
            asked = (run.get("parameters") or {}).get("request") or {}
            if asked.get("request") == request.id and _state_of(run) not in TERMINAL:
                return str(run["id"])
        return None

    def _unconfirmed(self, request: RequestRow, reason: str, action: str) -> None:
        """Told once for each reason and each posting, however often we look."""
        self._note_hold(request, reason if action == "held" else None)
        sequence = {"held": 0, "posted again": 1}.get(action, 2)
        payload = {"request": request.id, "reason": reason, "action": action, "posts": request.posts}
        subject = f"{request.id}|{reason}"
        kind = Kind.RETRAIN_UNCONFIRMED
        event = Event(
            kind=kind,
            model=request.model,
            subject=subject,
            episode=request.episode,
            request=request.id,
            sequence=sequence,
            payload=payload,
        )
        if str(event.id) in self._told:
            return
        self._told.add(str(event.id))
        self._ledger.add_events([event])
        log.warning("request_unconfirmed", model=request.model, reason=reason, action=action)

    def _note_hold(self, request: RequestRow, reason: str | None) -> None:
        if request.held != reason:
            self._ledger.hold(request.id, reason)

    # --- champions -------------------------------------------------------------------------------

    def _look_at_champion(self, model: str, in_flight: Collection[str]) -> None:
        notice = self._prefect.read_variable(champion_variable(model))
        if not isinstance(notice, dict) or notice == self._champions.get(model):
            return
        if notice.get("request") in in_flight:
            # The request's own outcome says more, and is told first: what follows depends on the order.
            return
        action: Literal["promoted", "rolled-back"] = (
            "rolled-back" if notice.get("action") == "rolled-back" else "promoted"
        )
        self._tell(ChampionMoved(model, str(notice.get("model_version", "")), action))
        self._champions[model] = notice

    def _look_at_serving(self, request: RequestRow) -> None:
        assert request.outcome is not None and request.ended_at is not None
        version = request.outcome.model_version
        if version in self._ledger.versions_seen(request.model):
            self._ledger.mark_served(request.id, "yes")
            return
        patience = timedelta(seconds=self._settings.serve_deadline_seconds)
        if now() - request.ended_at < patience:
            return
        self._ledger.add_events(
            [
                Event(
                    kind=Kind.PROMOTION_UNSERVED,
                    model=request.model,
                    subject=request.id,
                    version=version,
                    episode=request.episode,
                    request=request.id,
                    payload={"model_version": version, "promoted_at": request.ended_at.isoformat()},
                )
            ]
        )
        self._ledger.mark_served(request.id, "unserved")


def _closed(name: str, deployment: Mapping[str, Any] | None) -> str | None:
    """Why the deployment takes no run that nobody asked an operator about."""
    if deployment is None:
        return f"deployment {name} does not exist: run `retrain-daemon deploy`"
    return f"deployment {name} is paused: resume it in Prefect" if deployment.get("paused") else None


def _state_of(run: Mapping[str, Any] | None) -> str:
    """The run's state type; a run that was deleted counts as cancelled."""
    return "CANCELLED" if run is None else str((run.get("state") or {}).get("type") or "PENDING")


def _message_of(run: Mapping[str, Any] | None) -> str:
    return "it was deleted" if run is None else str((run.get("state") or {}).get("message") or "no message")
