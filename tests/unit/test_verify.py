"""Verify: an episode that is as it was is equal; one thing altered, anywhere, is named."""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from daemon.engines import StoredEngines
from daemon.errors import UsageError
from daemon.evidently_worker import EvidentlyWorker
from daemon.ledger import Ledger
from daemon.loop import Loop, LoopSettings, RequestEnded, ScoresDisputed
from daemon.memory import MemoryDeadLetters, MemoryLog, MemoryReader, MemorySource
from daemon.verify import Verification, verify
from daemon.wire.references import ReferenceStore
from monitors.decoding import make_decoder
from monitors.drift import WindowRows
from monitors.episodes import Judged
from monitors.events import Outcome
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
TOPIC = "predictions"
POLICY = PolicySettings(method="thresholds", for_windows=2, keep_firing_windows=1, backoff_windows=1)
BY_TIME = ModelSettings(
    reference_rows=100,
    window=WindowSettings(seconds=60.0, grace_seconds=5.0, min_rows=10, max_rows=40, idle_seconds=3_600.0),
    policy=POLICY,
)
BY_COUNT = ModelSettings(
    reference_rows=100, window=WindowSettings(rows=50, min_rows=10, max_rows=50), policy=POLICY
)


class NoReviews:
    """Evidently has tests of its own."""

    def url_of(self, model: str, version: str, key: int) -> str:
        return f"http://reports/{model}-{version}-{key}.html"

    def offer(self, judged: Judged, rows: WindowRows, wanted: bool) -> None: ...


class World:
    """A log with two drifts in it, and the ledger of the loop that read it."""

    engine: Literal["compiled", "evidently"] = "compiled"
    distrusted: tuple[str, ...] = ()
    segments: tuple[str, ...] = ()
    labels = ""

    def __init__(self, folder: Path, model: ModelSettings, partitions: int) -> None:
        self.model = model
        self.file = folder / "ledger.db"
        self.references = folder / "references"
        self.log = MemoryLog()
        self.log.create(TOPIC, partitions)
        self.ledger = Ledger(f"sqlite:///{self.file}")
        self.store = ReferenceStore(str(self.references))
        self.decoder = make_decoder({TOPIC: FieldSettings()}, "", ["fraud"], LimitSettings())
        self.worker = EvidentlyWorker()
        self._partitions = partitions

    def play(self, change_at: int = 0, policy: PolicySettings = POLICY) -> None:
        """Calm, drifted, calm, drifted; the first episode's request is refused, so it asks again."""
        loop = self._loop()
        for number in range(1_500):
            if change_at and number == change_at:
                self.model = msgspec.structs.replace(self.model, policy=policy)
                self.source.close()
                loop = self._loop()
            if number == 700 and self.distrusted:
                loop.news.put(ScoresDisputed("fraud", "1", 0, self.distrusted, ("differs",)))
            self._predict(number, 40.0 if 500 <= number < 900 or number >= 1_200 else 0.0)
            if number % 10 == 0:
                loop.run_once(timeout_seconds=0.0)
                for row in self.ledger.requests(open_only=True):
                    loop.news.put(RequestEnded("fraud", row.id, Outcome(action="refused", sentence="worse")))
        for _ in range(4):
            loop.run_once(timeout_seconds=0.0)

    def verify(self, name: str = "fraud:1", log: MemoryLog | None = None) -> Verification:
        reader = MemoryReader(log or self.log)
        return verify(self.ledger, ["fraud"], name, reader, self.decoder, self.store, "g")

    def change(self, statement: str, *values: Any) -> None:
        """By another hand than ours."""
        with sqlite3.connect(self.file) as connection:
            assert connection.execute(statement, values).rowcount == 1
        connection.close()

    def rows(self, query: str) -> list[Any]:
        with sqlite3.connect(self.file) as connection:
            found = connection.execute(query).fetchall()
        connection.close()
        return found

    def _loop(self) -> Loop:
        settings = LoopSettings(
            group="g",
            member="m",
            mode="retrain",
            models={"fraud": self.model},
            limits=LimitSettings(),
            labels_topic=self.labels,
            checkpoint_seconds=3_600.0,
        )
        kafka = KafkaSettings(topic=TOPIC, labels_topic=self.labels, start="earliest")
        self.source = MemorySource(self.log, kafka)
        engines = StoredEngines(self.store, {"fraud": self.model}, self.engine, self.worker)
        letters = MemoryDeadLetters()
        return Loop(settings, self.source, self.decoder, letters, self.ledger, engines, NoReviews())

    def _predict(self, number: int, shift: float) -> None:
        time = START + timedelta(seconds=number)
        body = {
            "model": "fraud",
            "model_version": "1",
            "id": f"r{number}",
            "event_time": time.isoformat(),
            "features": {
                "x": number * 7 % 50 + shift,
                "y": number * 3 % 40 / 8 + shift,
                "z": "abcdefg"[number % 7],
            },
            "prediction": number % 2,
        }
        if self.segments:
            body["segment"] = self.segments[number % len(self.segments)]
        partition = Partition(TOPIC, number % self._partitions)
        self.log.append(partition, json.dumps(body).encode(), timestamp_ms=int(time.timestamp() * 1000))


