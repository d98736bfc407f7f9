"""Status: what the ledger says about each model, as plain values for people and programs."""

from collections.abc import Mapping
from typing import Any

import msgspec

from daemon.account import account_of
from daemon.ledger import Ledger, RequestRow, now
from monitors.episodes import ModelState
from monitors.settings import ModelSettings


def ledger_status(ledger: Ledger, models: Mapping[str, ModelSettings]) -> dict[str, Any]:
    """Everything as of the last checkpoint; times are RFC 3339 in UTC."""
    counters = ledger.counters()
    return {
        "records": counters.get("records", 0),
        "dead_letters": counters.get("dead_letters", 0),
        "predictions_expired": counters.get("predictions_expired", 0),
        "outbox_waiting": ledger.waiting_count(),
        "models": {model: _model_status(ledger, model, settings) for model, settings in models.items()},
    }


def read_status(config: Any) -> dict[str, Any]:
    """The same for a configuration (`daemon.config.Config`), whether or not a daemon is running."""
    ledger = Ledger(config.ledger.url)
    try:
        return ledger_status(ledger, config.models)
    finally:
        ledger.close()


def _model_status(ledger: Ledger, model: str, settings: ModelSettings) -> dict[str, Any]:
    # Checkpoints come between these reads. Whoever counts a window must see what it led to: it is read first.
    windows, last = ledger.window_count(model), ledger.windows(model, limit=1)
    state = ledger.model_states().get(model)
    account = account_of(ledger, model, settings.policy, state or ModelState())
    requests = ledger.requests(model)
    actions = [row.outcome.action for row in requests if row.outcome is not None]
    silenced = ledger.silences().get(model)
    episode = None if state is None or state.episode is None else state.episode
    return {
        "stage": "quiet" if state is None else str(state.stage),
        "serving": "" if state is None else state.serving,
        "windows": windows,
        "last_window": _window_status(last[0]) if last else None,
        "episodes": 0 if state is None else state.episodes,
        "episode": None
        if episode is None
        else {"id": episode.id, "number": episode.number, "state": str(episode.stage)},
        "budget": None if account is None else msgspec.to_builtins(account),
        "requests": [_request_status(row) for row in requests],
        "promoted": actions.count("promoted"),
        "refused": actions.count("refused"),
        "failed": actions.count("failed"),
        "broken": [] if state is None else list(state.broken),
        "silenced_until": silenced.isoformat() if silenced and silenced > now() else None,
        "versions": sorted(ledger.versions_seen(model)),
    }


def _window_status(row: dict[str, Any]) -> dict[str, Any]:
    names = ("version", "start", "end", "verdict", "drift_share", "report", "metric", "score", "labelled")
    return {name: row[name] for name in names} | {"clause": row["evidence"]["decision"]["clause"]}


def _request_status(row: RequestRow) -> dict[str, Any]:
    return {
        "request": row.id,
        "episode": row.episode,
        "attempt": row.attempt,
        "state": row.state,
        "posts": row.posts,
        "posted_at": row.posted_at.isoformat() if row.posted_at else None,
        "run": row.run,
        "created_by": row.created_by,
        "outcome": None if row.outcome is None else msgspec.to_builtins(row.outcome),
        "served": row.served,
        "held": row.held,
    }
