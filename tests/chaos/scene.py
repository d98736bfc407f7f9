"""The scene: one log in stages, the same whoever plays it. Each stage ends in a request of every model."""

import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

from daemon.wire.kafka_client import make_producer
from monitors.settings import (
    DataSettings,
    GateSettings,
    KafkaSettings,
    ModelSettings,
    PolicySettings,
    TrainingSettings,
    WindowSettings,
)

MODELS = ("churn", "fraud", "spam")
START = datetime(2026, 1, 1, tzinfo=UTC)
PARTITIONS = 3
WINDOW, GRACE = timedelta(seconds=60), timedelta(seconds=5)
CALM_WINDOWS, DRIFTED_WINDOWS = 3, 3
ROWS_PER_WINDOW = 100
LABEL_DELAY = timedelta(seconds=20)
SETTINGS = ModelSettings(
    serving_version="1",
    reference_rows=400,
    label_horizon_seconds=120.0,
    window=WindowSettings(
        seconds=WINDOW.total_seconds(),
        grace_seconds=GRACE.total_seconds(),
        min_rows=20,
        max_rows=80,
        idle_seconds=86_400.0,
    ),
    policy=PolicySettings(
        method="thresholds", drift_share=0.6, for_windows=DRIFTED_WINDOWS, keep_firing_windows=1
    ),
    data=DataSettings(max_rows=400, min_rows=50),
    training=TrainingSettings(parameters={"max_iter": 30}),
    gate=GateSettings(min_holdout_rows=20, resamples=500),
)


class Scene:
    """
    What the service logs. A stage is two parts: calm windows, then drifted ones that end in a request.

    The request's window is the last that its part closes, and the next part is written only after all
    requests have ended. So every outcome meets every monitor between the same two windows, however long
    a run takes and whoever is killed meanwhile; that makes the undisturbed run an oracle.
    """

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._chance = random.Random(5)
        self._number = 0
        self._windows = 0
        # Where a daemon ends that has taken all it can: labels of an open window wait for it to close.
        self.ends = {(topic, index): 0 for topic in kafka.topics for index in range(PARTITIONS)}
        self.ends[kafka.labels_topic, 0] = 0
        self._labels = 0

    def reference(self) -> list[tuple[dict[str, Any], int]]:
        """The rows that the first champion is trained on, with their labels."""
        chance = random.Random(3)
        return [_row(chance, 0) for _ in range(SETTINGS.reference_rows)]

    def write_part(self, stage: int, drifted: bool, versions: dict[str, str]) -> None:
        """Write one part; `versions` are the champions, by model."""
        producer = make_producer(self._kafka)
        windows = DRIFTED_WINDOWS if drifted else CALM_WINDOWS
        world = stage if drifted else stage - 1
        begin = START + self._windows * WINDOW
        self._windows += windows
        end = START + self._windows * WINDOW
        labels: list[tuple[datetime, dict[str, Any]]] = []
        total = windows * ROWS_PER_WINDOW
        for step in range(total):
            time = begin + (end - begin) * step / total
            for model in MODELS:
                labels.append(self._write_row(producer, model, versions[model], time, world))
            if step % 50 == 0:
                self._send(producer, step % PARTITIONS, b"garbage")
        for partition in range(PARTITIONS):
            # Time goes on in every partition, far enough to close what was written and nothing more.
            self._write_row(producer, MODELS[0], versions[MODELS[0]], end + GRACE, world, partition)
        for time, label in labels:
            body = json.dumps({**label, "event_time": time.isoformat()}).encode()
            producer.send(self._kafka.labels_topic, value=body, partition=0)
        producer.flush()
        producer.close()
        self.ends[self._kafka.labels_topic, 0] = self._labels + sum(time < end for time, _ in labels)
        self._labels += len(labels)

    def _write_row(
        self,
        producer: Any,
        model: str,
        version: str,
        time: datetime,
        world: int,
        where: int | None = None,
    ) -> tuple[datetime, dict[str, Any]]:
        features, label = _row(self._chance, world)
        name = f"{model}-{self._number}"
        self._number += 1
        partition = self._chance.randrange(PARTITIONS) if where is None else where
        body = {
            "model": model,
            "model_version": version,
            "id": name,
            "event_time": time.isoformat(),
            "features": features,
            "prediction": label,
        }
        self._send(producer, partition, json.dumps(body).encode())
        return time + LABEL_DELAY, {"model": model, "id": name, "label": label}

    def _send(self, producer: Any, partition: int, value: bytes) -> None:
        topic = self._kafka.topics[0]
        producer.send(topic, value=value, partition=partition)
        self.ends[topic, partition] += 1


def _row(chance: random.Random, world: int) -> tuple[dict[str, Any], int]:
    """Each world lies elsewhere, and has its own boundary: what was learned in one is wrong in the next."""
    shift = 3.0 * world
    x, y, z = (chance.gauss(shift, 1.0) for _ in range(3))
    above = x + y > 2 * shift
    return {"x": x, "y": y, "z": z}, int(above if world % 2 else not above)
