"""Streams: rows in the order in which the world brought them, and what later turned out to be true."""

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flows.data import plain_scalar
from flows.rows import LabelledRows
from flows.scoring import Floats, Values
from monitors.records import Scalar

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["classification", "regression"]


@dataclass(frozen=True, eq=False)
class Stream:
    """
    A whole stream, one entry per row in every array; the first `reference_rows` train the first champion.

    `times` are aware and never fall, and are the numbers of the rows where the stream is not `timed`;
    `labels` are None where the truth never became known.
    """

    case: str
    kind: Kind
    features: "pd.DataFrame"
    labels: Values
    times: tuple[datetime, ...]
    segments: tuple[str | None, ...]
    reference_rows: int
    timed: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def live_rows(self) -> int:
        """How many rows come after the reference."""
        return len(self) - self.reference_rows

    @cached_property
    def seconds(self) -> Floats:
        """The event times in seconds since the epoch."""
        return np.array([moment.timestamp() for moment in self.times])

    @cached_property
    def known(self) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """Which rows have a usable label at all."""
        return np.array([label is not None for label in self.labels], dtype=bool)

    def records(self, start: int, end: int) -> list[dict[str, Scalar]]:
        """The features of rows `start <= row < end`, as a record of the log holds them."""
        return records_of(self.features.iloc[start:end])

    def labelled(self, start: int, end: int, said: "Said | None" = None) -> LabelledRows:
        """The rows `start <= row < end` that have a label, and what was answered for them, if anything."""
        which = np.flatnonzero(self.known[start:end]) + start
        nothing = np.full(len(which), None, dtype=object)
        return LabelledRows(
            features=self.features.iloc[which].reset_index(drop=True),
            labels=self.labels[which],
            event_times=self.seconds[which],
            predictions=nothing if said is None else said.predictions[which],
            probabilities=np.full(len(which), np.nan) if said is None else said.probabilities[which],
            segments=np.array(self.segments, dtype=object)[which],
        )


@dataclass(frozen=True, eq=False)
class Said:
    """What was answered for each row of a stream: None and nan where nothing was (yet)."""

    predictions: Values
    probabilities: Floats

    @classmethod
    def nothing(cls, rows: int) -> "Said":
        """Room for so many answers."""
        return cls(np.full(rows, None, dtype=object), np.full(rows, np.nan))

    def put(self, start: int, predictions: Values, probabilities: Values | None) -> None:
        """Note the answers for the rows from `start` on; later ones replace earlier ones."""
        end = start + len(predictions)
        self.predictions[start:end] = [plain_scalar(value) for value in predictions]
        self.probabilities[start:end] = np.nan if probabilities is None else probabilities


def records_of(features: "pd.DataFrame") -> list[dict[str, Scalar]]:
    """One mapping of plain values per row."""
    names = [str(name) for name in features.columns]
    columns = [[plain_scalar(value) for value in features[name].tolist()] for name in features.columns]
    if not names:
        return [{} for _ in range(len(features))]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
