"""Facts: a backtest added up, for a person, a page and a machine."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
import numpy as np

from flows.backtest.file_replay import Replayed
from flows.backtest.happened import Breakage, Happened
from flows.backtest.schedules import Schedule
from flows.backtest.stream import Said, Stream
from flows.scoring import Answers, Metric, score

DIGITS = 6
_TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00")


class ScheduleFacts(msgspec.Struct, frozen=True):
    """One schedule: its metric over all live rows, its retrainings, and its metric per window."""

    metric: float | None
    retrainings: int
    windows: tuple[float | None, ...]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """
    Everything that is shown of one policy on one stream.

    `reasons` say why each request was asked for.
    Rows are numbers in the stream; metrics are over all live rows that have a label, or per window.
    `promotions` are (first row served, version); `windows` are the bounds of the windows' rows.
    """

    case: str
    metric: Metric
    rows: int
    reference_rows: int
    windows: tuple[tuple[int, int], ...]
    never: float | None
    live: float | None
    live_windows: tuple[float | None, ...]
    never_windows: tuple[float | None, ...]
    schedules: dict[int, ScheduleFacts]
    happened: Happened
    promotions: tuple[tuple[int, str], ...]
    change_rows: tuple[int | None, ...]
    reasons: tuple[str, ...]
    drifts: tuple[int, ...]
    seconds: float

    def rows_of(self, breakage: Breakage) -> tuple[int, int]:
        """The first row of the windows in which data was broken, and the first one after them."""
        starts = {end: start for start, end in self.windows}
        windows = self.happened.windows
        return starts[windows[breakage.first].end_row], windows[breakage.last].end_row

    @property
    def started(self) -> int:
        """How many retrainings were started."""
        return len(self.happened.requests)

    @property
    def false_before_first_drift(self) -> int | None:
        """Retrainings started before the first known drift; None where none is known."""
        if not self.drifts:
            return None
        first = min(self.drifts)
        asked = (self.happened.windows[request.window].end_row for request in self.happened.requests)
        return sum(row <= first for row in asked)

    def json_object(self) -> dict[str, Any]:
        """The last line of `--json`."""
        return {
            "case": self.case,
            "metric": self.metric,
            "rows": self.rows,
            "windows": len(self.windows),
            "never": _rounded(self.never),
            "schedule": {
                str(every): {"metric": _rounded(one.metric), "retrainings": one.retrainings}
                for every, one in self.schedules.items()
            },
            "live": _rounded(self.live),
            "started": self.started,
            "promoted": self.happened.count("promoted"),
            "refused": self.happened.count("refused"),
            "episodes": [
                {
                    "window": episode.window,
                    "signal": episode.signal,
                    "change_point": row,
                    "action": episode.action,
                }
                for episode, row in zip(self.happened.episodes, self.change_rows, strict=True)
            ],
            "false_before_first_drift": self.false_before_first_drift,
            "seconds": round(self.seconds, 1),
            "comparisons": len(self.happened.comparisons),
            "came_back": len(self.happened.came_back),
        }


def facts_of(
    stream: Stream,
    metric: Metric,
    replayed: Replayed,
    schedules: Sequence[Schedule],
    drifts: Sequence[int],
    seconds: float,
) -> Facts:
    """Add everything up."""
    first, happened = stream.reference_rows, replayed.happened
    ends = list(dict.fromkeys(window.end_row for window in happened.windows))
    windows = tuple(zip([first, *ends[:-1]], ends, strict=True)) if ends else ()
    scores = _Scores(stream, metric, windows)
    return Facts(
        case=stream.case,
        metric=metric,
        rows=len(stream),
        reference_rows=first,
        windows=windows,
        never=scores.over(replayed.never),
        live=scores.over(replayed.said),
        live_windows=scores.each(replayed.said),
        never_windows=scores.each(replayed.never),
        schedules={
            one.every: ScheduleFacts(scores.over(one.said), one.retrainings, scores.each(one.said))
            for one in schedules
        },
        happened=happened,
        promotions=replayed.promotions,
        change_rows=tuple(
            None
            if episode.change_point is None
            else int(np.searchsorted(stream.seconds, episode.change_point.timestamp()))
            for episode in happened.episodes
        ),
        reasons=tuple(_in_rows(asked.reason, stream) for asked in happened.requests),
        drifts=tuple(drifts),
        seconds=seconds,
    )


def _in_rows(reason: str, stream: Stream) -> str:
    """Where the stream has no times, those that its rows were given are the numbers of the rows."""
    if stream.timed:
        return reason

    def row(found: re.Match[str]) -> str:
        moment = datetime.fromisoformat(found[0]).timestamp()
        return f"row {int(np.searchsorted(stream.seconds, moment)):,}"

    return _TIME.sub(row, reason)


class _Scores:
    """The metric of anybody's answers, over all live rows and per window."""

    def __init__(self, stream: Stream, metric: Metric, windows: Sequence[tuple[int, int]]) -> None:
        self._stream = stream
        self._metric = metric
        self._windows = windows

    def over(self, said: Said) -> float | None:
        return self._score(said, self._stream.reference_rows, len(self._stream))

    def each(self, said: Said) -> tuple[float | None, ...]:
        return tuple(self._score(said, start, end) for start, end in self._windows)

    def _score(self, said: Said, start: int, end: int) -> float | None:
        answered = np.array([one is not None for one in said.predictions[start:end]], dtype=bool)
        which = np.flatnonzero(self._stream.known[start:end] & answered) + start
        if not len(which):
            return None
        probabilities = said.probabilities[which]
        answers = Answers(
            "", said.predictions[which], None if np.isnan(probabilities).any() else probabilities
        )
        value = score(self._metric, self._stream.labels[which], answers)
        return None if np.isnan(value) else value


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
