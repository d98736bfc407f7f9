"""`explain` and `verify` of what a real daemon process decided on a real broker."""

import json
import math
import random
import shutil
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from daemon.cli import main
from daemon.config import load
from monitors.records import Partition

if TYPE_CHECKING:
    from tests.conftest import Kafka

pytestmark = pytest.mark.kafka

START = datetime(2026, 1, 1, tzinfo=UTC)
CHILD = Path(__file__).with_name("doomed_daemon.py")


def log_of(count: int) -> list[tuple[int, bytes]]:
    """Two models that drift over three partitions, some records out of order, some garbage."""
    chance = random.Random(5)
    records = []
    for number in range(count):
        drifted = 600 <= number < 900
        late = chance.uniform(0, 20) if chance.random() < 0.05 else 0.0
        time = START + timedelta(seconds=max(0.0, number - late))
        body = {
            "model": ("fraud", "churn")[number % 2],
            "model_version": "1",
            "id": f"r{number}",
            "event_time": time.isoformat(),
            "features": {"x": chance.gauss(4.0 if drifted else 0.0, 1.0), "y": chance.choice("abc")},
            "prediction": number // 2 % 2,
        }
        records.append((chance.randrange(3), json.dumps(body).encode()))
        if number % 150 == 0:
            records.append((chance.randrange(3), b"garbage"))
    return records


class Scene:
    """A log, the ledger of a daemon that read it to its end, and the command line on both."""

    def __init__(self, kafka: "Kafka", folder: Path) -> None:
        self.kafka = kafka
        self.folder = folder
        self.topic = kafka.topic(3)
        self.file = folder / "retrain-daemon.toml"
        self.file.write_text(
            f'mode = "retrain"\n[kafka]\nbootstrap_servers = "{kafka.bootstrap_servers}"\n'
            f'topic = "{self.topic}"\nlabels_topic = "{kafka.topic(1)}"\nstart = "earliest"\n'
            f'group = "{kafka.name("group")}"\ndead_letter_topic = "{kafka.topic(1)}"\n'
            "session_timeout_seconds = 6.0\n"
            '[prefect]\napi_url = "http://127.0.0.1:9/api"\n'
            + "".join(
                f"[models.{model}]\nreference_rows = 150\nlabel_horizon_seconds = 120.0\n"
                f"[models.{model}.window]\nseconds = 60.0\ngrace_seconds = 5.0\nmin_rows = 10\n"
                "max_rows = 25\nidle_seconds = 3600.0\n"
                f'[models.{model}.policy]\nmethod = "thresholds"\n'
                for model in ("fraud", "churn")
            )
        )

    def write(self, records: list[tuple[int, bytes]]) -> None:
        for partition in range(3):
            self.kafka.produce(self.topic, [value for one, value in records if one == partition], partition)

    def run(self) -> None:
        config = load(self.file, {})
        plan = self.folder / "plan.json"
        told = {
            "kafka": msgspec.to_builtins(config.kafka),
            "models": msgspec.to_builtins(config.models),
            "ledger": config.ledger.url,
            "references": config.registry.references_url,
        }
        plan.write_text(json.dumps(told))
        subprocess.run([sys.executable, str(CHILD), str(plan), "none", "0"], timeout=120, check=True)

    def copy(self, folder: Path) -> "Scene":
        """The same log with a ledger and references that may be spoilt."""
        other = object.__new__(Scene)
        other.__dict__.update(self.__dict__, folder=folder, file=folder / self.file.name)
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return other


@pytest.fixture(scope="module")
def played(kafka: "Kafka", tmp_path_factory: pytest.TempPathFactory) -> Scene:
    scene = Scene(kafka, tmp_path_factory.mktemp("scene"))
    scene.write(log_of(1_200))
    scene.run()
    return scene


