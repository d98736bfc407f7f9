"""Timeline: the metric over the stream, with everything that happened to it, as one SVG."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from flows.demo.facts import Facts, Request
from flows.demo.scoreboard import WindowScore

WIDTH, HEIGHT = 1000, 380
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 64, 64
TICKS = 4
MARKS = {"promoted": "M0,-7 L7,6 L-7,6 Z", "refused": "M-5,-5 L5,5 M-5,5 L5,-5"}
OTHER_MARK = "M-5,-5 H5 V5 H-5 Z"


def timeline(facts: Facts) -> str:
    """The SVG element; its colours come from the page's style sheet."""
    scale = _Scale(facts)
    parts = [
        *_acts(facts, scale),
        *_axes(facts, scale),
        *_episodes(facts, scale),
        _line(facts.scores, scale, "never"),
        _line(facts.scores, scale, "live"),
        *_points(facts, scale),
        *_requests(facts, scale),
        *_kills(facts, scale),
    ]
    label = f"{facts.metric} per window of the served champion and of the first champion"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


class _Scale:
    """Rows and metric to pixels."""

    def __init__(self, facts: Facts) -> None:
        values = [value for score in facts.scores for value in (score.live, score.never)] or [0.0, 1.0]
        spread = max(max(values) - min(values), 0.02)
        self.low = max(0.0, min(values) - 0.1 * spread)
        self.high = max(values) + 0.1 * spread
        if facts.metric == "accuracy":
            self.high = min(1.0, self.high)
        ends = [score.end for score in facts.scores] + [act.end for act in facts.acts]
        self.rows = max([1, *ends])

    def x(self, row: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * min(row, self.rows) / self.rows, 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)


def _acts(facts: Facts, scale: _Scale) -> Iterator[str]:
    for act in facts.acts:
        start, end = scale.x(act.start), scale.x(act.end)
        shade = "act odd" if act.number % 2 else "act"
        yield (
            f'<rect class="{shade}" x="{start}" y="{TOP - 34}" width="{round(end - start, 1)}" '
            f'height="{HEIGHT - TOP - BOTTOM + 34}"/>'
            f'<text class="acttitle" x="{start + 8}" y="{TOP - 16}">{act.number}. {escape(act.title)}</text>'
        )


def _axes(facts: Facts, scale: _Scale) -> Iterator[str]:
    for value in round_values(scale.low, scale.high):
        y = scale.y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{_short(value)}</text>'
    for row in round_values(0, scale.rows):
        yield (
            f'<text class="tick" x="{scale.x(row)}" y="{HEIGHT - BOTTOM + 20}" '
            f'text-anchor="middle">{row:,.0f}</text>'
        )
    yield (
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - BOTTOM + 40}" '
        f'text-anchor="middle">live rows, in windows of {facts.window_rows:,}</text>'
    )


def round_values(low: float, high: float) -> list[float]:
    """
    Values within the bounds that are easy to read, some five of them.

    >>> round_values(0.38, 0.97), round_values(0, 12_500)
    ([0.4, 0.5, 0.6, 0.7, 0.8, 0.9], [0.0, 2500.0, 5000.0, 7500.0, 10000.0, 12500.0])
    """
    wanted = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(wanted))
    step = next(power * digit for digit in (1.0, 2.0, 2.5, 5.0, 10.0) if power * digit >= wanted * 0.66)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _episodes(facts: Facts, scale: _Scale) -> Iterator[str]:
    for episode in dict.fromkeys(request.episode for request in facts.requests):
        requests = [request for request in facts.requests if request.episode == episode]
        start = scale.x(min(request.since_row for request in requests))
        end = scale.x(max(request.asked_row for request in requests))
        title = f"episode {requests[0].episode_number}: drift from row {requests[0].since_row:,}"
        yield (
            f'<rect class="episode" x="{start}" y="{TOP}" width="{round(max(end - start, 2.0), 1)}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>{escape(title)}</title></rect>'
        )


def _line(scores: Sequence[WindowScore], scale: _Scale, who: str) -> str:
    points = " ".join(f"{scale.x(_middle(score))},{scale.y(getattr(score, who))}" for score in scores)
    return f'<polyline class="{who}" points="{points}"/>'


def _points(facts: Facts, scale: _Scale) -> Iterator[str]:
    for score in facts.scores:
        title = (
            f"window {score.number}, version {score.version}: {facts.metric} {score.live:.3f}, "
            f"never retrained {score.never:.3f}"
        )
        yield (
            f'<circle class="point" cx="{scale.x(_middle(score))}" cy="{scale.y(score.live)}" r="3">'
            f"<title>{escape(title)}</title></circle>"
        )


def _requests(facts: Facts, scale: _Scale) -> Iterator[str]:
    for request in facts.requests:
        x, kind = scale.x(request.asked_row), _kind(request)
        yield (
            f'<g class="request {kind}"><title>{escape(_told(request))}</title>'
            f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<path transform="translate({x},{TOP - 2})" d="{MARKS.get(kind, OTHER_MARK)}"/></g>'
        )


def _kills(facts: Facts, scale: _Scale) -> Iterator[str]:
    for kill in facts.kills:
        x = scale.x(kill.row)
        yield (
            f'<g class="kill"><title>kill -9 of the daemon at row {kill.row:,}, its request posted and '
            f'not yet confirmed</title><text x="{x + 8}" y="{HEIGHT - BOTTOM - 10}">kill -9</text>'
            f'<circle cx="{x}" cy="{HEIGHT - BOTTOM - 14}" r="5"/></g>'
        )


def _told(request: Request) -> str:
    which = f"episode {request.episode_number}, attempt {request.attempt}"
    return f"{which}: {request.action}. {request.sentence}"


def _kind(request: Request) -> str:
    return request.action if request.action in MARKS else "other"


def _middle(score: WindowScore) -> float:
    return (score.start + score.end) / 2


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
