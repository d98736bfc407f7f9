"""Members that share models by partition index: over an in-memory log and a real ledger."""

import json
import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from daemon.engines import StoredEngines
from daemon.errors import StaleOwner
from daemon.evidently_worker import EvidentlyWorker
from daemon.ledger import Ledger
from daemon.ledger_metrics import LedgerMetrics
from daemon.loop import Loop, LoopSettings
from daemon.memory import MemoryDeadLetters, MemoryLog, MemorySource
from daemon.wire.references import ReferenceStore
from monitors.decoding import make_decoder
from monitors.drift import WindowRows
from monitors.episodes import Judged
from monitors.monitor import Result
from monitors.records import Partition
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
    reference_rows=60,
    label_horizon_seconds=50.0,
    window=WindowSettings(seconds=20.0, grace_seconds=0.0, min_rows=10, max_rows=15, idle_seconds=3_600.0),
    policy=PolicySettings(method="thresholds", for_windows=2, keep_firing_windows=1),
)
# Which partition each model's records are keyed to; one of four has none, one has two models.
HOMES = {"a": 0, "b": 1, "c": 3, "d": 3}
PARTITIONS = 4


class NoReviews:
    """Evidently has tests of its own."""

    def url_of(self, model: str, version: str, key: int) -> str:
        return f"{model}-{version}-{key}"

    def offer(self, judged: Judged, rows: WindowRows, wanted: bool) -> None: ...


