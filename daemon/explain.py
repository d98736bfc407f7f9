"""Explain: how one thing led to the next in an episode, from offsets to the champion alias, with links."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import msgspec

from daemon.case import Case, Window, open_case
from daemon.grounds import Grounds
from daemon.ledger import Ledger, RequestRow, StoredWindow
from daemon.wire.names import full_deployment_name
from monitors.events import Kind
from monitors.performance import Performance

_DETECTED = ("signal", "change_point", "clause", "action", "loss", "baseline", "columns", "moved", "segments")


class Elsewhere(Protocol):
    """What Prefect and the registry know; each answer may be a reason for there being none."""

    def run(self, run: str) -> dict[str, Any]: ...
    def deployment(self, model: str) -> dict[str, Any]: ...
    def alias(self, model: str) -> dict[str, Any]: ...


def explain(ledger: Ledger, models: list[str], name: str, elsewhere: Elsewhere) -> dict[str, Any]:
    """Everything about one episode as plain values; times are RFC 3339, nothing is a feature's value."""
    case = open_case(ledger, models, name)
    episode = case.episode
    requests = [_request(row, elsewhere) for row in case.requests]
    return {
        "episode": {
            "id": episode.id,
            "number": episode.number,
            "model": episode.model,
            "version": episode.version,
            "stage": case.stage,
            "since": episode.since.isoformat(),
            "opened_at": episode.opened_at.isoformat(),
            "ended_at": case.ended_at,
            "attempts": len(case.requests),
        },
        "detected": _detected(case),
        "windows": [_window(window, case) for window in case.windows],
        "requests": requests,
        "deployment": elsewhere.deployment(episode.model) if case.requests else None,
        "alias": _alias(case, elsewhere),
        "events": [
            {"id": row["id"], "kind": row["kind"], "posted_at": row["posted_at"], "refusal": row["refusal"]}
            for row in case.events
        ],
    }


class _Told(msgspec.Struct, frozen=True):
    """What is read of an event that was told."""

    payload: dict[str, Any]


def _detected(case: Case) -> dict[str, Any] | None:
    """Why the episode was opened, as the event said it: signal, clause, action, columns and segments."""
    for row in case.events:
        if row["kind"] != Kind.DRIFT_DETECTED:
            continue
        try:
            payload = msgspec.json.decode(row["body"], type=_Told).payload
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        return {name: payload[name] for name in _DETECTED if name in payload}
    return None


def _window(window: Window, case: Case) -> dict[str, Any]:
    stored, judged = window.stored, window.judged
    told = {
        "version": stored.version,
        "start": stored.start,
        "end": stored.end,
        "report_url": stored.report,
        "performance": _performance(stored),
    }
    if judged is None:
        return {**told, "problem": window.problem}
    report, decision = judged.report, judged.decision
    return {
        **told,
        "offsets": msgspec.to_builtins(judged.spans),
        "rows": judged.seen,
        "sampled": judged.sampled,
        "reference": _reference(stored.grounds),
        "drift_share": report.drift_share,
        "scores": msgspec.to_builtins(report.scores),
        "prediction": msgspec.to_builtins(report.prediction),
        "findings": msgspec.to_builtins(report.findings),
        "segments": msgspec.to_builtins(judged.segments),
        "verdict": str(decision.verdict),
        "phase": str(decision.phase),
        "clause": decision.clause,
        "request": _asked(judged.end.isoformat(), judged.version, case),
    }


def _performance(stored: StoredWindow) -> dict[str, Any] | None:
    """What the labels said of it, each segment included; None while they have not come."""
    try:
        found = msgspec.json.decode(stored.performance or "null", type=Performance | None)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if found is None:
        return None
    names = ("metric", "score", "loss", "labelled", "unlabelled", "expired")
    segments = [{"segment": one.segment, "rows": one.rows, "loss": one.loss} for one in found.segments]
    return {name: getattr(found, name) for name in names} | {"segments": segments}


def _reference(text: str) -> str:
    """The digest of the reference that judged it, as far as the ledger can tell."""
    try:
        return msgspec.json.decode(text, type=Grounds).reference
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


class _Asked(msgspec.Struct, frozen=True):
    """What is read of a request's payload."""

    window_end: str = ""
    model_version: str = ""


