"""`retrain-daemon backtest`: the stream read, replayed, added up and told."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from daemon.wire.references import ReferenceStore
from flows.backtest.facts import Facts, facts_of
from flows.backtest.file_replay import FileReplay, Replayed
from flows.backtest.history import history_of
from flows.backtest.options import Options
from flows.backtest.page import write_page
from flows.backtest.progress import Progress
from flows.backtest.schedules import Schedule, Schedules
from flows.backtest.stream import Stream
from flows.backtest.table import UnusableStream, read_table
from flows.backtest.told import tell
from flows.backtest.topic_log import read_topic
from flows.backtest.topic_replay import replay_topic
from flows.scoring import Metric, MetricMismatch, metric_of
from monitors.reference import Reference
from monitors.settings import FlowSettings, ModelSettings


@dataclass(frozen=True, eq=False)
class Tried:
    """A policy that was tried: the stream, what it did there, the schedules beside it, and the facts."""

    stream: Stream
    replayed: Replayed
    schedules: Sequence[Schedule]
    facts: Facts


def main(options: Options) -> int:
    """Run one backtest; 0 whatever it shows, for it was asked what would have been."""
    with Progress(sys.stderr) as progress:
        tried = backtest(options, progress)
        other = None
        if options.other is not None:
            theirs = msgspec.structs.replace(options, settings=options.other)
            other = backtest(theirs, progress, known=()).facts
    if options.report is not None:
        write_page(tried.facts, options.report)
    tell(tried.facts, other, options)
    return 0


def backtest(options: Options, progress: Progress, known: Sequence[Schedule] | None = None) -> Tried:
    """What the policy would have done on the file; `known` are schedules that need no computing."""
    began = time.monotonic()
    if options.file is None:
        settings = options.settings
        stream, replayed = _topic(options, progress)
    else:
        stream = read_stream(options.file, options)
        settings = _of_kind(options.settings, stream)
        _metric(settings.settings, stream)
        replayed = _file(settings, stream, options.label_lag, progress)
    metric = _metric(settings.settings, stream)
    if known is None:
        known = _scheduled(settings.settings, stream, replayed, options.label_lag, progress)
    seconds = time.monotonic() - began
    facts = facts_of(stream, metric, replayed, known, options.drifts, seconds)
    return Tried(stream, replayed, known, facts)


def read_stream(file: Path, options: Options) -> Stream:
    """The file as a stream."""
    settings = options.settings.settings
    stream = read_table(
        file,
        label=options.label,
        ignore=options.ignore,
        reference_rows=settings.reference_rows,
        least_live=settings.window.rows or 1,
        kind=settings.kind if options.kind_stated else None,
    )
    if settings.window.rows is None and not stream.timed:
        raise UnusableStream(
            f"{file} has no column 'ts', and the configuration's windows are of {settings.window.seconds:g}"
            " seconds: give windows of rows with --window-rows"
        )
    if wrong := [row for row in options.drifts if not 0 <= row < len(stream)]:
        raise UnusableStream(f"--drift-at {wrong[0]}: {file} has rows 0 to {len(stream) - 1}")
    return stream


def _topic(options: Options, progress: Progress) -> tuple[Stream, Replayed]:
    settings = options.settings
    with progress.step("reading", None):
        log = read_topic(settings, options.models, options.since, options.until)
    store = ReferenceStore(settings.registry.references_url)

    def look(model: str, version: str) -> Reference | None:
        found = store.read(model, version)
        return None if found is None else Reference.from_bytes(found[0])

    ours = [record for record in log.predictions if record.model == settings.model]
    begin = history_of(settings, ours[0].model_version, ours[0].event_time)
    with progress.step("replay", len(ours)) as advance:
        return replay_topic(settings, log, look, begin, advance)


def _of_kind(settings: FlowSettings, stream: Stream) -> FlowSettings:
    model = msgspec.structs.replace(settings.settings, kind=stream.kind)
    return msgspec.structs.replace(settings, settings=model)


def _metric(settings: ModelSettings, stream: Stream) -> Metric:
    try:
        return metric_of(settings.gate, stream.kind)
    except MetricMismatch as error:
        raise UnusableStream(f"{stream.case}: its labels look like a {stream.kind}'s: {error}") from error


def _file(settings: FlowSettings, stream: Stream, label_lag: int, progress: Progress) -> Replayed:
    with progress.step("replay", stream.live_rows) as advance:
        return FileReplay(settings, stream, label_lag, advance).run()


def _scheduled(
    settings: ModelSettings, stream: Stream, replayed: Replayed, label_lag: int, progress: Progress
) -> Sequence[Schedule]:
    ends = list(dict.fromkeys(window.end_row for window in replayed.happened.windows))
    schedules = Schedules(settings, stream, ends, label_lag, replayed.never)
    with progress.step("schedules", schedules.cost) as advance:
        return schedules.run(advance)
