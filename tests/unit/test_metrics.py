"""Metrics, health and readiness, as they are read over HTTP from a loop that runs."""

import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from daemon.config import load
from daemon.health import HUNG_SECONDS
from daemon.loop import RequestEnded
from daemon.memory import MemoryDeadLetters
from monitors.events import Outcome
from monitors.records import Partition


def eventually(what: Callable[[], Any], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_what_is_read_is_counted_by_topic_and_what_cannot_be_by_code(watched: Any) -> None:
    member = watched.member()
    watched.predict(3)
    watched.garbage(b"{")
    watched.garbage(b'{"model": "other"}')
    watched.label([0, 1], at=1)
    member.cycles()
    assert member.samples("records_read_total") == {("predictions",): 5, ("labels",): 2}
    found = member.samples("dead_letters_total")
    assert {code: count for code, count in found.items() if count} == {
        ("invalid_json",): 1,
        ("unknown_model",): 1,
    }
    assert found["too_far_ahead",] == 0, "known codes begin at 0, or the first one would not be seen"


def test_windows_are_counted_by_verdict_and_late_records_beside_them(watched: Any) -> None:
    member = watched.member()
    watched.predict(250)
    watched.predict(3, at=0)
    member.cycles()
    judged = member.samples("windows_judged_total")
    assert judged == {("fraud", "learning", "1"): 2, ("fraud", "calm", "1"): 2}
    assert member.value("late_records_total", "fraud", "1") == 3
    watched.predict(2, at=0)
    member.cycles()
    assert member.value("late_records_total", "fraud", "1") == 5


def test_a_drift_is_seen_from_the_share_to_the_request(watched: Any) -> None:
    member = watched.member()
    watched.predict(200)
    watched.predict(150, shift=60.0)
    member.cycles()
    assert member.value("drift_share", "fraud") == 1.0
    stages = member.samples("stage")
    assert {stage for (_, stage), there in stages.items() if there} == {"open"} and len(stages) == 6
    assert member.samples("serving_info") == {("fraud", "1"): 1}
    waiting = {key: count for key, count in member.samples("requests").items() if count}
    assert waiting == {("fraud", "", "waiting"): 1}
    events = member.samples("events_recorded_total")
    assert events["retrain-daemon.drift.detected", "fraud"] == 1
    assert events["retrain-daemon.data.lost", "fraud"] == 0
    assert member.value("outbox_waiting_events") == 2
    assert 0 < member.value("outbox_oldest_event_age_seconds") < 60
    end = member.value("last_window_end_timestamp_seconds", "fraud")
    assert end == 1_767_225_600 + 300, "the end of the last window closed, in event time"


def test_a_request_is_followed_until_its_version_is_served(watched: Any) -> None:
    member = watched.member()
    watched.predict(200)
    watched.predict(150, shift=60.0)
    member.cycles()
    assert member.value("unconfirmed_requests", "fraud") == 0, "it was not even posted"
    (request,) = member.ledger.requests()
    (asked,) = [row for row in member.ledger.waiting_events() if row.request == request.id]
    member.ledger.mark_posted(asked)
    assert member.value("unconfirmed_requests", "fraud") == 0, "its time is not up"
    member.ledger.post_again(request.id)
    member.ledger.mark_posted(asked)
    assert member.value("unconfirmed_requests", "fraud") == 1, "posted again: nothing came in time"
    member.ledger.confirm(request.id, "run", "automation")
    assert member.value("unconfirmed_requests", "fraud") == 0
    outcome = Outcome(action="promoted", sentence="better", model_version="2")
    member.loop.news.put(RequestEnded("fraud", request.id, outcome))
    member.cycles()
    assert member.value("requests", "fraud", "promoted", "ended") == 1
    assert member.value("promotion_unserved", "fraud") == 0
    member.ledger.mark_served(request.id, "unserved")
    assert member.value("promotion_unserved", "fraud") == 1
    watched.predict(100, shift=60.0, version="2")
    member.cycles()
    assert member.value("promotion_unserved", "fraud") == 0, "served late, but served"


def test_labels_give_the_score_of_the_version_in_service(watched: Any) -> None:
    member = watched.member()
    watched.predict(400)
    watched.label(range(100), at=60)
    member.cycles()
    assert member.samples("performance_score") == {("accuracy", "fraud"): 0.5}
    watched.label(range(101, 150, 2), at=240)
    watched.label([151], at=251)
    member.cycles()
    assert member.samples("performance_score") == {("accuracy", "fraud"): 1.0}, "of the last, and no mean"


def test_the_lag_is_what_could_be_taken_and_is_not(watched: Any) -> None:
    member = watched.member()
    watched.predict(10)
    watched.label(range(7), at=1_000)
    member.cycles()
    lag = {("0", "predictions"): 0, ("0", "labels"): 0}
    assert member.samples("kafka_lag_records") == lag, "labels of a window that is open wait, and nobody lags"
    assert member.samples("stream_time_timestamp_seconds") == {("0", "predictions"): 1_767_225_609}
    assert member.value("kafka_reachable") == 1


def test_a_checkpoint_is_timed(watched: Any) -> None:
    member = watched.member()
    member.cycles()
    assert member.value("checkpoint_duration_seconds_count") >= 1
    assert 0 < member.value("checkpoint_duration_seconds_sum") < 10
    for name in ("last_checkpoint_timestamp_seconds", "last_cycle_timestamp_seconds"):
        assert abs(member.value(name) - time.time()) < 30


def test_reviews_are_counted_by_what_came_of_them(watched: Any) -> None:
    member = watched.member()
    member.metrics.reviewed("fraud", "disagreed")
    assert member.value("reviews_total", "fraud", "disagreed") == 1
    assert member.value("reviews_total", "fraud", "agreed") == 0


def test_a_restart_forgets_nothing_that_stands_in_the_ledger(watched: Any) -> None:
    first = watched.member()
    watched.predict(200)
    watched.predict(150, shift=60.0)
    first.cycles()
    watched.log.members.clear()
    second = watched.member()
    second.cycles()
    for name in ("drift_share", "stage", "requests", "outbox_waiting_events", "serving_info"):
        assert second.samples(name) == first.samples(name), name


def test_a_standby_is_ready_and_leaves_the_telling_to_the_owner(watched: Any) -> None:
    owner, standby = watched.member(), watched.member()
    watched.predict(200)
    owner.cycles()
    standby.cycles()
    for member, role in ((owner, "owner"), (standby, "standby")):
        assert member.get("/readyz")[::2] == (200, f"ready: {role}\n")
        roles = {"joining": 0, "owner": 0, "standby": 0, "waiting": 0} | {role: 1}
        assert member.samples("role") == {(one,): value for one, value in roles.items()}
    assert owner.samples("requests") and owner.samples("kafka_lag_records")
    for name in ("requests", "stage", "prefect_reachable", "kafka_lag_records"):
        assert standby.samples(name) == {}, name
    owner.loop._source.close()
    standby.cycles()
    assert standby.get("/readyz")[::2] == (200, "ready: owner\n")
    assert standby.samples("stage")


def test_prefect_away_is_seen_and_is_no_reason_to_be_unwell(watched: Any) -> None:
    member = watched.member()
    member.cycles()
    assert member.value("prefect_reachable") == 1
    member.prefect_reachable = False
    assert member.value("prefect_reachable") == 0
    assert member.get("/healthz")[0] == member.get("/readyz")[0] == 200


def test_a_ledger_that_fails_leaves_the_other_metrics(watched: Any) -> None:
    member = watched.member()
    watched.predict(10)
    member.cycles()
    assert member.value("ledger_readable") == 1
    with sqlite3.connect(watched.folder / "ledger.db") as connection:
        connection.execute("DROP TABLE requests")
    connection.close()
    assert member.get("/metrics")[0] == 200
    assert member.value("ledger_readable") == 0
    assert member.value("records_read_total", "predictions") == 10
    assert member.samples("stage") == {}, "half of the truth would look like all of it"


def test_made_up_versions_do_not_become_metrics_without_end(watched: Any) -> None:
    member = watched.member()
    for number in range(60):
        watched.predict(1, version=f"made-up-{number}")
    watched.predict(120, version="made-up-0")
    member.cycles()
    versions = {version for _, _, version in member.samples("windows_judged_total")}
    assert 0 < len(versions) <= 8
    assert member.value("dead_letters_total", "too_many_versions") > 0


def test_names_follow_the_conventions_and_every_metric_is_explained(watched: Any) -> None:
    member = watched.member()
    watched.predict(200)
    member.cycles()
    families = list(text_string_to_metric_families(member.get("/metrics")[2]))
    ours = [family for family in families if not family.name.startswith("process_")]
    assert len(ours) > 25
    for family in ours:
        assert family.name.startswith("retrain_daemon_") and family.documentation.endswith(".")
        assert not family.name.endswith("_created")
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{family.name}_total"}
    assert {"process_resident_memory_bytes", "process_cpu_seconds"} <= {one.name for one in families}


def test_who_asks_for_openmetrics_gets_it(watched: Any) -> None:
    member = watched.member()
    assert member.get("/metrics")[1].startswith("text/plain")
    _, kind, text = member.get("/metrics", "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text") and text.endswith("# EOF\n")


def test_the_pages_are_on_loopback_unless_told_otherwise() -> None:
    assert load(None, {"RETRAIN_DAEMON_MODELS__FRAUD__KIND": "classification"}).http.host == "127.0.0.1"


# --- health and readiness ----------------------------------------------------------------------------


class Stuck(MemoryDeadLetters):
    """A dead-letter topic that does not come back with an answer until it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.released = threading.Event(), threading.Event()

    def flush(self) -> None:
        if self._pending:
            self.entered.set()
            self.released.wait(240)
        super().flush()


def test_a_loop_that_hangs_is_unhealthy_until_it_turns_again(watched: Any) -> None:
    letters, stop = Stuck(), threading.Event()
    member = watched.member(letters)
    running = threading.Thread(target=member.loop.run, args=(stop,), daemon=True)
    member.loop.settings = member.loop.settings.__class__(**{**_fields(member), "checkpoint_seconds": 0.0})
    running.start()
    try:
        eventually(lambda: member.get("/readyz")[0] == 200)
        watched.garbage(b"{")
        assert letters.entered.wait(120)
        assert member.get("/healthz")[::2] == (200, "ok\n"), "one slow cycle is not a hung loop"
        member.clock += HUNG_SECONDS + 1
        status, _, why = member.get("/healthz")
        assert status == 503 and "no cycle for 121 seconds" in why
        assert member.get("/readyz")[0] == 503
        assert member.get("/metrics")[0] == 200, "the pages answer while the loop does not"
        letters.released.set()
        eventually(lambda: member.get("/healthz")[0] == 200)
    finally:
        letters.released.set()
        stop.set()
        running.join(120)


def _fields(member: Any) -> dict[str, Any]:
    settings = member.loop.settings
    return {name: getattr(settings, name) for name in settings.__struct_fields__}


def test_a_member_that_has_not_joined_is_alive_and_not_ready(watched: Any) -> None:
    member = watched.member()
    assert member.get("/healthz")[0] == 200
    status, _, why = member.get("/readyz")
    assert status == 503 and "consumer group" in why


def test_without_kafka_a_member_is_alive_and_not_ready(watched: Any) -> None:
    member = watched.member()
    member.metrics.cycled("owner", False, {Partition("predictions", 0): 3})
    assert member.get("/healthz")[0] == 200
    assert member.get("/readyz")[::2] == (503, "not ready: Kafka does not answer\n")
    assert member.value("kafka_reachable") == 0
    assert member.value("kafka_lag_records", "0", "predictions") == 3, "as last seen"
