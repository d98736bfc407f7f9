"""ACLs on a real broker with TLS and SCRAM: README's table is enough, and each of its rows is needed."""

import json
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest

from daemon.dlq import Selection, letters
from daemon.engines import StoredEngines
from daemon.evidently_worker import EvidentlyWorker
from daemon.ledger import Ledger
from daemon.loop import Loop, LoopSettings
from daemon.verify import Verification, verify
from daemon.wire.kafka import KafkaDeadLetters, KafkaRefused, KafkaSource, log_bounds, read_ranges
from daemon.wire.kafka_client import PASSWORD_VARIABLE, USERNAME_VARIABLE, admin
from daemon.wire.kafka_log import KafkaLog
from daemon.wire.kafka_sender import KafkaSender
from daemon.wire.references import ReferenceStore
from flows.data import extract
from monitors.decoding import make_decoder
from monitors.drift import WindowRows
from monitors.episodes import Judged
from monitors.events import OffsetRange
from monitors.records import InvalidRecord, Partition, RawRecord
from monitors.settings import (
    DataSettings,
    FieldSettings,
    FlowSettings,
    KafkaSettings,
    LimitSettings,
    ModelSettings,
    PolicySettings,
    RegistrySettings,
    WindowSettings,
)

pytestmark = pytest.mark.kafka

README = Path(__file__).parents[2] / "README.md"
START = datetime(2026, 1, 1, tzinfo=UTC)
ROWS = 120
# From this row on; its window is judged, and the one after it.
DRIFT = 60
# The labels of the last window wait in their topic until it is closed, which it never is.
LABELS_READ = 90
MODEL = ModelSettings(
    serving_version="1",
    reference_rows=30,
    window=WindowSettings(seconds=30.0, grace_seconds=0.0, min_rows=5),
    policy=PolicySettings(method="thresholds", for_windows=1),
    data=DataSettings(min_rows=ROWS),
)
# What must have been said by then, the time to try included.
SAID_SECONDS = 15.0
PATIENCE_SECONDS = 120.0

Permission = tuple[str, str, str]


class NoReviews:
    """Evidently has tests of its own."""

    def url_of(self, model: str, version: str, key: int) -> str:
        return ""

    def offer(self, judged: Judged, rows: WindowRows, wanted: bool) -> None: ...


class Scene:
    """Topics and a group of the test's own, and who may do what with them."""

    def __init__(self, secured: Any, folder: Path) -> None:
        self.secured = secured
        self._folder = folder
        self.names = {
            "kafka.topic": secured.topic("predictions"),
            "kafka.labels_topic": secured.topic("labels"),
            "kafka.dead_letter_topic": secured.topic("dead"),
            "kafka.group": secured.name("group"),
        }
        secured.produce(self.names["kafka.topic"], [b"garbage", *map(prediction, range(ROWS))])
        secured.produce(self.names["kafka.labels_topic"], list(map(label, range(ROWS))))

    def settings(self, user: str, **fields: Any) -> KafkaSettings:
        named = {key.removeprefix("kafka."): name for key, name in self.names.items()}
        found: KafkaSettings = self.secured.settings(user, **(named | fields))
        return found

    def grant(self, user: str, permissions: list[Permission]) -> None:
        for operation, kind, key in permissions:
            self.secured.grant(user, operation, kind, self.names[key])

    def revoke(self, user: str, permission: Permission) -> None:
        operation, kind, key = permission
        self.secured.revoke(user, operation, kind, self.names[key])

    def asked_for(self, user: str, permission: Permission) -> str:
        """How an error asks for it."""
        operation, kind, key = permission
        return (
            f"--add --allow-principal User:{user} --operation {operation.capitalize()} "
            f"--{kind} {self.names[key]}"
        )

    def flow(self) -> FlowSettings:
        """What a deployment gives the worker: all that the daemon has but its password."""
        kafka = self.settings("daemon", sasl_password="")
        flow = FlowSettings(
            model="fraud",
            settings=MODEL,
            kafka=kafka,
            fields={topic: FieldSettings() for topic in (*kafka.topics, kafka.labels_topic)},
            limits=LimitSettings(),
            registry=RegistrySettings(),
        )
        return msgspec.json.decode(msgspec.json.encode(flow), type=FlowSettings)


