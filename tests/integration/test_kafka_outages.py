"""Outages of Kafka, and what holds the loop up: real daemons, as the command starts them, on real Kafka."""

import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from kafka import OffsetAndMetadata, TopicPartition

from daemon.ledger import Ledger
from daemon.wire.kafka_client import admin, ensure_topics, make_producer
from daemon.wire.local_kafka import LocalKafka, free_port, java_and_maven
from monitors.settings import KafkaSettings

pytestmark = pytest.mark.kafka

START = datetime(2026, 1, 1, tzinfo=UTC)
SESSION_SECONDS = 2.0
PATIENCE_SECONDS = 240.0
NOBODY = "http://127.0.0.1:9/api"


class Outage:
    """A prediction log, and daemons that read it in one group."""

    def __init__(self, folder: Path, kafka: LocalKafka, no_evidently: dict[str, str]) -> None:
        self.kafka = kafka
        self.no_evidently = no_evidently
        self.folder = folder
        self.topic, self.letters, self.group = (
            f"{stem}-{uuid.uuid4().hex[:8]}" for stem in ("predictions", "letters", "group")
        )
        self.settings = KafkaSettings(bootstrap_servers=kafka.bootstrap_servers, topic=self.topic)
        self.written = 0
        self.daemons: list[Daemon] = []
        ensure_topics(self.settings, {self.topic: 2, self.letters: 1})

    def write(self, rows: int) -> None:
        """So many more predictions, a second of event time apart; every second 300 are drifted."""
        # With a Kafka that is just coming back a producer takes its time.
        producer = make_producer(self.settings, delivery_timeout_ms=int(PATIENCE_SECONDS * 1000))
        chance = random.Random(self.written)
        for number in range(self.written, self.written + rows):
            shift = 4.0 if number // 300 % 2 else 0.0
            body = {
                "model": "fraud",
                "model_version": "1",
                "id": f"r{number}",
                "event_time": (START + timedelta(seconds=number)).isoformat(),
                "features": {
                    "x": chance.gauss(shift, 1.0),
                    "y": "ab"[number % 2],
                },
                "prediction": number % 2,
            }
            value = b"garbage" if number % 100 == 50 else json.dumps(body).encode()
            producer.send(self.topic, value=value, partition=number % 2)
        producer.flush(timeout=PATIENCE_SECONDS)
        producer.close(timeout=5)
        self.written += rows

    def delete(self) -> None:
        with admin(self.settings) as client:
            client.delete_topics([self.topic])

    def generation(self) -> int:
        """How often the group has settled: what a member that left would have raised."""
        with admin(self.settings) as client:
            return int(client.describe_groups([self.group])[self.group]["generation_id"])

    def daemon(self, name: str = "daemon", **settings: str) -> "Daemon":
        made = Daemon(self, name, settings)
        self.daemons.append(made)
        return made

    def close(self) -> None:
        for daemon in self.daemons:
            daemon.kill()


