"""Evidence: what Prefect's API says of each request, asked for and never assumed."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec

from daemon.wire.prefect import PrefectApi, created_by_automation, full_deployment_name
from flows.demo.facts import Request, Run
from flows.demo.play import Asked
from flows.demo.stream import EPOCH, Stream
from monitors.events import RESOURCE_PREFIX, Kind, RetrainRequest

EVENTS = 1_000
TERMINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})


class Evidence:
    """One reading of Prefect's runs and event feed for one model, from `since` on."""

    def __init__(self, api: PrefectApi, model: str, since: datetime) -> None:
        self._ui_url = api.ui_url
        self.runs = _runs(api, model, since)
        self._events = _events(api, model)

    @property
    def ended(self) -> bool:
        """Whether no run is still going on."""
        return all(run.ended for run in self.runs)

    def request(self, asked: Asked, stream: Stream) -> Request:
        """What the daemon said of a request, with what Prefect says of its event and its runs."""
        runs = tuple(run for run in self.runs if run.request == asked.id)
        event = self._events.get(asked.id)
        told = None if event is None else _payload(event)
        return Request(
            id=asked.id,
            episode=str(asked.body.get("episode", "")),
            episode_number=told.episode_number if told else 0,
            attempt=asked.attempt,
            asked_row=asked.row,
            since_row=asked.row if told is None else row_of(stream, told.suspected_since),
            action=asked.action,
            sentence=asked.sentence,
            model_version=asked.model_version,
            drift_share=told.drift_share if told else None,
            drifted_columns=told.drifted_columns if told else (),
            event_in_feed=event is not None,
            event_url=_event_url(self._ui_url, event),
            report_url=told.report_url if told else "",
            runs=runs,
        )

    def requests(self, asked: Iterable[Asked], stream: Stream) -> tuple[Request, ...]:
        """All of them, in the order in which they were asked."""
        return tuple(self.request(one, stream) for one in asked)


def row_of(stream: Stream, moment: datetime) -> int:
    """The live row that happened then."""
    rows = (moment - EPOCH) / timedelta(seconds=stream.row_seconds) - len(stream.reference)
    return max(0, round(rows))


def strayed(requests: Sequence[Request], runs: Sequence[Run]) -> tuple[str, ...]:
    """What is not as promised: each request one run, by an automation, its event in the feed."""
    sentences = [
        f"episode {request.episode_number}, attempt {request.attempt} has {len(request.runs)} runs, not one"
        for request in requests
        if len(request.runs) != 1
    ]
    sentences += [
        f"the event of episode {request.episode_number}, attempt {request.attempt} is not in the feed"
        for request in requests
        if not request.event_in_feed
    ]
    known = {request.id for request in requests}
    sentences += [
        f"run {run.id} belongs to no request of the daemon's" for run in runs if run.request not in known
    ]
    sentences += [
        f"run {run.id} was not created by an automation" for run in runs if run.created_by != "automation"
    ]
    return tuple(sentences)


def _runs(api: PrefectApi, model: str, since: datetime) -> tuple[Run, ...]:
    deployment = api.deployment(full_deployment_name(model))
    if deployment is None:
        return ()
    found = sorted(api.runs_of(deployment["id"], since), key=lambda run: str(run["created"]))
    return tuple(
        Run(
            id=run["id"],
            name=run["name"],
            request=str((run["parameters"].get("request") or {}).get("request", "")),
            created_by="automation" if created_by_automation(run) else "direct",
            state=run["state_name"] or "",
            ended=run["state_type"] in TERMINAL,
            url=f"{api.ui_url}/runs/flow-run/{run['id']}",
        )
        for run in found
    )


def _events(api: PrefectApi, model: str) -> dict[str, Mapping[str, Any]]:
    wanted = {
        "event": {"name": [str(Kind.RETRAIN_REQUESTED)]},
        "resource": {"id": [f"{RESOURCE_PREFIX}{model}"]},
    }
    found = api.events(wanted, limit=EVENTS)
    return {str(event["resource"].get("retrain-daemon.request", "")): event for event in found}


def _payload(event: Mapping[str, Any]) -> RetrainRequest:
    return msgspec.convert(event["payload"], RetrainRequest)


def _event_url(ui_url: str, event: Mapping[str, Any] | None) -> str:
    if event is None:
        return ""
    return f"{ui_url}/events/event/{str(event['occurred'])[:10]}/{event['id']}"
