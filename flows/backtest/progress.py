"""Progress: how far a backtest has come, on a terminal; elsewhere nothing is said before the end."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

Advance = Callable[[int], None]


def still(steps: int) -> None:
    """Nobody looks."""


class Progress(AbstractContextManager["Progress"]):
    """One bar for each thing that takes its time."""

    def __init__(self, stream: TextIO) -> None:
        self._bars: Bars | None = None
        if stream.isatty():
            from rich import progress
            from rich.console import Console

            self._bars = progress.Progress(console=Console(file=stream), transient=True)
            self._bars.start()

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextmanager
    def step(self, name: str, steps: int | None) -> Iterator[Advance]:
        """A bar that is full after so many steps; None: nobody knows how many."""
        if self._bars is None:
            yield still
            return
        bars, task = self._bars, self._bars.add_task(name, total=steps)

        def advance(count: int) -> None:
            bars.advance(task, count)

        yield advance
