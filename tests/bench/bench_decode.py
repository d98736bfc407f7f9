"""
Measures decoding: records per CPU second, and the ratio to `json.loads` in the same run.

Run with `python -m tests.bench.bench_decode` or as a script from the checkout.
"""

import json
import sys
import time
from collections.abc import Callable

from monitors.decoding import JsonDecoder
from monitors.records import Partition, RawRecord
from monitors.settings import FieldSettings, LimitSettings

RECORDS = 20_000
ROUNDS = 5


def sample(columns: int, nan: bool = False) -> bytes:
    """A record as a Python producer would write it."""
    features = {f"feature_{n}": n * 1.37 if n % 4 else f"category {n}" for n in range(columns)}
    record = {
        "model": "fraud",
        "model_version": "7",
        "id": "a8f0e1c2-7b1d-4c5a",
        "event_time": "2026-01-01T10:00:00.123Z",
        "features": features | ({"broken": float("nan")} if nan else {}),
        "prediction": 1,
        "probability": 0.93,
        "segment": "eu",
    }
    return json.dumps(record).encode()


def rate(call: Callable[[], object]) -> float:
    """Calls per CPU second; the best of some rounds, as other processes only ever slow one down."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(RECORDS):
            call()
        best = min(best, time.process_time() - start)
    return RECORDS / best


def main() -> None:
    decoder = JsonDecoder(FieldSettings(), {"fraud"}, LimitSettings())
    for name, value in (
        ("20 columns", sample(20)),
        ("200 columns", sample(200)),
        ("with NaN", sample(20, True)),
    ):
        raw = RawRecord(Partition("predictions", 0), 0, 1_790_000_000_000, None, value)
        ours, plain = rate(lambda raw=raw: decoder.decode(raw)), rate(lambda value=value: json.loads(value))
        line = (
            f"{name:12} {len(value):6} bytes  {ours:10,.0f} records/cpu-s  {ours / plain:5.2f} x json.loads\n"
        )
        sys.stdout.write(line)


if __name__ == "__main__":
    main()
