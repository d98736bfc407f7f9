"""`dlq`: what is listed of dead letters, and that each goes back once."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from daemon.cli import main
from daemon.config import Config, load
from daemon.dlq import Selection, redrive
from daemon.ledger import Ledger
from daemon.ports import SendAnswer
from daemon.wire.kafka import KafkaDeadLetters, read_ranges
from daemon.wire.kafka_client import log_bounds
from daemon.wire.kafka_log import KafkaLog
from monitors.events import OffsetRange
from monitors.records import InvalidRecord, Partition, RawRecord

if TYPE_CHECKING:
    from tests.conftest import Kafka

pytestmark = pytest.mark.kafka

TIME = 1_767_225_600_000
SECRET = "the-value-of-a-feature"


class Office:
    """A topic, its dead letters and a ledger."""

    def __init__(self, kafka: "Kafka", folder: Path) -> None:
        self.kafka = kafka
        self.topic = kafka.topic(2)
        self.file = folder / "retrain-daemon.toml"
        self.file.write_text(
            f'[kafka]\nbootstrap_servers = "{kafka.bootstrap_servers}"\ntopic = "{self.topic}"\n'
            f'dead_letter_topic = "{kafka.name("dead")}"\n[models.fraud]\n'
        )
        self.config: Config = load(self.file, {})
        letters = KafkaDeadLetters(self.config.kafka)
        for offset, (code, partition) in enumerate([("not_json", 0), ("no_model", 1), ("no_model", 1)]):
            letters.put(self.raw(partition, offset), InvalidRecord(code, "why it is invalid"))
        # The same letter once more, as after a crash; one of a topic of somebody else; one that was cut.
        letters.put(self.raw(1, 2), InvalidRecord("no_model", "why it is invalid"))
        elsewhere = RawRecord(Partition("not-ours", 0), 9, TIME, None, b"x")
        letters.put(elsewhere, InvalidRecord("not_json", "why"))
        large = RawRecord(Partition(self.topic, 0), 8, TIME, None, b"x" * 900_000)
        letters.put(large, InvalidRecord("too_large", "why"))
        letters.flush()
        letters.close()
        # And what a stranger wrote there.
        kafka.produce(self.config.kafka.dead_letter_topic, [b"stranger"])

    def raw(self, partition: int, offset: int) -> RawRecord:
        headers = (("trace", b"t"), ("retrain-daemon.code", b"forged"))
        value = f'{{"x": "{SECRET}", "n": {offset}}}'.encode()
        return RawRecord(Partition(self.topic, partition), offset, TIME + offset, b"key", value, headers)

    def back(self) -> list[RawRecord]:
        """What is in the topic now."""
        bounds = log_bounds(self.config.kafka, self.topic).items()
        ranges = [OffsetRange(one.topic, one.index, first, end) for one, (first, end) in bounds]
        found = read_ranges(self.config.kafka, ranges)
        return sorted(found, key=lambda raw: (raw.timestamp_ms, raw.partition, raw.offset))

    def run(self, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
        capsys.readouterr()
        assert main(["dlq", *words, "--json", "--config", str(self.file)]) == 0
        out = capsys.readouterr().out
        assert SECRET not in out
        return json.loads(out)


@pytest.fixture
def office(kafka: "Kafka", tmp_path: Path) -> Office:
    return Office(kafka, tmp_path)


def test_letters_are_listed_by_code_and_place_and_never_with_values(
    office: Office, capsys: pytest.CaptureFixture[str]
) -> None:
    told = office.run(capsys, "list")
    assert told["codes"] == {"no_model": 3, "not_json": 2, "too_large": 1}
    first = told["letters"][0]
    assert (first["code"], first["topic"], first["partition"], first["offset"]) == (
        "not_json",
        office.topic,
        0,
        0,
    )
    assert first["timestamp_ms"] == TIME and not first["truncated"] and first["state"] == ""
    assert [one["truncated"] for one in told["letters"]][-1]
    some = office.run(capsys, "list", "--code", "no_model", "--offsets", "2:", "--partition", "1")
    assert [one["offset"] for one in some["letters"]] == [2, 2]
    assert len(office.run(capsys, "list", "--limit", "1")["letters"]) == 1
    assert main(["dlq", "list", "--config", str(office.file)]) == 0
    text = capsys.readouterr().out
    assert f"{office.topic}/1/2" in text and SECRET not in text
    assert re.search(r"6 dead letters in dead\S+: 3 no_model, 2 not_json, 1 too_large", text)


def test_what_is_selected_goes_back_as_it_was_and_once(
    office: Office, capsys: pytest.CaptureFixture[str]
) -> None:
    assert office.run(capsys, "redrive", "--code", "no_model")["sent"] == 2
    back = office.back()
    assert [(raw.partition.index, raw.timestamp_ms, raw.key) for raw in back] == [
        (1, TIME + 1, b"key"),
        (1, TIME + 2, b"key"),
    ]
    assert [raw.value for raw in back] == [office.raw(1, 1).value, office.raw(1, 2).value]
    assert back[1].headers == (
        ("trace", b"t"),
        ("retrain-daemon.code", b"forged"),
        ("retrain-daemon.redriven", f"{office.topic}/1/2".encode()),
    )
    again = office.run(capsys, "redrive", "--code", "no_model")
    assert (again["sent"], again["skipped"]) == (0, 2)
    assert "was sent back before" in again["letters"][0]["why"]
    states = [one["state"] for one in office.run(capsys, "list", "--code", "no_model")["letters"]]
    assert states == ["sent"] * 3
    assert len(office.back()) == 2
    forced = office.run(capsys, "redrive", "--code", "no_model", "--offsets", "1", "--force")
    assert forced["sent"] == 1 and len(office.back()) == 3


def test_cut_letters_and_topics_of_others_stay(office: Office, capsys: pytest.CaptureFixture[str]) -> None:
    told = office.run(capsys, "redrive", "--all", "--force")
    assert (told["sent"], told["skipped"]) == (3, 2)
    why = {one["topic"]: one["why"] for one in told["letters"] if one["result"] == "skipped"}
    assert "is not read by this configuration" in why["not-ours"]
    assert "only its beginning was kept" in why[office.topic]


def test_redriving_wants_to_be_told_which(office: Office, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dlq", "redrive", "--config", str(office.file)]) == 2
    assert "--all for every dead letter" in capsys.readouterr().err
    assert main(["dlq", "list", "--offsets", "5:3", "--config", str(office.file)]) == 2
    assert office.back() == []


class Failing:
    """A sender that dies on its way, or is refused."""

    def __init__(self, answer: SendAnswer | None) -> None:
        self.answer = answer

    def send(self, records: Any) -> list[SendAnswer]:
        if self.answer is None:
            raise KeyboardInterrupt
        return [self.answer for _ in records]


def test_a_redrive_that_died_is_doubted_and_one_that_was_refused_is_not(office: Office) -> None:
    ledger = Ledger(office.config.ledger.url)

    def attempt(answer: SendAnswer | None) -> list[tuple[str, str]]:
        found = redrive(
            KafkaLog(office.config.kafka),
            office.config.kafka.dead_letter_topic,
            ledger,
            Failing(answer),
            [office.topic],
            Selection(codes=("not_json",), topic=office.topic),
        )
        return [(one.result, one.why) for one in found]

    assert attempt(SendAnswer("MessageSizeTooLarge")) == [("failed", "MessageSizeTooLarge")]
    with pytest.raises(KeyboardInterrupt):
        attempt(None)
    ((result, why),) = attempt(SendAnswer())
    assert result == "skipped" and "was interrupted" in why
    ledger.close()