def said(scene: Scene, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = main([*words, "--json", "--config", str(scene.file)])
    return code, json.loads(capsys.readouterr().out)


def nudged(value: bytes, window: Any) -> bytes:
    """A record of this window, moved by the smallest bit that there is; any other as it was."""
    body = json.loads(value) if value != b"garbage" else {}
    if body.get("model") != "fraud" or not window["start"] <= body["event_time"] < window["end"]:
        return value
    body["features"]["x"] = math.nextafter(body["features"]["x"], math.inf)
    return json.dumps(body).encode()


def parts(found: Any) -> list[str]:
    every = [one for window in found["windows"] for one in window["differences"]] + found["differences"]
    return list(dict.fromkeys(one["part"] for one in every))


def test_every_episode_is_equal(played: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = said(played, capsys, "verify")
    assert (code, [one["equal"] for one in found]) == (0, [True, True]), found
    assert all(window["rows"] for one in found for window in one["windows"])
    assert all(one["requests"] == 1 for one in found)
    assert main(["verify", "churn:1", "--config", str(played.file)]) == 0
    assert "churn episode 1" in capsys.readouterr().out


def test_one_byte_of_the_ledger_or_the_reference_is_named(
    played: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = played.copy(tmp_path)
    (ledger,) = tmp_path.rglob("ledger.db")
    with sqlite3.connect(ledger) as connection:
        number, text = connection.execute(
            "SELECT id, evidence FROM windows WHERE model = 'fraud' AND evidence LIKE '%firing%'"
        ).fetchone()
        place = text.index('"score":') + 11
        changed = text[:place] + ("1" if text[place] != "1" else "2") + text[place + 1 :]
        connection.execute("UPDATE windows SET evidence = ? WHERE id = ?", (changed, number))
    connection.close()
    code, found = said(scene, capsys, "verify", "fraud:1")
    assert (code, parts(found)) == (1, ["score"])
    (file,) = (file for file in tmp_path.rglob("*.reference") if "churn" in str(file.parent))
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert parts(said(scene, capsys, "verify", "churn:1")[1]) == ["reference"]


def test_explain_goes_from_offsets_to_requests_though_nobody_else_answers(
    played: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = said(played, capsys, "explain", "fraud:1")
    assert code == 0
    opening = next(window for window in told["windows"] if window["request"])
    assert opening["phase"] == "firing" and "drift share" in opening["clause"]
    assert {one["topic"] for one in opening["offsets"]} == {played.topic}
    assert {score["column"] for score in opening["scores"]} == {"x", "y"}
    (request,) = told["requests"]
    assert request["id"] == opening["request"] and request["state"] == "waiting"
    assert "no answer from Prefect" in told["deployment"]["problem"]
    prefix = told["episode"]["id"][:10]
    assert main(["explain", prefix, "--offline", "--config", str(played.file)]) == 0
    text = capsys.readouterr().out
    assert f"{played.topic}/0:" in text and "drift share" in text and request["id"] in text


def test_a_changed_record_and_offsets_that_are_gone_are_named(
    kafka: "Kafka", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = Scene(kafka, tmp_path)
    records = log_of(800)
    scene.write(records)
    scene.run()
    code, found = said(scene, capsys, "verify", "fraud:1")
    assert code == 0

    kafka.recreate(scene.topic, 3)
    opening = next(one for one in found["windows"] if one["rows"] > 25)
    scene.write([(one, nudged(value, opening)) for one, value in records])
    code, found = said(scene, capsys, "verify", "fraud:1")
    assert code == 1 and parts(found)[0] == "rows"
    assert len([window for window in found["windows"] if window["differences"]]) == 1

    kafka.delete_before(Partition(scene.topic, 1), 240)
    code, found = said(scene, capsys, "verify", "fraud:1")
    assert code == 1 and "offsets" in parts(found)
    gone = [one["detail"] for window in found["windows"] for one in window["differences"]]
    assert any(f"{scene.topic}/1: " in one and "the log begins at 240" in one for one in gone)