class Town:
    """What outlives the members: the log, the ledger, the references."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._url = folder, url
        self.log = MemoryLog()
        self.log.create("predictions", PARTITIONS)
        self.log.create("labels", PARTITIONS)
        self.letters = MemoryDeadLetters()
        self.ledger = Ledger(url)
        self._ledgers = [self.ledger]
        self._rows = dict.fromkeys(HOMES, 0)
        self._chance = random.Random(5)

    def member(self, sharing: str = "by-model") -> Loop:
        """A new process that joins the group."""
        kafka = KafkaSettings(
            labels_topic="labels",
            group="g",
            start="earliest",
            sharing=sharing,  # type: ignore[arg-type]
        )
        models = dict.fromkeys(HOMES, MODEL)
        fields = {"predictions": FieldSettings(), "labels": FieldSettings()}
        self._ledgers.append(Ledger(self._url))
        return Loop(
            LoopSettings(
                group="g",
                member="m",
                mode="retrain",
                models=models,
                limits=LimitSettings(),
                labels_topic="labels",
                checkpoint_seconds=3_600.0,
                sharing=kafka.sharing,
            ),
            MemorySource(self.log, kafka),
            make_decoder(fields, "labels", list(models), LimitSettings()),
            self.letters,
            self._ledgers[-1],
            StoredEngines(
                ReferenceStore(str(self._folder / "references")), models, "compiled", EvidentlyWorker()
            ),
            NoReviews(),
        )

    def kill(self, member: Loop) -> None:
        """The group has noticed that it is silent; it may still be there."""
        members = self.log.members["g"]
        members[:] = [one for one in members if one is not member._source]

    def write(self, count: int, models: Sequence[str] = tuple(HOMES)) -> None:
        """So many more records of each of these models, with their labels; the second hundred drifts."""
        for _ in range(count):
            for model in models:
                number, self._rows[model] = self._rows[model], self._rows[model] + 1
                shift = 60.0 if number % 200 >= 100 else 0.0
                self.predict(model, number, HOMES[model], self._chance.gauss(shift, 10.0))
                self.label(model, number, HOMES[model])

    def predict(self, model: str, number: int, partition: int, x: float = 0.0) -> None:
        self._append(
            "predictions",
            partition,
            number,
            {"model": model, "model_version": "1", "id": f"r{number}", "features": {"x": x}, "prediction": 1},
        )

    def label(self, model: str, number: int, partition: int) -> None:
        self._append("labels", partition, number, {"model": model, "id": f"r{number}", "label": number % 2})

    def _append(self, topic: str, partition: int, second: int, body: dict[str, object]) -> None:
        time = START + timedelta(seconds=second)
        value = json.dumps(body | {"event_time": time.isoformat()}).encode()
        self.log.append(Partition(topic, partition), value, timestamp_ms=int(time.timestamp() * 1000))

    def decisions(self) -> dict[str, object]:
        """All that the ledger says was decided, ids and scores included."""
        events = self.ledger.events()
        decided: dict[str, object] = {"counters": self.ledger.counters()}
        for model in HOMES:
            decided[f"{model} windows"] = self.ledger.evidence(model)
            decided[f"{model} scores"] = [
                (row["key"], row["score"], row["labelled"]) for row in self.ledger.windows(model)
            ]
            decided[f"{model} events"] = [(row["id"], row["kind"]) for row in events if row["model"] == model]
        return decided

    def letter_codes(self) -> list[tuple[str, int]]:
        return [(error.code, raw.partition.index) for raw, error in self.letters.stored]

    def close(self) -> None:
        for ledger in self._ledgers:
            ledger.close()


@pytest.fixture
def town(tmp_path: Path, ledger_url: str) -> Iterator[Town]:
    made = Town(tmp_path, ledger_url)
    yield made
    made.close()


def cycles(*members: Loop, count: int = 4) -> None:
    for _ in range(count):
        for member in members:
            member.run_once(timeout_seconds=0.001)


def keep(*members: Loop) -> None:
    """Have them write down what they hold, dead letters first."""
    for member in members:
        member._checkpoint(Result())


def watched(member: Loop) -> list[str]:
    return [] if member._monitor is None else sorted(member._monitor.models)


def test_two_members_share_the_models_and_decide_as_one_would(town: Town, tmp_path: Path) -> None:
    first, second = town.member(), town.member()
    town.write(320)
    cycles(first, second)
    keep(first, second)
    assert {tuple(watched(first)), tuple(watched(second))} == {("a", "b"), ("c", "d")}
    alone = Town(tmp_path / "alone", f"sqlite:///{tmp_path / 'alone.db'}")
    alone.log = town.log
    town.kill(first)
    town.kill(second)
    only = alone.member()
    cycles(only)
    keep(only)
    found, expected = town.decisions(), alone.decisions()
    alone.close()
    assert found == expected
    assert len(expected["a windows"]) == 15  # type: ignore[arg-type]
    assert [kind for _, kind in expected["d events"]][:2] == [  # type: ignore[attr-defined]
        "retrain-daemon.drift.detected",
        "retrain-daemon.retrain.requested",
    ]


def test_a_member_that_was_away_writes_nothing_and_asks_anew(town: Town) -> None:
    first, second = town.member(), town.member()
    town.write(150)
    cycles(first, second)
    town.kill(first)
    town.write(50)
    cycles(second)
    assert watched(second) == ["a", "b", "c", "d"]
    before = town.decisions()
    with pytest.raises(StaleOwner, match=r"another member owns 'g#\d', 'g#\d' by now"):
        first._checkpoint(Result())
    cycles(first)
    assert (watched(first), first.owner.is_set()) == ([], False)
    assert town.decisions() == before


def test_a_model_stays_where_it_was_met_first(town: Town) -> None:
    first, second = town.member(), town.member()
    town.write(30)
    cycles(first, second)
    town.predict("a", 31, 1)  # its owner is the same member
    town.predict("a", 32, 3)  # its owner is the other one
    cycles(first, second)
    keep(first, second)
    assert sorted(town.letter_codes()) == [("second_partition", 1), ("second_partition", 3)]
    assert town.ledger.homes()["a"] == Partition("predictions", 0)
    for member in (first, second):
        town.kill(member)
    third = town.member()
    town.predict("a", 33, 2)
    cycles(third)
    keep(third)
    assert town.letter_codes()[2:] == [("second_partition", 2)], "a restart forgets no home"


def test_of_two_members_that_meet_a_model_at_once_one_keeps_it(town: Town) -> None:
    first, second = town.member(), town.member()
    cycles(first, second)
    town.predict("a", 0, 0)
    town.predict("a", 1, 3)
    cycles(first, second)
    keep(first, second)
    assert sorted(watched(first) + watched(second)) == ["a"]
    assert len(town.letter_codes()) == 1 and town.ledger.counters()["records"] == 2


def test_labels_have_to_be_where_the_predictions_are(town: Town) -> None:
    first, second = town.member(), town.member()
    town.label("a", 5, 1)
    town.label("d", 5, 3)  # of which nobody has seen a prediction
    town.write(40, ["a", "b", "c"])
    cycles(first, second)
    keep(first, second)
    assert sorted(town.letter_codes()) == [("second_partition", 1), ("second_partition", 3)]


def test_windows_do_not_wait_for_partitions_of_other_models(town: Town) -> None:
    member = town.member()
    town.write(1, ["b", "c"])  # they have begun, and have not gone on
    town.write(100, ["a"])
    cycles(member)
    assert len(town.ledger.evidence("a")) == 4
    assert town.ledger.evidence("b") == []


def test_what_one_member_did_alone_is_carried_on_by_those_who_share(town: Town, tmp_path: Path) -> None:
    alone = town.member("one-active")
    town.write(125)
    cycles(alone)
    keep(alone)
    town.kill(alone)
    first, second = town.member(), town.member()
    town.write(195)
    cycles(first, second)
    assert [judged.seen for judged in town.ledger.evidence("a")] == [20] * 15
    assert [judged.seen for judged in town.ledger.evidence("d")] == [20] * 15
    with pytest.raises(StaleOwner):
        alone._checkpoint(Result())


def test_each_member_tells_metrics_of_its_own_models(town: Town) -> None:
    members = [town.member(), town.member()]
    town.write(70)
    cycles(*members)
    told = []
    for member in members:
        metrics = LedgerMetrics(
            town.ledger, dict.fromkeys(HOMES, ModelSettings()), 120.0, member.owner, lambda: True
        )
        stages = next(family for family in metrics.collect() if family.name.endswith("_stage"))
        told.append(sorted({sample.labels["model"] for sample in stages.samples}))
    assert sorted(told) == [["a", "b"], ["c", "d"]]


ACTIONS = st.lists(
    st.one_of(
        st.just(("join", 0)),
        st.tuples(st.sampled_from(("kill", "pause", "leave", "run", "run", "run")), st.integers(0, 2)),
    ),
    max_size=8,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=ACTIONS)
def test_joins_kills_and_pauses_change_no_decision(actions: list[tuple[str, int]]) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        town = Town(folder / "shared", f"sqlite:///{folder / 'shared.db'}")
        _live_through(town, actions)
        alone = Town(folder / "alone", f"sqlite:///{folder / 'alone.db'}")
        alone.log = town.log
        town.log.members.clear()
        only = alone.member()
        cycles(only)
        keep(only)
        found, expected = town.decisions(), alone.decisions()
        town.close()
        alone.close()
    event(f"{len(actions)} actions")
    for what in expected:
        assert found[what] == expected[what], what


def _live_through(town: Town, actions: list[tuple[str, int]]) -> None:
    """Some of the log is written before each action; at the end there is a member that reads all of it."""
    members, away = [town.member()], []
    for action, number in actions:
        town.write(20, ["a", "c"])
        if action == "join" and len(members) < 3:
            members.append(town.member())
        elif members and action != "join":
            chosen = members[number % len(members)]
            chosen.run_once(timeout_seconds=0.001)
            if action != "run":
                members.remove(chosen)
            if action in ("kill", "pause"):
                town.kill(chosen)
            if action == "leave":
                chosen._source.close()
            if action == "pause":
                away.append(chosen)
    members.append(town.member())
    town.write(20, ["a", "c"])
    cycles(*members, *away, count=3)
    _stop_all_but_the_last(town, members)
    cycles(members[-1])
    keep(members[-1])


def _stop_all_but_the_last(town: Town, members: list[Loop]) -> None:
    for member in members[:-1]:
        town.kill(member)
