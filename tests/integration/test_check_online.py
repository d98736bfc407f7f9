"""`check --online` and README's producer, against a real broker and a real Prefect server."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from daemon import checks
from daemon.config import Config, load
from daemon.wire.prefect import PrefectApi
from flows.deploy import deploy

if TYPE_CHECKING:
    from tests.conftest import Kafka

pytestmark = [pytest.mark.prefect, pytest.mark.kafka]


def config(
    folder: Path, kafka: "Kafka", topic: str, mode: str = "retrain", window: str = "seconds = 60"
) -> Config:
    path = folder / "retrain-daemon.toml"
    model = kafka.name("model")
    path.write_text(
        f'mode = "{mode}"\n[kafka]\nbootstrap_servers = "{kafka.bootstrap_servers}"\ntopic = "{topic}"\n'
        f'dead_letter_topic = "{kafka.name("dead")}"\n[prefect]\nwork_pool = "{kafka.name("pool")}"\n'
        f"[models.{model}.window]\n{window}\n"
    )
    return load(path, {})


def verdicts(config: Config) -> dict[str, str]:
    return {check.subject: check.verdict for check in checks.online(config)}


def test_what_is_not_deployed_fails_until_it_is(
    tmp_path: Path, kafka: "Kafka", prefect_api: PrefectApi
) -> None:
    stated = config(tmp_path, kafka, kafka.topic())
    (model,) = stated.models
    before = verdicts(stated)
    assert {verdict for subject, verdict in before.items() if subject.startswith("deployment")} == {"failed"}
    assert before["dead letters"] == "note"
    deploy([stated.flow_settings(model)], stated.prefect)
    assert "failed" not in verdicts(stated).values()


def test_whoever_only_observes_needs_no_deployment(
    tmp_path: Path, kafka: "Kafka", prefect_api: PrefectApi
) -> None:
    assert "failed" not in verdicts(config(tmp_path, kafka, kafka.topic(), mode="observe")).values()


def test_a_missing_topic_fails_and_count_windows_on_many_partitions_are_noted(
    tmp_path: Path, kafka: "Kafka", prefect_api: PrefectApi
) -> None:
    absent = kafka.name("absent")
    assert verdicts(config(tmp_path, kafka, absent, mode="observe"))[f"topic {absent}"] == "failed"
    many = config(tmp_path, kafka, kafka.topic(partitions=3), mode="observe", window="rows = 500")
    (model,) = many.models
    assert verdicts(many)[f"models.{model}.window.rows"] == "note"


@pytest.mark.parametrize(
    ("labels_at", "spread", "said"),
    [
        (0, 1, '"by-model" is possible'),
        (1, 1, "is in partitions 0, 1 of"),
        (0, 2, "is in partitions 0, 1 of"),
    ],
    ids=["apart", "labels elsewhere", "spanning"],
)
def test_it_says_whether_members_can_share_the_models(
    tmp_path: Path, kafka: "Kafka", labels_at: int, spread: int, said: str
) -> None:
    topic, labels = kafka.topic(partitions=2), kafka.topic(partitions=2)
    stated = config(tmp_path, kafka, topic, mode="observe")
    stated = msgspec.structs.replace(stated, kafka=msgspec.structs.replace(stated.kafka, labels_topic=labels))
    (model,) = stated.models
    label = {"model": model, "id": "1", "event_time": datetime.now(UTC).isoformat(), "label": 1}
    prediction = label | {"model_version": "1", "features": {"x": 1}, "prediction": 0}
    for partition in range(spread):
        kafka.produce(topic, [json.dumps(prediction).encode(), b"garbage"], partition)
    kafka.produce(labels, [json.dumps(label).encode()], labels_at)
    (sharing,) = [one for one in checks.online(stated) if one.subject == "kafka.sharing"]
    assert sharing.verdict == "ok" and said in sharing.text
    by_model = msgspec.structs.replace(stated.kafka, sharing="by-model")
    shared = msgspec.structs.replace(stated, kafka=by_model)
    (sharing,) = [one for one in checks.online(shared) if one.subject == "kafka.sharing"]
    assert sharing.verdict == ("ok" if "possible" in said else "failed")


def test_the_producer_of_the_readme_writes_what_the_decoder_reads(tmp_path: Path, kafka: "Kafka") -> None:
    from kafka import KafkaProducer

    from daemon.wire.kafka import read_ranges
    from daemon.wire.kafka_client import log_bounds
    from monitors.decoding import make_decoder
    from monitors.events import OffsetRange

    topic = kafka.topic()
    stated = config(tmp_path, kafka, topic)
    (model,) = stated.models
    producer = KafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    record: dict[str, Any] = {
        "model": model,
        "model_version": "1",
        "id": "order-1",
        "event_time": datetime.now(UTC).isoformat(),
        "features": {"amount": 12.5, "country": "PT"},
        "prediction": 0,
        "probability": 0.07,
    }
    producer.send(topic, key=model.encode(), value=json.dumps(record).encode())
    producer.flush()
    producer.close()
    ((partition, (first, end)),) = log_bounds(stated.kafka, topic).items()
    (raw,) = read_ranges(stated.kafka, [OffsetRange(topic, partition.index, first, end)])
    decoder = make_decoder(stated.mappings, stated.kafka.labels_topic, stated.models, stated.limits)
    assert decoder.decode(raw).id == "order-1"
