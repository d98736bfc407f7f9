"""Options: what a backtest was asked for, once the command line and the configurations have been read."""

from datetime import datetime
from pathlib import Path

import msgspec

from monitors.settings import FlowSettings


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """
    One backtest of a file, or without one of the topics in the settings, between `since` and `until`.

    `settings` hold what the command line overrules already. `models` are all that log into the topics;
    `kind_stated` says that the settings' kind was asked for, and is not to be read off the labels.
    """

    file: Path | None
    models: tuple[str, ...] = ()
    since: datetime | None = None
    until: datetime | None = None
    settings: FlowSettings
    other: FlowSettings | None = None
    kind_stated: bool = False
    label: str = "label"
    ignore: tuple[str, ...] = ()
    label_lag: int = 1
    drifts: tuple[int, ...] = ()
    report: Path | None = None
    json: bool = False
