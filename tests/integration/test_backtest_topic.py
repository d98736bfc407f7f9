"""A backtest of a topic decides what the live daemon decided on the same log, to the last bit."""

import json
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from daemon.cli import main
from daemon.config import Config, load
from daemon.engines import StoredEngines
from daemon.evidently_worker import EvidentlyWorker
from daemon.ledger import Ledger, RequestRow
from daemon.loop import ChampionMoved, Loop, LoopSettings, RequestEnded
from daemon.wire.kafka import KafkaSource
from daemon.wire.kafka_dead_letters import KafkaDeadLetters
from daemon.wire.references import ReferenceStore
from flows.backtest.happened import Happened
from flows.backtest.options import Options
from flows.backtest.progress import Progress
from flows.backtest.run import backtest
from flows.claims import FolderVariables
from flows.registry import LoadedModel, bootstrap_champion, load_champion, open_registry
from flows.retrain import Job, act
from monitors.decoding import make_decoder
from monitors.drift import WindowRows
from monitors.episodes import Judged
from monitors.events import Outcome, RetrainRequest
from monitors.records import Partition, RawRecord
from monitors.settings import KafkaSettings

if TYPE_CHECKING:
    from tests.conftest import Kafka

pytestmark = pytest.mark.kafka

START = datetime(2026, 1, 1, tzinfo=UTC)
MODEL = "parcels"
REFERENCE, WINDOW, WINDOWS = 600, 100, 14
# The first world comes back, and with it the model that knows it.
CHANGE, RETURN = 4, 10
BEHIND = 8
PATIENCE_SECONDS = 300.0


class NoReviews:
    """Evidently has tests of its own."""

    def url_of(self, model: str, version: str, key: int) -> str:
        return ""

    def offer(self, judged: Judged, rows: WindowRows, wanted: bool) -> None: ...


