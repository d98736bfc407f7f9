"""The commands that look back and look around: explain, verify, dlq and doctor."""

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from daemon.errors import UsageError

if TYPE_CHECKING:
    from daemon.config import Config
    from daemon.dlq import Letter, Selection
    from daemon.verify import Verification

SHOWN_LETTERS = 50

Arguments = argparse.Namespace


def _explain(arguments: Arguments) -> int:
    from daemon import cli
    from daemon.explain import NoOneElse, PrefectAndRegistry, explain, lines
    from daemon.ledger import Ledger
    from daemon.wire.prefect import PrefectApi

    config = cli._load(arguments)
    cli._configure_logs(config, arguments, "error")
    moves = cli._entrypoint
    others = PrefectAndRegistry(
        lambda: PrefectApi(config.prefect.api_url, retries=0, timeout_seconds=5.0),
        lambda model: moves("flows.registry:champion_moves")(config.flow_settings(model)),
    )
    ledger = Ledger(config.ledger.url)
    try:
        asked = NoOneElse() if arguments.offline else others
        told = explain(ledger, list(config.models), arguments.episode, asked)
    finally:
        ledger.close()
        others.close()
    cli._say(json.dumps(told, indent=2) if arguments.json else "\n".join(lines(told)))
    return 0


def _verify(arguments: Arguments) -> int:
    import msgspec

    from daemon import cli
    from daemon.case import names_of_episodes
    from daemon.ledger import Ledger
    from daemon.verify import verify
    from daemon.wire.kafka_log import KafkaLog
    from daemon.wire.references import ReferenceStore
    from monitors.decoding import make_decoder

    config = cli._load(arguments)
    cli._configure_logs(config, arguments, "error")
    models = list(config.models)
    decoder = make_decoder(config.mappings, config.kafka.labels_topic, models, config.limits)
    store = ReferenceStore(config.registry.references_url)
    log, ledger = KafkaLog(config.kafka), Ledger(config.ledger.url)
    try:
        names = [arguments.episode] if arguments.episode else names_of_episodes(ledger, models)
        found = [verify(ledger, models, one, log, decoder, store, config.kafka.group) for one in names]
    finally:
        ledger.close()
    if arguments.json:
        told = msgspec.to_builtins(found)
        cli._say(json.dumps(told[0] if arguments.episode else told, indent=2))
    else:
        for one in found:
            _say_verification(one, cli._say)
        if not found:
            cli._say("no episode yet: nothing to verify")
    return 0 if all(one.equal for one in found) else 1


def _say_verification(found: "Verification", say: Callable[[str], None]) -> None:
    rows = sum(window.rows for window in found.windows)
    what = f"{len(found.windows)} windows, {rows} records, {found.requests} requests"
    verdict = "equal" if found.equal else "NOT EQUAL"
    say(f"{found.model} episode {found.number} ({found.episode}): {verdict}; recomputed: {what}")
    for window in found.windows:
        for one in window.differences:
            say(
                f"  window {window.start} to {window.end}, version {window.version}: {one.part}: {one.detail}"
            )
    for one in found.differences:
        say(f"  {one.part}: {one.detail}")


def _dlq_list(arguments: Arguments) -> int:
    import msgspec

    from daemon import cli
    from daemon.dlq import letters, summary
    from daemon.ledger import Ledger
    from daemon.wire.kafka_log import KafkaLog

    config = cli._load(arguments)
    cli._configure_logs(config, arguments, "error")
    ledger = Ledger(config.ledger.url)
    try:
        states = ledger.redrives()
    finally:
        ledger.close()
    topic = config.kafka.dead_letter_topic
    found = list(letters(KafkaLog(config.kafka), topic, _selection(arguments), states))
    shown = found[-arguments.limit :] if arguments.limit else found
    if arguments.json:
        told = {"topic": topic, "letters": msgspec.to_builtins(shown), "codes": summary(found)}
        cli._say(json.dumps(told, indent=2))
        return 0
    if shown:
        cli._say(cli._columns([_row(letter) for letter in shown]))
    codes = ", ".join(f"{count} {code}" for code, count in summary(found).items())
    cli._say(f"{len(found)} dead letters in {topic}{': ' if codes else ''}{codes}")
    return 0


def _row(letter: "Letter") -> tuple[str, ...]:
    place = f"{letter.topic}/{letter.partition}/{letter.offset}"
    marks = (("cut",) if letter.truncated else ()) + ((letter.state,) if letter.state else ())
    # A detail may hold what a record calls its fields: no control character of it reaches a terminal.
    detail = "".join(sign if sign.isprintable() else "?" for sign in letter.detail)
    return letter.at, letter.code, place, f"{letter.size} bytes", " ".join(marks), detail


