"""The status for people: one row for each model, and what is in flight below."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(status: Mapping[str, Any], console: Console | None = None) -> None:
    """Write the values of `read_status` to the terminal."""
    console = console if console is not None else Console()
    console.print(
        f"{status['records']:,} records, {status['dead_letters']:,} dead letters, "
        f"{status['outbox_waiting']:,} events waiting to be delivered",
        highlight=False,
    )
    if expired := status["predictions_expired"]:
        console.print(f"{expired:,} predictions gave up waiting for their label", highlight=False)
    console.print(_models(status["models"]))
    accounts = {name: model["budget"] for name, model in status["models"].items() if model["budget"]}
    if accounts:
        console.print(_budgets(accounts))
    requests = [(name, request) for name, model in status["models"].items() for request in model["requests"]]
    if requests:
        console.print(_requests(requests))


def _models(models: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table(
        "model", "stage", "serving", "windows", "drift share", "episodes", "promoted", "refused", "note"
    )
    for name, model in models.items():
        window = model["last_window"]
        share = "" if window is None or window["drift_share"] is None else f"{window['drift_share']:.2f}"
        table.add_row(
            *map(_plain, (name, model["stage"], model["serving"], model["windows"], share)),
            *map(_plain, (model["episodes"], model["promoted"], model["refused"], _note(model))),
        )
    return table


def _budgets(accounts: Mapping[str, Mapping[str, Any]]) -> Table:
    """What is stated, what is achieved, and how much of it is in use now."""
    table = _table(
        "model", "budget", "achieved", "counted", "needless", "needed", "open", "data", "prediction", "loss"
    )
    for name, account in accounts.items():
        used = [f"{share:.0%}" for share in account["evidence"].values()]
        alarms = (account["needless"], account["needed"], account["open"])
        stated = f"{account['stated']:g} windows, {account['certainty']}"
        table.add_row(*map(_plain, (name, stated, _achieved(account), _counted(account), *alarms, *used)))
    return table


def _achieved(account: Mapping[str, Any]) -> str:
    if account["achieved"] is None:
        return "no needless alarm"
    return f"{account['achieved']:.4g} windows" + (", exceeded" if account["exceeded"] else "")


def _counted(account: Mapping[str, Any]) -> str:
    if account["since"] is None:
        return "0 windows"
    return f"{account['windows']:,} windows since {account['since'][:10]}"


def _note(model: Mapping[str, Any]) -> str:
    notes = []
    if model["broken"]:
        notes.append("broken: " + ", ".join(model["broken"]))
    if model["silenced_until"]:
        notes.append(f"silent until {model['silenced_until']}")
    return "; ".join(notes)


def _requests(requests: list[tuple[str, Mapping[str, Any]]]) -> Table:
    table = _table("model", "request", "attempt", "state", "run", "started by", "outcome")
    for name, request in requests:
        outcome, held = request["outcome"], request["held"]
        said = f"held: {held}" if held else ""
        if outcome is not None:
            said = f"{outcome['action']}: {outcome['sentence']}"
        ids = (request["request"][:8], request["attempt"], request["state"], (request["run"] or "")[:8])
        table.add_row(*map(_plain, (name, *ids, request["created_by"] or "", said)))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _plain(value: object) -> str:
    """Names come from records: brackets in them are no markup."""
    return str(value).replace("[", r"\[")