def world(rows: int, changed: bool, seed: int) -> pd.DataFrame:
    """In the changed world the inputs lie elsewhere, and mean the opposite."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(rows, 3))
    label = ((values[:, 0] > 0) ^ changed).astype(int)
    if changed:
        values = values * np.array([2.0, 1.0, 1.0]) + np.array([0.0, 2.5, 2.5])
    return pd.DataFrame(values, columns=["push", "pull", "load"]).assign(label=label)


class Slow(KafkaSource):
    """Reads no label before it has polled so many times: as if their topic were far away."""

    POLLS = 12

    def __init__(self, settings: KafkaSettings) -> None:
        super().__init__(settings)
        self._left = self.POLLS
        self._wanted: frozenset[Partition] = frozenset()

    def poll(self, timeout_seconds: float) -> Sequence[RawRecord]:
        if self._next:
            self._left -= 1
            self.hold(self._wanted)
        return super().poll(timeout_seconds)

    def hold(self, partitions: Collection[Partition]) -> None:
        self._wanted = frozenset(partitions)
        far = [one for one in self._partitions.values() if one.topic == self._settings.labels_topic]
        super().hold(self._wanted.union(far if self._left > 0 else ()))


class Live:
    """A daemon's loop, the flow that its requests lead to, and the service that logs what it says."""

    def __init__(self, kafka: "Kafka", folder: Path, label_partitions: int = 1) -> None:
        self.kafka = kafka
        self.folder = folder
        self.topic, self.labels = kafka.topic(1), kafka.topic(label_partitions)
        self.label_partitions = label_partitions
        self.file = folder / "retrain-daemon.toml"
        self.file.write_text(
            f'mode = "retrain"\n[kafka]\nbootstrap_servers = "{kafka.bootstrap_servers}"\n'
            f'topic = "{self.topic}"\nlabels_topic = "{self.labels}"\nstart = "earliest"\n'
            f'group = "{kafka.name("group")}"\ndead_letter_topic = "{kafka.topic(1)}"\n'
            "session_timeout_seconds = 30.0\n"
            f"[models.{MODEL}]\nreference_rows = {REFERENCE}\nlabel_horizon_seconds = 864000.0\n"
            f"[models.{MODEL}.window]\nrows = {WINDOW}\nmin_rows = 50\nidle_seconds = 86400.0\n"
            f"[models.{MODEL}.training]\nparameters = {{ max_iter = 8, min_samples_leaf = 5 }}\n"
        )
        self.config: Config = load(self.file, {})
        self.settings = self.config.flow_settings(MODEL)
        self.champion = self._bootstrapped()
        self.ledger = Ledger(self.config.ledger.url)
        self.source = KafkaSource(self.config.kafka)
        self.loop = self._loop()
        self._served: list[tuple[str, int]] = []
        self._told: Counter[Partition] = Counter()

    def close(self) -> None:
        self.source.close()
        self.ledger.close()

    def play(self) -> None:
        """One window after the other; while a request is open, the world stands still."""
        self._until(lambda: self.loop.owner.is_set())
        for number in range(WINDOWS):
            self._log_window(number, world(WINDOW, CHANGE <= number < RETURN, seed=100 + number))
            self._until(lambda window=number: self.ledger.window_count(MODEL) > window and self._all_taken())
            while request := self._open_request():
                self._carry_out(request)

    def fall_behind(self, windows: int) -> None:
        """Log much before anybody reads it; a process far from the labels dies, and another goes on."""
        for number in range(windows):
            self._log_window(number, moved(WINDOW, number >= CHANGE, seed=100 + number))
        self.restart(Slow(self.config.kafka))
        self._until(lambda: self.ledger.window_count(MODEL) >= windows // 2)
        self.restart(Slow(self.config.kafka))
        self._until(lambda: self.ledger.window_count(MODEL) == windows and self._at_rest())

    def catch_up(self, first: int, last: int) -> None:
        """Go on window by window until something is asked for."""
        for number in range(first, last):
            self._log_window(number, moved(WINDOW, True, seed=100 + number))
            self._until(lambda window=number: self.ledger.window_count(MODEL) > window and self._at_rest())
            if self._open_request():
                return

    def restart(self, source: KafkaSource) -> None:
        """As after kill -9: what is not in the ledger never was."""
        self.source.close()
        self.source = source
        self.loop = self._loop()

    def _bootstrapped(self) -> LoadedModel:
        rows = world(REFERENCE, False, seed=1)
        bootstrap_champion(self.settings, rows.drop(columns="label"), rows["label"])
        return self._loaded()

    def _loaded(self) -> LoadedModel:
        champion = load_champion(self.settings)
        assert champion is not None
        return champion

    def _loop(self) -> Loop:
        config = self.config
        store = ReferenceStore(config.registry.references_url)
        return Loop(
            LoopSettings(
                group=config.kafka.group,
                member="m",
                mode="retrain",
                models=config.models,
                limits=config.limits,
                labels_topic=self.labels,
                checkpoint_seconds=0.2,
            ),
            self.source,
            make_decoder(config.mappings, self.labels, list(config.models), config.limits),
            KafkaDeadLetters(config.kafka),
            self.ledger,
            StoredEngines(store, config.models, "compiled", EvidentlyWorker()),
            NoReviews(),
        )

    def _log_window(self, number: int, rows: pd.DataFrame) -> None:
        """Predictions of this window, then the labels of the one before."""
        answers = self.champion.answers(rows.drop(columns="label"))
        assert answers.probabilities is not None
        features = rows.drop(columns="label").to_dict("records")
        first = number * WINDOW
        times = [START + timedelta(minutes=first + place) for place in range(WINDOW)]
        self.kafka.produce(
            self.topic,
            [
                json.dumps(
                    {
                        "model": MODEL,
                        "model_version": self.champion.model_version,
                        "id": f"p{first + place}",
                        "event_time": times[place].isoformat(),
                        "features": features[place],
                        "prediction": int(answers.predictions[place]),
                        "probability": float(answers.probabilities[place]),
                    }
                ).encode()
                for place in range(WINDOW)
            ],
        )
        known_at = times[-1].isoformat()
        for index in range(self.label_partitions):
            told = [
                json.dumps({"model": MODEL, "id": name, "event_time": known_at, "label": label}).encode()
                for name, label in self._served
                if int(name[1:]) % self.label_partitions == index
            ]
            if told:
                self.kafka.produce(self.labels, told, index)
                self._told[Partition(self.labels, index)] += len(told)
        self._served = [(f"p{first + place}", label) for place, label in enumerate(rows["label"].tolist())]

    def _all_taken(self) -> bool:
        """Labels count once their window is closed, a cycle after they were read."""
        return all(self.loop._next[partition] == told for partition, told in self._told.items())

    def _at_rest(self) -> bool:
        """Whether nothing is left to read but labels whose turn it is not."""
        monitor, standing = self.loop._monitor, {one for one, line in self.loop._labels.items() if line}
        left = self.loop._next.keys() - standing - self.source.drained(fresh=True)
        return monitor is not None and not monitor.waits and not left

    def _open_request(self) -> RetrainRequest | None:
        found = self.ledger.requests(MODEL, open_only=True)
        return msgspec.json.decode(found[0].payload, type=RetrainRequest) if found else None

    def _carry_out(self, request: RetrainRequest) -> None:
        outcome = act(
            Job(
                settings=self.settings,
                request=request,
                request_id=request.request,
                run=str(uuid.uuid4()),
                registry=open_registry(self.settings),
                variables=FolderVariables(self.folder / "claims"),
                open_variables=lambda: FolderVariables(self.folder / "claims"),
            )
        )
        self.loop.news.put(RequestEnded(MODEL, request.request, outcome))
        if outcome.action == "rolled-back":
            self.loop.news.put(ChampionMoved(MODEL, outcome.model_version, "rolled-back"))
        self._until(
            lambda: request.request not in {row.id for row in self.ledger.requests(MODEL, open_only=True)}
        )
        self.champion = self._loaded()

    def _until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            assert time.monotonic() < deadline, "the loop did not get there"
            self.loop.run_once(0.05)


def moved(rows: int, changed: bool, seed: int) -> pd.DataFrame:
    """In the moved world other inputs come, and mean what they always did."""
    made = world(rows, False, seed)
    return made.assign(pull=made["pull"] + 3.0 * changed, load=made["load"] * (1.0 + changed))


@pytest.fixture(scope="module")
def live(kafka: "Kafka", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    played = Live(kafka, tmp_path_factory.mktemp("live"))
    try:
        played.play()
        yield played
    finally:
        played.close()


@pytest.fixture
def behind(kafka: "Kafka", tmp_path: Path) -> Iterator[Live]:
    live = Live(kafka, tmp_path, label_partitions=2)
    try:
        live.fall_behind(BEHIND)
        live.catch_up(BEHIND, BEHIND + 12)
        yield live
    finally:
        live.close()


def replayed(live: Live) -> Happened:
    options = Options(file=None, settings=live.settings, models=tuple(live.config.models))
    with Progress(sys.stderr) as progress:
        return backtest(options, progress, known=()).replayed.happened


def retrainings(live: Live) -> list[RequestRow]:
    return [row for row in live.ledger.requests(MODEL) if row.episode]


def comparisons(live: Live) -> list[RequestRow]:
    return [row for row in live.ledger.requests(MODEL) if not row.episode]


def verdict_of(outcome: Outcome) -> tuple[Any, ...]:
    """What the gate said, and of which versions; the run is another one."""
    scores = outcome.challenger_score, outcome.champion_score
    versions = outcome.registry_version, outcome.model_version, outcome.champion_before
    return outcome.action, outcome.sentence, *versions, outcome.metric, *scores


def test_a_topic_leads_to_the_decisions_that_the_ledger_holds(live: Live) -> None:
    happened = replayed(live)
    kept = live.ledger.evidence(MODEL)
    assert [window.judged for window in happened.windows] == kept
    assert len({judged.version for judged in kept}) > 1, "without a promotion this shows half of it"

    requests = retrainings(live)
    assert [(one.request, one.episode, one.attempt) for one in happened.requests] == [
        (row.id, row.episode, row.attempt) for row in requests
    ]
    assert [verdict_of(one.outcome) for one in happened.requests] == [
        verdict_of(row.outcome) for row in requests if row.outcome is not None
    ]
    episodes = sorted(live.ledger.episodes(MODEL), key=lambda episode: episode["number"])
    assert [(one.id, one.number) for one in happened.episodes] == [
        (episode["id"], episode["number"]) for episode in episodes
    ]
    judged_again = {(one.version, one.key): (one.score, one.labelled) for one in happened.performances}
    rows = live.ledger.windows(MODEL)
    held = {(row["version"], row["key"]): (row["score"], row["labelled"]) for row in rows if row["labelled"]}
    assert judged_again == held and held

    # The champion of before the log is one that may come back.
    assert [(one.request, verdict_of(one.outcome)) for one in happened.comparisons] == [
        (row.id, verdict_of(row.outcome)) for row in comparisons(live) if row.outcome is not None
    ]
    told = [str(told.event.id) for told in happened.events]
    posted = [event["id"] for event in live.ledger.events()]
    assert sorted(told) == sorted(posted)
    assert "rolled-back" in {one.outcome.action for one in happened.comparisons}


def test_the_command_replays_the_topic(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    code = main(["backtest", "--topic", "--config", str(live.file), "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (code, told["case"], told["windows"]) == (0, MODEL, WINDOWS)
    assert told["started"] == len(retrainings(live)) > 0


def test_only_what_was_logged_between_the_times_is_replayed(
    live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = ["backtest", "--topic", "--config", str(live.file)]
    assert main([*words, "--to", "2001-01-01T00:00:00Z"]) == 2
    assert "holds no prediction of 'parcels'" in capsys.readouterr().err
    assert main([*words, "--from", "1d", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == WINDOW * WINDOWS


@pytest.mark.slow
def test_how_far_either_topic_was_read_changes_nothing(behind: Live) -> None:
    """The daemon was far behind, and saw the labels last; a replay has all of them at hand."""
    happened = replayed(behind)
    assert [window.judged for window in happened.windows] == behind.ledger.evidence(MODEL)
    (asked,) = behind.ledger.requests(MODEL)
    again = happened.requests[0]
    assert (again.request, again.episode, again.attempt) == (asked.id, asked.episode, asked.attempt)
    posted = [event["id"] for event in behind.ledger.events()]
    assert [str(told.event.id) for told in happened.events][: len(posted)] == posted

    rows = behind.ledger.windows(MODEL)
    held = {(row["version"], row["key"]): (row["score"], row["labelled"]) for row in rows if row["labelled"]}
    assert {(one.version, one.key): (one.score, one.labelled) for one in happened.performances} == held
    told = json.loads(asked.payload)
    assert told["basis"] == "labels" and told["signal"] == "data drift", "labels that drift has waited for"
