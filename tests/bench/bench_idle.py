"""
Measures idling: CPU of a real `retrain-daemon start` with nothing to read, on real Kafka and Prefect.

Run as a script from the checkout; needs Java and Maven. `SECONDS=300` measures for longer.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.request import urlopen

from daemon.config import load
from daemon.wire.kafka_client import ensure_topics, make_producer
from daemon.wire.local_kafka import LocalKafka, free_port
from daemon.wire.local_prefect import LocalPrefectServer
from monitors.settings import KafkaSettings

SECONDS = float(os.environ.get("SECONDS", "90"))
# The first heartbeats, the group and the imports are behind it by then.
WARM_UP_SECONDS = 20.0
PATIENCE_SECONDS = 120.0
RECORDS = 2_000
START = datetime(2026, 1, 1, tzinfo=UTC)


def configuration(kafka: LocalKafka, prefect: LocalPrefectServer, port: int) -> str:
    """What `init` writes, but for the addresses and the mode: the defaults are what is measured."""
    return f"""
        mode = "retrain"
        [kafka]
        bootstrap_servers = "{kafka.bootstrap_servers}"
        topic = "predictions"
        labels_topic = "labels"
        start = "earliest"
        [prefect]
        api_url = "{prefect.url}"
        [http]
        port = {port}
        [models.fraud]
        reference_rows = 500
        [models.fraud.window]
        seconds = 100
    """


def produce(settings: KafkaSettings) -> None:
    """Some records over four partitions, so that windows and a reference are held while idling."""
    ensure_topics(settings, {"predictions": 4, "labels": 1})
    producer = make_producer(settings)
    for number in range(RECORDS):
        body = {
            "model": "fraud",
            "model_version": "1",
            "id": f"r{number}",
            "event_time": (START + timedelta(seconds=number)).isoformat(),
            "features": {f"x{n}": number * (n + 3) % 97 for n in range(20)},
            "prediction": number % 2,
        }
        producer.send("predictions", value=json.dumps(body).encode(), partition=number % 4)
    producer.flush()
    producer.close()


def command(name: str, config: Path) -> list[str]:
    return [sys.executable, "-P", "-m", "daemon.cli", name, "--config", str(config)]


def page(port: int, path: str) -> str:
    """One of the daemon's own pages; empty while it does not answer."""
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:  # refused, or not answered in time
        return ""


def wait_for(what: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not what():
        if time.monotonic() > deadline:
            raise SystemExit(
                f"the daemon is not idle after {PATIENCE_SECONDS:.0f} s:\n{log.read_text()[-3_000:]}"
            )
        time.sleep(0.2)


def cpu_seconds(task: Path) -> float:
    """User and system time so far of a process or thread, by its folder under /proc."""
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def by_thread(pid: int) -> dict[str, float]:
    """CPU seconds of each thread, by its number and name."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {f"{task.name} {(task / 'comm').read_text().strip()}": cpu_seconds(task) for task in tasks}


def measure(pid: int) -> str:
    """Percent of a core over the whole time, and of each thread that took some."""
    process = Path(f"/proc/{pid}")
    before, threads, began = cpu_seconds(process), by_thread(pid), time.monotonic()
    time.sleep(SECONDS)
    took, spent = time.monotonic() - began, cpu_seconds(process) - before
    shares = {name: 100 * (used - threads.get(name, 0.0)) / took for name, used in by_thread(pid).items()}
    told = ", ".join(f"{name} {share:.2f}" for name, share in shares.items() if share >= 0.01)
    return f"idle CPU: {100 * spent / took:.2f} % of a core over {took:.0f} s (by thread: {told})"


def run(folder: Path, kafka: LocalKafka, prefect: LocalPrefectServer) -> str:
    port, config, log = free_port(), folder / "retrain-daemon.toml", folder / "daemon.log"
    config.write_text(configuration(kafka, prefect, port))
    produce(load(config, {}).kafka)
    environment = {**os.environ, **prefect.environment}
    subprocess.run(command("deploy", config), env=environment, check=True, stdout=subprocess.DEVNULL)
    with log.open("wb") as out:
        daemon = subprocess.Popen(command("start", config), env=environment, stdout=out, stderr=out)
    try:
        wait_for(
            lambda: f'records_read_total{{topic="predictions"}} {RECORDS}.0' in page(port, "/metrics"), log
        )
        time.sleep(WARM_UP_SECONDS)
        return measure(daemon.pid)
    finally:
        daemon.terminate()
        daemon.wait(30)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with LocalKafka(folder / "kafka") as kafka, LocalPrefectServer(folder) as prefect:
            sys.stdout.write(run(folder, kafka, prefect) + "\n")


if __name__ == "__main__":
    main()
