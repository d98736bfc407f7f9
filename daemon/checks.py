"""Checks: whether what is configured can work, told before `start` finds out."""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from daemon.config import Config
from daemon.errors import RetrainDaemonError, UsageError
from monitors.decoding import FieldMapping, JsonDecoder
from monitors.passwords import without_passwords
from monitors.records import Partition, RawRecord

DEPLOY = "flows.deploy:deploy"
_ENVELOPE = frozenset({"key", "headers", "timestamp_ms", "value"})


class Check(msgspec.Struct, frozen=True):
    """One thing looked at; a `note` may be as meant, and never fails the command."""

    verdict: Literal["ok", "note", "failed"]
    subject: str
    text: str


class SampleRecord(msgspec.Struct, frozen=True):
    """What one line of a sample would be."""

    line: int
    fields: tuple[FieldMapping, ...]

    @property
    def fault(self) -> FieldMapping | None:
        """The field that makes it a dead letter, if it is one."""
        return next((field for field in self.fields if field.code), None)


def offline(config: Config) -> Iterator[Check]:
    """What this machine alone can say."""
    mode = "asks for retrainings" if config.mode == "retrain" else 'only tells; mode = "retrain" lets it ask'
    yield Check("ok", "mode", f"{config.mode}: {mode}")
    yield Check("ok", "models", ", ".join(config.models))
    yield Check("ok", "topics", ", ".join(config.mappings))
    yield _labels(config)
    yield from _folders(config)
    yield from _files(config)
    yield from _callables(config)


def online(config: Config) -> Iterator[Check]:
    """What Kafka and Prefect say."""
    yield from _kafka(config)
    yield from _prefect(config)


def read_sample(config: Config, file: Path, topic: str = "") -> Iterator[SampleRecord]:
    """
    How each line of a file would be read as a record of the topic (the first one if not named).

    A line is a payload, or `{"key", "headers", "timestamp_ms", "value"}` where a mapping wants more.
    """
    topic = topic or config.kafka.topics[0]
    mapping = config.mappings.get(topic)
    if mapping is None:
        known = ", ".join(config.mappings)
        raise UsageError(f"--topic: {topic} is not read; kafka.topic and kafka.labels_topic say: {known}")
    decoder = JsonDecoder(mapping, config.models, config.limits, labels=topic == config.kafka.labels_topic)
    for number, line in _lines(file):
        raw = _raw_record(line, Partition(topic, 0), number)
        yield SampleRecord(number, tuple(decoder.explain(raw)))


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.strip()
    except OSError as error:
        raise UsageError(f"--sample: cannot read {file} ({error.strerror}); check the path") from error


def _raw_record(line: bytes, partition: Partition, number: int) -> RawRecord:
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not _is_envelope(found):
        return RawRecord(partition, number, now_ms, None, line)
    return RawRecord(
        partition,
        number,
        found.get("timestamp_ms", now_ms),
        None if found.get("key") is None else _bytes(found["key"]),
        None if found["value"] is None else json.dumps(found["value"]).encode(),
        tuple((name, _bytes(value)) for name, value in found.get("headers", {}).items()),
    )


def _is_envelope(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and "value" in found
        and _ENVELOPE.issuperset(found)
        and isinstance(found.get("headers", {}), dict)
        and isinstance(found.get("timestamp_ms", 0), int)
    )


def _bytes(value: Any) -> bytes:
    """What a producer would have sent for it; an unpaired surrogate goes where it is refused."""
    return str(value).encode("utf-8", "surrogatepass")


def _labels(config: Config) -> Check:
    if config.kafka.labels_topic:
        return Check("ok", "labels", f"from topic {config.kafka.labels_topic}")
    mapped = sorted({mapping.label for mapping in config.mappings.values() if mapping.label})
    if mapped:
        return Check("ok", "labels", f"from the prediction records ({', '.join(mapped)})")
    return Check("note", "labels", "none; performance is not judged. Set kafka.labels_topic or fields.label")


def _folders(config: Config) -> Iterator[Check]:
    for subject, place in (
        ("ledger.url", config.ledger.url),
        ("reports.folder", config.reports.folder),
        ("registry.tracking_uri", config.registry.tracking_uri),
        ("registry.references_url", config.registry.references_url),
    ):
        folder = _local_folder(place)
        if folder is None:
            yield Check("ok", subject, f"is elsewhere: {without_passwords(place)}")
        elif (above := _existing(folder)).is_dir() and os.access(above, os.W_OK):
            yield Check("ok", subject, place)
        else:
            text = f"{_existing(folder)} is no folder that can be written to; change it or {subject}"
            yield Check("failed", subject, text)


