"""A loop that is watched: over an in-memory log and a real ledger, with its metrics and its pages."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from daemon.engines import StoredEngines
from daemon.evidently_worker import EvidentlyWorker
from daemon.health import Health
from daemon.http import HttpServer
from daemon.ledger import Ledger
from daemon.ledger_metrics import LedgerMetrics
from daemon.loop import Loop, LoopSettings
from daemon.memory import MemoryDeadLetters, MemoryLog, MemorySource
from daemon.metrics import Metrics
from daemon.wire.references import ReferenceStore
from monitors.decoding import make_decoder
from monitors.drift import WindowRows
from monitors.episodes import Judged
from monitors.records import Partition, RawRecord
from monitors.settings import (
    FieldSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    PolicySettings,
    WindowSettings,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
MODEL = ModelSettings(
    reference_rows=100,
    label_horizon_seconds=100.0,
    window=WindowSettings(seconds=50.0, grace_seconds=0.0, min_rows=10, max_rows=50),
    policy=PolicySettings(method="thresholds", for_windows=2, backoff_windows=1),
)
BY_BUDGET = PolicySettings(windows_between_false_retrainings=4.0)
TOPICS = ("predictions", "labels")


class NoReviews:
    """Evidently is asked elsewhere."""

    def url_of(self, model: str, version: str, key: int) -> str:
        return f"http://reports/{model}-{version}-{key}.html"

    def offer(self, judged: Judged, rows: WindowRows, wanted: bool) -> None: ...


class Quick(MemorySource):
    """Does not wait for what will not come."""

    def poll(self, timeout_seconds: float) -> Sequence[RawRecord]:
        return super().poll(min(timeout_seconds, 0.01))


class Cycles:
    """Stops a loop after so many."""

    def __init__(self, count: int) -> None:
        self._left = count

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


class Member:
    """One process: its loop, its metrics, its pages."""

    def __init__(self, world: "Watched", letters: MemoryDeadLetters) -> None:
        self.clock = 0.0
        self.prefect_reachable = True
        self.ledger = Ledger(f"sqlite:///{world.folder / 'ledger.db'}")
        self.health = Health(lambda: self.clock)
        self.metrics = Metrics(["fraud"], TOPICS, self.health)
        settings = LoopSettings(
            group="g",
            member="m",
            mode="retrain",
            models={"fraud": world.model},
            limits=LimitSettings(),
            labels_topic=world.labels_topic,
            checkpoint_seconds=3_600.0,
        )
        store = ReferenceStore(str(world.folder / "references"))
        self.loop = Loop(
            settings,
            Quick(world.log, KafkaSettings(labels_topic=world.labels_topic, start="earliest")),
            make_decoder(
                {topic: FieldSettings() for topic in TOPICS}, world.labels_topic, ["fraud"], LimitSettings()
            ),
            letters,
            self.ledger,
            StoredEngines(store, {"fraud": world.model}, "compiled", EvidentlyWorker()),
            NoReviews(),
            self.metrics,
        )
        self.metrics.registry.register(
            LedgerMetrics(
                self.ledger, {"fraud": world.model}, 120.0, self.loop.owner, lambda: self.prefect_reachable
            )
        )
        self.http = HttpServer("127.0.0.1", 0, world.folder, dict, self.health, self.metrics.render)
        self.http.start()

    def cycles(self, count: int = 4) -> None:
        self.loop.run(Cycles(count))  # type: ignore[arg-type]

    def get(self, path: str, accept: str = "") -> tuple[int, str, str]:
        """Status, content type and text of one of the pages."""
        try:
            with urlopen(Request(self.http.url + path, headers={"Accept": accept}), timeout=60) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], error.read().decode()

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        """The samples of one metric as Prometheus reads them, by the values of their labels by name."""
        _, _, text = self.get("/metrics")
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"retrain_daemon_{name}"
        }

    def value(self, name: str, *labels: str) -> float:
        return self.samples(name)[labels]


class Watched:
    """What outlives a process, and the members that were started on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = MODEL
        self.labels_topic = "labels"
        self.log = MemoryLog()
        for topic in TOPICS:
            self.log.create(topic)
        self.members: list[Member] = []
        self._rows = 0

    def member(self, letters: MemoryDeadLetters | None = None) -> Member:
        self.members.append(Member(self, letters or MemoryDeadLetters()))
        return self.members[-1]

    def predict(self, count: int, shift: float = 0.0, version: str = "1", at: int | None = None) -> None:
        """One record for each second from where the last ones ended, or all in one second."""
        for _ in range(count):
            number, self._rows = self._rows, self._rows + 1
            features = {"x": number * 7 % 50 + shift, "y": number * 3 % 40 + shift}
            self.write(
                "predictions",
                number if at is None else at,
                {"model_version": version, "id": f"r{number}", "features": features, "prediction": 1},
            )

    def label(self, numbers: Sequence[int], at: int) -> None:
        for number in numbers:
            self.write("labels", at, {"id": f"r{number}", "label": number % 2})

    def garbage(self, value: bytes) -> None:
        self.log.append(Partition("predictions", 0), value, timestamp_ms=int(START.timestamp() * 1000))

    def write(self, topic: str, at: int, body: Mapping[str, Any]) -> None:
        time = START + timedelta(seconds=at)
        value = json.dumps({"model": "fraud", "event_time": time.isoformat(), **body}).encode()
        self.log.append(Partition(topic, 0), value, timestamp_ms=int(time.timestamp() * 1000))

    def close(self) -> None:
        for member in self.members:
            member.http.close()
            member.ledger.close()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    """A world of the test's own."""
    world = Watched(tmp_path)
    yield world
    world.close()


@pytest.fixture(scope="session")
def experienced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Member]:
    """A member that has been through everything: drift, labels, garbage, late records. To be read only."""
    world = Watched(tmp_path_factory.mktemp("experienced"))
    world.model = msgspec.structs.replace(MODEL, policy=BY_BUDGET)
    member = world.member()
    world.predict(200)
    world.predict(150, shift=60.0)
    world.predict(3, at=0)
    world.garbage(b"{")
    world.label(range(350), at=290)
    member.cycles()
    yield member
    world.close()
