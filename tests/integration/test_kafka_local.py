"""A real Kafka of our own: it comes, keeps what it has, and never outlives us."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.wire.kafka import ensure_topics, log_bounds, make_producer
from daemon.wire.local_kafka import LocalKafka, LocalKafkaError, default_cache, java_and_maven
from monitors.records import Partition
from monitors.settings import KafkaSettings

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.skipif(not java_and_maven(), reason="needs Java and Maven"),
]


@pytest.mark.slow
def test_backdated_records_outlive_a_kill_and_a_retention_check(tmp_path: Path) -> None:
    often = {"log.retention.check.interval.ms": "200", "log.initial.task.delay.ms": "200"}
    with LocalKafka(tmp_path, overrides=often) as broker:
        settings = KafkaSettings(bootstrap_servers=broker.bootstrap_servers)
        ensure_topics(settings, {"old": 1})
        producer = make_producer(settings)
        producer.send("old", value=b"1", timestamp_ms=1_600_000_000_000)
        producer.close(timeout=10)
        broker.kill()
        broker.start()
        time.sleep(1.0)
        assert broker.bootstrap_servers == settings.bootstrap_servers
        assert log_bounds(settings, "old") == {Partition("old", 0): (0, 1)}


def test_it_ends_with_whoever_started_it(tmp_path: Path, ends: Callable[[int], bool]) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from daemon.wire.local_kafka import LocalKafka
        print(LocalKafka(Path(sys.argv[1])).start().pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=180,
    )
    assert ends(int(done.stdout))


def test_a_broker_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    broker = LocalKafka(tmp_path, overrides={"log.segment.bytes": "not a number"})
    with pytest.raises(LocalKafkaError, match="not a number"):
        broker.start()


def test_the_cache_needs_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "")
    assert default_cache().is_absolute()
    assert str(os.getuid()) in str(default_cache())