def _local_folder(place: str) -> Path | None:
    if place.startswith("sqlite"):
        return Path(place.partition(":///")[2]).parent
    return None if "://" in place else Path(place)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _files(config: Config) -> Iterator[Check]:
    files = [
        (f"kafka.{name}", getattr(config.kafka, name))
        for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile")
    ]
    files += [
        (f"models.{name}.data.path", model.data.path)
        for name, model in config.models.items()
        if model.data.source == "folder" and "://" not in model.data.path
    ]
    for subject, file in files:
        if file and not os.access(file, os.R_OK):
            yield Check("failed", subject, f"{file} cannot be read; correct the path or its permissions")


def _callables(config: Config) -> Iterator[Check]:
    for name, model in config.models.items():
        for subject, entry in (("data", model.data.callable), ("training", model.training.callable)):
            if entry and importlib.util.find_spec(entry.partition(":")[0].partition(".")[0]) is None:
                text = f"{entry} cannot be imported here; the workers must be able to"
                yield Check("note", f"models.{name}.{subject}.callable", text)


def _kafka(config: Config) -> Iterator[Check]:
    from daemon.wire.kafka_client import UnknownTopic, log_bounds

    known: dict[Partition, tuple[int, int]] = {}
    for topic in config.mappings:
        try:
            bounds = log_bounds(config.kafka, topic)
        except UnknownTopic as error:
            yield Check("failed", f"topic {topic}", str(error))
        except RetrainDaemonError as error:
            # The next topic would only say the same again, after another timeout.
            yield Check("failed", "kafka", str(error))
            return
        else:
            records = sum(end - first for first, end in bounds.values())
            yield Check("ok", f"topic {topic}", f"{len(bounds)} partitions, {records:,} offsets")
            yield from _count_windows(config, topic, len(bounds))
            known |= bounds
    yield from _sharing(config, known)
    try:
        log_bounds(config.kafka, config.kafka.dead_letter_topic, needs="Write")
        yield Check("ok", "dead letters", config.kafka.dead_letter_topic)
    except UnknownTopic:
        yield Check("note", "dead letters", f"{config.kafka.dead_letter_topic} is made when `start` needs it")
    except RetrainDaemonError as error:
        yield Check("failed", "dead letters", str(error))


def _sharing(config: Config, bounds: Mapping[Partition, tuple[int, int]]) -> Iterator[Check]:
    """Whether models span partitions, which decides how members can share them."""
    from daemon import sharing_check
    from daemon.wire.sharing import uneven

    try:
        places = sharing_check.look(config, bounds)
    except RetrainDaemonError as error:
        yield Check("note", "kafka.sharing", f"where the models are could not be seen: {error}")
        return
    for topic in config.mappings:
        yield Check("ok", f"models in {topic}", places.in_topic(topic))
    problem = uneven(bounds) or places.parted()
    if config.kafka.sharing == "one-active":
        possible = f'"by-model" is not possible: {problem}' if problem else '"by-model" is possible'
        yield Check("ok", "kafka.sharing", f"one member reads, the others stand by; {possible}")
    elif problem:
        text = f'{problem}; key predictions and labels by model, in as many partitions, or use "one-active"'
        yield Check("failed", "kafka.sharing", text)
    else:
        yield Check("ok", "kafka.sharing", "members share the models, by partition")


def _count_windows(config: Config, topic: str, partitions: int) -> Iterator[Check]:
    if partitions == 1 or topic == config.kafka.labels_topic:
        return
    for name, model in config.models.items():
        if model.window.rows is not None:
            text = (
                f"topic {topic} has {partitions} partitions, and count windows need all of the model in one; "
                "key the records by model, or use window.seconds"
            )
            yield Check("note", f"models.{name}.window.rows", text)


def _prefect(config: Config) -> Iterator[Check]:
    deploy: Callable[..., list[Any]] = load_entrypoint(DEPLOY)
    flows = [config.flow_settings(name) for name in config.models]
    try:
        changes = deploy(flows, config.prefect, dry_run=True)
    except Exception as error:
        # Its own errors say what to do; whatever else it is, it is a defect and to be seen as one.
        if not hasattr(error, "exit_code"):
            raise
        yield Check("failed", "prefect", str(error))
        return
    missing: Literal["note", "failed"] = "failed" if config.mode == "retrain" else "note"
    for change in changes:
        subject = f"{change.kind} {change.name}"
        if change.action == "unchanged":
            yield Check("note" if change.detail else "ok", subject, change.detail or "as it should be")
        else:
            what = {"created": "is missing", "updated": "differs"}.get(change.action, "should not be there")
            detail = f" ({change.detail})" if change.detail else ""
            yield Check(missing, subject, f"{what}{detail}; run `retrain-daemon deploy`")


def load_entrypoint(entry: str) -> Any:
    """An object by `module:name`: how this side reaches flows without importing them."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)
