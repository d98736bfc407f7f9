"""Streams: the rows a demo model is asked to score, in the order in which the world brings them."""

from datetime import UTC, datetime, timedelta
from typing import Literal

import msgspec

from monitors.records import Scalar

Kind = Literal["classification", "regression"]

EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
ROW_SECONDS = 60.0
# The longest stream still ends well before any clock that runs this code.
LONGEST_SECONDS = 300 * 86_400.0


class Row(msgspec.Struct, frozen=True):
    """What the model sees of one case, and what later turns out to be true."""

    features: dict[str, Scalar]
    label: Scalar


class Act(msgspec.Struct, frozen=True):
    """
    A stretch of the live rows with a story; rows `start <= row < end`.

    `expect` is what must have happened by its end for the story to be true.
    """

    number: int
    title: str
    sentence: str
    start: int
    end: int
    expect: Literal["silence", "refused", "promoted", "killed"]


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """The rows that train the first champion, then the live ones; `acts` only where one was staged."""

    model: str
    source: str
    kind: Kind
    window_rows: int
    reference: tuple[Row, ...]
    live: tuple[Row, ...]
    acts: tuple[Act, ...] = ()

    @property
    def row_seconds(self) -> float:
        """Event time between two rows: a minute, or less where the stream is very long."""
        return min(ROW_SECONDS, LONGEST_SECONDS / (len(self.reference) + len(self.live)))

    def event_time(self, live_row: int) -> datetime:
        """
        When the row of that number happened; reference rows have negative numbers.

        Always the same for the same stream, and in the past: windows do not depend on the day a
        demo runs, and no record is ahead of its Kafka timestamp.
        """
        return EPOCH + timedelta(seconds=(len(self.reference) + live_row) * self.row_seconds)

    def act_at(self, live_row: int) -> Act | None:
        """The act that this row belongs to."""
        return next((act for act in self.acts if act.start <= live_row < act.end), None)
