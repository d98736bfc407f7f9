"""Telling: a backtest as a table for a person, or as one line for a machine."""

import json
import sys
from collections.abc import Iterator, Sequence

from flows.backtest.facts import Facts
from flows.backtest.happened import Asked, Breakage
from flows.backtest.options import Options
from flows.scoring import Metric


def tell(facts: Facts, other: Facts | None, options: Options) -> None:
    """To stdout; with `--json` the table goes to stderr, so that stdout is the one line."""
    from flows.backtest.compare import comparison, comparison_object, differences

    lines, told = list(table(facts)), facts.json_object()
    if other is not None and options.other is not None:
        found = differences(options.settings.settings, options.other.settings)
        lines += ["", *comparison(facts, other, found)]
        told["compare"] = comparison_object(other, found)
    if options.report is not None:
        lines += ["", f"The page is {options.report}"]
    people = sys.stderr if options.json else sys.stdout
    people.write("\n".join(lines) + "\n")
    if options.json:
        sys.stdout.write(json.dumps(told) + "\n")


def table(facts: Facts) -> Iterator[str]:
    """The whole answer, line by line."""
    live = facts.rows - facts.reference_rows
    yield f"{facts.case}: {facts.rows:,} rows, {live:,} of them live, in {len(facts.windows)} windows"
    yield ""
    yield from columns(
        [("", facts.metric, "retrainings"), *_compared(facts)],
    )
    yield ""
    yield from _requests(facts)
    yield from _comebacks(facts)
    yield from _breakages(facts)


def _compared(facts: Facts) -> Iterator[tuple[str, str, str]]:
    yield "never retrained", shown(facts.never, facts.metric), "0"
    for every, one in facts.schedules.items():
        name = "every window" if every == 1 else f"every {every} windows"
        yield name, shown(one.metric, facts.metric), str(one.retrainings)
    promoted = f"{facts.started}, {facts.happened.count('promoted')} of them promoted"
    yield "this policy", shown(facts.live, facts.metric), promoted


def _requests(facts: Facts) -> Iterator[str]:
    if not facts.happened.requests:
        yield "No retraining was asked for."
        return
    yield f"{facts.started} retrainings, {len(facts.happened.episodes)} episodes:"
    numbers = {episode.id: episode.number for episode in facts.happened.episodes}
    rows = [_request(asked, numbers.get(asked.episode, 0), facts) for asked in facts.happened.requests]
    yield from columns(rows)


def _comebacks(facts: Facts) -> Iterator[str]:
    happened = facts.happened
    if not happened.comparisons:
        return
    asked, back = len(happened.comparisons), len(happened.came_back)
    yield ""
    told = f"{asked} comparisons with champions of before, which train nothing; {back} came back"
    yield f"{told}:" if back else f"{told}."
    yield from columns(
        [
            (f"window {one.window}", f"row {happened.windows[one.window].end_row:,}", one.outcome.sentence)
            for one in happened.came_back
        ]
    )


def _breakages(facts: Facts) -> Iterator[str]:
    breakages = facts.happened.breakages()
    if breakages:
        yield ""
        yield "Broken data:"
        yield from columns([_breakage(one, facts) for one in breakages])


def _breakage(one: Breakage, facts: Facts) -> tuple[str, ...]:
    first, last = facts.rows_of(one)
    mended = "not mended" if one.mended is None else f"mended with window {one.mended}"
    which = ", ".join(f"{column} ({code})" for column, code in one.columns.items())
    return f"windows {one.first} to {one.last}", f"rows {first:,} to {last:,}", which, mended


def _request(asked: Asked, episode: int, facts: Facts) -> tuple[str, ...]:
    row = facts.happened.windows[asked.window].end_row
    return (
        f"window {asked.window}",
        f"row {row:,}",
        f"episode {episode}, attempt {asked.attempt}",
        asked.outcome.action,
        asked.outcome.sentence,
    )


def shown(value: float | None, metric: Metric) -> str:
    """
    A metric's value with the digits that mean something.

    >>> shown(0.76234, "accuracy"), shown(48.512, "mae"), shown(None, "auc")
    ('0.7623', '48.51', '-')
    """
    if value is None:
        return "-"
    return f"{value:.4f}" if metric != "mae" or abs(value) < 1.0 else f"{value:.4g}"


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The rows as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()
