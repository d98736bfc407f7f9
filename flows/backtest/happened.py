"""What happened in a replay: windows, episodes and requests, in the order in which they came."""

import math
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal

import msgspec

from flows.verdict import Verdict as GateVerdict
from monitors.drift import DriftScore
from monitors.episodes import Judged
from monitors.events import Event, Kind, Outcome, RetrainRequest
from monitors.performance import Performance

_LEAST_P = 1e-300

Action = Literal["promoted", "refused", "failed", "futile", "watched"]


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """
    One judged window; `number` counts from 0, and `end_row` is the first row after it.

    `strengths` say by column how far its score is, where 1 is the threshold; `drifted` and `broken`
    are columns, and `judged` is the evidence that a ledger would hold.
    """

    judged: Judged
    number: int
    end_row: int
    version: str
    verdict: str
    clause: str
    drift_share: float
    drifted: tuple[str, ...]
    broken: tuple[str, ...]
    strengths: dict[str, float]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One request, for a retraining or a comparison with champions of before, and how it ended."""

    request: str
    episode: str
    attempt: int
    window: int
    reason: str
    outcome: Outcome
    verdict: GateVerdict | None = None


class Episode(msgspec.Struct, kw_only=True):
    """One episode; `change_point` is when the change is thought to have come."""

    id: str
    number: int
    window: int
    signal: str
    change_point: datetime | None
    action: Action = "watched"


class Breakage(msgspec.Struct, frozen=True):
    """
    A stretch of windows in which data was broken: its first and last number, and why, by column.

    `mended` is the window that was told of as sound again; None where that did not come.
    """

    first: int
    last: int
    mended: int | None
    columns: dict[str, str]


class Told(msgspec.Struct, frozen=True):
    """One event, and the number of the window that it was told at."""

    window: int
    event: Event


class Happened:
    """The ledger of a replay."""

    def __init__(self) -> None:
        self.windows: list[Window] = []
        self.performances: list[Performance] = []
        self.events: list[Told] = []
        self.episodes: list[Episode] = []
        self.requests: list[Asked] = []
        self.comparisons: list[Asked] = []

    def judge(self, judged: Judged, end_row: int) -> None:
        """Note a window."""
        self.windows.append(
            Window(
                judged=judged,
                number=len(self.windows),
                end_row=end_row,
                version=judged.version,
                verdict=str(judged.decision.verdict),
                clause=judged.decision.clause,
                drift_share=judged.report.drift_share,
                drifted=judged.report.drifted_columns,
                broken=judged.report.broken_columns,
                strengths={score.column: strength(score) for score in judged.report.scores},
            )
        )

    def tell(self, events: tuple[Event, ...]) -> None:
        """Note events, and what they say about episodes."""
        for event in events:
            self.events.append(Told(self.now, event))
            if event.kind is Kind.DRIFT_DETECTED:
                self.episodes.append(_opened(event, self.now))
            if event.kind is Kind.EPISODE_FUTILE:
                self._act(event.episode, "futile")

    def ask(self, request: RetrainRequest, outcome: Outcome, verdict: GateVerdict | None) -> None:
        """Note a request that has ended."""
        self.requests.append(self._asked(request, outcome, verdict))
        if outcome.action in ("promoted", "refused", "failed"):
            self._act(request.episode, outcome.action)
        for episode in self.episodes:
            if episode.id == request.episode and episode.change_point is None:
                episode.change_point = request.suspected_since

    def compare(self, request: RetrainRequest, outcome: Outcome, verdict: GateVerdict | None) -> None:
        """Note a comparison with champions of before that has ended; it trained nothing."""
        self.comparisons.append(self._asked(request, outcome, verdict))

    @property
    def came_back(self) -> list[Asked]:
        """The comparisons after which a champion of before served again."""
        return [one for one in self.comparisons if one.outcome.action == "rolled-back"]

    def _asked(self, request: RetrainRequest, outcome: Outcome, verdict: GateVerdict | None) -> Asked:
        return Asked(
            request=request.request,
            episode=request.episode,
            attempt=request.attempt,
            window=self.now,
            reason=request.reason,
            outcome=outcome,
            verdict=verdict,
        )

    def breakages(self) -> list[Breakage]:
        """When data was broken, as the events say it."""
        told = [one for one in self.events if one.event.kind in (Kind.DATA_BROKEN, Kind.DATA_MENDED)]
        found: list[Breakage] = []
        for place, one in enumerate(told):
            if one.event.kind is Kind.DATA_BROKEN:
                mended = next(
                    (later.window for later in told[place:] if _mends(later.event, one.event)), None
                )
                found.append(self._breakage(one.window, mended))
        return found

    def _breakage(self, first: int, mended: int | None) -> Breakage:
        windows = self.windows[first : len(self.windows) if mended is None else mended]
        broken = [window for window in windows if window.broken]
        columns = {
            finding.column: finding.code
            for window in broken
            for finding in window.judged.report.findings
            if finding.broken
        }
        return Breakage(first, broken[-1].number if broken else first, mended, columns)

    @property
    def now(self) -> int:
        """The number of the newest window; -1 before the first."""
        return len(self.windows) - 1

    def count(self, action: str) -> int:
        """How many requests ended so."""
        return sum(asked.outcome.action == action for asked in self.requests)

    def _act(self, episode: str, action: Action) -> None:
        for one in self.episodes:
            # What was promoted once stays so, whatever the attempts before or after it came to.
            if one.id == episode and one.action != "promoted":
                one.action = action


def _mends(later: Event, broken: Event) -> bool:
    return later.kind is Kind.DATA_MENDED and later.version == broken.version


def strength(score: DriftScore) -> float:
    """
    How far a score has come on its way to the threshold, which is 1, and beyond.

    Distances by their ratio; p-values by their logarithms', the smaller the stronger.
    """
    if score.comparison == ">=":
        return score.score / score.threshold if score.threshold > 0.0 else float(score.drifted)
    if not 0.0 < score.threshold < 1.0:
        return float(score.drifted)
    return math.log(max(score.score, _LEAST_P)) / math.log(score.threshold)


def _opened(event: Event, window: int) -> Episode:
    say: Callable[[str], Any] = event.payload.get
    point = say("change_point") or say("suspected_since")
    return Episode(
        id=event.episode,
        number=say("episode_number"),
        window=window,
        signal=say("signal") or "data",
        change_point=datetime.fromisoformat(point) if point else None,
    )
