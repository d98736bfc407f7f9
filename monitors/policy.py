"""Policy: when drift has lasted long enough to act on, and when it is over."""

from datetime import datetime
from enum import StrEnum
from typing import Literal

import msgspec

from monitors.drift import DriftReport
from monitors.evidence import SUSPICIOUS, Evidence, EvidenceState, Moved, observe
from monitors.settings import PolicySettings

MOST_MOVED = 10
MOST_NAMED = 3


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


Signal = Literal["data drift", "prediction drift", "performance"]


class PolicyState(msgspec.Struct, frozen=True):
    """
    What must be remembered between windows. `since` is the start of the first drifted one.

    `data` and `prediction` are the evidence that a budget is held against, `streak` is of thresholds.
    """

    phase: Phase = Phase.INACTIVE
    streak: int = 0
    since: datetime | None = None
    data: EvidenceState = EvidenceState()
    prediction: EvidenceState = EvidenceState()


class Decision(msgspec.Struct, frozen=True):
    """
    What the policy made of one window; `clause` is the rule that decided, in words and numbers.

    `moved` are the features that speak for drift, the most telling first; `evidence` is in windows of
    budget, and `certified` once quiet windows have shown how much each feature and the prediction vary.
    """

    verdict: Verdict
    phase: Phase
    clause: str
    since: datetime | None = None
    signal: Signal = "data drift"
    evidence: float | None = None
    moved: tuple[Moved, ...] = ()
    certified: bool = False


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
    if settings.method == "budget":
        return _by_budget(settings, state, start, report)
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


# By a budget of needless alarms


def _by_budget(
    settings: PolicySettings, state: PolicyState, start: datetime, report: DriftReport
) -> tuple[PolicyState, Decision]:
    """Half of the budget's evidence may come from the features, half from the predictions."""
    budget = settings.windows_between_false_retrainings
    data, of_data = observe(state.data, report.shifts, budget)
    prediction, of_prediction = observe(state.prediction, report.prediction_shifts, budget)
    evidence = (of_data.value + of_prediction.value) / 2.0
    signal: Signal = "data drift" if of_data.value >= of_prediction.value else "prediction drift"
    telling = of_data if signal == "data drift" else of_prediction
    phase = _phase(state.phase, evidence, budget)
    since = None if phase is Phase.INACTIVE else state.since or start
    after = PolicyState(phase, 0, since, data, prediction)
    verdict = Verdict.DRIFTED if phase is Phase.FIRING else Verdict.CALM
    certified = (of_data.certified or not report.shifts) and (
        of_prediction.certified or not report.prediction_shifts
    )
    clause = _clause(signal, telling, evidence, budget, certified)
    return after, Decision(
        verdict, phase, clause, since, signal, evidence, telling.moved[:MOST_MOVED], certified
    )


def _phase(before: Phase, evidence: float, budget: float) -> Phase:
    if evidence >= budget:
        return Phase.FIRING
    if evidence < SUSPICIOUS * budget:
        return Phase.INACTIVE
    # What has fired goes on until it's calm: a value about the limit isn't news with every window.
    return Phase.FIRING if before is Phase.FIRING else Phase.PENDING


def _clause(signal: Signal, telling: Evidence, evidence: float, budget: float, certified: bool) -> str:
    sign = ">=" if evidence >= budget else "<"
    how = "certified" if certified else "estimated"
    said = f"{signal}: evidence {evidence:.3g} {sign} {budget:g} windows between false retrainings ({how})"
    if evidence < SUSPICIOUS * budget or not telling.moved:
        return said
    columns = dict.fromkeys(one.column for one in telling.moved)
    return f"{said}, from {', '.join(list(columns)[:MOST_NAMED])}"
