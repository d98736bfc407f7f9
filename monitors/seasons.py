"""Seasons: which slot of the day, the week or whatever comes round again an event time lies in."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

import msgspec
import numpy as np
import numpy.typing as npt

from monitors.settings import DriftSettings

Slots = npt.NDArray[np.int64]

_EPOCH = datetime.fromtimestamp(0, UTC)
_MICROSECOND = timedelta(microseconds=1)


class Season(msgspec.Struct, frozen=True):
    """
    So many slots of equal length that come round again after `seconds`, counted from the epoch in UTC.

    >>> weekday_hours = Season(604_800.0, 168)
    >>> weekday_hours.slot_of(datetime(1970, 1, 8, 3, 59, tzinfo=UTC))
    3
    """

    seconds: float
    slots: int

    @classmethod
    def of(cls, settings: DriftSettings) -> "Season | None":
        """The season that is configured, if one is."""
        if settings.season_seconds <= 0.0 or settings.season_slots <= 1:
            return None
        return cls(settings.season_seconds, settings.season_slots)

    @property
    def name(self) -> str:
        """What slots of this season, and of no other, are called by: its seconds and how many they are."""
        return f"{self.seconds:g}/{self.slots}"

    def slot_of(self, at: datetime) -> int:
        """The slot, from 0, of an aware event time; a slot's first microsecond is its own."""
        return (at - _EPOCH) // _MICROSECOND % self._microseconds * self.slots // self._microseconds

    def slots_of(self, microseconds: npt.NDArray[np.int64]) -> Slots:
        """The same of many times since the epoch."""
        return microseconds % self._microseconds * self.slots // self._microseconds

    def slot_of_window(self, times: Iterable[datetime]) -> int:
        """The slot of the middle row; that of every row where windows divide slots. There is a row."""
        ordered = sorted(times)
        return self.slot_of(ordered[len(ordered) // 2])

    @property
    def _microseconds(self) -> int:
        return max(1, round(self.seconds * 1e6))


def microseconds_of(times: Sequence[datetime]) -> npt.NDArray[np.int64]:
    """
    Aware event times as whole microseconds since the epoch.

    >>> microseconds_of([datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)]).tolist()
    [1000000]
    """
    return np.array([(at - _EPOCH) // _MICROSECOND for at in times], dtype=np.int64)
