"""The policy: how many windows it takes, and what says nothing about drift."""

from datetime import UTC, datetime, timedelta

from monitors.drift import DriftReport, DriftScore, Finding
from monitors.evidence import CERTIFYING_WINDOWS
from monitors.policy import Decision, Phase, PolicyState, Verdict, step
from monitors.settings import PolicySettings
from monitors.shifts import Shift

START = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = PolicySettings(method="thresholds", drift_share=0.5, for_windows=2, keep_firing_windows=2)


def score(column: str, drifted: bool) -> DriftScore:
    return DriftScore(column, "ks", 0.01 if drifted else 0.9, 0.05, "<=", drifted, 9, 9, "test/ks")


def report(letter: str) -> DriftReport:
    """`d` half of the columns drifted, `c` one in three, `b` broken."""
    if letter == "b":
        return DriftReport((), (Finding("x", "null_share", 0.9, True),))
    drifted = (True, True, False) if letter == "d" else (False, True, False)
    return DriftReport(tuple(score(name, one) for name, one in zip("xyz", drifted, strict=True)))


def play(letters: str, settings: PolicySettings = SETTINGS) -> list[Decision]:
    state, decisions = PolicyState(), []
    for number, letter in enumerate(letters):
        start = START + timedelta(hours=number)
        state, decision = step(settings, state, start, letter != "i", report(letter))
        decisions.append(decision)
    return decisions


def phases(letters: str, settings: PolicySettings = SETTINGS) -> str:
    short = {Phase.INACTIVE: "-", Phase.PENDING: "p", Phase.FIRING: "F"}
    return "".join(short[decision.phase] for decision in play(letters, settings))


def test_it_fires_after_for_windows_drifted_windows_in_a_row() -> None:
    assert phases("cddd") == "-pFF"


def test_a_calm_window_breaks_the_streak() -> None:
    assert phases("dcdcdd") == "p-p-pF"


def test_it_takes_keep_firing_windows_calm_windows_to_end() -> None:
    assert phases("ddcdcc") == "pFFFF-"


def test_broken_and_insufficient_windows_change_nothing() -> None:
    assert phases("dbd") == "ppF"
    assert phases("did") == "ppF"
    assert phases("ddbic") == "pFFFF"
    assert [decision.verdict for decision in play("bi")] == [Verdict.BROKEN, Verdict.INSUFFICIENT]


def test_since_is_the_start_of_the_first_drifted_window_of_the_stretch() -> None:
    assert play("dcdd")[-1].since == START + timedelta(hours=2)
    assert play("ddcc")[-1].since is None


def test_one_named_column_is_enough() -> None:
    settings = PolicySettings(method="thresholds", drift_share=0.9, columns=("y",), for_windows=1)
    (decision,) = play("c", settings)
    assert (decision.phase, decision.clause) == (Phase.FIRING, "policy.columns: y drifted")


def test_nothing_scored_is_no_drift() -> None:
    _, decision = step(SETTINGS, PolicyState(), START, True, DriftReport(()))
    assert decision.verdict is Verdict.CALM


def test_the_clause_says_the_rule_and_the_numbers() -> None:
    assert play("d")[0].clause == "drift share 0.667 >= policy.drift_share 0.5"


def test_a_budget_is_certified_of_features_and_predictions_alike() -> None:
    calm, state = Shift("x", "location", 0.0, 100, 0.0, 500, 0.6, 0.6), PolicyState()
    features = DriftReport((), shifts=(calm,))
    both = DriftReport((), shifts=(calm,), prediction_shifts=(calm,))
    told: list[bool] = []
    for report in [features] * (CERTIFYING_WINDOWS + 3) + [both] * (CERTIFYING_WINDOWS + 3):
        state, decision = step(PolicySettings(), state, START, True, report)
        told.append(decision.certified)
        assert ("(certified)" if decision.certified else "(estimated)") in decision.clause
    changes = [place for place in range(1, len(told)) if told[place] != told[place - 1]]
    assert changes == [CERTIFYING_WINDOWS + 2, CERTIFYING_WINDOWS + 3, 2 * CERTIFYING_WINDOWS + 5]