class Daemon:
    """`retrain-daemon start` with a ledger of its own, and a Prefect that nobody runs."""

    def __init__(self, outage: Outage, name: str, settings: dict[str, Any]) -> None:
        self.ledger_file = outage.folder / f"{name}.db"
        self._ledger = f"sqlite:///{self.ledger_file}"
        self._port = free_port()
        self._environment = os.environ | ({} if "engine" in settings else outage.no_evidently)
        self._config = outage.folder / f"{name}.toml"
        self._log = outage.folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._config.write_text(
            f"""
            mode = "retrain"
            [kafka]
            bootstrap_servers = "{settings.get("servers", outage.kafka.bootstrap_servers)}"
            topic = "{settings.get("topic", outage.topic)}"
            dead_letter_topic = "{outage.letters}"
            group = "{outage.group}"
            start = "earliest"
            session_timeout_seconds = {SESSION_SECONDS}
            connect_timeout_seconds = 10.0
            security_protocol = "{settings.get("protocol", "PLAINTEXT")}"
            [prefect]
            api_url = "{settings.get("prefect", NOBODY)}"
            [ledger]
            url = "{self._ledger}"
            checkpoint_seconds = 0.5
            [registry]
            references_url = "{outage.folder / name}-references"
            [reports]
            folder = "{outage.folder / name}-reports"
            url = "http://reports.example"
            [http]
            port = {self._port}
            [log]
            format = "json"
            [drift]
            engine = "{settings.get("engine", "compiled")}"
            [models.fraud]
            reference_rows = 200
            [models.fraud.window]
            seconds = 50.0
            grace_seconds = 5.0
            min_rows = 10
            max_rows = 30
            idle_seconds = 3600.0
            [models.fraud.policy]
            method = "thresholds"
            for_windows = 2
            keep_firing_windows = 1
            """
        )

    def launch(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "daemon.cli", "start", "--config", str(self._config)],
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def start(self) -> None:
        """Start, and return when it owns the log."""
        self.launch()
        self.until(lambda: self.page("/readyz") == "ready: owner\n")

    def stop(self) -> int:
        """Ask it to stop; return its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> int:
        """Wait for its end; return its exit code."""
        assert self._process is not None
        code = self._process.wait(PATIENCE_SECONDS)
        self._process = None
        return code

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def until(self, what: Callable[[], object]) -> None:
        """Wait for that, while the daemon runs."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not what():
            assert self._process is not None
            assert self._process.poll() is None, f"it ended:\n{self.said()[-3_000:]}"
            assert time.monotonic() < deadline, f"it never came to that:\n{self.said()[-3_000:]}"
            time.sleep(0.1)

    def until_read(self, records: int) -> None:
        self.until(lambda: self.counters().get("records", 0) >= records)

    def said(self) -> str:
        return self._log.read_text()

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.said().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def page(self, path: str) -> str:
        """What it answers there; nothing, where it says that it is not well."""
        try:
            with urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=10) as answer:
                return str(answer.read().decode())
        except (URLError, ConnectionError, TimeoutError):
            return ""

    def lag(self) -> float:
        """The records that are not yet read, as Prometheus is told."""
        lines = self.page("/metrics").splitlines()
        lags = [line for line in lines if line.startswith("retrain_daemon_kafka_lag_records{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lags)

    def counters(self) -> dict[str, int]:
        return dict(self._from_ledger(lambda ledger: ledger.counters()))

    def told(self, kind: str) -> list[dict[str, Any]]:
        """What the events of this kind say that stand in line for Prefect, by their partitions."""
        rows = self._from_ledger(lambda ledger: ledger.events())
        bodies = [json.loads(row["body"]) for row in rows if row["kind"] == f"retrain-daemon.{kind}"]
        for body in bodies:
            del body["payload"]["schema"]
        return sorted((body["payload"] for body in bodies), key=lambda payload: payload.get("partition", -1))

    def decisions(self) -> tuple[Any, ...]:
        """All that was decided, ids and scores included."""
        return tuple(
            self._from_ledger(
                lambda ledger: (
                    ledger.evidence("fraud"),
                    [(row["id"], row["kind"]) for row in ledger.events()],
                    [(row.id, row.attempt) for row in ledger.requests()],
                    ledger.counters(),
                )
            )
        )

    def _from_ledger(self, read: Callable[[Ledger], Any]) -> Any:
        ledger = Ledger(self._ledger)
        try:
            return read(ledger)
        finally:
            ledger.close()


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[LocalKafka]:
    """A broker that the test may take away."""
    if not java_and_maven():
        pytest.skip("needs Java and Maven")
    with LocalKafka(tmp_path / "kafka") as broker:
        yield broker


@pytest.fixture
def outage(own_kafka: LocalKafka, tmp_path: Path, no_evidently: dict[str, str]) -> Iterator[Outage]:
    """On a broker of the test's own."""
    made = Outage(tmp_path, own_kafka, no_evidently)
    yield made
    made.close()


@pytest.fixture
def scene(real_kafka: Any, tmp_path: Path, no_evidently: dict[str, str]) -> Iterator[Outage]:
    """On the broker of the session, which has to stay."""
    made = Outage(tmp_path, real_kafka.broker, no_evidently)
    yield made
    made.close()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Meanwhile that process does nothing, and does not end either."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def same_as_undisturbed(outage: Outage, daemon: Daemon) -> None:
    """Compare with what a daemon decides that reads the same log in peace."""
    peaceful = outage.daemon("peaceful")
    peaceful.start()
    peaceful.until_read(outage.written)
    assert peaceful.stop() == 0
    expected = peaceful.decisions()
    for one, other in zip(daemon.decisions(), expected, strict=True):
        assert one == other
    assert len(expected[0]) > 8 and len(expected[1]) > 1, "there was something to decide"


# --- Kafka away --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sessions", [0, 3])
def test_a_kafka_that_was_away_changes_no_decision(outage: Outage, sessions: int) -> None:
    """Also where it was away for longer than the session, which the group then takes for the member's end."""
    outage.write(400)
    daemon = outage.daemon()
    daemon.start()
    daemon.until_read(300)
    outage.kafka.kill()
    daemon.until(lambda: daemon.page("/readyz") == "")
    time.sleep(sessions * SESSION_SECONDS)
    outage.kafka.start()
    outage.write(300)
    daemon.until_read(outage.written)
    assert daemon.stop() == 0
    assert daemon.told("data.lost") == []
    same_as_undisturbed(outage, daemon)


# --- less data than there was -------------------------------------------------------------------------


def test_what_retention_deleted_unread_is_told_with_its_offsets(scene: Outage) -> None:
    scene.write(100)
    daemon = scene.daemon()
    daemon.start()
    daemon.until_read(100)
    assert daemon.stop() == 0
    scene.write(100)
    with admin(scene.settings) as client:
        client.delete_records({TopicPartition(scene.topic, 0): 80, TopicPartition(scene.topic, 1): 50})
    daemon.start()
    daemon.until_read(170)
    assert daemon.told("data.lost") == [
        {"topic": scene.topic, "partition": 0, "expected": 50, "available": 80}
    ]
    assert daemon.stop() == 0


@pytest.mark.slow
def test_a_kafka_that_comes_back_empty_is_told_of_and_read_from_its_start(outage: Outage) -> None:
    """A disk that was replaced: the same topic, and nothing in it."""
    outage.write(100)
    daemon = outage.daemon()
    daemon.start()
    daemon.until_read(100)
    outage.kafka.kill()
    shutil.rmtree(outage.kafka.data / f"{outage.topic}-0")
    outage.kafka.start()
    outage.write(20)
    daemon.until_read(120)
    assert daemon.told("data.lost") == [
        {"topic": outage.topic, "partition": 0, "expected": 50, "available": 0}
    ]
    assert daemon.stop() == 0


def test_a_topic_that_is_made_anew_is_told_of_and_read_from_its_start(scene: Outage) -> None:
    """Also where the new one has grown beyond the old one before anybody looks."""
    scene.write(100)
    daemon = scene.daemon()
    daemon.start()
    daemon.until_read(100)
    assert daemon.stop() == 0
    scene.delete()
    ensure_topics(scene.settings, {scene.topic: 2})
    scene.write(200)
    daemon.start()
    daemon.until_read(300)
    assert daemon.told("data.lost") == [
        {"topic": scene.topic, "partition": index, "expected": 50, "available": 0} for index in (0, 1)
    ]
    assert daemon.stop() == 0


@pytest.mark.slow
def test_offsets_that_were_reset_by_hand_are_told_of_and_do_not_count(scene: Outage) -> None:
    scene.write(500)
    daemon = scene.daemon()
    daemon.start()
    daemon.until_read(500)
    assert daemon.stop() == 0
    with admin(scene.settings) as client:
        client.alter_group_offsets(
            scene.group, {TopicPartition(scene.topic, 0): OffsetAndMetadata(7, "", -1)}
        )
    scene.write(100)
    daemon.start()
    daemon.until_read(600)
    assert daemon.stop() == 0
    (told,) = daemon.logged("group_offsets_differ")
    assert (told["partition"], told["group"], told["ledger"], told["going_on"]) == (0, 7, 250, 250)
    same_as_undisturbed(scene, daemon)


# --- no such topic, no such broker --------------------------------------------------------------------


def test_an_unknown_topic_ends_the_start_and_is_named(scene: Outage) -> None:
    daemon = scene.daemon(topic="predicitons")
    daemon.launch()
    assert daemon.ended() == 2
    assert "no topic 'predicitons'; correct kafka.topic" in daemon.said()


@pytest.mark.slow
def test_a_topic_that_is_deleted_while_it_is_read_ends_the_daemon_and_is_named(scene: Outage) -> None:
    scene.write(50)
    daemon = scene.daemon()
    daemon.start()
    daemon.until_read(50)
    scene.delete()
    assert daemon.ended() == 2
    assert f"has had no topic {scene.topic!r} for 30 s" in daemon.said()
    assert daemon.logged("topic_gone")


# --- what holds the loop up ---------------------------------------------------------------------------


@pytest.fixture
def steady(scene: Outage) -> Iterator[Callable[..., Daemon]]:
    """Starts a daemon on a log with something in it, which has to keep its place in the group to the end."""
    started: list[tuple[Daemon, frozenset[str]]] = []

    def members() -> frozenset[str]:
        with admin(scene.settings) as client:
            described = client.describe_groups([scene.group])[scene.group]
        return frozenset(member["member_id"] for member in described["members"])

    def start(**settings: str) -> Daemon:
        scene.write(100)
        daemon = scene.daemon(**settings)
        daemon.start()
        daemon.until_read(100)
        started.append((daemon, members()))
        return daemon

    yield start
    ((daemon, before),) = started
    scene.write(20)
    daemon.until_read(scene.written)
    daemon.until(lambda: daemon.lag() == 0)
    assert members() == before, "it left its group"
    assert len(daemon.logged("member_active")) == 1
    assert daemon.stop() == 0


def test_a_ledger_slower_than_the_session_costs_no_place(
    scene: Outage, steady: Callable[..., Daemon]
) -> None:
    daemon = steady()
    other = sqlite3.connect(daemon.ledger_file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    scene.write(200)
    time.sleep(4 * SESSION_SECONDS)
    assert daemon.counters() == {"records": 100, "dead_letters": 1}
    other.execute("ROLLBACK")
    other.close()
    daemon.until_read(300)


def test_a_prefect_that_never_answers_holds_nothing_up(scene: Outage, steady: Callable[..., Daemon]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        daemon = steady(prefect=f"http://127.0.0.1:{silent.getsockname()[1]}/api")
        scene.write(500)
        daemon.until_read(600)
        daemon.until(lambda: daemon.lag() == 0)
        assert daemon.told("drift.detected"), "there was something to post"


@pytest.mark.parametrize("engine", ["compiled", pytest.param("evidently", marks=pytest.mark.slow)])
def test_an_evidently_that_does_not_answer_costs_no_place(
    scene: Outage, steady: Callable[..., Daemon], engine: str
) -> None:
    """It draws reports beside the loop; where it judges, the loop waits for it, and the lag is told."""
    daemon = steady(engine=engine)
    scene.write(400)
    daemon.until(lambda: daemon.logged("evidently_started"))
    child = int(daemon.logged("evidently_started")[0]["pid"])
    with stopped(child):
        if engine == "compiled":
            scene.write(100)
            daemon.until_read(600)
        else:
            time.sleep(4 * SESSION_SECONDS)
            assert daemon.counters()["records"] < 500
    daemon.until_read(scene.written)
