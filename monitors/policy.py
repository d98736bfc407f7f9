"""Policy: when drift has lasted long enough to act on, and when it is over."""

from datetime import datetime
from enum import StrEnum

import msgspec

from monitors.drift import DriftReport
from monitors.settings import PolicySettings


class Verdict(StrEnum):
    """What one window says by itself."""

    CALM = "calm"
    DRIFTED = "drifted"
    BROKEN = "broken"
    INSUFFICIENT = "insufficient"
    LEARNING = "learning"


class Phase(StrEnum):
    """Where a version stands after some windows."""

    INACTIVE = "inactive"
    PENDING = "pending"
    FIRING = "firing"


class PolicyState(msgspec.Struct, frozen=True):
    """What must be remembered between windows. `since` is the start of the first drifted one."""

    phase: Phase = Phase.INACTIVE
    streak: int = 0
    since: datetime | None = None


class Decision(msgspec.Struct, frozen=True):
    """What the policy made of one window; `clause` is the rule that decided, in words and numbers."""

    verdict: Verdict
    phase: Phase
    clause: str
    since: datetime | None = None


def step(
    settings: PolicySettings, state: PolicyState, start: datetime, rows_suffice: bool, report: DriftReport
) -> tuple[PolicyState, Decision]:
    """
    Judge one closed window that starts at `start`.

    Broken or too little data says nothing about drift: the state stays as it was.

    >>> from datetime import UTC
    >>> calm = DriftReport(())
    >>> step(PolicySettings(), PolicyState(), datetime(2026, 1, 1, tzinfo=UTC), True, calm)[1].verdict
    <Verdict.CALM: 'calm'>
    """
    if not rows_suffice:
        return state, _told(state, Verdict.INSUFFICIENT, "fewer rows than window.min_rows")
    if broken := report.broken_columns:
        return state, _told(state, Verdict.BROKEN, f"data broken in {', '.join(broken)}")
    drifted, clause = _drifted(settings, report)
    after = _after_drift(settings, state, start) if drifted else _after_calm(settings, state)
    return after, _told(after, Verdict.DRIFTED if drifted else Verdict.CALM, clause)


def _told(state: PolicyState, verdict: Verdict, clause: str) -> Decision:
    return Decision(verdict, state.phase, clause, state.since)


def _drifted(settings: PolicySettings, report: DriftReport) -> tuple[bool, str]:
    alone = [score.column for score in report.scores if score.drifted and score.column in settings.columns]
    prediction = report.prediction
    if prediction is not None and prediction.drifted and "prediction" in settings.columns:
        alone.append("prediction")
    if alone:
        return True, f"policy.columns: {', '.join(alone)} drifted"
    share = report.drift_share
    drifted = bool(report.scores) and share >= settings.drift_share
    sign = ">=" if drifted else "<"
    return drifted, f"drift share {share:.3f} {sign} policy.drift_share {settings.drift_share:g}"


def _after_drift(settings: PolicySettings, state: PolicyState, start: datetime) -> PolicyState:
    if state.phase is Phase.FIRING:
        return msgspec.structs.replace(state, streak=0)
    streak = state.streak + 1 if state.phase is Phase.PENDING else 1
    phase = Phase.FIRING if streak >= settings.for_windows else Phase.PENDING
    return PolicyState(phase, 0 if phase is Phase.FIRING else streak, state.since or start)


def _after_calm(settings: PolicySettings, state: PolicyState) -> PolicyState:
    if state.phase is not Phase.FIRING or state.streak + 1 >= settings.keep_firing_windows:
        return PolicyState()
    return msgspec.structs.replace(state, streak=state.streak + 1)
