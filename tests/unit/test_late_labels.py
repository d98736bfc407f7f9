"""Labels that come days after their predictions: none is lost by a restart, and what waits is bounded."""

import sqlite3
from contextlib import closing
from typing import Any

import msgspec
import pytest

from daemon.status import ledger_status
from monitors.settings import ModelSettings, PolicySettings, WindowSettings

HOUR, DAY = 3_600, 86_400
ROWS = 6
MODEL = ModelSettings(
    reference_rows=ROWS * 4,
    label_horizon_seconds=6.0 * DAY,
    window=WindowSettings(seconds=float(HOUR), grace_seconds=0.0, min_rows=2, max_rows=ROWS),
    policy=PolicySettings(method="thresholds", for_windows=2),
)


@pytest.fixture
def days(watched: Any) -> "Days":
    watched.model = MODEL
    return Days(watched)


class Days:
    """Predictions of whole days, six in each hour, and the labels of some of them."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.member: Any = None

    def restart(self) -> None:
        """As after kill -9: nothing is closed and nothing is said."""
        self.world.log.members.clear()
        self.member = self.world.member()

    def run(self, cycles: int = 5) -> None:
        for _ in range(cycles):
            self.member.loop.run_once(0.01)

    def predict(self, day: int) -> None:
        for number in range(24 * ROWS):
            at = day * DAY + number * HOUR // ROWS
            features = {"x": number % ROWS * 1.0, "y": number % 3 * 1.0}
            self.world.write(
                "predictions",
                at,
                {"model_version": "1", "id": f"r{at}", "features": features, "prediction": 1},
            )

    def label(self, day: int, known_after: int, first: int = 0, every: int = 1) -> None:
        """The labels of a day's predictions, known so many days later; every third says 1."""
        for number in range(first, 24 * ROWS, every):
            at = day * DAY + number * HOUR // ROWS
            self.world.write(
                "labels", at + known_after * DAY, {"id": f"r{at}", "label": int(number % 3 == 0)}
            )

    def windows(self) -> list[dict[str, Any]]:
        return list(self.member.ledger.windows("fraud"))

    def waiting(self) -> tuple[int, int, int]:
        """Windows and predictions in memory, and bytes in the ledger, that wait for labels."""
        labels = self.member.loop._monitor.models["fraud"]._labels
        with closing(sqlite3.connect(self.world.folder / "ledger.db")) as connection:
            query = "SELECT sum(length(data)) FROM chunks WHERE kind IN ('pending', 'matched', 'early')"
            (kept,) = connection.execute(query).fetchone()
        return len(labels._pending), len(labels._home), kept or 0


def test_labels_five_days_late_are_all_there_whatever_restarts(days: Days) -> None:
    days.restart()
    for day in range(12):
        days.predict(day)
        days.run(1)
        days.restart()
        # Half of them a day before the others: a window has some of its labels when the process dies.
        if day >= 4:
            days.label(day - 4, known_after=4, every=2)
        if day >= 5:
            days.label(day - 5, known_after=5, first=1, every=2)
        days.run()
        days.restart()
        days.run()
    judged = days.windows()
    # The last labels known are those of day 6, and day 5's were due by then.
    assert len(judged) == 12 * 24 - 1
    for window in judged[: 6 * 24]:
        assert (window["labelled"], window["score"]) == (ROWS, pytest.approx(1 / 3)), window["key"]
    assert "predictions_expired" not in days.member.ledger.counters()


def test_a_label_that_comes_after_its_horizon_counts_for_nothing(days: Days) -> None:
    days.restart()
    for day in range(9):
        days.predict(day)
    days.label(0, known_after=5, every=2)
    days.label(2, known_after=5)
    days.run()
    days.label(0, known_after=8)
    days.run()
    assert [window["labelled"] for window in days.windows()[:20]] == [ROWS // 2] * 20


def test_what_waits_for_labels_that_never_come_is_bounded_and_counted(days: Days) -> None:
    days.world.model = msgspec.structs.replace(MODEL, max_pending_rows=10 * ROWS)
    days.restart()
    sizes = []
    for day in range(6):
        days.predict(day)
        days.run()
        if day == 3:
            days.restart()
            days.run()
        sizes.append(days.waiting())
    assert [size[:2] for size in sizes] == [(10, 10 * ROWS)] * 6, "ten windows, whatever the number of days"
    assert max(size[2] for size in sizes) < 1.1 * sizes[0][2]
    expired = (6 * 24 - 1 - 10) * ROWS
    assert days.member.ledger.counters()["predictions_expired"] == expired
    assert ledger_status(days.member.ledger, {"fraud": MODEL})["predictions_expired"] == expired
    since_the_restart = 2 * 24 * ROWS
    assert days.member.value("predictions_expired_total", "fraud") == since_the_restart


def test_where_labels_fall_silent_the_last_ones_still_count(days: Days) -> None:
    days.world.model = msgspec.structs.replace(
        MODEL, label_horizon_seconds=1.0 * DAY, max_pending_seconds=2.0 * DAY
    )
    days.restart()
    days.predict(0)
    days.label(0, known_after=0, every=2)  # and then no more
    days.run()
    days.predict(1)
    days.run()
    assert all(window["metric"] is None for window in days.windows()), "not due, and not given up"
    days.predict(2)
    days.run()
    days.restart()
    days.predict(3)
    days.run()
    judged = [window for window in days.windows() if window["metric"] is not None]
    assert [window["labelled"] for window in judged] == [ROWS // 2] * 24 + [0] * 23
    assert days.member.ledger.counters()["predictions_expired"] == 24 * ROWS // 2 + 23 * ROWS


def test_where_no_label_comes_later_nothing_waits(days: Days) -> None:
    days.world.labels_topic = ""
    days.restart()
    days.predict(0)
    days.run()
    assert days.waiting() == (0, 0, 0)
    assert "predictions_expired" not in days.member.ledger.counters(), "nobody waited for them"
