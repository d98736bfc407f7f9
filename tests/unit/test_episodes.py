"""Episodes: one request at a time, back-off, verification, and what people do by hand."""

from datetime import UTC, datetime, timedelta
from typing import Literal

from monitors.drift import DriftReport, Finding
from monitors.episodes import (
    Circumstances,
    Judged,
    ModelState,
    Stage,
    on_champion,
    on_outcome,
    on_window,
)
from monitors.events import Event, Kind, OffsetRange, Outcome
from monitors.policy import Decision, Phase, Verdict
from monitors.settings import PolicySettings

START = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = PolicySettings(method="thresholds", backoff_windows=2, max_attempts=3)


class Story:
    """A model's life, told window by window; remembers every event."""

    def __init__(
        self, settings: PolicySettings = SETTINGS, mode: Literal["observe", "retrain"] = "retrain"
    ) -> None:
        self.settings = settings
        self.around = Circumstances("cluster|group", mode)
        self.state = ModelState()
        self.events: list[Event] = []
        self._key = 0

    def window(self, what: str, version: str = "1") -> list[str]:
        """One window: firing, pending, calm or broken; returns the kinds of what was told."""
        phase = {"firing": Phase.FIRING, "pending": Phase.PENDING}.get(what, Phase.INACTIVE)
        verdict = {"calm": Verdict.CALM, "broken": Verdict.BROKEN}.get(what, Verdict.DRIFTED)
        findings = (Finding("x", "null_share", 0.9, True),) if what == "broken" else ()
        start = START + timedelta(hours=self._key)
        judged = Judged(
            model="fraud",
            version=version,
            key=self._key,
            start=start,
            end=start + timedelta(hours=1),
            seen=100,
            sampled=100,
            spans=(OffsetRange("predictions", 0, 100 * self._key, 100 * self._key + 100),),
            report=DriftReport((), findings),
            decision=Decision(verdict, phase, "a clause", start),
        )
        self._key += 1
        self.state, told = on_window(self.around, self.settings, self.state, judged)
        return self._note(told)

    def windows(self, what: str, count: int) -> list[str]:
        return [kind for _ in range(count) for kind in self.window(what)]

    def outcome(self, action: Literal["promoted", "refused", "failed"], version: str = "2") -> list[str]:
        outcome = Outcome(action=action, sentence="a sentence", model_version=version)
        self.state, told = on_outcome(self.settings, self.state, self.request, outcome)
        return self._note(told)

    def champion(self, version: str, action: Literal["promoted", "rolled-back"]) -> list[str]:
        self.state, told = on_champion(self.settings, self.state, version, action)
        return self._note(told)

    @property
    def request(self) -> str:
        assert self.state.episode is not None
        return self.state.episode.request

    @property
    def requests(self) -> list[str]:
        return [event.request for event in self.events if event.kind is Kind.RETRAIN_REQUESTED]

    def _note(self, told: tuple[Event, ...]) -> list[str]:
        self.events += told
        return [str(event.kind).removeprefix("retrain-daemon.") for event in told]


def test_drift_opens_an_episode_and_asks_once() -> None:
    story = Story()
    assert story.window("pending") == []
    assert story.state.stage is Stage.SUSPECTED
    assert story.window("firing") == ["drift.detected", "retrain.requested"]
    assert story.windows("firing", 5) == [], "one open request per model"


def test_observing_tells_of_drift_and_asks_for_nothing() -> None:
    story = Story(mode="observe")
    assert story.window("firing") == ["drift.detected"]
    assert story.windows("firing", 3) + story.window("calm") == ["drift.resolved"]


def test_a_silenced_model_asks_once_the_silence_is_over() -> None:
    story = Story()
    story.around = Circumstances("cluster|group", "retrain", silenced=True)
    assert story.window("firing") == ["drift.detected"]
    story.around = Circumstances("cluster|group", "retrain")
    assert story.window("firing") == ["retrain.requested"]


