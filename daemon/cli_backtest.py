"""`retrain-daemon backtest`: its words, and the settings that they and the configuration come to."""

import argparse
import os
from collections.abc import Callable
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
    settings = _settings(arguments, arguments.config)
    other = None if arguments.compare is None else _settings(arguments, arguments.compare)
    options = cli._entrypoint("flows.backtest.options:Options")(
        file=arguments.file,
        settings=settings,
        other=other,
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
    if arguments.file is None:
        raise UsageError("say what to replay: a Parquet or CSV FILE")


def _settings(arguments: Arguments, path: str | None) -> "FlowSettings":
    """Those of the configuration, or the defaults, with what the command line overrules."""
    import msgspec

    settings = _defaults(arguments.file) if path is None else _configured(arguments, Path(path))
    return msgspec.structs.replace(settings, settings=_overruled(arguments, settings.settings))


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


def _configured(arguments: Arguments, path: Path) -> "FlowSettings":
    from daemon.config import load

    config = load(path, os.environ)
    names = list(config.models)
    if arguments.model is None and len(names) > 1:
        raise UsageError(f"{path} has several models; say with --model which of {', '.join(names)}")
    name = arguments.model or names[0]
    if name not in config.models:
        raise UsageError(f"{path} has no model {name!r} (--model); there are {', '.join(names)}")
    return config.flow_settings(name)


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
            "sales.parquet --label churned --config retrain-daemon.toml --metric auc --label-lag 4",
        ),
    )
    option = backtest.add_argument
    option("file", nargs="?", type=Path, metavar="FILE",
           help="Replay this Parquet or CSV file; row order is time order.")  # fmt: skip
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