def _asked(end: str, version: str, case: Case) -> str:
    """The request that this window led to, if it led to one."""
    for row in case.requests:
        try:
            asked = msgspec.json.decode(row.payload, type=_Asked)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        if (asked.window_end.replace("Z", "+00:00"), asked.model_version) == (end, version):
            return row.id
    return ""


def _request(row: RequestRow, elsewhere: Elsewhere) -> dict[str, Any]:
    outcome = row.outcome
    return {
        "id": row.id,
        "attempt": row.attempt,
        "state": row.state,
        "posted_at": row.posted_at.isoformat() if row.posted_at else None,
        "posts": row.posts,
        "created_by": row.created_by,
        "run": {"id": row.run, **elsewhere.run(row.run)} if row.run else None,
        "gate": None if outcome is None else msgspec.to_builtins(outcome),
        "ended_at": row.ended_at.isoformat() if row.ended_at else None,
        "served": row.served,
    }


def _alias(case: Case, elsewhere: Elsewhere) -> dict[str, Any] | None:
    """The alias's moves that this episode led to; without a promotion there is none."""
    promotions = {row.id for row in case.requests if row.outcome and row.outcome.action == "promoted"}
    if not promotions:
        return None
    known = elsewhere.alias(case.episode.model)
    return {**known, "moves": [move for move in known.get("moves", ()) if move["request"] in promotions]}


class NoOneElse:
    """The ledger's word alone, with nothing else asked."""

    def run(self, run: str) -> dict[str, Any]:
        return {}

    def deployment(self, model: str) -> dict[str, Any]:
        return {"name": full_deployment_name(model)}

    def alias(self, model: str) -> dict[str, Any]:
        return {}


