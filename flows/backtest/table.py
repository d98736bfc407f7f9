"""Tables: a stream from a Parquet or CSV file, row order taken as time order."""

import math
from collections.abc import Collection, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.backtest.stream import Kind, Stream
from flows.data import plain_scalar
from flows.errors import FlowError
from monitors.records import Scalar

if TYPE_CHECKING:
    import pandas as pd

TIME, SEGMENT = "ts", "segment"
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
FEW_VALUES = 20
# Numbers in a column of times are seconds since 1970, or milliseconds from here on (the year 5138).
_MILLISECONDS_FROM = 1e11


class UnusableStream(FlowError):
    """The file, or what was said about it, makes no stream; the message names the column and the remedy."""

    exit_code = 2


def read_table(
    path: Path,
    *,
    label: str,
    ignore: Collection[str],
    reference_rows: int,
    least_live: int,
    kind: Kind | None,
) -> Stream:
    """
    The file's rows: the first `reference_rows` train, the rest, at least `least_live`, is live.

    `ts`, `segment`, the label and the ignored columns are no features. Without a `ts` the row's
    number is its time, in seconds. `kind` None: as the labels look.
    """
    frame = _frame(path)
    frame.columns = [str(name) for name in frame.columns]
    if label not in frame.columns:
        raise UnusableStream(_no_label(path, label, list(frame.columns)))
    if len(frame) < reference_rows + least_live:
        raise UnusableStream(
            f"{path} has {len(frame)} rows, fewer than --reference-rows {reference_rows} and one window of"
            f" {least_live}; lower --reference-rows or --window-rows"
        )
    beside = {label, TIME, SEGMENT, *ignore}
    features = [name for name in frame.columns if name not in beside]
    if not features:
        raise UnusableStream(f"{path} has no feature column beside {label!r}; ignore fewer with --ignore")
    kind = kind or _kind(frame[label])
    return Stream(
        case=path.stem,
        kind=kind,
        features=_features(frame[features]),
        labels=_labels(path, frame[label], label, kind, reference_rows),
        times=_times(path, frame, ignore),
        segments=_segments(frame, ignore),
        reference_rows=reference_rows,
        timed=_timed(frame, ignore),
    )


def _frame(path: Path) -> "pd.DataFrame":
    import pandas as pd

    if not path.is_file():
        raise UnusableStream(f"there is no file {path}; give a Parquet or CSV file, or --topic")
    try:
        if path.name.lower().endswith((".csv", ".csv.gz", ".txt")):
            return pd.read_csv(path)
        return pd.read_parquet(path)
    except ImportError as error:
        raise UnusableStream(
            f"{path} needs pyarrow; `pip install 'retrain-daemon[parquet]'`, or give a CSV file"
        ) from error
    except (OSError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise UnusableStream(
            f"{path} can't be read: {said}; CSV files end in .csv, all else is Parquet"
        ) from error


def _no_label(path: Path, label: str, columns: Sequence[str]) -> str:
    if not label:
        return f"{path}: say which column to predict with --label; it has {_listed(columns)}"
    near = get_close_matches(label, columns, 1, 0.5)
    meant = f"did you mean {near[0]!r}?" if near else f"it has {_listed(columns)}"
    return f"{path} has no column {label!r} (--label): {meant}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown


def _kind(labels: "pd.Series[Any]") -> Kind:
    import pandas as pd

    if not pd.api.types.is_numeric_dtype(labels) or pd.api.types.is_bool_dtype(labels):
        return "classification"
    known = labels.dropna()
    whole = bool((known == known.round()).all())
    return "classification" if whole and known.nunique() <= FEW_VALUES else "regression"


def _labels(path: Path, column: "pd.Series[Any]", name: str, kind: Kind, reference_rows: int) -> Any:
    values = [plain_scalar(value) for value in column.tolist()]
    labels = np.empty(len(values), dtype=object)
    labels[:] = [_number(value) for value in values] if kind == "regression" else [_class(v) for v in values]
    words = sum(label is None and value is not None for label, value in zip(labels, values, strict=True))
    if words:
        raise UnusableStream(
            f"{path}: column {name!r} holds {words} labels that are no numbers, and --metric mae needs them;"
            " mend the column or use --metric accuracy"
        )
    if not sum(label is not None for label in labels[:reference_rows]):
        raise UnusableStream(
            f"{path}: column {name!r} has no label in the first {reference_rows} rows, which train the first"
            " champion; name another --label or more --reference-rows"
        )
    return labels


def _class(value: Scalar) -> Scalar:
    """1.0 and 1 are one class; the log says the shorter one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: Scalar) -> float | None:
    return float(value) if isinstance(value, bool | int | float) and math.isfinite(value) else None


def _features(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Values as JSON holds them; moments become seconds since 1970."""
    import pandas as pd

    columns: dict[str, Any] = {}
    for name in frame.columns:
        column = frame[name]
        if pd.api.types.is_numeric_dtype(column) and isinstance(column.dtype, np.dtype):
            columns[name] = column.to_numpy()
        else:
            columns[name] = pd.Series([_plain(value) for value in column.tolist()], dtype=object)
    return pd.DataFrame(columns)


def _plain(value: Any) -> Scalar:
    if isinstance(value, datetime):
        # pandas' NaT is a datetime too, the only one that differs from itself.
        return None if value != value else _aware(value).timestamp()
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    return float(value) if isinstance(value, Decimal) else plain_scalar(value)


def _aware(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _times(path: Path, frame: "pd.DataFrame", ignore: Collection[str]) -> tuple[datetime, ...]:
    """Event times that never fall: where the file's do, a row has the time of the one before it."""
    if not _timed(frame, ignore):
        return tuple(EPOCH + timedelta(seconds=row) for row in range(len(frame)))
    moments = _moments(path, frame[TIME])
    return tuple(accumulate(moments, max))


def _timed(frame: "pd.DataFrame", ignore: Collection[str]) -> bool:
    return TIME in frame.columns and TIME not in ignore


def _moments(path: Path, column: "pd.Series[Any]") -> list[datetime]:
    import pandas as pd

    otherwise = f"mend it, or take row numbers as the time with --ignore {TIME}"
    try:
        if pd.api.types.is_numeric_dtype(column):
            milliseconds = column.abs().max() >= _MILLISECONDS_FROM
            parsed = pd.to_datetime(column, unit="ms" if milliseconds else "s", utc=True)
        else:
            parsed = pd.to_datetime(column, utc=True)
    except (ValueError, TypeError, OverflowError) as error:
        said = str(error).partition("\n")[0]
        raise UnusableStream(f"{path}: column {TIME!r} has no times: {said}; {otherwise}") from error
    missing = int(parsed.isna().sum())
    if missing:
        raise UnusableStream(f"{path}: column {TIME!r} is empty in {missing} rows; {otherwise}")
    return [moment.to_pydatetime(warn=False) for moment in parsed]


def _segments(frame: "pd.DataFrame", ignore: Collection[str]) -> tuple[str | None, ...]:
    if SEGMENT not in frame.columns or SEGMENT in ignore:
        return (None,) * len(frame)
    return tuple(
        None if (value := _class(plain_scalar(one))) is None else str(value)
        for one in frame[SEGMENT].tolist()
    )
