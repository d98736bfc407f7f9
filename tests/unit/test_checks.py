"""What `check` finds: on this machine, in a sample, and where nothing answers."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from daemon import checks
from daemon.cli import main
from daemon.config import Config, load

ROOT = Path(__file__).parents[2]
GOOD = {
    "model": "fraud",
    "model_version": "7",
    "id": "a1",
    "event_time": "2026-01-31T12:00:00Z",
    "features": {"amount": 12.5},
    "prediction": 1,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(folder: Path, text: str = "") -> Config:
    path = folder / "retrain-daemon.toml"
    path.write_text("[models.fraud]\n" + text)
    return load(path, {})


def failed(found: Any) -> dict[str, str]:
    return {check.subject: check.text for check in found if check.verdict == "failed"}


def sample(folder: Path, *lines: Any) -> Path:
    path = folder / "sample.jsonl"
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    return path


def test_a_plain_config_passes(folder: Path) -> None:
    assert failed(checks.offline(config(folder))) == {}


def test_files_that_are_not_there_are_named(folder: Path) -> None:
    text = '[models.fraud.data]\nsource = "folder"\npath = "rows"\n[kafka]\nssl_cafile = "ca.pem"\n'
    assert set(failed(checks.offline(config(folder, text)))) == {"kafka.ssl_cafile", "models.fraud.data.path"}


def test_a_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / "taken").write_text("a file")
    text = '[ledger]\nurl = "sqlite:///taken/ledger.db"\n'
    assert set(failed(checks.offline(config(folder, text)))) == {"ledger.url"}


def test_a_password_in_a_url_is_not_shown(folder: Path) -> None:
    text = '[ledger]\nurl = "postgresql://u:pg-pass@h/d"\n'
    assert "pg-pass" not in str(list(checks.offline(config(folder, text))))


def test_a_callable_that_is_not_here_is_only_noted(folder: Path) -> None:
    text = '[models.fraud.training]\ncallable = "nowhere_to_be_found.trainer:train"\n'
    found = {check.subject: check.verdict for check in checks.offline(config(folder, text))}
    assert found["models.fraud.training.callable"] == "note"


def test_a_sample_shows_each_field_and_each_fault(folder: Path) -> None:
    path = sample(folder, GOOD, {**GOOD, "event_time": 5}, b"", b"{not json", b'{"model": NaN}')
    good, late, broken, nan = checks.read_sample(config(folder), path)
    assert good.fault is None
    assert [(field.field, field.source) for field in good.fields][:2] == [
        ("model", "payload `model`"),
        ("model_version", "payload `model_version`"),
    ]
    assert [record.fault.code if record.fault else "" for record in (late, broken, nan)] == [
        "invalid_event_time",
        "invalid_json",
        "missing_field",
    ]
    assert (broken.line, nan.line) == (4, 5)


def test_a_sample_may_bring_key_headers_and_timestamp(folder: Path) -> None:
    text = '[fields]\nid = "@key"\nmodel_version = "@header:version"\nevent_time = "@timestamp"\n'
    line = {"key": "k1", "headers": {"version": 3}, "timestamp_ms": 1_769_860_800_000, "value": GOOD}
    (record,) = checks.read_sample(config(folder, text), sample(folder, line))
    assert record.fault is None


def test_a_sample_of_labels_is_read_as_labels(folder: Path) -> None:
    text = '[kafka]\nlabels_topic = "labels"\n'
    label = {"model": "fraud", "id": "a1", "label": 1, "event_time": "2026-01-31T12:00:00Z"}
    (record,) = checks.read_sample(config(folder, text), sample(folder, label), "labels")
    assert [field.field for field in record.fields] == ["model", "id", "label", "event_time"]


def test_the_command_counts_and_fails_for_dead_letters(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config(folder)
    assert main(["check", "--sample", str(sample(folder, GOOD, GOOD))]) == 0
    assert "2 lines: 2 records, 0 dead letters" in capsys.readouterr().out
    assert main(["check", "--sample", str(sample(folder, GOOD, {**GOOD, "id": None}))]) == 1
    said = capsys.readouterr().out
    assert "line 2: dead letter, missing_field: id is missing or null at payload `id`" in said
    assert main(["check", "--sample", "nowhere.jsonl"]) == 2
    assert main(["check", "--sample", str(sample(folder, GOOD)), "--topic", "other"]) == 2


def test_a_line_that_is_an_envelope_of_nonsense_is_no_crash(folder: Path) -> None:
    lines = [
        {"value": None},
        {"value": 3, "headers": [1]},
        {"value": GOOD, "timestamp_ms": "x"},
        b"[" * 5_000,
    ]
    records = list(checks.read_sample(config(folder), sample(folder, *lines)))
    assert [record.fault is not None for record in records] == [True] * 4


def test_where_nobody_listens_the_reason_is_told_once(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        config(
            folder,
            f'[kafka]\nbootstrap_servers = "127.0.0.1:{port}"\nconnect_timeout_seconds = 1.0\n'
            f'labels_topic = "labels"\n[prefect]\napi_url = "http://127.0.0.1:{port}/api"\n',
        )
        # A process of its own: kafka-python forgets to close the sockets of a failed connection.
        words = [sys.executable, "-m", "daemon.cli", "check", "--online"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(folder / "prefect")}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("failed")]
    assert done.returncode == 1, done.stderr
    assert [line.split()[1] for line in found] == ["kafka:", "prefect:"]
    assert all(str(port) in line for line in found)
    assert "Traceback" not in done.stderr


def test_count_windows_on_many_partitions_are_noted(folder: Path) -> None:
    count = config(folder, "[models.fraud.window]\nrows = 500\n")
    assert [check.subject for check in checks._count_windows(count, "predictions", 3)] == [
        "models.fraud.window.rows"
    ]
    assert list(checks._count_windows(count, "predictions", 1)) == []
    seconds = msgspec.structs.replace(config(folder))
    assert list(checks._count_windows(seconds, "predictions", 3)) == []