class Labelled(World):
    """The default policy: inputs are always the same, and from the 700th on the model is wrong."""

    labels = "labels"

    def __init__(self, folder: Path) -> None:
        policy = PolicySettings(windows_between_false_retrainings=20.0)
        model = msgspec.structs.replace(BY_COUNT, policy=policy, label_horizon_seconds=200.0)
        super().__init__(folder, model, 1)
        self.log.create(self.labels)
        topics = {TOPIC: FieldSettings(), self.labels: FieldSettings()}
        self.decoder = make_decoder(topics, self.labels, ["fraud"], LimitSettings())

    def _predict(self, number: int, shift: float) -> None:
        super()._predict(number, 0.0)
        known = number - 80
        if known < 0 or known % 11 == 0:
            return
        time = START + timedelta(seconds=number)
        label = known % 2 ^ (known > 700) ^ (known % 7 == 0)
        body = {"model": "fraud", "id": f"r{known}", "event_time": time.isoformat(), "label": label}
        self.log.append(
            Partition(self.labels, 0), json.dumps(body).encode(), timestamp_ms=int(time.timestamp() * 1000)
        )


SHAPES = {"by time": (BY_TIME, 3), "by count": (BY_COUNT, 1)}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, MemoryLog]]:
    """Both worlds, played once."""
    made = {}
    for shape, (model, partitions) in SHAPES.items():
        folder = tmp_path_factory.mktemp("played")
        world = World(folder, model, partitions)
        world.play()
        world.ledger.close()
        made[shape] = folder, world.log
    return made


def copied(played: dict[str, tuple[Path, MemoryLog]], shape: str, folder: Path) -> World:
    original, log = played[shape]
    shutil.copytree(original, folder, dirs_exist_ok=True)
    world = World(folder, *SHAPES[shape])
    world.log = altered(log, Partition(TOPIC, 0), -1, b"")
    return world


@pytest.fixture(params=list(SHAPES))
def world(
    request: pytest.FixtureRequest, tmp_path: Path, played: dict[str, tuple[Path, MemoryLog]]
) -> Iterator[World]:
    made = copied(played, request.param, tmp_path)
    yield made
    made.ledger.close()


def parts(found: Verification) -> list[str]:
    """Which parts differ, the windows' first, each once."""
    every = [one for window in found.windows for one in window.differences]
    return list(dict.fromkeys(one.part for one in (*every, *found.differences)))


def told(found: Verification) -> str:
    every = [one for window in found.windows for one in window.differences]
    return "\n".join(f"{one.part}: {one.detail}" for one in (*every, *found.differences))


