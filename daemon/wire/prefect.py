"""Prefect's API: how either side posts events, keeps claims, and looks at deployments and runs."""

import contextvars
import json
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast
from urllib.parse import parse_qs, quote, urlsplit

import msgspec

from daemon.wire.names import champion_variable as champion_variable
from daemon.wire.names import claim_variable as claim_variable
from daemon.wire.names import deployment_name as deployment_name
from daemon.wire.names import full_deployment_name as full_deployment_name
from daemon.wire.names import variable_slug as variable_slug

if TYPE_CHECKING:
    import httpx
    from prefect.context import SettingsContext

# The server answers 204 to a larger event and drops it. The margin is for what the server adds.
EVENT_BYTES = 1_500_000 - 4_096
VARIABLE_CHARACTERS = 5_000
PAGE = 100
EVENTS_PAGE = 50
_RETRYABLE = frozenset({408, 425, 429})
_Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]


class PrefectError(Exception):
    """Base of what can go wrong with Prefect; the message says what, where and what to do."""

    exit_code = 1


class PrefectNotConfigured(PrefectError):
    """Nobody said where the Prefect server is."""

    exit_code = 2


class PrefectUnavailable(PrefectError):
    """No usable answer: not reachable, too slow, overloaded or broken. The same call may work later."""


