"""Progress: the story while it happens, as lines, and on a terminal with a moving last line."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TextIO

from flows.demo.facts import Facts
from flows.demo.scoreboard import Metric, WindowScore
from flows.demo.stream import Act

if TYPE_CHECKING:
    from rich.status import Status

BAR = 24
# What the worst champion that anybody would look at scores, so that bars differ visibly.
LEAST_ACCURACY = 0.4


class Progress(AbstractContextManager["Progress"]):
    """
    Tells what happens, to a person or to a log.

    With `live`, a spinner says what is being waited for; without, only what happened is told.
    """

    def __init__(
        self, stream: TextIO, *, metric: Metric, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.console import Console

        self.metric = metric
        self._clock = clock
        self._started = clock()
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self.live = self._console.is_terminal
        self._status: Status | None = None
        self._worst = 0.0

    def __exit__(self, *exception: object) -> None:
        self.done()

    def opening(self, title: str, sentence: str) -> None:
        """What this is, before anything is started."""
        self._print(f"[bold]{_safe(title)}[/]")
        self._print(f"[dim]{_safe(sentence)}[/]")
        self._print()

    def ready(self, what: str, detail: str = "") -> None:
        """One thing that is now there."""
        self._line("[green]ready     [/]", f"[bold]{_safe(what)}[/] {_safe(detail)}")

    def act(self, act: Act) -> None:
        """A stretch of the stream begins."""
        self._print()
        self._line("", f"[bold cyan]Act {act.number}: {_safe(act.title)}.[/] {_safe(act.sentence)}")

    def window(self, score: WindowScore, drift: str) -> None:
        """A window was served and judged."""
        bars = f"{self._bar(score.live, 'green')} {score.live:.3f}"
        never = ""
        if score.live != score.never:
            never = f"  [dim]never retrained {score.never:.3f}[/]"
        self._line(f"window {score.number:<3}", f"{bars}{never}  [dim]{_safe(drift)}[/]")

    def drift(self, sentence: str) -> None:
        """Drift was found, or is over."""
        self._line("[yellow]drift     [/]", _safe(sentence))

    def request(self, sentence: str) -> None:
        """A retraining was asked for, or its run has started."""
        self._line("[yellow]retrain   [/]", _safe(sentence))

    def outcome(self, action: str, sentence: str, version: str) -> None:
        """A request ended."""
        moved = action in ("promoted", "rolled-back")
        other = {"refused": "bold magenta", "kept": "bold"}
        style = "bold green" if moved else other.get(action, "bold red")
        told = f"{sentence}; version {version} serves from now on" if moved else sentence
        self._line(f"[{style}]{_safe(action):<10}[/]", _safe(told))

    def kill(self, sentence: str) -> None:
        """The daemon was killed."""
        self._line("[bold red]kill -9   [/]", _safe(sentence))

    def warn(self, sentence: str) -> None:
        """Something that should not have been."""
        self._line("[bold red]warning   [/]", _safe(sentence))

    def waiting(self, what: str) -> None:
        """What is being waited for; only to be seen where somebody watches."""
        if not self.live:
            return
        if self._status is None:
            self._status = self._console.status("", spinner="dots")
            self._status.start()
        self._status.update(f"[dim]{_safe(what)}[/]")

    def done(self) -> None:
        """Nothing is being waited for."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def closing(self, facts: Facts, links: Sequence[tuple[str, str]]) -> None:
        """The numbers and the links."""
        self.done()
        self._print()
        self._print(f"[bold]{_safe(verdict(facts))}[/]")
        for name, value in numbers(facts):
            self._print(f"  {name:<24} {_safe(value)}")
        self._print()
        for name, value in links:
            self._print(f"  {name:<24} [cyan]{_safe(value)}[/]")
        for sentence in facts.broken_promises:
            self.warn(sentence)

    def _bar(self, value: float, style: str) -> str:
        if self.metric == "accuracy":
            share = (value - LEAST_ACCURACY) / (1.0 - LEAST_ACCURACY)
        else:
            self._worst = max(self._worst, value)
            share = value / self._worst if self._worst else 0.0
        full = round(BAR * min(max(share, 0.0), 1.0))
        return f"[{style}]{'█' * full}[/][dim]{'·' * (BAR - full)}[/]"

    def _line(self, head: str, text: str) -> None:
        seconds = self._clock() - self._started
        self._print(f"[dim]{seconds:6.1f}s[/]  {head}  {text}" if head else text)

    def _print(self, text: str = "") -> None:
        self._console.print(text)


def verdict(facts: Facts) -> str:
    """The demo in one sentence."""
    promoted, refused = len(facts.promoted), len(facts.refused)
    asked = f"{_count(len(facts.requests), 'request')}: {promoted} promoted, {refused} refused"
    if facts.metric_after is None or facts.metric_never is None:
        return f"{asked}. The first champion still serves."
    return (
        f"{asked}. Since the first promotion: {facts.metric} {facts.metric_after:.3f}, "
        f"against {facts.metric_never:.3f} had nobody retrained."
    )


def numbers(facts: Facts) -> list[tuple[str, str]]:
    """What was counted, in words."""
    told = facts.json_object()
    rows: list[tuple[str, Any]] = [
        ("broker", facts.broker),
        ("records", f"{facts.records:,}"),
        ("windows judged", facts.judged_windows),
        ("drift episodes", facts.episodes),
        ("requests", len(facts.requests)),
        ("runs by the automation", told["runs_by_automation"]),
        ("runs created directly", told["runs_direct"]),
        ("kill -9 of the daemon", len(facts.kills)),
        (f"{facts.metric} on reference", _number(facts.metric_reference)),
        (f"{facts.metric} while drifted", _number(facts.metric_drifted)),
        ("setup, then the loop", f"{facts.seconds_setup:.0f} s, then {facts.seconds_loop:.0f} s"),
    ]
    return [(name, str(value)) for name, value in rows]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(text)
