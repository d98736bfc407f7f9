"""Several real daemons on one Postgres ledger: killed, paused and cut off, they decide as one would."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from daemon.ledger import Ledger
from daemon.wire.kafka_client import log_bounds, make_producer

pytestmark = [pytest.mark.kafka, pytest.mark.slow]

START = datetime(2026, 1, 1, tzinfo=UTC)
PATIENCE_SECONDS = 180.0
ROWS = 2_500
DRIFTED = (range(1_000, 1_500), range(2_000, ROWS))
CONFIG = """
mode = "retrain"
[kafka]
bootstrap_servers = "{servers}"
topic = "{topic}"
labels_topic = "{labels}"
dead_letter_topic = "{letters}"
group = "{group}"
sharing = "{sharing}"
start = "earliest"
session_timeout_seconds = 6.0
[prefect]
api_url = "http://127.0.0.1:9/api"
[ledger]
url = "{ledger}"
checkpoint_seconds = 0.5
[registry]
references_url = "{name}-references"
[reports]
folder = "{name}-reports"
[http]
port = 0
"""
MODEL = """
[models.{model}]
reference_rows = 300
label_horizon_seconds = 120.0
[models.{model}.window]
seconds = 60.0
grace_seconds = 5.0
min_rows = 10
max_rows = 40
idle_seconds = 3600.0
[models.{model}.policy]
method = "thresholds"
keep_firing_windows = 1
"""


def eventually(what: Callable[[], object], why: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not what():
        assert time.monotonic() < deadline, f"not in {PATIENCE_SECONDS:.0f} s: {why}"
        time.sleep(0.2)


class Member:
    """One `retrain-daemon start`, and what it logs."""

    def __init__(self, config: Path, log: Path) -> None:
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "daemon.cli", "start", "--config", str(config)],
                env=os.environ | {"RETRAIN_DAEMON_LOG__FORMAT": "json"},
                stdout=out,
                stderr=out,
            )

    def logged(self, event: str) -> list[dict[str, Any]]:
        """What it told under this name."""
        return [one for one in self._told() if one["event"] == event]

    def _told(self) -> list[dict[str, Any]]:
        """Its last line may not be whole yet."""
        lines = self._log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def until_logged(self, event: str, times: int = 1) -> None:
        def found() -> bool:
            assert self.alive, f"it ended:\n{self._log.read_text()[-3000:]}"
            return len(self.logged(event)) >= times

        eventually(found, f"{event} (for the {times}. time) in {self._log}")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def owns(self) -> int:
        """How many partitions it last said it has."""
        said = {"member_active", "member_standby", "member_fenced", "partitions_lost"}
        last = [one for one in self._told() if one["event"] in said][-1:]
        return last[0]["partitions"] if last and last[0]["event"] == "member_active" else 0

    def until_owns(self, partitions: int) -> None:
        def owned() -> bool:
            assert self.alive, f"it ended:\n{self._log.read_text()[-3000:]}"
            return self.owns() == partitions

        eventually(owned, f"{partitions} partitions owned in {self._log}")

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)

    def stop(self) -> int:
        """Ask it to end; returns its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(120)