class PrefectAndRegistry:
    """
    Prefect by its API, the registry through the flows' own reader (an entrypoint, as flows are).

    An answer that cannot be had is a `problem` in its place: the ledger's part is shown anyway.
    """

    def __init__(self, open_api: Callable[[], Any], read_alias: Callable[[str], Mapping[str, Any]]) -> None:
        self._open_api = open_api
        self._read_alias = read_alias
        self._api: Any = None
        self._problem = ""

    def run(self, run: str) -> dict[str, Any]:
        return self._asked(lambda api: _run(api, run))

    def deployment(self, model: str) -> dict[str, Any]:
        name = full_deployment_name(model)
        return {"name": name, **self._asked(lambda api: _deployment(api, name))}

    def alias(self, model: str) -> dict[str, Any]:
        try:
            return dict(self._read_alias(model))
        except Exception as error:
            if not hasattr(error, "exit_code"):
                raise
            return {"problem": str(error)}

    def close(self) -> None:
        """Give the connection back, if one was made."""
        if self._api is not None:
            self._api.close()

    def _asked(self, question: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        from daemon.wire.prefect import PrefectError

        if self._problem:
            return {"problem": self._problem}
        try:
            if self._api is None:
                self._api = self._open_api()
            return question(self._api)
        except PrefectError as error:
            # Asked once: each further question would wait as long.
            self._problem = str(error)
            return {"problem": self._problem}


def _run(api: Any, run: str) -> dict[str, Any]:
    found = api.run(run)
    url = f"{api.ui_url}/runs/flow-run/{run}"
    if found is None:
        return {"problem": "Prefect does not know this run any more"}
    state = found.get("state") or {}
    return {"name": found.get("name"), "state": state.get("name"), "url": url}


def _deployment(api: Any, name: str) -> dict[str, Any]:
    found = api.deployment(name)
    if found is None:
        return {"problem": "does not exist: run `retrain-daemon deploy`"}
    return {"paused": found["paused"], "url": f"{api.ui_url}/deployments/deployment/{found['id']}"}


# For people


def lines(told: Mapping[str, Any]) -> Iterator[str]:
    """The same as text, one step a line."""
    episode = told["episode"]
    yield f"{episode['model']} episode {episode['number']} ({episode['id']}): {episode['stage']}"
    times = f"drifted since {episode['since']}, open from {episode['opened_at']}"
    yield f"  version {episode['version']}, {times}"
    if told["detected"]:
        yield from _detected_lines(told["detected"])
    for window in told["windows"]:
        yield from _window_lines(window)
    for request in told["requests"]:
        yield from _request_lines(request)
    yield from _alias_lines(told["alias"])
    for event in told["events"]:
        if event["refusal"] or not event["posted_at"]:
            why = f"refused by Prefect: {event['refusal']}" if event["refusal"] else "not delivered yet"
            yield f"event {event['kind']}: {why}"


def _detected_lines(told: Mapping[str, Any]) -> Iterator[str]:
    yield f"  because {told['clause']}" if "clause" in told else "  because it drifted"
    if "action" in told:
        yield f"  action  {told['action']}"
    for one in told.get("segments", ()):
        yield f"  segment {_segment_line(one)}"


def _segment_line(one: Mapping[str, Any]) -> str:
    """A segment that performance has fallen in, or that a column's shift is concentrated in."""
    if "loss" in one:
        before = "none before" if one["baseline"] is None else f"{one['baseline']:.4g} before"
        return f"{one['segment']}: loss {one['loss']:.4g}, {before}, {one['rows']} rows"
    return (
        f"{one['segment']}: {one['column']} moved {one['effect']:+.2f} sd, "
        f"{one['share']:.0%} of its shift, {one['rows']} rows"
    )


def _performance_lines(told: Mapping[str, Any]) -> Iterator[str]:
    score = "none" if told["score"] is None else f"{told['score']:.4g}"
    yield f"  labels    {told['metric']} {score} on {told['labelled']} rows"
    if told["segments"]:
        parts = (f"{one['segment']} {one['loss']:.4g} ({one['rows']})" for one in told["segments"])
        yield f"  loss      {', '.join(parts)}"


def _window_lines(window: Mapping[str, Any]) -> Iterator[str]:
    yield f"window {window['start']} to {window['end']}, version {window['version']}"
    if "problem" in window:
        yield f"  evidence  cannot be read: {window['problem']}"
        return
    spans = [f"{one['topic']}/{one['partition']}:{one['start']}-{one['end']}" for one in window["offsets"]]
    yield f"  offsets   {', '.join(spans)}: {window['rows']} records, {window['sampled']} sampled"
    yield from _found_lines(window)
    yield f"  policy    {window['verdict']}, {window['phase']}: {window['clause']}"
    if window["performance"]:
        yield from _performance_lines(window["performance"])
    if window["request"]:
        yield f"  request   {window['request']}"
    if window["report_url"]:
        yield f"  report    {window['report_url']}"


def _found_lines(window: Mapping[str, Any]) -> Iterator[str]:
    """What its rows show: which columns drifted, where, and what is broken."""
    for score in window["scores"]:
        if score["drifted"]:
            yield (
                f"  score     {score['column']}: {score['method']} {score['score']:.4g} "
                f"{score['comparison']} {score['threshold']:g}"
            )
    for one in window["segments"]:
        yield f"  segment   {_segment_line(one)}"
    for finding in window["findings"]:
        if finding["broken"]:
            yield f"  broken    {finding['column']}: {finding['code']} in {finding['share']:.1%} of the rows"


def _request_lines(request: Mapping[str, Any]) -> Iterator[str]:
    yield f"request {request['id']}, attempt {request['attempt']}: {request['state']}"
    yield f"  posted    {request['posted_at'] or 'not yet'}" + (
        f", {request['posts']} times" if request["posts"] > 1 else ""
    )
    if run := request["run"]:
        where = run.get("url") or run.get("problem") or ""
        state = f", {run['state']}" if run.get("state") else ""
        yield f"  run       {run['id']}, created by {request['created_by']}{state} {where}".rstrip()
    if gate := request["gate"]:
        yield f"  gate      {gate['action']}: {gate['sentence']}"
    if request["served"]:
        yield f"  served    {request['served']}"


def _alias_lines(alias: Mapping[str, Any] | None) -> Iterator[str]:
    if not alias:
        return
    if "problem" in alias:
        yield f"alias: {alias['problem']}"
        return
    for move in alias.get("moves", ()):
        yield (
            f"alias: {move['action']}, version {move['version']} in place of {move['expected'] or 'none'}, "
            f"at {move['at']}"
        )
    yield f"alias: the champion is version {alias.get('champion') or 'none'} {alias.get('url', '')}".rstrip()
