"""`retrain-daemon demo`: the whole loop on one machine, from nothing to a page with the numbers."""

import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from flows.demo.options import Options, parse
from flows.demo.progress import Progress
from flows.demo.stream import Stream
from flows.demo.table import UnusableTable

if TYPE_CHECKING:
    from flows.demo.facts import Facts
    from flows.demo.stage import Stage

UNUSABLE, INTERRUPTED = 2, 130
# The clock of a run's creation is Prefect's, ours started a little earlier.
BEFORE_START = timedelta(minutes=5)


def main(argv: Sequence[str]) -> int:
    """Run the demo: 0 if what it shows is true and went as told, 1 if not, 2 for unusable arguments."""
    options = parse(argv)
    try:
        stream = options.stream()
        with _terminable():
            return _staged(options, stream)
    except KeyboardInterrupt:
        return _said("stopped, and with it all that it had started", INTERRUPTED)
    except UnusableTable as error:
        return _said(str(error), UNUSABLE)
    except Exception as error:
        # Errors of ours say what to do; of any other the traceback is what helps.
        if not hasattr(error, "exit_code"):
            raise
        return _said(str(error), int(error.exit_code))


def _staged(options: Options, stream: Stream) -> int:
    from flows.demo.stage import Stage
    from flows.demo.surroundings import demo_folder, own_log, private_environment

    since, started = datetime.now(UTC) - BEFORE_START, time.monotonic()
    output = sys.stderr if options.json else sys.stdout
    progress = Progress(output, metric=options.metric_for(stream))
    with (
        demo_folder(options) as folder,
        private_environment(folder),
        own_log(folder / "demo.log"),
        progress,
    ):
        progress.opening("retrain-daemon demo", _opening(stream, folder))
        with Stage(folder, stream, options, progress) as stage:
            facts = _played(stage, options, stream, progress, since, time.monotonic() - started)
            stays = progress.live and not options.json
            _tell(stage, options, facts, progress, stays)
            if stays:
                _stay(progress)
    if options.json:
        print(json.dumps(facts.json_object()), flush=True)  # noqa: T201 - this is the output
    return 1 if facts.broken_promises else 0


def _played(
    stage: "Stage",
    options: Options,
    stream: Stream,
    progress: Progress,
    since: datetime,
    seconds_setup: float,
) -> "Facts":
    from flows.demo.play import Play
    from flows.demo.report import Seconds, facts_of
    from flows.demo.scoreboard import Scoreboard
    from flows.demo.serving import ServingSimulator

    board = Scoreboard(progress.metric)
    serving = ServingSimulator(stage.configuration.flow_settings(), stream, stage.producer, board)
    play = Play(stream, serving, stage.daemon, board, progress, pace=options.pace)
    started = time.monotonic()
    play.run()
    seconds = Seconds(seconds_setup, time.monotonic() - started)
    serving.log_last_labels()
    progress.waiting("asking Prefect about every run")
    return facts_of(stage, stream, play, board, since, seconds)


def _tell(stage: "Stage", options: Options, facts: "Facts", progress: Progress, stays: bool) -> None:
    from flows.demo.summary import write_summary

    links = [("summary", write_summary(facts, Path.cwd()).as_uri())]
    if options.keep or options.folder:
        links += [("folder", str(stage.folder)), ("registry", facts.registry)]
    if stays:
        links += _live_links(stage, facts)
    progress.closing(facts, links)


def _live_links(stage: "Stage", facts: "Facts") -> list[tuple[str, str]]:
    """Where to look around, for as long as everything stays up."""
    last = facts.requests[-1] if facts.requests else None
    found = [
        ("last run", last.runs[-1].url if last and last.runs else ""),
        ("its event", last.event_url if last else ""),
        ("its drift report", last.report_url if last else ""),
        ("daemon", f"{stage.configuration.daemon_url}/status"),
        ("Prefect", facts.prefect_ui),
        ("registry", facts.registry),
    ]
    return [(name, link) for name, link in found if link]


def _stay(progress: Progress) -> None:
    """Keep everything up for whoever wants to look around."""
    progress.waiting("everything stays up, have a look around; Ctrl-C ends it")
    try:
        while True:
            time.sleep(3_600)
    except KeyboardInterrupt:
        return


def _opening(stream: Stream, folder: Path) -> str:
    return (
        f"{stream.source}: {len(stream.reference):,} rows train the first champion, {len(stream.live):,} "
        f"are live, in windows of {stream.window_rows:,}. All of it runs in {folder}."
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """A request to terminate, or a closed terminal, is a Ctrl-C: everything is stopped on the way out."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    # SIGINT too: a shell's background job has it ignored. SIGHUP is left to nohup, if it was used.
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _said(sentence: str, code: int) -> int:
    print(f"retrain-daemon demo: {sentence}", file=sys.stderr)  # noqa: T201 - the command's own words
    return code
