"""`retrain-daemon backtest`: its words, and the settings that they and the configuration come to."""

import argparse
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon.errors import UsageError

if TYPE_CHECKING:
    from monitors.settings import FlowSettings, ModelSettings

REFERENCE_ROWS, WINDOW_ROWS, LABEL, LABEL_LAG = 5_000, 500, "label", 1
METRICS = ("accuracy", "balanced_accuracy", "mae", "auc")

Arguments = argparse.Namespace


def _backtest(arguments: Arguments) -> int:
    from daemon import cli

    _check_words(arguments)
    settings, models = _settings(arguments, arguments.config)
    other = None if arguments.compare is None else _settings(arguments, arguments.compare)[0]
    now = datetime.now(UTC)
    options = cli._entrypoint("flows.backtest.options:Options")(
        file=arguments.file,
        settings=settings,
        other=other,
        models=models,
        since=None if arguments.since is None else _moment("--from", arguments.since, now),
        until=None if arguments.until is None else _moment("--to", arguments.until, now),
        kind_stated=arguments.config is not None or arguments.metric is not None,
        label=arguments.label,
        ignore=tuple(name for name in arguments.ignore.split(",") if name),
        label_lag=arguments.label_lag,
        drifts=tuple(arguments.drift_at or ()),
        report=arguments.report,
        json=arguments.json,
    )
    code: int = cli._entrypoint("flows.backtest.run:main")(options)
    return code


def _check_words(arguments: Arguments) -> None:
    if (arguments.file is None) is not arguments.topic:
        raise UsageError("say what to replay: a Parquet or CSV FILE, or --topic")
    if arguments.topic and arguments.config is None:
        raise UsageError("--topic needs --config FILE, which says where Kafka is and how records are read")
    if not arguments.topic and (arguments.since or arguments.until):
        raise UsageError("--from and --to are times in a topic; give them with --topic")


def _moment(option: str, text: str, now: datetime) -> datetime:
    """RFC 3339 with an offset, or a duration before now."""
    from daemon import cli

    found = cli.parse_until(text, now, option)
    return now - (found - now) if text[-1:] in "dhms" else found


def _settings(arguments: Arguments, path: str | None) -> tuple["FlowSettings", tuple[str, ...]]:
    """
    Those of the configuration, or the defaults, with what the command line overrules.

    Beside them the names of all models of the configuration.
    """
    import msgspec

    settings = _defaults(arguments.file) if path is None else None
    models: tuple[str, ...] = ()
    if path is not None:
        settings, models = _configured(arguments, Path(path))
    assert settings is not None
    return msgspec.structs.replace(settings, settings=_overruled(arguments, settings.settings)), models


def _defaults(file: Path) -> "FlowSettings":
    from monitors.settings import (
        FlowSettings,
        KafkaSettings,
        LimitSettings,
        ModelSettings,
        RegistrySettings,
        WindowSettings,
    )

    return FlowSettings(
        model=file.stem,
        settings=ModelSettings(reference_rows=REFERENCE_ROWS, window=WindowSettings(rows=WINDOW_ROWS)),
        kafka=KafkaSettings(),
        fields={},
        limits=LimitSettings(),
        registry=RegistrySettings(),
    )


def _configured(arguments: Arguments, path: Path) -> tuple["FlowSettings", tuple[str, ...]]:
    from daemon import cli
    from daemon.config import load

    config = load(path, os.environ)
    cli._configure_logs(config, arguments, "error")
    names = list(config.models)
    if arguments.model is None and len(names) > 1:
        raise UsageError(f"{path} has several models; say with --model which of {', '.join(names)}")
    name = arguments.model or names[0]
    if name not in config.models:
        raise UsageError(f"{path} has no model {name!r} (--model); there are {', '.join(names)}")
    cli._lend_password(config)
    return config.flow_settings(name), tuple(names)


