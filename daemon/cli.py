"""The command line: what each command needs, when it is asked for it, and how it answers."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon.cli_audit import add_commands
from daemon.cli_backtest import add_backtest
from daemon.errors import UsageError

if TYPE_CHECKING:
    from daemon.config import Config

CONFIG_VARIABLE = "RETRAIN_DAEMON_CONFIG"
DEFAULT_CONFIG = "retrain-daemon.toml"
OVERFLOW = "a time or duration that far away makes no sense"

# Asked for before any of them is imported; MLflow obeys only the word, Evidently any value.
NO_TELEMETRY = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")

Arguments = argparse.Namespace
Command = Callable[[Arguments], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 stopped as asked, 1 failed, 2 usage or configuration."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.update({name: value for name, value in NO_TELEMETRY.items() if name not in os.environ})
    command, arguments = _chosen(words)
    try:
        return command(arguments)
    except KeyboardInterrupt:
        return _complain("interrupted", 1)
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if getattr(arguments, "log_level", None) == "debug":
            raise
        return _failed(error)


def _chosen(words: list[str]) -> tuple[Command, Arguments]:
    # The demo has a command line of its own, `--help` included.
    if words[:1] == ["demo"]:
        return _demo, Arguments(words=words[1:])
    arguments = _parser().parse_args(words)
    command: Command = arguments.command
    return command, arguments


def _failed(error: Exception) -> int:
    code = getattr(error, "exit_code", None)
    if code is not None:
        return _complain(str(error), code)
    said = str(error).partition("\n")[0]
    advice = "run again with --log-level debug for the traceback"
    return _complain(f"unexpected {type(error).__name__}: {said}; {advice}", 1)


def _complain(text: str, code: int) -> int:
    from monitors.passwords import without_passwords

    for line in without_passwords(text).splitlines():
        sys.stderr.write(f"retrain-daemon: {line}\n")
    return code


def _say(text: str = "") -> None:
    sys.stdout.write(text + "\n")


# Commands


def _init(arguments: Arguments) -> int:
    from daemon.init import write_config

    path = _config_path(arguments)
    write_config(path, arguments.model, arguments.bootstrap_servers, arguments.topic)
    _say(f"{path} written. Look it over, then run `retrain-daemon check --online`.")
    return 0


def _check(arguments: Arguments) -> int:
    config = _load(arguments)
    if arguments.sample:
        return _check_sample(config, arguments)
    from daemon import checks

    looked_at = list(checks.offline(config))
    if arguments.online:
        _configure_logs(config, arguments, "error")
        looked_at += checks.online(config)
    for check in looked_at:
        _say(f"{check.verdict:6} {check.subject}: {check.text}")
    return 1 if any(check.verdict == "failed" for check in looked_at) else 0


def _check_sample(config: "Config", arguments: Arguments) -> int:
    from daemon import checks

    total = dead = 0
    shown: set[tuple[tuple[str, str, str, str], ...]] = set()
    for record in checks.read_sample(config, arguments.sample, arguments.topic or ""):
        total, dead = total + 1, dead + (record.fault is not None)
        fault = record.fault
        _say(f"line {record.line}: " + (f"dead letter, {fault.code}: {fault.detail}" if fault else "record"))
        rows = tuple((row.field, row.source, row.found, row.code or "ok") for row in record.fields)
        if rows not in shown and len(shown) < 10:
            shown.add(rows)
            _say(_columns(rows))
    _say(f"{total} lines: {total - dead} records, {dead} dead letters")
    return 1 if dead or not total else 0


def _deploy(arguments: Arguments) -> int:
    config = _load(arguments)
    _configure_logs(config, arguments, "warning")
    names = [_known(config, arguments.model)] if arguments.model else list(config.models)
    flows = [config.flow_settings(name) for name in names]
    changes = _entrypoint("flows.deploy:deploy")(flows, config.prefect, remove=arguments.remove)
    _say(_columns([(change.action, change.kind, change.name, change.detail) for change in changes]))
    return 0


def _start(arguments: Arguments) -> int:
    config = _load(arguments)
    _configure_logs(config, arguments, config.log.level)
    code: int = _entrypoint("daemon.app:run")(config)
    return code


def _status(arguments: Arguments) -> int:
    config = _load(arguments)
    _configure_logs(config, arguments, "warning")
    status = _entrypoint("daemon.status:read_status")(config)
    if arguments.json:
        _say(json.dumps(status, indent=2, default=str))
    else:
        _entrypoint("daemon.status_table:show")(status)
    return 0


def _retrain(arguments: Arguments) -> int:
    config = _load(arguments)
    model = _known(config, arguments.model)
    _configure_logs(config, arguments, config.log.level)
    _use_prefect(config)
    _lend_password(config)
    outcome = _entrypoint("flows.retrain:run_now")(config.flow_settings(model))
    _say(f"{model}: {outcome.action}: {outcome.sentence}")
    return 1 if outcome.action == "failed" else 0


def _silence(arguments: Arguments) -> int:
    config = _load(arguments)
    model = _known(config, arguments.model)
    until = parse_until(arguments.until, datetime.now(UTC))
    ledger = _entrypoint("daemon.ledger:Ledger")(config.ledger.url)
    try:
        ledger.silence(model, until)
    finally:
        ledger.close()
    _say(f"{model}: no retraining requests until {until.isoformat(timespec='seconds')}")
    return 0


def _rollback(arguments: Arguments) -> int:
    config = _load(arguments)
    model = _known(config, arguments.model)
    _configure_logs(config, arguments, config.log.level)
    _use_prefect(config)
    outcome = _entrypoint("flows.registry:rollback")(config.flow_settings(model), arguments.reason)
    _say(f"{model}: {outcome.sentence}")
    return 0


def _demo(arguments: Arguments) -> int:
    code: int = _entrypoint("flows.demo.run:main")(getattr(arguments, "words", []))
    return code


# What commands share


def parse_until(text: str, now: datetime, option: str = "--until") -> datetime:
    """
    A moment from `now`, a duration like `1d12h`, or RFC 3339 with an offset.

    >>> parse_until("1d12h", datetime(2026, 1, 1, tzinfo=UTC)).isoformat()
    '2026-01-02T12:00:00+00:00'
    """
    if text == "now":
        return now
    if text and (match := _DURATION.fullmatch(text)):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        try:
            return now + timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        except OverflowError:
            raise UsageError(f"{option} {text}: {OVERFLOW}; use something like 2h or 7d") from None
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else _refuse_naive(text, option)
    except (ValueError, OverflowError):
        example = (now + timedelta(days=1)).isoformat(timespec="seconds")
        raise UsageError(
            f"{option} {text}: is no time; use 2h, 1d12h, now, or a time like {example}"
        ) from None


def _refuse_naive(text: str, option: str) -> datetime:
    raise UsageError(f"{option} {text}: has no UTC offset; end it with Z or +hh:mm")


def _config_path(arguments: Arguments) -> Path:
    chosen = getattr(arguments, "config", None) or os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG
    return Path(chosen)


def _load(arguments: Arguments) -> "Config":
    from daemon.config import load

    path: Path | None = _config_path(arguments)
    chosen = getattr(arguments, "config", None) or os.environ.get(CONFIG_VARIABLE)
    in_environment = any(name.startswith("RETRAIN_DAEMON_MODELS__") for name in os.environ)
    if not chosen and in_environment and not Path(DEFAULT_CONFIG).exists():
        path = None
    return load(path, os.environ)


def _known(config: "Config", model: str) -> str:
    if model not in config.models:
        raise UsageError(f"{model}: is no configured model; there are {', '.join(config.models)}")
    return model


def _configure_logs(config: "Config", arguments: Arguments, level: str) -> None:
    import msgspec

    from daemon.logs import configure

    level = getattr(arguments, "log_level", None) or level
    configure(msgspec.structs.replace(config.log, level=level), config.secrets())


def _use_prefect(config: "Config") -> None:
    """A flow that runs in this process finds its server the way Prefect itself does."""
    if config.prefect.api_url:
        os.environ["PREFECT_API_URL"] = config.prefect.api_url


def _lend_password(config: "Config") -> None:
    """A flow's settings hold no secret: one that runs in this process finds it where a worker's would."""
    if config.kafka.sasl_password:
        os.environ["RETRAIN_DAEMON_KAFKA__SASL_PASSWORD"] = config.kafka.sasl_password


def _entrypoint(entry: str) -> Any:
    from importlib import import_module

    module, _, name = entry.partition(":")
    return getattr(import_module(module), name)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"  {line}".rstrip() for line in lines)


# The parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retrain-daemon",
        description="Read the prediction log, notice drift, and get a better model promoted or say why not.",
        epilog=_examples("init --model fraud", "check --online", "start"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser, None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_setup(commands)
    _add_running(commands)
    _add_operating(commands)
    add_backtest(commands, _add)
    add_commands(commands, _add, _add_common)
    return parser


def _add_setup(commands: Any) -> None:
    init = _add(
        commands,
        "init",
        _init,
        "Write a first configuration; one that exists is never overwritten.",
        ("", "--model churn --topic churn.predictions", "--bootstrap-servers kafka-1:9092,kafka-2:9092"),
    )
    init.add_argument("--model", default="model", metavar="NAME", help="Name the model (default: model).")
    init.add_argument(
        "--bootstrap-servers",
        default="localhost:9092",
        metavar="HOST:PORT",
        help="Say where Kafka is (default: localhost:9092).",
    )
    init.add_argument(
        "--topic", default="predictions", help="Name the prediction topic (default: predictions)."
    )
    check = _add(
        commands,
        "check",
        _check,
        "Check the configuration, what it reaches, or a sample of the log.",
        ("", "--online", "--sample records.jsonl"),
    )
    check.add_argument(
        "--online", action="store_true", help="Also ask Kafka and Prefect (default: this machine only)."
    )
    check.add_argument(
        "--sample",
        type=Path,
        metavar="FILE",
        help="Show how each line of FILE, one JSON record per line, would be read (default: none).",
    )
    check.add_argument(
        "--topic", help="Read the sample as records of this topic (default: the first of kafka.topic)."
    )
    deploy = _add(
        commands,
        "deploy",
        _deploy,
        "Create or update what Prefect needs: work pool, deployments, automations.",
        ("", "--model fraud", "--remove"),
    )
    deploy.add_argument("--remove", action="store_true", help="Remove it all again (default: keep).")
    deploy.add_argument("--model", metavar="NAME", help="Touch only this model (default: all).")


def _add_running(commands: Any) -> None:
    _add(
        commands,
        "start",
        _start,
        "Read the log until told to stop: the first signal finishes the cycle, the second kills.",
        ("", "--config fraud.toml", "--log-level debug"),
    )
    status = _add(
        commands,
        "status",
        _status,
        "Show windows, episodes and requests, as of the last checkpoint.",
        ("", "--json", "--config fraud.toml"),
    )
    status.add_argument("--json", action="store_true", help="Print JSON (default: a table).")
    _add(
        commands,
        "demo",
        _demo,
        "Show the whole loop on this machine; `demo --help` has its options.",
        ("", "--json", "--data stream.parquet --label label"),
    )


def _add_operating(commands: Any) -> None:
    retrain = _add(
        commands,
        "retrain",
        _retrain,
        "Retrain a model now, in this process, and promote the challenger if it is better.",
        ("fraud", "fraud --log-level debug", "fraud --config fraud.toml"),
    )
    silence = _add(
        commands,
        "silence",
        _silence,
        "Let a model ask for nothing until a time; windows are judged and told as before.",
        ("fraud --until 2h", "fraud --until 2026-12-27T00:00:00Z", "fraud --until now"),
    )
    rollback = _add(
        commands,
        "rollback",
        _rollback,
        "Make the champion before this one the champion again.",
        ("fraud", 'fraud --reason "refunds are scored too low"', "fraud --config fraud.toml"),
    )
    for command in (retrain, silence, rollback):
        command.add_argument("model", metavar="MODEL", help="Name the model.")
    silence.add_argument(
        "--until",
        required=True,
        metavar="TIME",
        help="Give a duration (2h, 1d12h), an RFC 3339 time, or `now` to end a silence (required).",
    )
    rollback.add_argument(
        "--reason",
        default="rolled back by hand",
        help="Say why, for the audit record (default: rolled back by hand).",
    )


def _add(commands: Any, name: str, command: Command, does: str, examples: Sequence[str]) -> Any:
    parser = commands.add_parser(
        name,
        help=does,
        description=does,
        epilog=_examples(*(f"{name} {example}".strip() for example in examples)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(parser, argparse.SUPPRESS)
    parser.set_defaults(command=command)
    return parser


def _add_common(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Options that mean the same before and after the command."""
    parser.add_argument(
        "--config",
        default=default,
        metavar="FILE",
        help=f"Read or write this configuration (default: {DEFAULT_CONFIG}; env: {CONFIG_VARIABLE}).",
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default=default,
        help="Say more or less (default: log.level; env: RETRAIN_DAEMON_LOG__LEVEL).",
    )


def _examples(*commands: str) -> str:
    return "examples:\n" + "\n".join(f"  retrain-daemon {command}" for command in commands)


if __name__ == "__main__":
    sys.exit(main())
