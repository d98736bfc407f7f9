"""Summary: the page that stays after a demo; one file, nothing loaded from anywhere."""

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

from flows.demo.facts import Facts, Request
from flows.demo.progress import numbers, verdict
from flows.demo.style import STYLE
from flows.demo.timeline import MARKS, timeline

FILE_NAME = "demo-summary.html"

LEGEND = (
    ('<polyline class="live" points="1,7 23,7"/>', "served champion"),
    ('<polyline class="never" points="1,7 23,7"/>', "first champion, never retrained"),
    ('<rect class="episode" x="2" y="1" width="20" height="12"/>', "drift, until its last request"),
    *(
        (f'<g class="request {kind}"><path transform="translate(12,7) scale(.8)" d="{path}"/></g>', kind)
        for kind, path in MARKS.items()
    ),
    ('<g class="kill"><circle cx="12" cy="7" r="5"/></g>', "kill -9 of the daemon"),
)


def summary_page(facts: Facts) -> str:
    """The whole page."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>retrain-daemon demo: {escape(facts.model)}</title>",
            f"<style>{STYLE}</style></head><body>",
            *_body(facts),
            "</body></html>",
            "",
        ]
    )


def write_summary(facts: Facts, folder: Path) -> Path:
    """Write the page into the folder; returns where it is."""
    path = folder / FILE_NAME
    path.write_text(summary_page(facts), encoding="utf-8")
    return path


def _body(facts: Facts) -> Iterator[str]:
    yield f"<h1>{escape(verdict(facts))}</h1>"
    yield (
        f'<p class="soft">retrain-daemon demo on <code>{escape(facts.source)}</code>, model '
        f"<code>{escape(facts.model)}</code>, {escape(facts.broker)}</p>"
    )
    for sentence in facts.broken_promises:
        yield f'<p class="warning">{escape(sentence)}</p>'
    yield f"<h2>{escape(facts.metric)} per window</h2>"
    yield f'<div class="card">{timeline(facts)}{_legend(facts)}</div>'
    yield from _acts(facts)
    yield from _requests(facts)
    yield "<h2>Numbers</h2>"
    yield (
        '<div class="card facts">'
        + "".join(
            f"<div><span>{escape(name)}</span><b>{escape(value)}</b></div>" for name, value in numbers(facts)
        )
        + "</div>"
    )
    yield "<h2>The same for a machine</h2>"
    yield f'<div class="card"><pre>{escape(json.dumps(facts.json_object(), indent=2))}</pre></div>'


def _legend(facts: Facts) -> str:
    there = LEGEND if facts.kills else LEGEND[:-1]
    entries = "".join(
        f'<span><svg viewBox="0 0 24 14" aria-hidden="true">{drawing}</svg>{escape(name)}</span>'
        for drawing, name in there
    )
    return f'<div class="legend">{entries}</div>'


def _acts(facts: Facts) -> Iterator[str]:
    if not facts.acts:
        return
    yield "<h2>What was staged</h2>"
    rows = "".join(
        f"<tr><th>{act.number}</th><td><b>{escape(act.title)}</b></td><td>{escape(act.sentence)}</td></tr>"
        for act in facts.acts
    )
    yield f'<div class="card"><table>{rows}</table></div>'


def _requests(facts: Facts) -> Iterator[str]:
    yield "<h2>Retraining requests</h2>"
    if not facts.requests:
        yield '<div class="card"><p class="soft">None: no window drifted for long enough.</p></div>'
        return
    head = "".join(f"<th>{name}</th>" for name in ("", "outcome", "the gate says", "why it was asked", "run"))
    rows = "".join(_request(request) for request in facts.requests)
    yield f'<div class="card"><table><tr>{head}</tr>{rows}</table></div>'


def _request(request: Request) -> str:
    kind = request.action if request.action in ("promoted", "refused") else "other"
    version = f" as version {request.model_version}" if request.action == "promoted" else ""
    share = "" if request.drift_share is None else f"{request.drift_share:.0%} of the columns drifted"
    columns = escape(", ".join(request.drifted_columns))
    return (
        f"<tr><td>episode&nbsp;{request.episode_number},<br>attempt&nbsp;{request.attempt}</td>"
        f'<td class="{kind}">{escape(request.action)}{escape(version)}</td>'
        f"<td>{escape(request.sentence)}</td>"
        f'<td>{share}<br><span class="soft">{columns}</span></td>'
        f"<td>{'<br>'.join(_run_lines(request)) or 'none'}</td></tr>"
    )


def _run_lines(request: Request) -> Iterator[str]:
    for run in request.runs:
        feed = "its event is in the feed" if request.event_in_feed else "its event is not in the feed"
        yield (
            f'<code title="{escape(run.id)}">{escape(run.id[:8])}</code> created by '
            f"{'an automation' if run.created_by == 'automation' else 'the daemon itself'}"
            f'<br><span class="soft">{feed}</span>'
        )
