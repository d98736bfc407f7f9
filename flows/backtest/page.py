"""The page: a backtest to look at; one file, nothing loaded from anywhere, light and dark."""

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from flows.backtest.chart import drift_chart, metric_chart, nearest_schedule
from flows.backtest.facts import Facts
from flows.backtest.happened import Asked, Breakage, Episode
from flows.backtest.table import UnusableStream
from flows.backtest.told import shown
from flows.demo.style import STYLE
from flows.demo.timeline import MARKS

MORE_STYLE = """
:root { --schedule: #b45309; --known: #7c3aed; }
@media (prefers-color-scheme: dark) { :root { --schedule: #fbbf24; --known: #a78bfa; } }
.schedule { fill: none; stroke: var(--schedule); stroke-width: 1.5; stroke-linejoin: round; opacity: .8; }
.known line { stroke: var(--known); stroke-width: 1.5; }
.cell { fill: color-mix(in srgb, var(--never) calc(var(--shade) * 100%), var(--shade-0, transparent)); }
.cell.over { fill: color-mix(in srgb, var(--schedule) calc(25% + var(--shade) * 75%), transparent); }
.broken { fill: var(--bad); }
.spoilt { fill: var(--bad); opacity: .13; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.ours td, tr.ours th { font-weight: 700; color: var(--ink); }
"""