class Scene:
    """One log, and as many groups of daemons with a ledger of their own as wanted."""

    def __init__(
        self, kafka: Any, folder: Path, models: Sequence[str], sharing: str, partitions: int
    ) -> None:
        self.kafka = kafka
        self.sharing = sharing
        self._by_model = sharing == "by-model"
        self.topic, self.labels = kafka.topic(partitions), kafka.topic(partitions if self._by_model else 1)
        self.all = 2 * partitions if self._by_model else partitions + 1
        self._letters, self._group = kafka.topic(), kafka.name("group")
        self._folder = folder
        self._models = models
        self._partitions = partitions
        self._chance = random.Random(7)
        self._written = 0
        self.members: list[Member] = []

    def write(self, until: int) -> None:
        """Go on with the log up to this row: drift from time to time, some garbage, labels."""
        producer = make_producer(self.kafka.settings())
        for number in range(self._written, until):
            for model in self._models:
                self._write_row(producer, model, number)
        self._written = until
        producer.flush()
        producer.close()

    def finish(self) -> None:
        """A last record in every partition, so far ahead that all windows are closed and labels taken."""
        self.write(ROWS)
        producer = make_producer(self.kafka.settings())
        for model in self._models:
            for partition in self._partitions_of(model):
                body = self._prediction(
                    model, f"last-{partition}", START + timedelta(seconds=ROWS + 600), 0.0
                )
                self._send(producer, self.topic, partition, body)
        producer.flush()
        producer.close()

    def start(self, name: str, ledger: str, sharing: str = "") -> Member:
        number = len(self.members)
        config = self._folder / f"{name}-{number}.toml"
        config.write_text(
            CONFIG.format(
                servers=self.kafka.bootstrap_servers,
                topic=self.topic,
                labels=self.labels,
                letters=self._letters,
                group=self._group,
                sharing=sharing or self.sharing,
                ledger=ledger,
                name=name,
            )
            + "".join(MODEL.format(model=model) for model in self._models)
        )
        self.members.append(Member(config, self._folder / f"{name}-{number}.log"))
        return self.members[-1]

    def until_read(self, url: str, *topics: str) -> None:
        """Until the ledger has everything that is in these topics."""
        ledger = Ledger(url)
        ends = {
            one: end for topic in topics for one, (_, end) in log_bounds(self.kafka.settings(), topic).items()
        }

        def read() -> bool:
            at = ledger.restore().positions
            return all(one in at and at[one].next_offset >= end for one, end in ends.items())

        try:
            eventually(read, f"all of {', '.join(topics)} in the ledger")
        finally:
            ledger.close()

    def undisturbed(self, url: str) -> dict[str, object]:
        """
        The decisions of one member that reads everything, and that nobody disturbs.

        It shares as the others do: one that reads all label partitions as one group takes the labels of the
        newest window only when the next one is due, and this log ends before.
        """
        member = self.start("undisturbed", url)
        self.until_read(url, self.topic, self.labels)
        assert member.stop() == 0
        return self.decisions(url)

    def decisions(self, url: str) -> dict[str, object]:
        """All that a ledger says was decided, ids and scores included."""
        ledger = Ledger(url)
        decided: dict[str, object] = {"counters": ledger.counters()}
        events = ledger.events()
        for model in self._models:
            decided[f"{model} windows"] = ledger.evidence(model)
            decided[f"{model} scores"] = [
                (row["key"], row["score"], row["labelled"]) for row in ledger.windows(model)
            ]
            decided[f"{model} events"] = [(row["id"], row["kind"]) for row in events if row["model"] == model]
            decided[f"{model} requests"] = [(row.id, row.attempt) for row in ledger.requests(model)]
        ledger.close()
        return decided

    def judged_twice(self) -> list[tuple[object, ...]]:
        """The windows that members of a group told of more than once."""
        told = [
            (one["model"], one["version"], one["end"])
            for member in self.members
            for one in member.logged("window_evaluated")
        ]
        return [one for one in set(told) if told.count(one) > 1]

    def close(self) -> None:
        for member in self.members:
            if member.alive:
                member.kill()

    def _write_row(self, producer: Any, model: str, number: int) -> None:
        chance = self._chance
        drifted = any(number in span for span in DRIFTED)
        jitter = chance.uniform(0, 20) if chance.random() < 0.05 else 0.0
        event_time = START + timedelta(seconds=max(0.0, number - jitter))
        partition = chance.choice(self._partitions_of(model))
        body = self._prediction(model, f"r{number}", event_time, 4.0 if drifted else 0.0)
        self._send(producer, self.topic, partition, body)
        if number % 200 == 0:
            producer.send(self.topic, value=b"garbage", partition=partition)
        if number % 3:
            known = (event_time + timedelta(seconds=30)).isoformat()
            label = {"model": model, "id": f"r{number}", "label": number % 2, "event_time": known}
            self._send(producer, self.labels, partition if self._by_model else 0, label)

    def _partitions_of(self, model: str) -> Sequence[int]:
        if self._by_model:
            return (self._models.index(model) % self._partitions,)
        return range(self._partitions)

    def _prediction(self, model: str, name: str, event_time: datetime, shift: float) -> dict[str, object]:
        return {
            "model": model,
            "model_version": "1",
            "id": name,
            "event_time": event_time.isoformat(),
            "features": {"x": self._chance.gauss(shift, 1.0), "y": self._chance.choice("abc")},
            "prediction": 1,
        }

    @staticmethod
    def _send(producer: Any, topic: str, partition: int, body: dict[str, object]) -> None:
        producer.send(topic, value=json.dumps(body).encode(), partition=partition)


@pytest.fixture
def scene(request: pytest.FixtureRequest, real_kafka: Any, tmp_path: Path) -> Iterator[Scene]:
    sharing = getattr(request, "param", "one-active")
    models = ["fraud", "churn", "price"] if sharing == "by-model" else ["fraud"]
    made = Scene(real_kafka, tmp_path, models, sharing, 2 if sharing == "by-model" else 3)
    yield made
    made.close()


@pytest.mark.parametrize("scene", ["one-active", "by-model"], indirect=True)
def test_a_killed_and_a_paused_member_double_and_miss_no_window(scene: Scene, postgres: Any) -> None:
    url = postgres.database()
    half = scene.all // 2 if scene.sharing == "by-model" else 0
    first = scene.start("group", url)
    scene.write(700)
    first.until_logged("window_evaluated")
    second = scene.start("group", url)
    first.until_owns(scene.all - half)
    second.until_owns(half)
    second.until_logged("member_active" if half else "member_standby")

    scene.write(1_200)
    first.kill()
    second.until_owns(scene.all)
    scene.until_read(url, scene.topic)

    third = scene.start("group", url)
    second.until_owns(scene.all - half)
    third.until_owns(half)
    third.until_logged("member_active" if half else "member_standby")
    scene.write(1_500)
    second.pause()
    third.until_owns(scene.all)
    scene.write(2_000)
    scene.until_read(url, scene.topic)
    second.resume()
    second.until_owns(half)
    third.until_owns(scene.all - half)

    scene.finish()
    third.kill()
    second.until_owns(scene.all)
    scene.until_read(url, scene.topic, scene.labels)
    assert second.stop() == 0
    assert scene.judged_twice() == []

    found, expected = scene.decisions(url), scene.undisturbed(postgres.database())
    for what in expected:
        assert found[what] == expected[what], what
    assert len(expected["fraud windows"]) > 40, "there was something to decide"  # type: ignore[arg-type]
    assert len(expected["fraud requests"]) == 1  # type: ignore[arg-type]


def test_a_member_outlives_its_postgres(scene: Scene, own_postgres: Any) -> None:
    url = own_postgres.database()
    member = scene.start("group", url)
    scene.write(1_200)
    member.until_logged("window_evaluated")
    own_postgres.kill()
    scene.finish()
    member.until_logged("ledger_away")
    own_postgres.start()
    scene.until_read(url, scene.topic, scene.labels)
    assert member.stop() == 0
    assert scene.judged_twice() == []
    found, expected = scene.decisions(url), scene.undisturbed(own_postgres.database())
    for what in expected:
        assert found[what] == expected[what], what
