"""
Kill -9 everywhere, hundreds of times, and nothing may be lost, doubled or decided otherwise.

The scene is played twice, each time on topics, a Prefect server and a registry of its own: undisturbed,
which is the oracle, and in the storm. The last line is a JSON object; the exit code is 0 if all is well.
"""

import json
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from doomed_run import FLOW_STEPS
from doomed_start import DAEMON_STEPS, SERVER
from patience import Patience
from scene import MODELS
from storm import READING, Storm
from verdict import altered_byte_is_found, decisions, judged_windows, runs, verifications
from world import World

from daemon.wire.local_kafka import LocalKafka
from flows.demo.surroundings import private_environment

KILLS = 200
# How many of the decisions that differ are shown.
DIFFERENCES = 10
# What costs seconds each is had so often and no more.
SCARCE = 10


def quotas(kills: int) -> tuple[dict[str, int], int]:
    """How many kills of each daemon step and of the server, and of each step of the flow."""
    few = max(1, min(SCARCE, kills // 16))
    rare = {"posted": few, "confirmed": few, SERVER: few}
    left = max(len(READING), kills - sum(rare.values()) - len(FLOW_STEPS) * few)
    return rare | {step: -(-left // len(READING)) for step in READING}, few


def main() -> int:
    """Play it twice; 0 if the storm changed nothing. What was played is kept if it did."""
    kills = int(os.environ.get("CHAOS_KILLS", str(KILLS)))
    folder = Path(tempfile.mkdtemp(prefix="retrain-daemon-chaos-"))
    told: dict[str, Any] = {}
    try:
        with Patience() as patience, private_environment(folder), LocalKafka(folder / "kafka") as kafka:
            told = played(folder, kafka.bootstrap_servers, kills, patience)
    except Exception:  # noqa: BLE001 - whatever it was, it is told, and what was played is kept
        say(traceback.format_exc())
    well = bool(told) and is_well(told, kills)
    if well:
        shutil.rmtree(folder)
    else:
        say(f"logs, ledgers and registries are kept in {folder}")
    say(json.dumps(told or {"finished": False}))
    return 0 if well else 1


def played(folder: Path, bootstrap_servers: str, kills: int, patience: Patience) -> dict[str, Any]:
    """The object of the last line."""
    by_daemon, by_flow = quotas(kills)
    # Each stage has a request of each model, and a run dies at most once in each step of a request.
    stages = max(2, -(-(by_flow + 2) // len(MODELS)))
    started = time.monotonic()

    def tell(line: str) -> None:
        say(f"[{time.monotonic() - started:6.1f} s] {line}")

    with World(folder / "calm", bootstrap_servers, 0, patience) as calm, _explained(calm):
        tell("the undisturbed play begins")
        Storm(calm, stages, {}, tell).play()
        expected, windows = decisions(calm), judged_windows(calm)
    with World(folder / "storm", bootstrap_servers, by_flow, patience) as world, _explained(world):
        tell("the storm begins")
        storm = Storm(world, stages, by_daemon, tell)
        storm.play()
        tell("the storm is over; every episode is verified")
        told = verdict(world, storm, expected, windows)
        tell("all is held against the undisturbed play")
        return told


@contextmanager
def _explained(world: World) -> Iterator[None]:
    """Where everything stood, if the play breaks off."""
    try:
        yield
    except Exception:
        say("the play broke off:")
        try:
            for line in world.state():
                say(line)
        except Exception as error:  # noqa: BLE001 - the reason for breaking off is what has to be told
            say(f"more cannot be told: {error!r}")
        raise


def say(line: str) -> None:
    """At once, for whoever waits."""
    print(line, flush=True)  # noqa: T201 - the command's own words


def verdict(world: World, storm: Storm, expected: list[str], windows: Any) -> dict[str, Any]:
    """What came of it, in numbers."""
    world.patience.begin("verifying every episode")
    found, judged = decisions(world), judged_windows(world)
    pairs = zip_longest(found, expected, fillvalue="nothing")
    for one, other in [pair for pair in pairs if pair[0] != pair[1]][:DIFFERENCES]:
        say(f"decided: {one}\nundisturbed: {other}")
    by_step = storm.kills_by_step()
    verified = verifications(world, world.ledger)
    return {
        "kills": sum(by_step.values()),
        "kills_by_step": by_step,
        "windows_expected": len(windows),
        "windows_judged": len(judged),
        "windows_lost": len(windows.keys() - judged.keys()),
        "windows_doubled": sum(count - 1 for count in judged.values()),
        **runs(world),
        "decisions_equal": found == expected,
        "episodes": len(verified),
        "verified_episodes": sum(one.equal for one in verified),
        "altered_byte_found": altered_byte_is_found(world),
    }


def is_well(told: dict[str, Any], kills: int) -> bool:
    """Killed as often as asked, and nothing lost, doubled, missing, twice or decided otherwise."""
    by_step, (_, few) = told["kills_by_step"], quotas(kills)
    wrong = ("windows_lost", "windows_doubled", "missing_runs", "duplicate_runs")
    return (
        told["kills"] >= kills
        and all(by_step[step] >= few for step in (*DAEMON_STEPS, *FLOW_STEPS, SERVER))
        and not any(told[name] for name in wrong)
        and told["decisions_equal"]
        and told["windows_judged"] == told["windows_expected"] > 0
        and told["acting_runs"] == told["requests"] > 0
        and told["verified_episodes"] == told["episodes"] > 0
        and told["altered_byte_found"]
    )