def _dlq_redrive(arguments: Arguments) -> int:
    import msgspec

    from daemon import cli
    from daemon.dlq import redrive
    from daemon.ledger import Ledger
    from daemon.wire.kafka_log import KafkaLog
    from daemon.wire.kafka_sender import KafkaSender

    selection = _selection(arguments)
    if selection.everything and not arguments.all:
        raise UsageError(
            "say which: --code, --topic, --partition or --offsets, or --all for every dead letter"
        )
    config = cli._load(arguments)
    cli._configure_logs(config, arguments, "error")
    sender, ledger = KafkaSender(config.kafka), Ledger(config.ledger.url)
    try:
        became = list(
            redrive(
                KafkaLog(config.kafka),
                config.kafka.dead_letter_topic,
                ledger,
                sender,
                list(config.mappings),
                selection,
                force=arguments.force,
            )
        )
    finally:
        sender.close()
        ledger.close()
    counts = {result: sum(one.result == result for one in became) for result in ("sent", "skipped", "failed")}
    if arguments.json:
        cli._say(json.dumps({**counts, "letters": msgspec.to_builtins(became)}, indent=2))
    else:
        for one in became:
            if one.result != "sent":
                cli._say(f"{one.topic}/{one.partition}/{one.offset} {one.code}: {one.result}: {one.why}")
        cli._say(", ".join(f"{count} {result}" for result, count in counts.items()))
    return 1 if counts["failed"] else 0


def _selection(arguments: Arguments) -> "Selection":
    from daemon.dlq import Selection, parse_offsets

    first, end = parse_offsets(arguments.offsets) if arguments.offsets else (0, None)
    return Selection(tuple(arguments.code or ()), arguments.topic or "", arguments.partition, first, end)


def _doctor(arguments: Arguments) -> int:
    import msgspec

    from daemon import cli
    from daemon.doctor import examine

    config: Config = cli._load(arguments)
    cli._configure_logs(config, arguments, "error")
    looked_at = []
    for check in examine(config, arguments.probe):
        looked_at.append(check)
        if not arguments.json:
            cli._say(f"{check.verdict:6} {check.subject}: {check.text}")
    well = all(check.verdict != "failed" for check in looked_at)
    if arguments.json:
        cli._say(json.dumps({"well": well, "checks": msgspec.to_builtins(looked_at)}, indent=2))
    return 0 if well else 1


# The parser


def add_commands(commands: Any, add: Callable[..., Any], common: Callable[..., None]) -> None:
    """Add these commands to the command line; `add` and `common` are its own."""
    explain = add(
        commands,
        "explain",
        _explain,
        "Show how one thing led to the next in an episode, from the offsets to the champion alias.",
        ("fraud:1", "fraud:1 --json", "8fb1c2d0 --offline"),
    )
    explain.add_argument("episode", metavar="EPISODE", help="Name it: MODEL:NUMBER, or its id's beginning.")
    explain.add_argument(
        "--offline", action="store_true", help="Ask neither Prefect nor the registry (default: ask both)."
    )
    verify = add(
        commands,
        "verify",
        _verify,
        "Read an episode's offsets again, recompute its decisions and compare them bit for bit.",
        ("fraud:1", "", "fraud:1 --json"),
    )
    verify.add_argument(
        "episode",
        nargs="?",
        default="",
        metavar="EPISODE",
        help="Name it: MODEL:NUMBER, or its id's beginning (default: every episode).",
    )
    doctor = add(
        commands,
        "doctor",
        _doctor,
        "Look at everything the daemon stands on: Kafka, permissions, Prefect, pins, clocks.",
        ("", "--json", "--probe"),
    )
    doctor.add_argument(
        "--probe",
        action="store_true",
        help="See Kafka's clock by a record in a topic of its own, made and deleted (default: only read).",
    )
    for command in (explain, verify, doctor):
        _add_json(command)
    _add_dlq(commands, add, common)


def _add_dlq(commands: Any, add: Callable[..., Any], common: Callable[..., None]) -> None:
    dlq = add(
        commands,
        "dlq",
        _dlq_list,
        "List dead letters, or send them back to the topic that they came from.",
        ("list", "list --code not_json --json", "redrive --code event_time_ahead --topic predictions"),
    )
    actions = dlq.add_subparsers(title="actions", metavar="ACTION", required=True)
    told = "List dead letters with code, detail and coordinates, never with what is in them."
    listed = actions.add_parser("list", help=told, description=told)
    listed.set_defaults(command=_dlq_list)
    listed.add_argument(
        "--limit",
        type=int,
        default=SHOWN_LETTERS,
        metavar="N",
        help=f"Show the newest N; 0 for all (default: {SHOWN_LETTERS}).",
    )
    does = "Send dead letters back to their topic and partition; each only once, unless forced."
    redriven = actions.add_parser("redrive", help=does, description=does)
    redriven.set_defaults(command=_dlq_redrive)
    redriven.add_argument(
        "--all", action="store_true", help="Send every dead letter (default: those selected)."
    )
    redriven.add_argument(
        "--force", action="store_true", help="Send those again that were sent before (default: skip them)."
    )
    for action in (listed, redriven):
        common(action, argparse.SUPPRESS)
        _add_json(action)
        action.add_argument("--code", action="append", help="Only letters with this code; may be repeated.")
        action.add_argument("--topic", help="Only records that were read from this topic (default: any).")
        action.add_argument(
            "--partition", type=int, metavar="N", help="Only records of this partition (default: any)."
        )
        action.add_argument(
            "--offsets",
            metavar="FIRST:END",
            help="Only records of these offsets of their topic, END left out (default: any).",
        )


def _add_json(command: Any) -> None:
    command.add_argument("--json", action="store_true", help="Print JSON (default: text).")
