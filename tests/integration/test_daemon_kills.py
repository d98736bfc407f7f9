"""Kill -9 of a real process on a real broker, wherever it hurts: the decisions stay the same."""

import json
import multiprocessing
import random
import sys
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import pytest

from daemon.ledger import Ledger
from daemon.wire.kafka_client import make_producer
from monitors.settings import KafkaSettings, ModelSettings, PolicySettings, WindowSettings

sys.path.append(str(Path(__file__).parent))
# It lies beside this file, and its processes must find it by its name.
import doomed_daemon

pytestmark = pytest.mark.kafka

START = datetime(2026, 1, 1, tzinfo=UTC)
PATIENCE_SECONDS = 600.0
# Each process is forked from one that has imported everything of ours: many starts cost what one does.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["daemon.engines", "daemon.loop", "daemon.wire.kafka", "daemon.wire.references", "monitors.decoding"]
)
STEPS = ("read", "scored", "before_commit", "after_commit")
ROWS = 3_000
END = START + timedelta(seconds=ROWS)
WINDOW, GRACE, HORIZON = timedelta(seconds=60), timedelta(seconds=5), timedelta(seconds=120)
MODEL = ModelSettings(
    reference_rows=300,
    label_horizon_seconds=HORIZON.total_seconds(),
    window=WindowSettings(
        seconds=WINDOW.total_seconds(),
        grace_seconds=GRACE.total_seconds(),
        min_rows=10,
        max_rows=40,
        idle_seconds=3_600.0,
    ),
    policy=PolicySettings(method="thresholds", for_windows=2, keep_firing_windows=1),
)


class Scene:
    """One log, and as many daemons with a ledger of their own as wanted."""

    def __init__(self, kafka: Any, folder: Path) -> None:
        self.settings = KafkaSettings(
            bootstrap_servers=kafka.bootstrap_servers,
            topic=kafka.topic(3),
            labels_topic=kafka.topic(1),
            dead_letter_topic=kafka.topic(1),
            group=f"group-{random.getrandbits(32):x}",
            start="earliest",
            session_timeout_seconds=1.5,
        )
        self._folder = folder
        self._rows: list[tuple[int, datetime, str]] = []
        self._labels: set[str] = set()

    def write(self) -> None:
        """Two drifts in 3,000 seconds of stream time, jittered, over three partitions; some garbage."""
        chance = random.Random(7)
        producer = make_producer(self.settings)
        for number in range(ROWS):
            drifted = 1_000 <= number < 1_500 or number >= 2_400
            jitter = chance.uniform(0, 20) if chance.random() < 0.05 else 0.0
            time = START + timedelta(seconds=max(0.0, number - jitter))
            body = {
                "model": "fraud",
                "model_version": "1",
                "id": f"r{number}",
                "event_time": time.isoformat(),
                "features": {"x": chance.gauss(4.0 if drifted else 0.0, 1.0), "y": chance.choice("abc")},
                "prediction": number % 2,
            }
            partition = chance.randrange(3)
            self._rows.append((partition, time, f"r{number}"))
            self._send(producer, self.settings.topics[0], partition, body)
            if number % 200 == 0:
                producer.send(self.settings.topics[0], value=b"garbage", partition=partition)
            if number % 3:
                self._labels.add(f"r{number}")
                known = (time + timedelta(seconds=30)).isoformat()
                label = {"model": "fraud", "id": f"r{number}", "label": number % 2, "event_time": known}
                self._send(producer, self.settings.labels_topic, 0, label)
        producer.flush()
        producer.close()

    def run(self, name: str, step: str = "none", countdown: int = 0) -> int | None:
        """One process, until it dies or is done; returns its exit code, None if it took too long."""
        plan = self._folder / f"{name}.json"
        plan.write_text(
            json.dumps(
                {
                    "kafka": msgspec.to_builtins(self.settings),
                    "models": {"fraud": msgspec.to_builtins(MODEL)},
                    "ledger": self._url(name),
                    "references": str(self._folder / f"{name}-references"),
                }
            )
        )
        child = FORKS.Process(target=doomed_daemon.main, args=(plan, step, countdown))
        child.start()
        child.join(PATIENCE_SECONDS)
        if child.is_alive():
            child.kill()
            return None
        return child.exitcode

    def labelled(self) -> dict[datetime, int]:
        """How many of each window's sampled rows have a label: the right answer, from what was written."""
        windows: dict[datetime, list[str]] = {}
        read: dict[int, datetime] = {}
        for partition, time, name in self._rows:
            start = START + (time - START) // WINDOW * WINDOW
            earlier = read.get(partition, time)
            read[partition] = max(earlier, time)
            if start + WINDOW + GRACE > earlier:
                windows.setdefault(start, []).append(name)
        most = MODEL.window.max_rows
        sampled = {start: sorted(names, key=_rank)[:most] for start, names in windows.items()}
        return {start: sum(name in self._labels for name in names) for start, names in sampled.items()}

    def judged_labels(self, name: str) -> dict[datetime, int]:
        """The same, as a ledger has it, of the windows whose horizon the label log has passed."""
        ledger = Ledger(self._url(name))
        rows = ledger.windows("fraud")
        ledger.close()
        return {
            datetime.fromisoformat(row["start"]): row["labelled"] for row in rows if row["metric"] is not None
        }

    def decisions(self, name: str) -> tuple[object, ...]:
        """All that a ledger says was decided, ids and scores included."""
        ledger = Ledger(self._url(name))
        scores = [(row["key"], row["score"], row["labelled"]) for row in ledger.windows("fraud")]
        told = [(row["id"], row["kind"]) for row in ledger.events()]
        requests = [(row.id, row.attempt) for row in ledger.requests()]
        decided = ledger.evidence("fraud"), told, requests, scores, ledger.counters()
        ledger.close()
        return decided

    def _url(self, name: str) -> str:
        return f"sqlite:///{self._folder / name}.db"

    @staticmethod
    def _send(producer: Any, topic: str, partition: int, body: dict[str, object]) -> None:
        producer.send(topic, value=json.dumps(body).encode(), partition=partition)


def _rank(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=8).digest()


@pytest.mark.parametrize("wanted", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_change_no_decision(kafka: Any, tmp_path: Path, wanted: int) -> None:
    scene = Scene(kafka, tmp_path)
    scene.write()
    assert scene.run("undisturbed") == 0
    expected = scene.decisions("undisturbed")
    judged_labels, right = scene.judged_labels("undisturbed"), scene.labelled()
    # Labels are taken up to the window that never closes; those before have passed the horizon.
    assert judged_labels == {start: right[start] for start in right if start < END - 2 * WINDOW - HORIZON}

    chance = random.Random(11)
    kills = 0
    for turn in range(4 * wanted):
        step = STEPS[turn % len(STEPS)]
        if scene.run("killed", step, chance.randint(1, 2)) == -9:
            kills += 1
        if kills == wanted:
            break
    assert scene.run("killed") == 0
    found = scene.decisions("killed")

    assert kills == wanted
    for one, other in zip(found, expected, strict=True):
        assert one == other
    judged, told, *_ = expected
    assert len(judged) > 40 and len(told) > 1, "there was something to decide"  # type: ignore[arg-type]