def altered(original: MemoryLog, partition: Partition, offset: int, value: bytes) -> MemoryLog:
    """The same log but for one record."""
    log = MemoryLog()
    log.cluster_id = original.cluster_id
    log.create(TOPIC, len(original.partitions((TOPIC,))))
    for one in original.partitions((TOPIC,)):
        raws: list[RawRecord] = list(original.read(one, 0, 10_000))
        for raw in raws:
            changed = one == partition and raw.offset == offset
            log.append(one, value if changed else raw.value, timestamp_ms=raw.timestamp_ms)
    return log


class Uneven(World):
    """The shift is in one of three segments alone."""

    segments = ("d", "d", "e")

    def _predict(self, number: int, shift: float) -> None:
        super()._predict(number, shift if number % 3 == 2 else 0.0)


def test_in_which_segments_a_shift_is_is_recomputed(tmp_path: Path) -> None:
    long = msgspec.structs.replace(BY_TIME.window, seconds=180.0, max_rows=180)
    world = Uneven(tmp_path, msgspec.structs.replace(BY_TIME, window=long), 1)
    world.play()
    found = world.verify()
    assert found.equal and found.windows, told(found)
    (row, *_) = world.rows('SELECT id, evidence FROM windows WHERE evidence LIKE \'%"segment":"e"%\'')
    changed = row[1].replace('"segment":"e"', '"segment":"d"', 1)
    world.change("UPDATE windows SET evidence = ? WHERE id = ?", changed, row[0])
    assert parts(world.verify()) == ["segment"]
    world.ledger.close()


def test_every_episode_is_equal_and_was_recomputed(world: World) -> None:
    for name in ("fraud:1", "fraud:2"):
        found = world.verify(name)
        assert found.equal, told(found)
        assert len(found.windows) >= 3 and all(window.rows for window in found.windows)
    first = world.verify("fraud:1")
    assert first.requests >= 2
    assert world.verify(first.episode[:13]) == first


def test_each_window_is_judged_by_the_settings_of_then(tmp_path: Path) -> None:
    world = World(tmp_path, BY_TIME, 3)
    world.play(
        change_at=640,
        policy=PolicySettings(method="thresholds", drift_share=0.7, columns=("y",), for_windows=1),
    )
    assert len(world.rows("SELECT digest FROM settings")) == 2
    found = world.verify()
    clauses = {one.decision.clause for one in world.ledger.evidence("fraud")[8:15]}
    assert clauses >= {"policy.columns: y drifted", "drift share 0.667 >= policy.drift_share 0.5"}
    assert found.equal, told(found)
    world.ledger.close()


@pytest.mark.slow
@pytest.mark.parametrize("distrusted", [(), ("z", "prediction")])
def test_scores_of_evidently_itself_are_the_same_in_another_process(
    tmp_path: Path, distrusted: tuple[str, ...]
) -> None:
    world = World(tmp_path, BY_TIME, 3)
    world.engine, world.distrusted = "compiled" if distrusted else "evidently", distrusted
    world.play()
    world.worker.close()
    engines = {
        (score.column, score.engine) for one in world.ledger.evidence("fraud") for score in one.report.scores
    }
    assert ("z", "evidently") in engines and (("x", "compiled") in engines) == bool(distrusted)
    for name in ("fraud:1", "fraud:2"):
        found = world.verify(name)
        assert found.equal, told(found)
    world.ledger.close()


def test_any_byte_of_the_evidence(world: World) -> None:
    """Each character in turn becomes another one, in a window of the episode."""
    opening = world.verify().windows[1]
    ((number, text),) = [
        (number, text)
        for number, key, text in world.rows("SELECT id, key, evidence FROM windows")
        if key == opening.key
    ]
    missed = []
    for place in range(0, len(text), 29):
        other = "7" if text[place] != "7" else "8"
        changed = text[:place] + other + text[place + 1 :]
        world.change("UPDATE windows SET evidence = ? WHERE id = ?", changed, number)
        if world.verify().equal:
            missed.append(text[max(0, place - 20) : place + 1])
    assert missed == []
    world.change("UPDATE windows SET evidence = ? WHERE id = ?", text, number)
    assert world.verify().equal


