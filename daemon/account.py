"""
Account: what a model's budget of needless alarms was spent on, as far back as the ledger goes.

An alarm is an episode, whichever signal opened it. It was *needed* if it led to a promotion that stood,
or if somebody promoted by hand meanwhile; *needless* if it ended, resolved or futile, without one, or if
probation rolled its promotion back; until then it is *open*. So an episode of a real drift that no
challenger could cure counts as needless, and so does each one that ends in `mode = "observe"`, where
nothing can be promoted: what is achieved is a lower bound. Windows count if they were judged of the
version in service and something was decided on them: not while it learned, nor broken or too small ones.
Both are counted from the first such window that retention has left.
"""

import math
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal, get_args

import msgspec

from daemon.ledger import Ledger, RequestRow
from monitors.episodes import Episode, ModelState
from monitors.evidence import EvidenceState
from monitors.losses import LossState
from monitors.policy import PolicyState
from monitors.settings import PolicySettings

# More needless alarms than the budget would give once in so many cases are more than bad luck.
UNLIKELY = 0.05

Fate = Literal["needed", "needless", "open"]
FATES: tuple[Fate, ...] = get_args(Fate)


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """
    The budget stated and the one achieved; None where nothing needless happened, or nothing was counted.

    `evidence` is what each signal has of the budget now: the two of drift add up to an alarm at 1, and
    performance raises one at 1 by itself. `certainty` is of the newest window.
    """

    stated: float
    achieved: float | None
    exceeded: bool
    certainty: Literal["estimated", "certified"]
    windows: int
    since: str | None
    episodes: int
    needed: int
    needless: int
    open: int
    evidence: dict[str, float]


class _Asked(msgspec.Struct, frozen=True):
    """What is read of a request's payload."""

    kind: str = "retrain"
    promotion: str = ""


def account_of(ledger: Ledger, model: str, settings: PolicySettings, state: ModelState) -> Account | None:
    """A model's account; None where its policy keeps no budget."""
    if settings.method != "budget":
        return None
    windows, since = ledger.counted_windows(model)
    fates = list(_fates(ledger, model, since)) if since is not None else []
    needless = fates.count("needless")
    newest = ledger.newest_counted(model)
    stated = settings.windows_between_false_retrainings
    return Account(
        stated=stated,
        achieved=windows / needless if needless else None,
        exceeded=is_exceeded(stated, windows, needless),
        certainty="certified" if newest is not None and newest.decision.certified else "estimated",
        windows=windows,
        since=since.isoformat() if since is not None else None,
        episodes=len(fates),
        needed=fates.count("needed"),
        needless=needless,
        open=fates.count("open"),
        evidence=shares(stated, ledger.policy_state(model, state.serving), state.losses),
    )


def is_exceeded(stated: float, windows: int, needless: int) -> bool:
    """
    Whether so many needless alarms in so many windows are more than a kept budget explains (Poisson, 5 %).

    >>> [is_exceeded(100.0, 50, needless) for needless in (0, 1, 2, 3)]
    [False, False, False, True]
    """
    # Loaded by whoever asks for an account, not by every start.
    from scipy.special import pdtrc

    return bool(needless) and float(pdtrc(needless - 1, windows / stated)) < UNLIKELY


def shares(budget: float, policy: PolicyState, losses: LossState) -> dict[str, float]:
    """The evidence of each signal as a share of the budget, 1 at most."""
    # The logarithm of the budget is the level at which a CUSUM of losses alarms.
    lost = 1.0 if losses.fallen else math.exp(min(0.0, losses.cusum - math.log(budget)))
    return {
        "data drift": min(1.0, _windows_of(policy.data) / 2.0 / budget),
        "prediction drift": min(1.0, _windows_of(policy.prediction) / 2.0 / budget),
        "performance": lost if losses.cusum > 0.0 else 0.0,
    }


def _windows_of(state: EvidenceState) -> float:
    """The mean of all detectors, which is what is held against the budget."""
    logs = [log for feature in state.features.values() for log in feature.detectors]
    return math.fsum(map(math.exp, logs)) / len(logs) if logs else 0.0


def _fates(ledger: Ledger, model: str, since: datetime) -> Iterable[Fate]:
    requests = ledger.requests(model)
    undone = _rolled_back(requests)
    promoted = {
        row.episode
        for row in requests
        if row.outcome is not None and row.outcome.action == "promoted" and row.id not in undone
    }
    all_undone = {row.episode for row in requests if row.id in undone} - promoted
    for row in ledger.episodes(model):
        # It opened at the end of a window that is counted, then.
        if datetime.fromisoformat(row["opened_at"]) > since:
            yield _fate(row, row["id"] in promoted, row["id"] in all_undone)


def _fate(row: dict[str, Any], promoted: bool, undone: bool) -> Fate:
    if undone:
        return "needless"
    # What somebody promoted by hand had no request.
    if promoted or msgspec.json.decode(row["state"], type=Episode).promoted:
        return "needed"
    return "needless" if row["ended_at"] is not None or row["stage"] == "futile" else "open"


def _rolled_back(requests: Iterable[RequestRow]) -> set[str]:
    """The requests whose promotion probation has undone."""
    return {
        msgspec.json.decode(row.payload, type=_Asked).promotion
        for row in requests
        if row.outcome is not None and row.outcome.action == "rolled-back"
    }