class PrefectRefused(PrefectError):
    """The server understood and said no; the same call will be refused again."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ActionResult(msgspec.Struct, frozen=True):
    """What an automation made of an event; `run` is the flow run that it created, if it did."""

    succeeded: bool
    reason: str
    run: str


class PrefectApi:
    """
    One connection to one Prefect server, for one thread.

    Prefect's own client is inside, so that the active profile's API key, auth string, CSRF, TLS and
    header settings apply. It retries what is worth retrying for some seconds; after that the caller
    decides. Prefect's temporary in-process server is never started: it would end with us.
    """

    def __init__(self, api_url: str = "", *, retries: int = 1, timeout_seconds: float = 30.0) -> None:
        from prefect.client.orchestration import SyncPrefectClient
        from prefect.settings import get_current_settings

        settings = get_current_settings()
        address = (api_url or settings.api.url or "").rstrip("/")
        self.url = _without_user(_checked(address))
        self.ui_url = _ui_url(self.url, settings.api.url, settings.ui_url)
        secrets = (settings.api.auth_string, settings.api.key)
        auth_string, api_key = (secret.get_secret_value() if secret else None for secret in secrets)
        self._client = SyncPrefectClient(
            address,
            auth_string=auth_string,
            api_key=api_key,
            httpx_settings={"timeout": min(timeout_seconds, settings.api.request_timeout)},
        )
        self._client.__enter__()
        self._context = contextvars.copy_context()
        self._limits = self._context.run(_limit_retries, min(retries, settings.client.max_retries))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back; the object is of no use afterwards."""
        self._client.__exit__(None, None, None)

    # Events

    def post_event(self, body: Mapping[str, Any]) -> None:
        """
        Post one event in the API's form; `occurred` and `id` must be in it.

        The server has taken it when this returns, and may still lose it if it dies at once: what
        must not be lost is confirmed by what it leads to, and posted again under the same id.
        """
        size = len(json.dumps(body, ensure_ascii=False).encode())
        if size > EVENT_BYTES:
            raise PrefectRefused(
                f"event {body.get('event')} has {size} bytes, and Prefect drops events of more than"
                f" {EVENT_BYTES} without a word: make its payload smaller"
            )
        self.call("POST", "/events", [dict(body)])

    def events(self, filter: Mapping[str, Any], limit: int = EVENTS_PAGE) -> list[dict[str, Any]]:
        """The newest events of the feed that match, at most `limit`; they can be read some seconds late."""
        page = self.call("POST", "/events/filter", {"filter": filter, "limit": min(limit, EVENTS_PAGE)})
        found: list[dict[str, Any]] = list(page["events"])
        while len(found) < limit and page["next_page"]:
            # The link may carry a host that only the server knows; the token in it is what counts.
            token = parse_qs(urlsplit(page["next_page"]).query)["page-token"][0]
            page = self.call("GET", "/events/filter/next", params={"page-token": token})
            found += page["events"]
        return found[:limit]

    def action_results(self, event_id: str) -> list[ActionResult]:
        """What automations made of this event so far, as far as the feed tells."""
        prefix = "prefect.automation.action."
        wanted = {
            "event": {"name": [f"{prefix}executed", f"{prefix}failed"]},
            "related": {"id": [f"prefect.event.{event_id}"]},
        }
        return [_action_result(event) for event in self.events(wanted)]

    # Variables

    def create_variable(self, name: str, value: Any) -> bool:
        """
        Create the variable; False if it exists already. Of many who try, one gets True.

        If the answer to a creation was lost, the retry says False to its own maker: after False,
        read who made it.
        """
        body = {"name": name, "value": _checked_value(name, value)}
        return self._send("POST", "/variables/", body, answers=(409,)).status_code != 409

    def read_variable(self, name: str) -> Any | None:
        """Its value, or None if there is none of that name."""
        response = self._send("GET", f"/variables/name/{quote(name, safe='')}", answers=(404,))
        return None if response.status_code == 404 else _json(response)["value"]

    def update_variable(self, name: str, value: Any) -> None:
        """Overwrite a variable that exists; refused if it does not."""
        body = {"value": _checked_value(name, value)}
        self.call("PATCH", f"/variables/name/{quote(name, safe='')}", body)

    def set_variable(self, name: str, value: Any) -> None:
        """Create or overwrite."""
        if not self.create_variable(name, value):
            self.update_variable(name, value)

    def delete_variable(self, name: str) -> bool:
        """False if there was none of that name."""
        response = self._send("DELETE", f"/variables/name/{quote(name, safe='')}", answers=(404,))
        return response.status_code != 404

    def variables(self, prefix: str) -> dict[str, Any]:
        """Names and values of all variables whose name begins so."""
        # The server's pattern matches anywhere and reads `_` as any letter, so it only narrows.
        body = {"variables": {"name": {"like_": prefix}}, "sort": "NAME_ASC"}
        return {
            variable["name"]: variable["value"]
            for variable in self.pages("/variables/filter", body)
            if variable["name"].startswith(prefix)
        }

    # Deployments, automations, runs

    def deployment(self, full_name: str) -> dict[str, Any] | None:
        """The deployment `flow/name` with `id`, `paused` and all else, or None."""
        path = "/".join(quote(part, safe="") for part in full_name.split("/", 1))
        response = self._send("GET", f"/deployments/name/{path}", answers=(404,))
        return None if response.status_code == 404 else cast("dict[str, Any]", _json(response))

    def automations(self, name: str) -> list[dict[str, Any]]:
        """All automations of that name, the oldest first: names are not unique. See `enabled`."""
        body = {"automations": {"name": {"any_": [name]}}, "sort": "CREATED_DESC"}
        return sorted(self.pages("/automations/filter", body), key=_age)

    def runs_of(self, deployment_id: str, since: datetime) -> list[dict[str, Any]]:
        """Every run of the deployment that was or is expected to start at `since` or later."""
        body = {
            "deployments": {"id": {"any_": [deployment_id]}},
            "flow_runs": {"expected_start_time": {"after_": since.isoformat()}},
            # By id, because no run moves in that order while we page: a new one can only show one twice.
            "sort": "ID_DESC",
        }
        return list({run["id"]: run for run in self.pages("/flow_runs/filter", body)}.values())

    def run(self, run_id: str) -> dict[str, Any] | None:
        """The flow run with its state, or None if it does not exist (any more)."""
        response = self._send("GET", f"/flow_runs/{quote(run_id, safe='')}", answers=(404,))
        return None if response.status_code == 404 else cast("dict[str, Any]", _json(response))

    def create_run(
        self, deployment_id: str, parameters: Mapping[str, Any], idempotency_key: str
    ) -> dict[str, Any]:
        """Create a run; a key that was used before gives the run of then, whatever became of it."""
        body = {
            "parameters": dict(parameters),
            "idempotency_key": idempotency_key,
            "state": {"type": "SCHEDULED"},
        }
        path = f"/deployments/{quote(deployment_id, safe='')}/create_flow_run"
        return cast("dict[str, Any]", self.call("POST", path, body))

    # Anything else

    def clock(self) -> tuple[datetime, datetime, datetime]:
        """Our time, the server's (in whole seconds) and ours again."""
        asked = datetime.now(UTC)
        told = self._send("GET", "/health").headers.get("date", "")
        answered = datetime.now(UTC)
        try:
            return asked, parsedate_to_datetime(told), answered
        except (TypeError, ValueError):
            raise PrefectRefused(f"{self.url} answers without a date: its clock cannot be seen") from None

    def call(
        self, method: _Method, path: str, body: Any = None, params: Mapping[str, str] | None = None
    ) -> Any:
        """One request; the answer's JSON, or None where it has no body."""
        response = self._send(method, path, body, params)
        return _json(response) if response.content else None

    def find(self, path: str) -> dict[str, Any] | None:
        """What is at this path, or None."""
        response = self._send("GET", path, answers=(404,))
        return None if response.status_code == 404 else cast("dict[str, Any]", _json(response))

    def pages(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Every row of a `/filter` path, page after page."""
        offset = 0
        while True:
            rows = self.call("POST", path, {**body, "limit": PAGE, "offset": offset})
            yield from rows
            offset += PAGE
            if len(rows) < PAGE:
                return

    def _send(
        self,
        method: _Method,
        path: str,
        body: Any = None,
        params: Mapping[str, str] | None = None,
        answers: Collection[int] = (),
    ) -> "httpx.Response":
        """Send one request; statuses in `answers` are answers, all other refusals are raised."""
        import httpx

        keywords: dict[str, Any] = {"params": params} if body is None else {"params": params, "json": body}
        send = cast("Any", self._client.request)
        try:
            response: httpx.Response = self._context.run(send, method, path, **keywords)
        except httpx.HTTPStatusError as error:
            if error.response.status_code in answers:
                return error.response
            raise _translated(method, path, self.url, error.response) from None
        except httpx.RequestError as error:
            raise PrefectUnavailable(
                f"no answer from Prefect at {self.url} ({type(error).__name__}: {error}):"
                " is the server running, and is this its address?"
            ) from error
        return response


def created_by_automation(run: Mapping[str, Any]) -> bool:
    """Whether an automation created the run; the server says so of each run itself."""
    return bool((run.get("created_by") or {}).get("type") == "AUTOMATION")


def _limit_retries(retries: int) -> "SettingsContext":
    """Bound Prefect's own retrying in the calling context, which is ours alone; it is never left."""
    from prefect.context import SettingsContext, get_settings_context
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings

    settings = get_current_settings().copy_with_update(updates={PREFECT_CLIENT_MAX_RETRIES: retries})
    return SettingsContext(profile=get_settings_context().profile, settings=settings).__enter__()


def _checked(address: str) -> str:
    parts = urlsplit(address)
    if not address:
        raise PrefectNotConfigured(
            "no Prefect server is configured: run `prefect config set PREFECT_API_URL=...`"
            " or set prefect.api_url (e.g. http://127.0.0.1:4200/api)"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PrefectNotConfigured(
            f"{_without_user(address)!r} is no address of a Prefect server: prefect.api_url (or the profile's"
            " PREFECT_API_URL) looks like http://127.0.0.1:4200/api"
        )
    return address


def _without_user(address: str) -> str:
    """The address without the user and password that it may carry."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _ui_url(url: str, profile_url: str | None, profile_ui_url: str | None) -> str:
    if profile_ui_url and profile_url and profile_url.rstrip("/") == url:
        return profile_ui_url.rstrip("/")
    return url.removesuffix("/api")


def _checked_value(name: str, value: Any) -> Any:
    size = len(json.dumps(value))
    if size > VARIABLE_CHARACTERS:
        raise PrefectRefused(
            f"the value of variable {name} has {size} characters, Prefect takes {VARIABLE_CHARACTERS}:"
            " shorten it"
        )
    return value


def _translated(method: str, path: str, url: str, response: "httpx.Response") -> PrefectError:
    status = response.status_code
    what = f"{method} {path} at {url} was answered with {status}"
    if status >= 500 or status in _RETRYABLE:
        return PrefectUnavailable(f"{what}: the server is overloaded or broken, see its log")
    if status in (401, 403):
        return PrefectRefused(
            f"{what}: not authorised; set PREFECT_API_AUTH_STRING (own server) or PREFECT_API_KEY (Cloud)"
            f" as the server expects{_detail(response)}",
            status,
        )
    hint = "" if path.startswith("/variables") or url.endswith("/api") else "; does the address end in /api?"
    return PrefectRefused(f"{what}{_detail(response)}{hint}", status)


def _detail(response: "httpx.Response") -> str:
    """The server's reason. Its echo of the request is left out: a secret may be in it."""
    try:
        body = msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        return ""
    detail = body.get("detail") or body.get("exception_detail") if isinstance(body, dict) else None
    if isinstance(detail, list):
        detail = "; ".join(
            f"{'.'.join(str(part) for part in problem.get('loc', ()))}: {problem.get('msg', '')}"
            for problem in detail[:5]
            if isinstance(problem, dict)
        )
    return f": {detail[:500]}" if isinstance(detail, str) and detail else ""


def _json(response: "httpx.Response") -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise PrefectRefused(
            f"{_without_user(str(response.url))} answered with something else than JSON:"
            " is this the address of Prefect's API? It ends in /api"
        ) from error


def _action_result(event: Mapping[str, Any]) -> ActionResult:
    runs = [
        related["prefect.resource.id"].removeprefix("prefect.flow-run.")
        for related in event["related"]
        if related.get("prefect.resource.role") == "flow-run"
    ]
    return ActionResult(
        succeeded=event["event"].endswith(".executed"),
        reason=str(event["payload"].get("reason") or ""),
        run=runs[0] if runs else "",
    )


def _age(automation: Mapping[str, Any]) -> tuple[datetime, str]:
    return datetime.fromisoformat(automation["created"]), str(automation["id"])
