"""A budget of needless alarms is accounted for from what the ledger holds, and as far back as it goes."""

import io
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from rich.console import Console

from daemon import account, status_table
from daemon.account import Account, account_of
from daemon.ledger import Checkpoint, Ledger, now
from daemon.status import ledger_status
from monitors import budget, probation
from monitors.drift import DriftReport
from monitors.episodes import Circumstances, Judged, ModelState, Stage, on_champion
from monitors.events import OffsetRange, Outcome
from monitors.evidence import EvidenceState, FeatureState
from monitors.losses import LossState
from monitors.monitor import ModelChanges
from monitors.performance import LabelChanges, Performance
from monitors.policy import Decision, Phase, PolicyState, Verdict
from monitors.settings import GateSettings, ModelSettings, PolicySettings, WindowSettings

START = datetime(2026, 1, 1, tzinfo=UTC)
MODEL = ModelSettings(policy=PolicySettings(windows_between_false_retrainings=50.0))
AROUND = Circumstances("cluster|g", "retrain")
NO_LABELS = LabelChanges((), {}, (), (), 0, 0)


class Life:
    """A model's windows and outcomes, decided by the policy and written to a real ledger."""

    def __init__(self, url: str) -> None:
        self.ledger = Ledger(url)
        self.ledger.take_over("g", "m")
        self.state = ModelState(serving="1")
        self.hour = 0

    def window(self, phase: Phase, certified: bool = False, version: str = "1") -> None:
        """One window of a version; `firing` opens an episode, `inactive` resolves it."""
        start = START + timedelta(hours=self.hour)
        verdict = Verdict.DRIFTED if phase is Phase.FIRING else Verdict.CALM
        judged = Judged(
            model="fraud",
            version=version,
            key=self.hour,
            start=start,
            end=start + timedelta(hours=1),
            seen=100,
            sampled=100,
            spans=(OffsetRange("predictions", 0, 100 * self.hour, 100 * self.hour + 100),),
            report=DriftReport(()),
            decision=Decision(verdict, phase, "a clause", start, certified=certified),
        )
        self.hour += 1
        counted = ((version, judged.key),) if version == self.state.serving else ()
        self.state, events = budget.on_window(AROUND, MODEL, self.state, judged)
        self.keep(events, judged, counted)

    def windows(self, phases: str) -> None:
        """`.` is a calm window and `d` one that fires."""
        for one in phases:
            self.window(Phase.FIRING if one == "d" else Phase.INACTIVE)

    def ask(self) -> str:
        """The open episode asks for a retraining; returns the request."""
        self.state = msgspec.structs.replace(self.state, unlabelled=budget.UNLABELLED_WINDOWS)
        self.window(Phase.FIRING)
        self.state = msgspec.structs.replace(self.state, unlabelled=0)
        return self.ledger.requests("fraud")[-1].id

    def end(self, request: str, action: Literal["promoted", "refused"]) -> None:
        outcome = Outcome(action=action, sentence="a sentence", model_version="1")
        self.state, events = budget.on_outcome(MODEL, self.state, request, outcome)
        self.keep(events, None, (), [(request, outcome)])

    def roll_back(self, promotion: str) -> None:
        """Probation asks about a promotion, and undoes it."""
        outcome = Outcome(action="promoted", sentence="", model_version="1", champion_before="1")
        gate = GateSettings(probation_windows=1)
        tried = probation.begin("fraud", promotion, outcome, gate)
        assert tried is not None
        tried = probation.on_window(tried, probation.Served("1", START, START, ()))
        labels = Performance("1", 1, "accuracy", score=0.5, labelled=90, unlabelled=0)
        tried, (event,) = probation.on_labels(tried, gate, "cluster|group", labels, None)
        outcome = Outcome(action="rolled-back", sentence="worse", model_version="1")
        self.keep((event,), None, ())
        self.keep((), None, (), [(event.request, outcome)])

    def keep(self, events: Any, judged: Judged | None, counted: Any, ended: Any = ()) -> None:
        changes = ModelChanges(self.state, {}, NO_LABELS, counted)
        windows = [(judged, "")] if judged else []
        self.ledger.checkpoint(
            Checkpoint(positions={}, models={"fraud": changes}, judged=windows, events=events, ended=ended)
        )

    @property
    def account(self) -> Account:
        found = account_of(self.ledger, "fraud", MODEL.policy, self.state)
        assert found is not None
        return found

    @property
    def fates(self) -> tuple[int, int, int, int]:
        """Windows, and alarms that were needed, needless, and are open."""
        found = self.account
        assert found.episodes == found.needed + found.needless + found.open
        return found.windows, found.needed, found.needless, found.open


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    found = Life(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield found
    found.ledger.close()


def test_an_alarm_that_passes_by_itself_was_needless(life: Life) -> None:
    life.windows("....")
    assert life.fates == (4, 0, 0, 0)
    assert (life.account.stated, life.account.achieved, life.account.exceeded) == (50.0, None, False)
    life.windows("dd")
    assert life.fates == (6, 0, 0, 1), "nobody knows yet"
    life.windows("..")
    assert life.fates == (8, 0, 1, 0)
    assert life.account.achieved == 8.0
    life.windows("d...")
    assert (life.account.achieved, life.account.exceeded) == (6.0, True)


def test_an_alarm_that_led_to_a_better_model_was_needed(life: Life) -> None:
    life.windows("..d")
    life.end(life.ask(), "promoted")
    assert life.fates == (4, 1, 0, 0), "as soon as it is promoted"
    life.windows("..d.")
    assert life.fates == (8, 1, 1, 0)
    assert life.account.achieved == 8.0, "the needed one is not held against the budget"


def test_an_alarm_of_which_all_attempts_were_refused_was_needless(life: Life) -> None:
    life.windows("d")
    life.end(life.ask(), "refused")
    assert life.fates == (2, 0, 0, 1), "another attempt may follow"
    for _ in range(MODEL.policy.max_attempts - 1):
        life.windows("d" * life.state.wait_windows)
        life.state = msgspec.structs.replace(life.state, wait_windows=0)
        life.end(life.ask(), "refused")
    assert life.state.stage is Stage.FUTILE
    assert life.fates[1:] == (0, 1, 0), "it is given up, though the drift goes on"


def test_a_promotion_that_probation_undid_does_not_make_an_alarm_needed(life: Life) -> None:
    life.windows("d")
    request = life.ask()
    life.end(request, "promoted")
    life.windows(".")
    assert life.fates[1:] == (1, 0, 0)
    life.roll_back(request)
    assert life.fates[1:] == (0, 1, 0)


def test_an_alarm_in_which_somebody_promoted_by_hand_was_needed(life: Life) -> None:
    life.windows(".d")
    life.state, events = on_champion(MODEL.policy, life.state, "2", "promoted")
    life.keep(events, None, ())
    assert life.fates == (2, 1, 0, 0)


def test_windows_and_alarms_are_counted_over_what_retention_has_left(life: Life) -> None:
    life.windows("..d..")
    assert life.fates == (5, 0, 1, 0)
    first = now()
    life.windows("..d.")
    assert (life.fates, life.account.since) == ((9, 0, 2, 0), START.isoformat())
    life.ledger.prune(first)
    assert life.fates == (4, 0, 1, 0), "the first alarm is forgotten with its windows"
    assert life.account.since == (START + timedelta(hours=5)).isoformat()
    assert life.account.achieved == 4.0


def test_an_alarm_whose_windows_are_partly_forgotten_is_not_held_against_the_rest(life: Life) -> None:
    life.windows("..d")
    first = now()
    life.windows("d.")
    life.ledger.prune(first)
    assert [row["stage"] for row in life.ledger.episodes("fraud")] == ["resolved"], "it is still there"
    assert life.fates == (2, 0, 0, 0), "and began before what is counted"


def test_versions_that_are_only_observed_do_not_count(life: Life) -> None:
    life.windows("..")
    life.window(Phase.FIRING, version="shadow")
    assert life.fates == (2, 0, 0, 0)


def test_the_budget_is_certified_as_of_the_newest_window_that_counts(life: Life) -> None:
    assert life.account.certainty == "estimated"
    life.window(Phase.INACTIVE, certified=True)
    assert life.account.certainty == "certified"
    life.window(Phase.INACTIVE, version="shadow")
    assert life.account.certainty == "certified"
    life.window(Phase.INACTIVE)
    assert life.account.certainty == "estimated"


def test_a_policy_of_thresholds_keeps_no_account(life: Life) -> None:
    life.windows("..")
    assert account_of(life.ledger, "fraud", PolicySettings(method="thresholds"), life.state) is None


def test_evidence_is_in_shares_of_the_budget() -> None:
    half = FeatureState(detectors=(3.912023005428146,) * 6)  # log(50)
    quiet = FeatureState()
    data = EvidenceState({"x|location": half, "y|location": quiet})
    found = account.shares(50.0, PolicyState(data=data, prediction=data), LossState())
    assert found == pytest.approx({"data drift": 0.25, "prediction drift": 0.25, "performance": 0.0})
    slipping = account.shares(50.0, PolicyState(), LossState(cusum=3.912023005428146 / 2))
    assert slipping["performance"] == pytest.approx(50.0**-0.5)
    fallen = account.shares(50.0, PolicyState(), LossState(cusum=0.1, fallen=True))
    assert fallen["performance"] == 1.0


# As a loop writes it


def test_a_loop_counts_the_sound_windows_of_the_version_in_service(watched: Any) -> None:
    watched.model = ModelSettings(
        reference_rows=100,
        window=WindowSettings(seconds=50.0, grace_seconds=0.0, min_rows=10, max_rows=50),
        policy=PolicySettings(windows_between_false_retrainings=4.0),
    )
    member = watched.member()
    watched.predict(100)  # learned from
    watched.predict(150, version="shadow")
    watched.predict(250)
    watched.predict(150, shift=60.0)
    watched.predict(50, shift=60_000.0)  # broken
    watched.predict(51)
    member.cycles()
    verdicts = [(row["version"], row["verdict"], row["counted"]) for row in member.ledger.windows("fraud")]
    assert verdicts.count(("1", "learning", 0)) == 2 and verdicts.count(("1", "broken", 0)) == 1
    assert ("shadow", "calm", 0) in verdicts, "it is judged, and leads to nothing"
    counted = [(version, verdict) for version, verdict, counts in verdicts if counts]
    assert counted == [("1", "calm")] * 5 + [("1", "drifted")] * 4

    models = {"fraud": watched.model}
    told = ledger_status(member.ledger, models)["models"]["fraud"]["budget"]
    assert (told["stated"], told["windows"], told["open"], told["certainty"]) == (4.0, 9, 1, "estimated")
    assert told["evidence"]["data drift"] == 1.0 and told["evidence"]["performance"] == 0.0
    assert member.value("budget_stated_windows", "fraud") == 4.0
    assert member.value("budget_counted_windows", "fraud") == 9
    assert member.samples("budget_alarms") == {
        ("needed", "fraud"): 0,
        ("needless", "fraud"): 0,
        ("open", "fraud"): 1,
    }
    assert member.value("budget_exceeded", "fraud") == member.value("budget_certified", "fraud") == 0
    assert member.value("budget_evidence_share", "fraud", "data drift") == 1.0


def test_the_table_says_what_was_stated_and_what_was_achieved(life: Life) -> None:
    life.windows("..d...d..")
    text = io.StringIO()
    status_table.show(ledger_status(life.ledger, {"fraud": MODEL}), Console(width=200, file=text))
    assert "50 windows, estimated" in text.getvalue()
    assert "4.5 windows, exceeded" in text.getvalue()
    assert "9 windows since 2026-01-01" in text.getvalue()