def write_page(facts: Facts, path: Path) -> None:
    """Write the page; `UnusableStream` where that cannot be."""
    try:
        path.write_text(page(facts), encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnusableStream(f"--report {path}: {reason}; name a file in a folder that is there") from error


def page(facts: Facts) -> str:
    """The whole page."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>backtest: {escape(facts.case)}</title>",
            f"<style>{STYLE}{MORE_STYLE}</style></head><body>",
            *_body(facts),
            "</body></html>",
            "",
        ]
    )


def headline(facts: Facts) -> str:
    """The backtest in one sentence."""
    promoted = facts.happened.count("promoted")
    retrainings = f"{facts.started} retraining{'' if facts.started == 1 else 's'}, {promoted} promoted"
    live, never = shown(facts.live, facts.metric), shown(facts.never, facts.metric)
    if not facts.started:
        return f"{facts.metric} {live}; no retraining was asked for"
    return f"{facts.metric} {live} with {retrainings}; {never} had nobody retrained"


def _body(facts: Facts) -> Iterator[str]:
    live = facts.rows - facts.reference_rows
    yield f"<h1>{escape(headline(facts))}</h1>"
    yield (
        f'<p class="soft">retrain-daemon backtest of <code>{escape(facts.case)}</code>: {live:,} live rows '
        f"in {len(facts.windows)} windows, after {facts.reference_rows:,} rows of reference</p>"
    )
    yield f"<h2>{escape(facts.metric)} per window</h2>"
    yield f'<div class="card">{metric_chart(facts)}{_legend(facts)}</div>'
    yield "<h2>Beside schedules</h2>"
    yield f'<div class="card">{_schedules(facts)}</div>'
    if any(window.strengths or window.broken for window in facts.happened.windows):
        yield "<h2>Drift per column and window</h2>"
        yield f'<div class="card">{drift_chart(facts)}{_drift_legend()}</div>'
    yield "<h2>Episodes</h2>"
    yield f'<div class="card">{_episodes(facts)}</div>'
    yield "<h2>Retrainings</h2>"
    yield f'<div class="card">{_requests(facts)}</div>'
    yield from _comebacks(facts)
    yield from _data(facts)
    yield "<h2>The same for a machine</h2>"
    yield f'<div class="card"><pre>{escape(json.dumps(facts.json_object(), indent=2))}</pre></div>'


def _legend(facts: Facts) -> str:
    every = nearest_schedule(facts)
    entries = [
        ('<polyline class="live" points="1,7 23,7"/>', "this policy"),
        ('<polyline class="never" points="1,7 23,7"/>', "never retrained"),
    ]
    if every is not None:
        entries.append(('<polyline class="schedule" points="1,7 23,7"/>', _every(every)))
    entries.append(('<rect class="episode" x="2" y="1" width="20" height="12"/>', "episode"))
    if facts.happened.breakages():
        entries.append(('<rect class="spoilt" x="2" y="1" width="20" height="12"/>', "broken data"))
    entries += [
        (f'<g class="request {kind}"><path transform="translate(12,7) scale(.8)" d="{path}"/></g>', kind)
        for kind, path in MARKS.items()
    ]
    if facts.drifts:
        entries.append(('<g class="known"><line x1="12" x2="12" y1="0" y2="14"/></g>', "known drift"))
    return _legend_of(entries)


def _drift_legend() -> str:
    box = 'x="2" y="1" width="20" height="12"'
    return _legend_of(
        [
            (f'<rect class="cell" style="--shade:.3" {box}/>', "below its threshold"),
            (f'<rect class="cell over" style="--shade:.35" {box}/>', "drifted"),
            (f'<rect class="cell over" style="--shade:1" {box}/>', "three times its threshold"),
            (f'<rect class="broken" {box}/>', "broken"),
        ]
    )


def _legend_of(entries: Sequence[tuple[str, str]]) -> str:
    spans = "".join(
        f'<span><svg viewBox="0 0 24 14" aria-hidden="true">{drawing}</svg>{escape(name)}</span>'
        for drawing, name in entries
    )
    return f'<div class="legend">{spans}</div>'


def _every(every: int) -> str:
    return "every window" if every == 1 else f"every {every} windows"


def _schedules(facts: Facts) -> str:
    better = min if facts.metric == "mae" else max
    rows = [
        ("", "never retrained", facts.never, 0),
        *(("", f"retrained {_every(k)}", one.metric, one.retrainings) for k, one in facts.schedules.items()),
        ("ours", "this policy", facts.live, facts.started),
    ]
    values = [value for _, _, value, _ in rows if value is not None]
    best = better(values) if values else None
    cells = "".join(
        f'<tr class="{kind}"><td>{name}</td><td class="number">{shown(value, facts.metric)}'
        f'{" ★" if value is not None and value == best else ""}</td><td class="number">{count}</td></tr>'
        for kind, name, value, count in rows
    )
    head = f'<th></th><th class="number">{escape(facts.metric)}</th><th class="number">retrainings</th>'
    return f"<table><tr>{head}</tr>{cells}</table>"


def _episodes(facts: Facts) -> str:
    happened = facts.happened
    if not happened.episodes:
        return '<p class="soft">None.</p>'
    names = ("", "signal", "opened at row", "change thought to be at row", "came to")
    rows = "".join(
        _episode(episode, happened.windows[episode.window].end_row, change)
        for episode, change in zip(happened.episodes, facts.change_rows, strict=True)
    )
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{rows}</table>"


def _episode(episode: Episode, row: int, change: int | None) -> str:
    point = "-" if change is None else f"{change:,}"
    return (
        f"<tr><td>{episode.number}</td><td>{escape(episode.signal)}</td><td>{row:,}</td>"
        f'<td>{point}</td><td class="{_kind(episode.action)}">{escape(episode.action)}</td></tr>'
    )


def _requests(facts: Facts) -> str:
    if not facts.happened.requests:
        return '<p class="soft">None was asked for.</p>'
    names = ("row", "", "outcome", "the gate says", "why it was asked")
    numbers = {episode.id: episode.number for episode in facts.happened.episodes}
    rows = "".join(
        _request(asked, numbers.get(asked.episode, 0), facts.happened.windows[asked.window].end_row, reason)
        for asked, reason in zip(facts.happened.requests, facts.reasons, strict=True)
    )
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{rows}</table>"


def _request(asked: Asked, episode: int, row: int, reason: str) -> str:
    action = asked.outcome.action
    return (
        f"<tr><td>{row:,}</td><td>episode&nbsp;{episode}, attempt&nbsp;{asked.attempt}</td>"
        f'<td class="{_kind(action)}">{escape(action)}</td><td>{escape(asked.outcome.sentence)}</td>'
        f'<td class="soft">{escape(reason)}</td></tr>'
    )


def _kind(action: str) -> str:
    return action if action in ("promoted", "refused") else "other" if action != "watched" else "soft"


def _comebacks(facts: Facts) -> Iterator[str]:
    happened = facts.happened
    if not happened.comparisons:
        return
    yield "<h2>Champions of before</h2>"
    rows = "".join(
        f"<tr><td>{happened.windows[one.window].end_row:,}</td><td>{escape(one.outcome.sentence)}</td>"
        f'<td class="soft">{escape(one.reason)}</td></tr>'
        for one in happened.came_back
    )
    head = "<th>row</th><th>came back</th><th>why it was asked</th>"
    told = f"<table><tr>{head}</tr>{rows}</table>" if rows else ""
    compared = f"{len(happened.comparisons)} comparisons, which train nothing; {len(happened.came_back)}"
    yield f'<div class="card"><p class="soft">{compared} of them brought one back.</p>{told}</div>'


def _data(facts: Facts) -> Iterator[str]:
    breakages = facts.happened.breakages()
    if not breakages:
        return
    yield "<h2>Broken data</h2>"
    names = ("rows", "windows", "columns", "mended with window")
    rows = "".join(_breakage(one, facts) for one in breakages)
    head = "".join(f"<th>{name}</th>" for name in names)
    yield f'<div class="card"><table><tr>{head}</tr>{rows}</table></div>'


def _breakage(one: Breakage, facts: Facts) -> str:
    first, last = facts.rows_of(one)
    columns = ", ".join(f"{column} ({code})" for column, code in one.columns.items())
    mended = "not yet" if one.mended is None else str(one.mended)
    return (
        f"<tr><td>{first:,} to {last:,}</td><td>{one.first} to {one.last}</td>"
        f"<td>{escape(columns)}</td><td>{mended}</td></tr>"
    )