def test_a_refusal_is_followed_by_back_off_and_a_new_request() -> None:
    story = Story()
    story.window("firing")
    story.outcome("refused")
    assert story.windows("firing", 2) == [], "two windows of back-off"
    assert story.window("firing") == ["retrain.requested"]
    assert len(set(story.requests)) == 2, "the next attempt is a request of its own"


def test_back_off_doubles_and_broken_windows_do_not_count() -> None:
    story = Story()
    story.window("firing")
    story.outcome("refused")
    story.windows("firing", 3)
    story.outcome("failed")
    assert story.windows("broken", 9) == ["data.broken"]
    assert story.windows("firing", 4)[1:] == []
    assert story.window("firing") == ["retrain.requested"]


def test_after_max_attempts_the_episode_is_futile_until_it_is_calm() -> None:
    story = Story(PolicySettings(method="thresholds", backoff_windows=1, max_attempts=2))
    story.window("firing")
    story.outcome("refused")
    story.windows("firing", 2)
    assert story.outcome("refused") == ["episode.futile"]
    assert story.windows("firing", 9) == []
    assert story.state.stage is Stage.FUTILE
    assert story.window("calm") == ["drift.resolved"]
    assert story.window("firing") == ["drift.detected", "retrain.requested"]


def test_a_promotion_is_verified_on_the_new_version_alone() -> None:
    story = Story()
    story.window("firing")
    story.outcome("promoted", "2")
    assert story.state.stage is Stage.VERIFYING
    assert story.windows("firing", 3) == [], "the old version still being served says nothing"
    assert story.window("pending", "2") == []
    assert story.window("calm", "2") == ["drift.resolved"]
    assert story.state.stage is Stage.QUIET


def test_a_promotion_that_did_not_help_leads_to_another_episode() -> None:
    story = Story()
    story.window("firing")
    story.outcome("promoted", "2")
    assert story.window("firing", "2") == ["drift.resolved"]
    assert story.window("firing", "2") == ["drift.detected", "retrain.requested"]
    assert story.state.episodes == 2


def test_an_outcome_told_twice_changes_nothing_the_second_time() -> None:
    story = Story()
    story.window("firing")
    request = story.request
    story.outcome("refused")
    before = story.state
    outcome = Outcome(action="refused", sentence="a sentence")
    assert on_outcome(SETTINGS, before, request, outcome) == (before, ())


def test_cooldown_delays_the_next_episode() -> None:
    story = Story(PolicySettings(method="thresholds", cooldown_seconds=7_200.0))
    story.window("firing")
    story.outcome("promoted", "2")
    story.window("calm", "2")
    assert story.window("firing", "2") == []
    assert story.window("firing", "2") == ["drift.detected", "retrain.requested"]


def test_shadow_versions_are_only_observed() -> None:
    story = Story()
    story.window("calm", "1")
    assert story.windows("firing", 3) == ["drift.detected", "retrain.requested"]
    shadow = Story()
    shadow.window("calm", "1")
    assert [kind for _ in range(3) for kind in shadow.window("firing", "shadow")] == []


def test_broken_data_is_told_once_and_so_is_its_end() -> None:
    story = Story()
    assert story.windows("broken", 3) == ["data.broken"]
    assert story.windows("calm", 2) == ["data.mended"]
    assert story.windows("broken", 1) == ["data.broken"]
    assert len({event.id for event in story.events}) == 3


def test_a_rollback_ends_the_verification_and_asks_for_nothing_at_once() -> None:
    story = Story()
    story.window("firing")
    story.outcome("promoted", "2")
    assert story.champion("1", "rolled-back") == ["episode.futile"]
    assert story.windows("firing", 6) == []


def test_a_promotion_by_hand_is_verified_too() -> None:
    story = Story(mode="observe")
    story.window("firing")
    story.champion("2", "promoted")
    assert story.window("calm", "2") == ["drift.resolved"]


def test_the_same_windows_give_the_same_ids() -> None:
    one, other = Story(), Story()
    for story in (one, other):
        story.window("firing")
        story.outcome("refused")
        story.windows("firing", 3)
    assert [event.id for event in one.events] == [event.id for event in other.events]
    assert len({event.id for event in one.events}) == len(one.events) == 3
