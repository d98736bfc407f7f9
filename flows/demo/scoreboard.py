"""Scores: how well the served champion did on each row, beside the first champion on the same rows."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from flows.scoring import canonical, numbers
from monitors.records import Scalar

Metric = Literal["accuracy", "mae"]


class WindowScore(msgspec.Struct, frozen=True):
    """One window's metric; `start` and `end` are live row numbers, `version` served its last row."""

    number: int
    start: int
    end: int
    version: str
    live: float
    never: float


class Scoreboard:
    """
    One entry per live row: what the served champion said, and what the first one would have said.

    >>> board = Scoreboard("accuracy")
    >>> board.add("1", labels=[1, 0], live=[1, 1], never=[0, 0])
    >>> board.live(0, 2), board.never(0, 2), board.live(2, 2)
    (0.5, 0.5, None)
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._live: list[float] = []
        self._never: list[float] = []
        self._versions: list[str] = []

    def __len__(self) -> int:
        return len(self._live)

    def add(
        self, version: str, *, labels: Sequence[Scalar], live: Sequence[Scalar], never: Sequence[Scalar]
    ) -> None:
        """Note rows that were just scored; their labels are known here before the daemon learns them."""
        self._live += self._points(labels, live)
        self._never += self._points(labels, never)
        self._versions += [version] * len(labels)

    def live(self, start: int, end: int) -> float | None:
        """The metric of whatever was served, over rows `start` to `end`; None where there is none."""
        return _mean(self._live[start:end])

    def never(self, start: int, end: int) -> float | None:
        """The metric of the first champion over the same rows."""
        return _mean(self._never[start:end])

    def live_over(self, stretches: Sequence[tuple[int, int]]) -> float | None:
        """The metric of whatever was served, over these stretches; a row in two of them counts once."""
        rows = sorted({row for start, end in stretches for row in range(start, min(end, len(self)))})
        return _mean([self._live[row] for row in rows])

    def first_row_of_another(self) -> int | None:
        """The first row that another than the first champion was served for; None if there is none."""
        return next((row for row, version in enumerate(self._versions) if version != self._versions[0]), None)

    def windows(self, rows: int) -> tuple[WindowScore, ...]:
        """The full windows so far, of so many rows each."""
        return tuple(
            self.window(number, (number - 1) * rows, number * rows)
            for number in range(1, len(self) // rows + 1)
        )

    def window(self, number: int, start: int, end: int) -> WindowScore:
        """The score of rows that are there."""
        live, never = self.live(start, end), self.never(start, end)
        if live is None or never is None:
            raise IndexError(f"no rows {start} to {end} were scored yet; there are {len(self)}")
        return WindowScore(number, start, end, self._versions[end - 1], live, never)

    def _points(self, labels: Sequence[Scalar], said: Sequence[Scalar]) -> list[float]:
        if self.metric == "accuracy":
            return [float(hit) for hit in canonical(labels) == canonical(said)]
        return [float(error) for error in abs(numbers(labels) - numbers(said))]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
