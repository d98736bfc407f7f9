"""Options: what `retrain-daemon demo` can be told."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from flows.demo.parcels import parcels
from flows.demo.play import Pace
from flows.demo.scoreboard import Metric
from flows.demo.stream import Kind, Stream
from flows.demo.table import UnusableTable, read_table

REFERENCE_ROWS = 2_000
WINDOW_ROWS = 500
# Fewer rows do not show what the acts stage.
LEAST_WINDOW_ROWS = 200

EXAMPLES = """\
examples:
  retrain-daemon demo                        the four acts, on a generated stream
  retrain-daemon demo --json                 the same without a terminal; the last line is one JSON object
  retrain-daemon demo --data sales.parquet --label churned --ignore customer_id,ts \\
                      --reference-rows 5000 --window-rows 500
"""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, parsed."""

    data: Path | None
    label: str
    ignore: tuple[str, ...]
    reference_rows: int
    window_rows: int
    metric: Literal["auto", "accuracy", "mae"]
    pace: Pace
    kafka: str
    keep: bool
    json: bool
    folder: Path | None
    seed: int

    def stream(self) -> Stream:
        """The rows to play; `UnusableTable` says what is wrong with a file."""
        if self.data is None:
            return parcels(seed=self.seed, reference_rows=self.reference_rows, window_rows=self.window_rows)
        stream = read_table(
            self.data,
            label=self.label,
            ignore=self.ignore,
            reference_rows=self.reference_rows,
            window_rows=self.window_rows,
        )
        if self.metric == "auto":
            return stream
        if self.metric == "mae" and any(isinstance(row.label, str) for row in stream.reference):
            raise UnusableTable(f"column {self.label!r} holds words, and mae needs numbers; use accuracy")
        kind: Kind = "regression" if self.metric == "mae" else "classification"
        return msgspec.structs.replace(stream, kind=kind)

    def metric_for(self, stream: Stream) -> Metric:
        """The metric asked for, else what suits the kind of label."""
        if self.metric != "auto":
            return self.metric
        return "mae" if stream.kind == "regression" else "accuracy"


def parse(argv: Sequence[str]) -> Options:
    """Read the arguments; ends with exit code 2 on those that cannot be meant."""
    parser = _parser()
    found = parser.parse_args(argv)
    if found.data is None and (found.label or found.ignore):
        parser.error("--label and --ignore name columns of --data; give --data FILE too")
    if found.data is not None and not found.label:
        parser.error("--data needs --label COLUMN, the column to predict")
    if found.data is None and (found.window_rows < LEAST_WINDOW_ROWS or found.metric == "mae"):
        parser.error(
            f"the four acts predict two classes, in windows of {LEAST_WINDOW_ROWS} rows at least; "
            "other windows and metrics are for --data"
        )
    return Options(**{**vars(found), "ignore": tuple(filter(None, found.ignore.split(",")))})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retrain-daemon demo",
        description="Show the whole loop on this machine: Kafka, Prefect, a registry and the daemon are "
        "started privately, a service is simulated, drift comes, and a better model is promoted or "
        "refused. Nothing of yours is touched.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE",
        help="play your own stream: Parquet or CSV, row order is time order")  # fmt: skip
    add("--label", default="", metavar="COLUMN", help="the column to predict")
    add("--ignore", default="", metavar="A,B", help="columns that are not features; absent ones are fine")
    add("--reference-rows", type=_positive, default=REFERENCE_ROWS, metavar="N",
        help="rows that train the first champion; the rest is live (default: %(default)s)")  # fmt: skip
    add("--window-rows", type=_positive, default=WINDOW_ROWS, metavar="W",
        help="rows of a window; labels come one window late (default: %(default)s)")  # fmt: skip
    add("--metric", choices=("auto", "accuracy", "mae"), default="auto",
        help="auto: accuracy for classes, mae for numbers (default: %(default)s)")  # fmt: skip
    add("--pace", choices=("wait", "free"), default="wait",
        help="wait: stream time stands still while a request is in flight, so that every run of the demo "
        "gives the same; free: a window a second (default: %(default)s)")  # fmt: skip
    add("--kafka", default="", metavar="HOST:PORT", help="use this broker instead of starting one")
    add("--folder", type=Path, metavar="DIR", help="where everything is kept (default: a temporary folder)")
    add("--keep", action="store_true", help="keep that folder: ledger, registry, reports, logs")
    add("--json", action="store_true", help="end with one JSON object on stdout; progress goes to stderr")
    add("--seed", type=int, default=7, metavar="N", help="of the generated stream (default: %(default)s)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of rows")
    return number
