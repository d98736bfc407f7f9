"""Drift: how far the current window has moved from the reference."""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, Protocol

import msgspec

from monitors.baseline import Baseline
from monitors.records import PredictionRecord
from monitors.shifts import Shift


class DriftScore(msgspec.Struct, frozen=True):
    """
    One column's drift score and the verdict on it.

    `comparison` is how `score` is held against `threshold` to say drift: p-values `<` or `<=`,
    distances `>=`. `implementation` names method and version, e.g. `evidently-0.7.23/wasserstein`.
    """

    column: str
    method: str
    score: float
    threshold: float
    comparison: Literal["<", "<=", ">="]
    drifted: bool
    reference_rows: int
    current_rows: int
    implementation: str
    engine: Literal["compiled", "evidently"] = "compiled"


class Finding(msgspec.Struct, frozen=True):
    """
    Something about a column that is not drift; `share` is of the window's rows, 0 to 1.

    Codes: missing, new, wrong_type, null_share, infinite, out_of_range, unseen_category, unscored.
    `broken` says that it went past its limit in `QualitySettings`.
    """

    column: str
    code: str
    share: float
    broken: bool
    detail: str = ""


class SegmentShift(msgspec.Struct, frozen=True):
    """
    A segment that a column's shift is concentrated in.

    `effect` is how far it has moved from what it was, in standard deviations of a row of the reference;
    `share` is its part in the whole column's shift.
    """

    column: str
    segment: str
    effect: float
    rows: int
    share: float


class DriftReport(msgspec.Struct, frozen=True):
    """
    What one window looks like beside the reference. `prediction` is scored apart from features.

    `shifts` are those of the features, what a budget of false alarms is kept by.
    """

    scores: tuple[DriftScore, ...]
    findings: tuple[Finding, ...] = ()
    prediction: DriftScore | None = None
    shifts: tuple[Shift, ...] = ()
    prediction_shifts: tuple[Shift, ...] = ()

    @property
    def drift_share(self) -> float:
        """The share of scored feature columns that drifted; 0.0 when nothing was scored."""
        if not self.scores:
            return 0.0
        return sum(score.drifted for score in self.scores) / len(self.scores)

    @property
    def drifted_columns(self) -> tuple[str, ...]:
        """The feature columns that drifted, in the reference's order."""
        return tuple(score.column for score in self.scores if score.drifted)

    @property
    def damaged(self) -> bool:
        """
        Whether a column's data is broken in a way that says nothing of the world.

        Categories that nobody has seen may be a new season or a new market: labels can tell.
        """
        return any(finding.broken and finding.code != "unseen_category" for finding in self.findings)

    @property
    def broken_columns(self) -> tuple[str, ...]:
        """The columns whose data is broken; a reason to call somebody, never to retrain."""
        return tuple(dict.fromkeys(finding.column for finding in self.findings if finding.broken))


class WindowRows(msgspec.Struct, frozen=True):
    """A closed window's rows, in (event time, partition, offset) order."""

    start: datetime
    end: datetime
    records: tuple[PredictionRecord, ...]


class DriftEngine(Protocol):
    """
    Scores columns against one reference; two forms (compiled, Evidently itself), same verdicts.

    `baseline` is how well the version did when it was made, where that is known. `locate` says which
    segments the shift of the named columns is concentrated in; it is asked when something fires.
    """

    @property
    def baseline(self) -> Baseline | None: ...

    def judge(self, records: Sequence[PredictionRecord]) -> DriftReport: ...

    def locate(
        self, records: Sequence[PredictionRecord], columns: Sequence[str]
    ) -> tuple[SegmentShift, ...]: ...