def _overruled(arguments: Arguments, settings: "ModelSettings") -> "ModelSettings":
    import msgspec

    replace: Callable[..., Any] = msgspec.structs.replace
    if arguments.reference_rows is not None:
        settings = replace(settings, reference_rows=arguments.reference_rows)
    rows = arguments.window_rows or settings.window.rows
    if rows is not None:
        least = min(settings.window.min_rows, rows)
        settings = replace(settings, window=replace(settings.window, rows=rows, seconds=None, min_rows=least))
    if arguments.metric is not None:
        kind = "regression" if arguments.metric == "mae" else "classification"
        settings = replace(settings, kind=kind, gate=replace(settings.gate, metric=arguments.metric))
    if arguments.trainer is not None:
        name = "" if arguments.trainer == "default" else arguments.trainer
        settings = replace(settings, training=replace(settings.training, callable=name))
    if arguments.seed is not None:
        settings = replace(settings, training=replace(settings.training, seed=arguments.seed))
    return settings


# The parser


def add_backtest(commands: Any, add: Callable[..., Any]) -> None:
    """Add the command to the command line; `add` is its own."""
    backtest = add(
        commands,
        "backtest",
        _backtest,
        "Replay a stream that has already happened, and show what a policy would have done, and won, on it.",
        (
            "sales.parquet --label churned",
            "sales.csv --label churned --reference-rows 5000 --window-rows 500 --json",
            "--topic --config retrain-daemon.toml --from 30d --report last-month.html",
        ),
    )
    option = backtest.add_argument
    option("file", nargs="?", type=Path, metavar="FILE",
           help="Replay this Parquet or CSV file; row order is time order.")  # fmt: skip
    option("--topic", action="store_true",
           help="Replay the topics of the configuration instead (default: a file).")  # fmt: skip
    option("--from", dest="since", metavar="TIME",
           help="Begin at this Kafka timestamp: a time, or 30d for 30 days ago (default: where the log "
           "begins).")  # fmt: skip
    option("--to", dest="until", metavar="TIME", help="End before it (default: where the log ends).")
    option("--label", default=LABEL, metavar="COLUMN",
           help=f"Name the column to predict (default: {LABEL}).")  # fmt: skip
    option("--ignore", default="", metavar="A,B",
           help="Name columns that are no features; absent ones are fine (default: none "
           "but ts and segment).")  # fmt: skip
    option("--reference-rows", type=_positive, metavar="N",
           help="Train the first champion on so many rows; the rest is live (default: "
           f"{REFERENCE_ROWS}, or the configuration's).")  # fmt: skip
    option("--window-rows", type=_positive, metavar="N",
           help=f"Judge windows of so many rows (default: {WINDOW_ROWS}, or the "
           "configuration's).")  # fmt: skip
    option("--label-lag", type=_natural, default=LABEL_LAG, metavar="WINDOWS",
           help=f"Let labels be known so many windows later (default: {LABEL_LAG}).")  # fmt: skip
    option("--metric", choices=METRICS, help="Judge by this metric (default: accuracy for classes, mae for "
           "numbers, or the configuration's).")  # fmt: skip
    option("--trainer", metavar="default|MODULE:FUNCTION",
           help="Train with this function (default: the configuration's, or our own).")  # fmt: skip
    option("--seed", type=_natural, metavar="N", help="Seed training and gate (default: 0).")
    option("--model", metavar="NAME", help="Use this model of the configuration (default: the only one).")
    option("--drift-at", type=_natural, action="append", metavar="ROW",
           help="Say at which row a drift is known to begin; may be repeated (default: none "
           "is known).")  # fmt: skip
    option("--compare", metavar="OTHER.toml",
           help="Try this configuration on the same stream too, and show what differs "
           "(default: none).")  # fmt: skip
    option("--report", type=Path, metavar="FILE.html",
           help="Write a page with the timeline of it all (default: none).")  # fmt: skip
    option("--json", action="store_true",
           help="End with one JSON object on stdout; the table goes to stderr (default: text).")  # fmt: skip


def _positive(text: str) -> int:
    number = _natural(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def _natural(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no whole number") from None
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return number
