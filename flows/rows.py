"""Labelled rows: what a model saw, what it said and what was true, in event-time order."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from monitors.events import OffsetRange

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """
    Rows to train and to judge on; every array has one entry per row.

    `event_times` are seconds since the epoch and never fall. `predictions` and `probabilities` are
    what the serving model logged, None and nan where it logged nothing. `segments` names each row's
    part of the population, None where the log says none. `offsets` are the ranges
    that were read to find the rows, and `fingerprint` is taken over every row.
    """

    features: "pd.DataFrame"
    labels: npt.NDArray[Any]
    event_times: npt.NDArray[np.float64]
    predictions: npt.NDArray[Any]
    probabilities: npt.NDArray[np.float64]
    segments: npt.NDArray[Any]
    offsets: tuple[OffsetRange, ...] = ()
    fingerprint: str = ""

    @classmethod
    def sorted(
        cls,
        features: "pd.DataFrame",
        labels: Sequence[Any],
        event_times: Sequence[float],
        predictions: Sequence[Any],
        probabilities: Sequence[float | None],
        offsets: tuple[OffsetRange, ...] = (),
        newest: int | None = None,
        segments: Sequence[Any] | None = None,
    ) -> Self:
        """Put rows in event-time order, keep the newest, and take their fingerprint."""
        times = np.asarray(event_times, dtype=float)
        order = np.argsort(times, kind="stable")
        order = order if newest is None else order[len(order) - min(newest, len(order)) :]
        kept = features.iloc[order].reset_index(drop=True)
        truth = _objects(labels)[order]
        return cls(
            features=kept,
            labels=truth,
            event_times=times[order],
            predictions=_objects(predictions)[order],
            probabilities=np.asarray(probabilities, dtype=float)[order],
            segments=_objects([None] * len(times) if segments is None else segments)[order],
            offsets=offsets,
            fingerprint=fingerprint(kept, truth, times[order]),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def between(self, start: int, end: int) -> Self:
        """The rows `start <= row < end`; the fingerprint stays that of the whole extract."""
        return self._picked(slice(start, end))

    def where(self, mask: npt.NDArray[np.bool_]) -> Self:
        """The rows that the mask keeps; the fingerprint stays that of the whole extract."""
        return self._picked(mask)

    def _picked(self, which: slice | npt.NDArray[np.bool_]) -> Self:
        return replace(
            self,
            features=self.features.iloc[which].reset_index(drop=True),
            labels=self.labels[which],
            event_times=self.event_times[which],
            predictions=self.predictions[which],
            probabilities=self.probabilities[which],
            segments=self.segments[which],
        )

    def first_at(self, moment: datetime | float) -> int:
        """The index of the first row at this time or later."""
        seconds = moment.timestamp() if isinstance(moment, datetime) else moment
        return int(np.searchsorted(self.event_times, seconds, side="left"))

    def first_after(self, seconds: float) -> int:
        """The index of the first row that is later than this."""
        return int(np.searchsorted(self.event_times, seconds, side="right"))


def fingerprint(
    features: "pd.DataFrame", labels: npt.NDArray[Any], event_times: npt.NDArray[np.float64]
) -> str:
    """SHA-256 over column names, types, and every value of every row."""
    import pandas as pd

    digest = hashlib.sha256()
    digest.update(repr([(str(name), str(kind)) for name, kind in features.dtypes.items()]).encode())
    for name in features.columns:
        digest.update(_hashed(pd.Series(features[name])))
    digest.update(_hashed(pd.Series(labels, dtype=object)))
    digest.update(np.ascontiguousarray(event_times).tobytes())
    return digest.hexdigest()


def _hashed(column: "pd.Series") -> bytes:
    import pandas as pd

    # Object columns may hold lists of types that pandas cannot order; their text always can be.
    values = column.map(repr) if column.dtype == object else column
    return np.asarray(pd.util.hash_pandas_object(values, index=False)).tobytes()


def _objects(values: Sequence[Any]) -> npt.NDArray[Any]:
    array = np.empty(len(values), dtype=object)
    array[:] = list(values)
    return array
