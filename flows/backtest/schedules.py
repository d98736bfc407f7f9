"""Schedules: what plain retrainings every so many windows would have come to on the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from flows.backtest.progress import Advance, still
from flows.backtest.stream import Said, Stream
from flows.errors import NotRetrainable
from flows.rows import LabelledRows
from flows.training import Challenger, answers, fit_span
from monitors.settings import ModelSettings

# How many models all schedules together may cost; each less frequent one reuses those of the most frequent.
MOST_FITS = 100


@dataclass(frozen=True, eq=False)
class Schedule:
    """Retraining after every `every` windows; how often that was, and what was answered."""

    every: int
    retrainings: int
    said: Said


def intervals(windows: int) -> list[int]:
    """
    Every 1, 2, 4 ... windows: from what `MOST_FITS` allow to one retraining.

    >>> intervals(60), intervals(300)
    ([1, 2, 4, 8, 16, 32], [4, 8, 16, 32, 64, 128, 256])
    """
    powers = [2**power for power in range(32) if 2**power <= windows]
    return [every for every in powers if windows // every <= MOST_FITS]


class Schedules:
    """Fits of the last reference-sized span of rows, each made only once, for all schedules of a stream."""

    def __init__(
        self,
        settings: ModelSettings,
        stream: Stream,
        ends: Sequence[int],
        label_lag: int,
        logged: Said | None = None,
    ) -> None:
        self._settings = settings
        self._stream = stream
        self._ends = [end for end in ends if end < len(stream)]
        self._lag = label_lag
        self._logged = logged
        self._advance: Advance = still
        self._fits: dict[int, Challenger | None] = {}

    @property
    def cost(self) -> int:
        """How many models will be fitted for all of them."""
        every = intervals(len(self._ends))
        return len(self._ends) // every[0] if every else 0

    def run(self, advance: Advance = still) -> list[Schedule]:
        """The most frequent one first; `advance` is told of each fit."""
        self._advance = advance
        return [self._run(every) for every in intervals(len(self._ends))]

    def _run(self, every: int) -> Schedule:
        first = self._stream.reference_rows
        said = Said.nothing(len(self._stream))
        champion, start, count = self._fitted(first), first, 0
        for closed in range(every, len(self._ends) + 1, every):
            end = self._ends[closed - 1]
            self._answer(said, champion, start, end)
            known = closed - self._lag
            champion = self._fitted(self._ends[known - 1] if known > 0 else first) or champion
            start, count = end, count + 1
        self._answer(said, champion, start, len(self._stream))
        return Schedule(every, count, said)

    def _answer(self, said: Said, champion: Challenger | None, start: int, end: int) -> None:
        if end <= start:
            return
        if champion is None:
            self._repeat(said, start, end)
            return
        rows = self._stream.features.iloc[start:end]
        found = answers("schedule", champion.schema, champion.estimator, rows)
        said.put(start, found.predictions, found.probabilities)

    def _repeat(self, said: Said, start: int, end: int) -> None:
        """Before there is a model of ours, what was logged stands."""
        if self._logged is not None:
            probabilities = self._logged.probabilities[start:end]
            said.put(start, self._logged.predictions[start:end], probabilities)

    def _fitted(self, known_until: int) -> Challenger | None:
        """A model of the newest labelled rows before this one; None where they teach nothing."""
        if known_until not in self._fits:
            rows = self._stream.labelled(0, known_until)
            newest = rows.between(max(0, len(rows) - self._settings.reference_rows), len(rows))
            self._fits[known_until] = self._fit(newest)
            self._advance(1)
        return self._fits[known_until]

    def _fit(self, rows: LabelledRows) -> Challenger | None:
        try:
            return fit_span(self._settings, rows) if len(rows) else None
        except NotRetrainable:
            return None