@pytest.mark.parametrize(
    ("old", "new", "part", "said"),
    [
        ("e-2", "e-1", "score", "x: score"),
        ('"verdict":"drifted"', '"verdict":"calm"', "ledger", "column verdict"),
        (">= policy.drift_share 0.5", ">= policy.drift_share 0.4", "clause", "drift_share 0.5"),
        ('"phase":"firing"', '"phase":"pending"', "phase", "phase 'pending'"),
        ('"model":"fraud"', '"model":"frauds"', "ledger", "frauds"),
        ('"sampled":', '"sampled":1', "rows", "sampled rows"),
        ('"spans":[', '"spanz":[', "evidence", "missing required field `spans`"),
        ('"engine":"compiled"', '"enginf":"compiled"', "evidence", "not written"),
    ],
)
def test_altered_evidence_names_what(world: World, old: str, new: str, part: str, said: str) -> None:
    opening = world.verify().windows[1]
    (text,) = (row[1] for row in world.rows("SELECT key, evidence FROM windows") if row[0] == opening.key)
    assert old in text, text
    changed = text.replace(old, new, 1)
    world.change("UPDATE windows SET evidence = ? WHERE key = ?", changed, opening.key)
    found = world.verify()
    (window,) = (window for window in found.windows if window.differences)
    assert window.key == opening.key
    assert part in parts(found) and said in told(found), told(found)


def test_one_changed_record_is_rows_and_the_score_that_it_moves(world: World) -> None:
    window = world.verify().windows[1]
    judged = next(one for one in world.ledger.evidence("fraud") if one.key == window.key)
    span = judged.spans[0]
    partition = Partition(span.topic, span.partition)
    (raw,) = world.log.read(partition, span.start, 1)
    assert raw.value is not None
    body = json.loads(raw.value)
    body["features"]["y"] += 1e-13
    found = world.verify(log=altered(world.log, partition, span.start, json.dumps(body).encode()))
    assert [one.key for one in found.windows if one.differences] == [window.key]
    assert parts(found)[0] == "rows" and "digest" in told(found)


def test_a_record_that_is_none_any_more_changes_the_count(world: World) -> None:
    judged = world.ledger.evidence("fraud")[-1]
    span = judged.spans[0]
    partition = Partition(span.topic, span.partition)
    found = world.verify("fraud:2", altered(world.log, partition, span.start + 1, b"no record"))
    assert f"records: {judged.seen} in the ledger, {judged.seen - 1} in the log" in told(found)


def test_offsets_that_are_gone_are_named_and_later_windows_are_not_blamed(world: World) -> None:
    first, second, *_ = world.verify().windows
    judged = next(one for one in world.ledger.evidence("fraud") if one.key == second.key)
    span = judged.spans[0]
    world.log.expire(Partition(span.topic, span.partition), span.start + 2)
    found = world.verify()
    assert [one.key for one in found.windows if one.differences] == [first.key, second.key]
    assert parts(found) == ["offsets"]
    assert f"{span.start} to {span.start + 1} are gone, the log begins at {span.start + 2}" in told(found)
    world.log.create(TOPIC)
    assert parts(world.verify()) == ["offsets"]


def test_another_reference_is_named_and_not_scored_by(world: World) -> None:
    found = world.store.read("fraud", "1")
    assert found is not None
    world.store.write("fraud", "1", found[0] + b"\x00")
    other = world.verify()
    assert parts(other) == ["reference"] and f"was judged by {found[1][:16]}" in told(other)


def test_a_byte_of_the_reference(world: World) -> None:
    (file,) = world.references.rglob("*.reference")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found = world.verify()
    assert parts(found) == ["reference"] and "not what was written" in told(found)
    for one in world.references.rglob("*"):
        if one.is_file():
            one.unlink()
    assert "has none any more" in told(world.verify())


