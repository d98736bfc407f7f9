"""
Kill -9 everywhere, hundreds of times, and nothing may be lost, doubled or decided otherwise.

The scene is played twice, each time on topics, a Prefect server and a registry of its own: undisturbed,
which is the oracle, and in the storm. The last line is a JSON object; the exit code is 0 if all is well.
"""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from doomed_run import FLOW_STEPS
from doomed_start import DAEMON_STEPS
from storm import READING, SERVER, Storm
from verdict import altered_byte_is_found, decisions, judged_windows, runs, verifications
from world import World

from daemon.wire.local_kafka import LocalKafka
from flows.demo.surroundings import private_environment

KILLS = 200
# The least of each step; there are twelve requests to die on, and no run dies twice in one step of them.
SCARCE = 10
STAGES = 4


def quotas(kills: int) -> tuple[dict[str, int], int]:
    """How many kills of each daemon step and of the server, and of each step of the flow."""
    few = max(1, min(SCARCE, kills // 16))
    rare = {"posted": few, "confirmed": few, SERVER: few}
    left = max(len(READING), kills - sum(rare.values()) - len(FLOW_STEPS) * few)
    return rare | {step: -(-left // len(READING)) for step in READING}, few


def main() -> int:
    kills = int(os.environ.get("CHAOS_KILLS", str(KILLS)))
    stages = STAGES if kills >= KILLS else 2
    by_daemon, by_flow = quotas(kills)
    started = time.monotonic()

    def tell(line: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {line}", flush=True)  # noqa: T201

    with tempfile.TemporaryDirectory(prefix="retrain-daemon-chaos-") as name, private_environment(Path(name)):
        folder = Path(name)
        with LocalKafka(folder / "kafka") as kafka:
            with World(folder / "calm", kafka.bootstrap_servers, 0) as calm:
                tell("the undisturbed play begins")
                Storm(calm, stages, {}, tell).play()
                expected, windows = decisions(calm), judged_windows(calm)
            with World(folder / "storm", kafka.bootstrap_servers, by_flow) as world:
                tell("the storm begins")
                storm = Storm(world, stages, by_daemon, tell)
                storm.play()
                tell("the storm is over; every episode is verified")
                told = verdict(world, storm, expected, windows)
    print(json.dumps(told))  # noqa: T201 - this is the output
    return 0 if is_well(told) and told["kills"] >= kills and at_least(by_flow, told["kills_by_step"]) else 1


def verdict(world: World, storm: Storm, expected: list[str], windows: Any) -> dict[str, Any]:
    """The object of the last line."""
    found, judged = decisions(world), judged_windows(world)
    for one, other in zip(found, expected, strict=False):
        if one != other:
            print(f"decided: {one}\nundisturbed: {other}")  # noqa: T201
            break
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


def at_least(few: int, by_step: dict[str, int]) -> bool:
    """Whether each named step was died in so often."""
    return all(by_step[step] >= few for step in (*DAEMON_STEPS, *FLOW_STEPS, SERVER))


def is_well(told: dict[str, Any]) -> bool:
    """Nothing lost, doubled, missing, twice or otherwise."""
    wrong = ("windows_lost", "windows_doubled", "missing_runs", "duplicate_runs")
    return (
        not any(told[name] for name in wrong)
        and told["decisions_equal"]
        and told["windows_judged"] == told["windows_expected"] > 0
        and told["acting_runs"] == told["requests"] > 0
        and told["verified_episodes"] == told["episodes"] > 0
        and told["altered_byte_found"]
    )
