"""Tables: somebody's own stream from a Parquet or CSV file, row order taken as time order."""

import math
from collections.abc import Collection
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.demo.stream import Kind, Row, Stream
from monitors.records import Scalar

if TYPE_CHECKING:
    import pandas as pd

FEW_VALUES = 20


class UnusableTable(ValueError):
    """The file cannot be made a stream; the message says what to change."""


def read_table(
    path: Path, *, label: str, ignore: Collection[str], reference_rows: int, window_rows: int
) -> Stream:
    """The file's rows as a stream: the first `reference_rows` train, the rest is live."""
    frame = _frame(path)
    if label not in frame.columns:
        raise UnusableTable(
            f"{path} has no column {label!r} (it has {', '.join(map(repr, frame.columns))}); "
            "name the column to predict with --label"
        )
    frame = frame[frame[label].notna()]
    if len(frame) < reference_rows + window_rows:
        raise UnusableTable(
            f"{path} has {len(frame)} labelled rows, fewer than --reference-rows {reference_rows} and one "
            f"window of --window-rows {window_rows}; lower one of them"
        )
    features = [column for column in frame.columns if column != label and column not in ignore]
    if not features:
        raise UnusableTable(f"{path} has no feature columns left beside {label!r}; ignore fewer columns")
    kind = _kind(frame[label])
    rows = _rows(frame, features, label)
    return Stream(
        model=_model_name(path),
        source=path.name,
        kind=kind,
        window_rows=window_rows,
        reference=rows[:reference_rows],
        live=rows[reference_rows:],
    )


def _frame(path: Path) -> "pd.DataFrame":
    import pandas as pd

    if not path.is_file():
        raise UnusableTable(f"there is no file {path}; give --data a Parquet or CSV file")
    if path.suffix.lower() in (".csv", ".gz", ".txt"):
        return pd.read_csv(path)
    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise UnusableTable(
            f"{path} needs pyarrow to be read; install it (pip install 'retrain-daemon[parquet]'), "
            "or give a CSV file"
        ) from error
    except (OSError, ValueError) as error:
        raise UnusableTable(f"{path} is not readable as Parquet: {error}; CSV files end in .csv") from error


def _kind(labels: "pd.Series[Any]") -> Kind:
    import pandas as pd

    if not pd.api.types.is_numeric_dtype(labels) or pd.api.types.is_bool_dtype(labels):
        return "classification"
    whole = bool((labels == labels.round()).all())
    return "classification" if whole and labels.nunique() <= FEW_VALUES else "regression"


def _rows(frame: "pd.DataFrame", features: list[str], label: str) -> tuple[Row, ...]:
    columns = {str(name): [_scalar(value) for value in frame[name].tolist()] for name in features}
    labels = [_scalar(value) for value in frame[label].tolist()]
    if _kind(frame[label]) == "classification":
        # 1.0 and 1 are the same class; the log says the shorter one.
        labels = [int(value) if isinstance(value, float) else value for value in labels]
    names = tuple(columns)
    return tuple(
        Row(dict(zip(names, values, strict=True)), truth)
        for *values, truth in zip(*columns.values(), labels, strict=True)
    )


def _scalar(value: object) -> Scalar:
    """A value that JSON holds; times become seconds since the epoch, and what is not a number nothing."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        # Seven digits say all of a 32-bit float, and keep a record short.
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, datetime):
        # pandas' NaT is a datetime too, the only one that differs from itself.
        return None if value != value else _aware(value).timestamp()
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    text = str(value)
    return None if text in ("NaT", "<NA>", "nan") else text


def _aware(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _model_name(path: Path) -> str:
    name = "".join(letter if letter.isalnum() else "-" for letter in path.stem.lower()).strip("-")
    return name[:40] or "stream"
