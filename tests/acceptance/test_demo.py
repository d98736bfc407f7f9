"""The demo for real: every process, the whole loop, and nothing left behind."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

DEMO = [sys.executable, "-P", "-m", "daemon.cli", "demo"]
SECONDS = 900


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """The environment of somebody who has nothing; Kafka's jars are kept between tests."""
    home = tmp_path / "home"
    home.mkdir()
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    # A server that the shell of the user knows of must not be asked anything.
    return {
        **kept,
        "HOME": str(home),
        "XDG_CACHE_HOME": cache,
        "PREFECT_API_URL": "http://127.0.0.1:9/api",
        "RETRAIN_DAEMON_KAFKA__TOPIC": "somebody-elses",
    }


def demo(folder: Path, environment: dict[str, str], *arguments: str) -> tuple[dict[str, Any], str]:
    """Run it to its end; the JSON object, and what it told on the way."""
    done = subprocess.run(
        [*DEMO, "--json", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def processes_in(folder: Path) -> list[str]:
    """The command lines of all processes that have this folder in their arguments or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or entry.name == str(os.getpid()):
            continue
        try:
            command, environment = ((entry / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(folder).encode() in command + environment:
            found.append(command.decode(errors="replace").replace("\0", " "))
    return found


@pytest.mark.slow
@pytest.mark.kafka
@pytest.mark.prefect
def test_the_four_acts_go_as_told_and_the_same_way_twice(tmp_path: Path, home: dict[str, str]) -> None:
    told, story = demo(tmp_path, home, "--folder", str(tmp_path / "first"))
    assert told["requests"] == told["runs_by_automation"] == len(set(told["run_ids"])) >= 3
    assert told["runs_direct"] == 0
    assert (told["kills"], told["refused"], told["promoted"]) == (1, 1, 2)
    assert told["metric_after"] > told["metric_never"] + 0.1
    assert told["metric_drifted"] < told["metric_reference"] - 0.1
    assert "Act 4" in story
    page = (tmp_path / "demo-summary.html").read_text()
    assert all(run[:8] in page for run in told["run_ids"])
    assert not processes_in(tmp_path / "first")
    assert not (Path(home["HOME"]) / ".prefect").exists()

    again, _ = demo(tmp_path, home)
    same = ["windows", "episodes", "requests", "promoted", "refused", "records", "rows_after", "metric_after"]
    assert {name: again[name] for name in same} == {name: told[name] for name in same}


@pytest.mark.slow
@pytest.mark.kafka
@pytest.mark.prefect
def test_a_stream_of_numbers_from_a_csv_file_is_judged_by_mae(tmp_path: Path, home: dict[str, str]) -> None:
    path = tmp_path / "numbers.csv"
    numbers = random.Random(1)
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["row", "x", "z", "y"])
        for row in range(4_000):
            moved = 2.0 if row >= 2_000 else 0.0
            x, z = numbers.gauss(moved, 1), numbers.gauss(moved, 1)
            writer.writerow([row, x, z, (3 - 3 * moved) * x + z + numbers.gauss(0, 0.1)])
    told, _ = demo(
        tmp_path,
        home,
        *("--data", str(path), "--label", "y", "--ignore", "row,absent"),
        *("--reference-rows", "1200", "--window-rows", "400"),
    )
    assert told["metric"] == "mae"
    assert told["promoted"] >= 1
    assert told["metric_after"] < told["metric_never"]
    assert told["kills"] == 0


@pytest.mark.slow
@pytest.mark.kafka
@pytest.mark.prefect
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_ends_it_early_leaves_nothing_behind(
    tmp_path: Path, home: dict[str, str], number: signal.Signals
) -> None:
    folder = tmp_path / "stopped"
    story = (tmp_path / "story.txt").open("w+")
    running = subprocess.Popen(
        [*DEMO, "--json", "--folder", str(folder)],
        cwd=tmp_path,
        env=home,
        stdout=subprocess.DEVNULL,
        stderr=story,
    )
    deadline = time.monotonic() + SECONDS
    while "window 2" not in Path(story.name).read_text():
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert processes_in(folder)
    running.send_signal(number)
    assert running.wait(120) == 130
    assert not processes_in(folder)
    story.close()
