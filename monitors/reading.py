"""Reading: how far the log was read, and so what may still come before the next step."""

from collections.abc import Collection, Mapping
from datetime import datetime

import msgspec

from monitors.records import LabelRecord, Partition


class Reading(msgspec.Struct, frozen=True):
    """
    The partitions of a member, and what is known of what they hold.

    `predictions` are those that windows wait for, `labels` all that labels come from; None: labels come with
    the predictions, or not at all. Those in `unread` may hold records that nobody has seen, and `heads` has
    the first label of each line that waits. Any other partition was read to its end.
    """

    predictions: Collection[Partition]
    labels: Collection[Partition] | None
    unread: Collection[Partition] = ()
    heads: Mapping[Partition, LabelRecord] = {}


class Place(msgspec.Struct, frozen=True, order=True):
    """Where a label stands in the order of steps: after the windows that close then, by partition."""

    time: datetime
    partition: Partition