@pytest.mark.parametrize(
    ("statement", "part"),
    [
        ("UPDATE settings SET body = replace(body, '0.5', '0.4')", "settings"),
        ("DELETE FROM settings", "settings"),
        ("UPDATE windows SET drift_share = drift_share + 0.001 WHERE id = {id}", "ledger"),
        ("UPDATE windows SET grounds = replace(grounds, 'rows', 'rowz') WHERE id = {id}", "grounds"),
        ("UPDATE windows SET grounds = '' WHERE id = {id}", "grounds"),
        ("UPDATE windows SET version = '2' WHERE id = {id}", "ledger"),
        ("UPDATE requests SET payload = replace(payload, '\"attempt\":1', '\"attempt\":3') WHERE attempt = 1"
         " AND asked_at = (SELECT min(asked_at) FROM requests)", "request"),
        ("UPDATE episodes SET state = replace(state, 'T00:08:00', 'T00:07:00') WHERE number = 1", "episode"),
        ("DELETE FROM windows WHERE id = {id}", "episode"),
    ],
)  # fmt: skip
def test_what_else_the_ledger_holds(
    played: dict[str, tuple[Path, MemoryLog]], tmp_path: Path, statement: str, part: str
) -> None:
    world = copied(played, "by time", tmp_path)
    key = world.verify().windows[1].key
    (number,) = (row[0] for row in world.rows("SELECT id, key FROM windows") if row[1] == key)
    world.change(statement.format(id=number))
    assert part in parts(world.verify()), told(world.verify())
    world.ledger.close()


def test_another_cluster_or_group_is_another_episode(world: World) -> None:
    world.log.cluster_id = "elsewhere"
    found = world.verify()
    assert parts(found) == ["episode"]
    assert "is this the Kafka cluster" in told(found)


def test_pruned_windows_leave_the_phase_to_the_ones_that_are_left(world: World) -> None:
    first = world.rows("SELECT id FROM windows ORDER BY id")[0][0]
    world.change("DELETE FROM windows WHERE id = ?", first)
    found = world.verify()
    assert found.equal, told(found)


@pytest.mark.parametrize("name", ["fraud:7", "other:1", "zz", "fraud"])
def test_an_unknown_episode_is_refused_with_those_there_are(world: World, name: str) -> None:
    with pytest.raises(UsageError, match="there are fraud:1, fraud:2"):
        world.verify(name)


def test_an_unclear_beginning_is_refused(world: World) -> None:
    with pytest.raises(UsageError, match="2 episodes begin so"):
        world.verify("")


def test_what_labels_led_to_is_recomputed_from_the_second_judgements(tmp_path: Path) -> None:
    world = Labelled(tmp_path)
    world.play()
    found = world.verify()
    assert found.equal, told(found)
    bases = [json.loads(row.payload)["basis"] for row in world.ledger.requests("fraud")]
    assert bases.count("labels") == len(bases) > 1

    heard = world.rows("SELECT id, body FROM steps WHERE body LIKE '%\"heard\"%' ORDER BY id")
    losses = [(json.loads(body)["performance"]["loss"], number, body) for number, body in heard]
    loss, number, body = next(one for one in losses if one[0] > 0.6)
    changed = body.replace(f'"loss":{loss}', '"loss":0.5')
    world.change("UPDATE steps SET body = ? WHERE id = ?", changed, number)
    other = world.verify()
    assert parts(other) == ["request"] and "its steps lead to" in told(other)

    world.change("UPDATE steps SET body = ? WHERE id = ?", body, number)
    world.change("DELETE FROM requests WHERE attempt = 2")
    missing = world.verify()
    assert parts(missing) == ["request"] and "attempt 2 is not in the ledger" in told(missing)
    world.ledger.close()


def test_where_steps_are_gone_requests_are_held_against_their_windows(tmp_path: Path) -> None:
    """As after an upgrade, or where retention has taken the oldest, windows and steps alike."""
    world = Labelled(tmp_path)
    world.play()
    world.change("DELETE FROM steps WHERE id = 1")
    found = world.verify()
    assert found.equal, told(found)
    world.change("DELETE FROM windows WHERE id = 1")
    found = world.verify()
    assert found.equal, told(found)
    world.ledger.close()
