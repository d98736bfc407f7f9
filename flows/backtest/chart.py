"""The chart: the metric and the drift per window, with everything that happened, as two SVG elements."""

import math
from collections.abc import Iterator, Sequence
from html import escape

from flows.backtest.facts import Facts
from flows.backtest.happened import Asked
from flows.backtest.told import shown
from flows.demo.timeline import MARKS, OTHER_MARK, round_values

WIDTH, HEIGHT = 1000, 360
LEFT, RIGHT, TOP, BOTTOM = 120, 20, 34, 52
# A line of more points than this is drawn of means, or nobody could follow it.
MOST_POINTS = 90
MOST_COLUMNS = 40
ROW_HEIGHT = 14
# A score so many times its threshold has the full colour.
FULL_STRENGTH = 3.0


class Axis:
    """Rows of the stream to pixels."""

    def __init__(self, facts: Facts) -> None:
        self._first, self._last = facts.reference_rows, max(facts.rows, facts.reference_rows + 1)

    def x(self, row: float) -> float:
        share = (min(max(row, self._first), self._last) - self._first) / (self._last - self._first)
        return round(LEFT + (WIDTH - LEFT - RIGHT) * share, 1)

    def ticks(self, y: float) -> Iterator[str]:
        for row in round_values(self._first, self._last):
            yield f'<text class="tick" x="{self.x(row)}" y="{y}" text-anchor="middle">{row:,.0f}</text>'


class Scale:
    """The metric to pixels."""

    def __init__(self, lines: Sequence[Sequence[float | None]], bounded: bool) -> None:
        values = [value for line in lines for value in line if value is not None] or [0.0, 1.0]
        spread = max(max(values) - min(values), 1e-3)
        self.low = max(0.0, min(values) - 0.06 * spread)
        self.high = max(values) + 0.06 * spread
        if bounded:
            self.high = min(1.0, self.high)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)


def nearest_schedule(facts: Facts) -> int | None:
    """The schedule with about as many retrainings as the policy; of two the cheaper."""
    wanted = facts.started
    return min(
        facts.schedules,
        key=lambda every: (
            abs(facts.schedules[every].retrainings - wanted),
            facts.schedules[every].retrainings,
        ),
        default=None,
    )


def metric_chart(facts: Facts) -> str:
    """The metric per window of the policy, of never retraining and of the nearest schedule."""
    axis, every = Axis(facts), nearest_schedule(facts)
    lines = {"never": facts.never_windows, "live": facts.live_windows}
    if every is not None:
        lines = {"schedule": facts.schedules[every].windows, **lines}
    drawn = {name: _thinned(facts.windows, values) for name, values in lines.items()}
    scale = Scale([[value for _, value in points] for points in drawn.values()], facts.metric != "mae")
    parts = [
        *_grid(axis, scale, facts),
        *_episodes(facts, axis),
        *_breakages(facts, axis),
        *_drifts(facts, axis),
        *(_line(name, points, axis, scale) for name, points in drawn.items()),
        *_requests(facts, axis),
    ]
    return _svg(HEIGHT, f"{facts.metric} per window", parts)


def drift_chart(facts: Facts) -> str:
    """A row for each column, a cell for each window: how far its score is."""
    names = _shown_columns(facts)
    axis, height = Axis(facts), 8 + ROW_HEIGHT * len(names) + 40
    parts = [
        f'<text class="tick" x="{LEFT - 8}" y="{8 + ROW_HEIGHT * (place + 1) - 3}" text-anchor="end">'
        f"{escape(_cut(name))}</text>"
        for place, name in enumerate(names)
    ]
    starts = [start for start, _ in facts.windows]
    ends = [end for _, end in facts.windows]
    bounds = dict(zip(ends, starts, strict=True))
    for window in facts.happened.windows:
        left, right = axis.x(bounds[window.end_row]), axis.x(window.end_row)
        for place, name in enumerate(names):
            parts.append(_cell(window.strengths, window.broken, name, left, right, 8 + ROW_HEIGHT * place))
    parts += axis.ticks(height - 14)
    return _svg(height, "drift per column and window", parts)


def _cell(
    strengths: dict[str, float], broken: Sequence[str], name: str, left: float, right: float, top: float
) -> str:
    box = f'x="{left}" y="{top}" width="{max(right - left - 0.5, 0.5):.1f}" height="{ROW_HEIGHT - 2}"'
    if name in broken:
        return f'<rect class="broken" {box}><title>{escape(name)}: broken</title></rect>'
    found = strengths.get(name)
    if found is None:
        return ""
    shade = min(max(found, 0.0) / FULL_STRENGTH, 1.0)
    told = f"{name}: {found:.2f} of its threshold"
    kind = "cell over" if found >= 1.0 else "cell"
    return f'<rect class="{kind}" style="--shade:{shade:.2f}" {box}><title>{escape(told)}</title></rect>'