class Daemon:
    """The loop with all that it needs of Kafka."""

    def __init__(self, kafka: KafkaSettings, folder: Path) -> None:
        models = {"fraud": MODEL}
        fields = {topic: FieldSettings() for topic in (*kafka.topics, kafka.labels_topic)}
        self.kafka = kafka
        self.decoder = make_decoder(fields, kafka.labels_topic, list(models), LimitSettings())
        self.references = ReferenceStore(str(folder / "references"))
        self.ledger = Ledger(f"sqlite:///{folder / f'{time.monotonic_ns()}.db'}")
        self.source = KafkaSource(kafka)
        self.letters: KafkaDeadLetters | None = None
        try:
            self.letters = KafkaDeadLetters(kafka)
            self.loop = Loop(
                LoopSettings(
                    group=kafka.group,
                    member="test",
                    mode="observe",
                    models=models,
                    limits=LimitSettings(),
                    labels_topic=kafka.labels_topic,
                    checkpoint_seconds=0.2,
                ),
                self.source,
                self.decoder,
                self.letters,
                self.ledger,
                StoredEngines(self.references, models, "compiled", EvidentlyWorker()),
                NoReviews(),
            )
        except BaseException:
            self.close()
            raise

    def run_until_all_is_read(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.ledger.counters().get("records", 0) < ROWS + 1 + LABELS_READ:
            self.loop.run_once(0.2)
            assert time.monotonic() < deadline, self.ledger.counters()

    def verify(self) -> Verification:
        """Read the episode's offsets again, as the same user, and judge them again."""
        log = KafkaLog(self.kafka)
        return verify(self.ledger, ["fraud"], "fraud:1", log, self.decoder, self.references, self.kafka.group)

    def run_until_refused(self) -> tuple[str, float]:
        """What the error says, and after how long."""
        began = time.monotonic()
        with pytest.raises(KafkaRefused) as caught:
            while time.monotonic() - began < SAID_SECONDS:
                self.loop.run_once(0.2)
        return str(caught.value), time.monotonic() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.letters is not None:
            self.letters.close()
        self.source.close()
        self.ledger.close()


def prediction(number: int) -> bytes:
    record = {
        "model": "fraud",
        "model_version": "1",
        "id": f"r{number}",
        "event_time": (START + timedelta(seconds=number)).isoformat(),
        "features": {"x": 6 if number >= DRIFT else number % 7, "plan": "ab"[number % 2]},
        "prediction": number % 2,
    }
    return json.dumps(record).encode()


def label(number: int) -> bytes:
    told = (START + timedelta(seconds=number)).isoformat()
    return json.dumps(
        {"model": "fraud", "id": f"r{number}", "label": number % 2, "event_time": told}
    ).encode()


def readme_permissions(user: str) -> list[Permission]:
    """The rows of README's table for this user; two that share a key share a row."""
    rows = re.findall(
        r"^\| (daemon|worker|operator) \| (\w+) \| (\w+) \| (.+?) \|", README.read_text(), re.MULTILINE
    )
    return [
        (operation.lower(), kind, key)
        for who, operation, kind, keys in rows
        if who == user
        for key in re.findall(r"`(kafka\.\w+)`", keys)
    ]


DAEMON = readme_permissions("daemon")
WORKER = readme_permissions("worker")
OPERATOR = readme_permissions("operator")


@pytest.fixture(scope="module")
def scene(secured: Any, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Everybody has what README says, and nothing more."""
    made = Scene(secured, tmp_path_factory.mktemp("scene"))
    made.grant("daemon", DAEMON)
    made.grant("worker", WORKER)
    made.grant("operator", OPERATOR)
    return made


@pytest.fixture
def lacking(scene: Scene, request: pytest.FixtureRequest) -> Iterator[tuple[str, Permission]]:
    """One permission less, for one test."""
    user, permission = request.param
    scene.revoke(user, permission)
    yield user, permission
    scene.grant(user, [permission])


def named(permission: Permission) -> str:
    return "-".join(permission)


# --- the smallest set of permissions -------------------------------------------------------------


def test_the_readme_names_permissions_for_all() -> None:
    assert len(DAEMON) == len(set(DAEMON)) == 4
    assert len(WORKER) == len(set(WORKER)) == 2
    assert len(OPERATOR) == len(set(OPERATOR)) == 3


def test_the_loop_runs_with_what_the_readme_grants(scene: Scene, tmp_path: Path) -> None:
    with Daemon(scene.settings("daemon"), tmp_path) as daemon:
        daemon.run_until_all_is_read()
        assert [judged.seen for judged in daemon.ledger.evidence("fraud")] == [30, 30, 30]
        assert daemon.ledger.counters()["dead_letters"] == 1
        found = daemon.verify()
        assert found.equal and len(found.windows) >= 1
    root, dead = scene.settings("root"), scene.names["kafka.dead_letter_topic"]
    ((first, end),) = log_bounds(root, dead).values()
    assert [letter.value for letter in read_ranges(root, [OffsetRange(dead, 0, first, end)])] == [b"garbage"]
    with admin(root) as client:
        committed = client.list_group_offsets(scene.names["kafka.group"])[scene.names["kafka.group"]]
    assert {one.topic: kept.offset for one, kept in committed.items()} == {
        scene.names["kafka.topic"]: ROWS + 1,
        scene.names["kafka.labels_topic"]: LABELS_READ,
    }


@pytest.mark.parametrize(
    "lacking", [("daemon", one) for one in DAEMON], indirect=True, ids=lambda p: named(p[1])
)
def test_the_daemon_needs_each_of_them_and_says_which_at_the_start(
    scene: Scene, lacking: tuple[str, Permission], tmp_path: Path
) -> None:
    began = time.monotonic()
    with pytest.raises(KafkaRefused) as caught, Daemon(scene.settings("daemon"), tmp_path) as daemon:
        daemon.run_until_all_is_read()
    assert scene.asked_for(*lacking) in str(caught.value)
    assert time.monotonic() - began < SAID_SECONDS


@pytest.mark.parametrize("permission", DAEMON, ids=named)
def test_a_permission_that_is_taken_from_a_running_daemon_is_not_met_with_silence(
    scene: Scene, permission: Permission, tmp_path: Path
) -> None:
    with Daemon(scene.settings("daemon"), tmp_path) as daemon:
        daemon.run_until_all_is_read()
        scene.revoke("daemon", permission)
        try:
            if permission[0] == "write":
                scene.secured.produce(scene.names["kafka.topic"], [b"garbage"])
            said, took = daemon.run_until_refused()
        finally:
            scene.grant("daemon", [permission])
    assert scene.asked_for("daemon", permission) in said
    assert took < SAID_SECONDS


def test_a_dead_letter_topic_that_may_not_be_made_is_asked_for(scene: Scene) -> None:
    absent = scene.secured.name("absent")
    scene.secured.grant("daemon", "write", "topic", absent)
    with pytest.raises(KafkaRefused, match=f"--create --topic {absent}"):
        KafkaDeadLetters(scene.settings("daemon", dead_letter_topic=absent))
    scene.secured.grant("daemon", "create", "topic", absent)
    KafkaDeadLetters(scene.settings("daemon", dead_letter_topic=absent)).close()


# --- the worker ----------------------------------------------------------------------------------


@pytest.fixture
def on_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that says who this is, and no password yet."""
    monkeypatch.setenv(USERNAME_VARIABLE, "worker")
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)


@pytest.mark.usefixtures("on_a_worker")
def test_a_worker_takes_the_password_from_its_environment(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, scene.secured.settings("worker").sasl_password)
    assert len(extract(scene.flow(), None).labels) == ROWS


@pytest.mark.usefixtures("on_a_worker")
def test_a_worker_takes_the_password_from_a_file(scene: Scene, tmp_path: Path) -> None:
    flow = scene.flow()
    file = tmp_path / "password"
    kafka = msgspec.structs.replace(flow.kafka, sasl_password_file=str(file))
    flow = msgspec.structs.replace(flow, kafka=kafka)
    with pytest.raises(KafkaRefused, match=f"cannot read {file}.*{PASSWORD_VARIABLE}"):
        extract(flow, None)
    file.write_text(scene.secured.settings("worker").sasl_password + "\n")
    assert len(extract(flow, None).labels) == ROWS


@pytest.mark.usefixtures("on_a_worker")
def test_a_worker_without_a_password_says_where_it_looked(scene: Scene) -> None:
    with pytest.raises(
        KafkaRefused, match=f"no password for 'worker'.*{PASSWORD_VARIABLE}.*sasl_password_file"
    ):
        extract(scene.flow(), None)


@pytest.mark.usefixtures("on_a_worker")
@pytest.mark.parametrize(
    "lacking", [("worker", one) for one in WORKER], indirect=True, ids=lambda p: named(p[1])
)
def test_the_worker_needs_each_of_them_and_says_which(
    scene: Scene, lacking: tuple[str, Permission], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, scene.secured.settings("worker").sasl_password)
    with pytest.raises(KafkaRefused) as caught:
        extract(scene.flow(), None)
    assert scene.asked_for(*lacking) in str(caught.value)


# --- whoever looks after dead letters -------------------------------------------------------------


def test_an_operator_lists_dead_letters_and_sends_them_back(scene: Scene) -> None:
    """To a topic of a scene that nobody counts the records of."""
    topic, dead = scene.names["kafka.topic"], scene.names["kafka.dead_letter_topic"]
    settings = scene.settings("operator")
    daemon = KafkaDeadLetters(scene.settings("daemon"))
    raw = RawRecord(Partition(topic, 0), 0, int(START.timestamp() * 1_000), None, b"garbage")
    daemon.put(raw, InvalidRecord("invalid_json", "it is garbage"))
    daemon.flush()
    daemon.close()
    listed = list(letters(KafkaLog(settings), dead, Selection(), {}))
    assert listed and {letter.topic for letter in listed} == {topic}
    sender = KafkaSender(settings)
    assert [answer.problem for answer in sender.send([raw])] == [""]
    sender.close()


@pytest.mark.parametrize(
    "lacking", [("operator", one) for one in OPERATOR], indirect=True, ids=lambda p: named(p[1])
)
def test_the_operator_needs_each_of_them_and_is_told(scene: Scene, lacking: tuple[str, Permission]) -> None:
    user, (operation, _, key) = lacking
    settings = scene.settings(user)
    if operation == "read":
        with pytest.raises(KafkaRefused) as caught:
            list(letters(KafkaLog(settings), scene.names[key], Selection(), {}))
        assert scene.asked_for(*lacking) in str(caught.value)
        return
    sender = KafkaSender(settings)
    (answer,) = sender.send([RawRecord(Partition(scene.names[key], 0), 0, 0, None, b"garbage")])
    sender.close()
    assert scene.asked_for(*lacking) in answer.problem and answer.certain
