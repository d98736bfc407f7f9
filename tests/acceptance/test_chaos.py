"""The short form of `make chaos`: every step dies at least once, and nothing comes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.wire.local_kafka import java_and_maven

PROGRAM = Path(__file__).parents[1] / "chaos" / "chaos.py"
STEPS = {
    *("read", "scored", "before_commit", "after_commit", "posted", "confirmed"),
    *("claimed", "trained", "reference_written", "alias_moved"),
    "prefect_server",
}


@pytest.mark.slow
@pytest.mark.kafka
@pytest.mark.prefect
@pytest.mark.skipif(not java_and_maven(), reason="needs Java and Maven")
def test_kills_everywhere_lose_double_and_change_nothing() -> None:
    # No limit here: a busy machine is slow, and a play that hangs gives itself up and says where.
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env={**os.environ, "CHAOS_KILLS": "20"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-3_000:]
    told = json.loads(done.stdout.splitlines()[-1])
    by_step = told["kills_by_step"]
    assert {step for step in STEPS if by_step[step] >= 1} == STEPS
    assert told["kills"] >= 20 and told["decisions_equal"]
    assert told["acting_runs"] == told["requests"] == told["episodes"] == told["verified_episodes"] > 5