def _shown_columns(facts: Facts) -> list[str]:
    """Those that drifted most, in the reference's order."""
    total: dict[str, float] = {}
    for window in facts.happened.windows:
        for name, found in window.strengths.items():
            total[name] = total.get(name, 0.0) + (found if math.isfinite(found) else 0.0)
        for name in window.broken:
            total[name] = total.get(name, 0.0) + FULL_STRENGTH
    most = set(sorted(total, key=lambda name: -total[name])[:MOST_COLUMNS])
    return [name for name in total if name in most]


def _svg(height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _grid(axis: Axis, scale: Scale, facts: Facts) -> Iterator[str]:
    for value in round_values(scale.low, scale.high):
        y = scale.y(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>'
    yield from axis.ticks(HEIGHT - BOTTOM + 18)
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text class="tick" x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">row of the stream</text>'


def _episodes(facts: Facts, axis: Axis) -> Iterator[str]:
    """From the estimated change to the last request, or to the window that opened it."""
    windows = facts.happened.windows
    for episode, change in zip(facts.happened.episodes, facts.change_rows, strict=True):
        opened = windows[episode.window].end_row
        asked = [windows[one.window].end_row for one in facts.happened.requests if one.episode == episode.id]
        left, right = axis.x(opened if change is None else change), axis.x(max([opened, *asked]))
        title = f"episode {episode.number}, {episode.signal}: {episode.action}"
        yield (
            f'<rect class="episode" x="{left}" y="{TOP}" width="{max(right - left, 2.0):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>{escape(title)}</title></rect>'
        )


def _breakages(facts: Facts, axis: Axis) -> Iterator[str]:
    for one in facts.happened.breakages():
        left, right = map(axis.x, facts.rows_of(one))
        title = f"broken: {', '.join(one.columns)}"
        yield (
            f'<rect class="spoilt" x="{left}" y="{TOP}" width="{max(right - left, 2.0):.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>{escape(title)}</title></rect>'
        )


def _drifts(facts: Facts, axis: Axis) -> Iterator[str]:
    for row in facts.drifts:
        x = axis.x(row)
        yield (
            f'<g class="known"><title>known drift at row {row:,}</title>'
            f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></g>'
        )


def _line(name: str, points: Sequence[tuple[float, float]], axis: Axis, scale: Scale) -> str:
    told = " ".join(f"{axis.x(row)},{scale.y(value)}" for row, value in points)
    return f'<polyline class="{name}" points="{told}"/>'


def _thinned(windows: Sequence[tuple[int, int]], values: Sequence[float | None]) -> list[tuple[float, float]]:
    """The middle row and the value of each window, or of as many neighbours together as it takes."""
    points = [
        ((start + end) / 2, value)
        for (start, end), value in zip(windows, values, strict=True)
        if value is not None
    ]
    many = -(-len(points) // MOST_POINTS) or 1
    groups = [points[place : place + many] for place in range(0, len(points), many)]
    return [
        (sum(row for row, _ in group) / len(group), sum(value for _, value in group) / len(group))
        for group in groups
    ]


def _requests(facts: Facts, axis: Axis) -> Iterator[str]:
    for asked in facts.happened.requests:
        x = axis.x(facts.happened.windows[asked.window].end_row)
        kind = asked.outcome.action if asked.outcome.action in MARKS else "other"
        yield (
            f'<g class="request {kind}"><title>{escape(_told(asked, facts))}</title>'
            f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<path transform="translate({x},{TOP - 12})" d="{MARKS.get(kind, OTHER_MARK)}"/></g>'
        )


def _told(asked: Asked, facts: Facts) -> str:
    row = facts.happened.windows[asked.window].end_row
    scores = asked.outcome
    held = ""
    if scores.challenger_score is not None:
        ours, theirs = (
            shown(scores.challenger_score, facts.metric),
            shown(scores.champion_score, facts.metric),
        )
        held = f" ({ours} against {theirs})"
    return f"row {row:,}, attempt {asked.attempt}: {scores.action}{held}. {scores.sentence}"


def _cut(name: str) -> str:
    return name if len(name) <= 17 else f"{name[:16]}\N{HORIZONTAL ELLIPSIS}"
