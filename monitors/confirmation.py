"""Confirmation: does Evidently itself say the same about a window as the compiled engine does?"""

import math
from collections.abc import Collection

import msgspec

from monitors.drift import DriftReport, DriftScore
from monitors.reference import PREDICTION

TOLERANCE = 1e-9


class Disagreement(msgspec.Struct, frozen=True):
    """One column on which the engines part: `about` its presence, its method, its score or its verdict."""

    column: str
    about: str
    compiled: DriftScore | None
    evidently: DriftScore | None
    prediction: bool = False


def confirm(
    compiled: DriftReport, evidently: DriftReport, tolerance: float = TOLERANCE
) -> tuple[Disagreement, ...]:
    """
    Where the two part, in the compiled report's order; nothing if they agree on every column.

    >>> confirm(DriftReport(()), DriftReport(()))
    ()
    """
    ours, theirs = _by_column(compiled), _by_column(evidently)
    names = dict.fromkeys([*ours, *theirs])
    found = [_compare(name, False, ours.get(name), theirs.get(name), tolerance) for name in names]
    found.append(_compare(PREDICTION, True, compiled.prediction, evidently.prediction, tolerance))
    return tuple(one for one in found if one is not None)


def fall_back(compiled: DriftReport, evidently: DriftReport, columns: Collection[str]) -> DriftReport:
    """The compiled report with Evidently's scores of the named feature columns in place of its own."""
    theirs = _by_column(evidently)
    scores = [score for score in compiled.scores if score.column not in columns or score.column in theirs]
    return msgspec.structs.replace(
        compiled, scores=tuple(theirs[s.column] if s.column in columns else s for s in scores)
    )


def _by_column(report: DriftReport) -> dict[str, DriftScore]:
    return {score.column: score for score in report.scores}


def _compare(
    column: str, prediction: bool, ours: DriftScore | None, theirs: DriftScore | None, tolerance: float
) -> Disagreement | None:
    about = _difference(ours, theirs, tolerance)
    return Disagreement(column, about, ours, theirs, prediction) if about else None


def _difference(ours: DriftScore | None, theirs: DriftScore | None, tolerance: float) -> str:
    if ours is None or theirs is None:
        return "" if ours is theirs else "presence"
    if ours.method != theirs.method:
        return "method"
    if not math.isclose(ours.score, theirs.score, rel_tol=tolerance, abs_tol=tolerance):
        return "score"
    on_the_edge = math.isclose(ours.score, ours.threshold, rel_tol=tolerance, abs_tol=tolerance)
    # Evidently's own last digit changes with PYTHONHASHSEED; on the very threshold it proves nothing.
    return "verdict" if ours.drifted != theirs.drifted and not on_the_edge else ""
