"""`doctor`: what it finds well, and what it finds amiss, on real servers."""

import importlib.metadata
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from daemon.cli import main
from daemon.config import Config, load
from daemon.doctor import _permission, _skew, pins
from daemon.wire.prefect import PrefectApi
from flows.automations import RETRAIN, automation_name
from flows.deploy import deploy

if TYPE_CHECKING:
    from tests.conftest import Kafka

AT = datetime(2026, 1, 1, tzinfo=UTC)


def seconds(number: float) -> datetime:
    return AT + timedelta(seconds=number)


@pytest.mark.parametrize(
    ("theirs", "verdict", "said"),
    [
        (seconds(0), "ok", "within"),
        (seconds(4), "ok", "within"),
        (seconds(30), "failed", "29.0 s ahead of"),
        (seconds(-30), "failed", "29.0 s behind"),
    ],
)
def test_a_clock_is_judged_by_what_is_certain(theirs: datetime, verdict: str, said: str) -> None:
    check = _skew("clock", seconds(0), theirs, seconds(1), 1.0)
    assert check.verdict == verdict and said in check.text


def test_permissions_that_are_not_granted_are_named() -> None:
    assert _permission("topic a", ("DESCRIBE", "READ"), frozenset({"DESCRIBE"})).verdict == "failed"
    assert "READ is not granted" in _permission("topic a", ("READ",), frozenset()).text
    assert _permission("topic a", ("READ",), None).verdict == "note"


def test_an_installed_version_outside_of_the_pins_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stated-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: stated\nVersion: 1.0\nRequires-Python: >=3.11\n"
        "Requires-Dist: pandas<1.0\nRequires-Dist: absent-of-all\nRequires-Dist: numpy>=2.0\n"
        "Requires-Dist: unheard-of; extra == 'more'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {check.text: check.verdict for check in pins("stated")}
    version = importlib.metadata.version("pandas")
    assert set(found.values()) == {"failed"} and len(found) == 2
    assert any(f"pandas {version} is installed, and <1.0 is needed" in text for text in found)
    assert any("absent-of-all is not installed" in text for text in found)


def stated(folder: Path, kafka: "Kafka", topic: str) -> Config:
    path = folder / "retrain-daemon.toml"
    path.write_text(
        f'mode = "retrain"\n[kafka]\nbootstrap_servers = "{kafka.bootstrap_servers}"\ntopic = "{topic}"\n'
        f'dead_letter_topic = "{kafka.topic()}"\n[prefect]\nwork_pool = "{kafka.name("pool")}"\n'
        f"[models.{kafka.name('model')}]\n"
    )
    return load(path, {})


def doctor(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["doctor", "--json", *words, "--config", str(folder / "retrain-daemon.toml")])
    told = json.loads(capsys.readouterr().out)
    assert told["well"] == (code == 0)
    return code, {check["subject"]: check for check in told["checks"]}


@pytest.mark.kafka
@pytest.mark.prefect
def test_all_is_well_once_deployed_and_an_automation_switched_off_is_told(
    tmp_path: Path, real_kafka: "Kafka", prefect_api: PrefectApi, capsys: pytest.CaptureFixture[str]
) -> None:
    topic = real_kafka.topic()
    config = stated(tmp_path, real_kafka, topic)
    (model,) = config.models
    code, found = doctor(tmp_path, capsys)
    assert code == 1
    name = automation_name(model, RETRAIN)
    assert "is missing" in found[f"automation {name}"]["text"]

    deploy([config.flow_settings(model)], config.prefect)
    code, found = doctor(tmp_path, capsys, "--probe")
    assert code == 0, found
    for subject in (
        "pins",
        "ledger",
        f"topic {topic}",
        f"permissions, topic {topic}",
        f"permissions, topic {config.kafka.dead_letter_topic}",
        "clock of Kafka",
        "clock of Prefect",
        "version of Prefect",
        f"automation {name}",
    ):
        assert found[subject]["verdict"] == "ok", found[subject]

    (automation,) = prefect_api.automations(name)
    prefect_api.call("PATCH", f"/automations/{automation['id']}", {"enabled": False})
    _, found = doctor(tmp_path, capsys)
    assert "switched off" in found[f"automation {name}"]["text"]


@pytest.mark.kafka
@pytest.mark.prefect
def test_records_from_the_future_and_a_missing_topic_fail(
    tmp_path: Path, kafka: "Kafka", prefect_api: PrefectApi, capsys: pytest.CaptureFixture[str]
) -> None:
    topic = kafka.topic()
    stated(tmp_path, kafka, topic)
    ahead = int((datetime.now(UTC) + timedelta(seconds=90)).timestamp() * 1000)
    kafka.produce(topic, [b"early"], timestamp_ms=ahead)
    code, found = doctor(tmp_path, capsys)
    assert code == 1 and found[f"times, topic {topic}"]["verdict"] == "failed"
    assert "ahead of this host's clock" in found[f"times, topic {topic}"]["text"]
    absent = kafka.name("absent")
    stated(tmp_path, kafka, absent)
    assert doctor(tmp_path, capsys)[1][f"topic {absent}"]["verdict"] == "failed"


def test_without_kafka_and_prefect_it_says_so_and_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "retrain-daemon.toml").write_text(
        '[kafka]\nbootstrap_servers = "127.0.0.1:9"\nconnect_timeout_seconds = 1.0\n'
        '[prefect]\napi_url = "http://127.0.0.1:9/api"\n[models.fraud]\n'
    )
    code, found = doctor(tmp_path, capsys)
    assert code == 1
    assert found["kafka"]["verdict"] == found["clock of Prefect"]["verdict"] == "failed"
    assert "not looked at" in found["permissions"]["text"]
