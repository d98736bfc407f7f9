"""The development broker's log: record batches kept as they came, found again by offset."""

import asyncio
import bisect
import struct
from collections.abc import Iterator

import msgspec
from kafka.record.memory_records import MemoryRecords

# Where a record batch (magic 2) keeps what a broker must know of it.
_LENGTH = struct.Struct(">i")
_LENGTH_AT, _LAST_DELTA_AT, _MAX_TIMESTAMP_AT, _MAGIC_AT = 8, 23, 35, 16
_HEADER_BYTES, _PREFIX_BYTES = 61, 12


class InvalidBatch(ValueError):
    """What a producer sent is no sequence of record batches."""


class Batch(msgspec.Struct, frozen=True):
    """Records `start <= offset < end` as the producer packed them."""

    start: int
    end: int
    max_timestamp: int
    data: bytes


class PartitionLog:
    """One partition in memory."""

    def __init__(self) -> None:
        self.first = 0
        self.end = 0
        self.grown = asyncio.Event()
        self._batches: list[Batch] = []
        self._starts: list[int] = []

    def append(self, data: bytes) -> int:
        """Store these batches and return the offset of their first record."""
        first = self.end
        for batch in list(_split(data, first)):
            self._batches.append(batch)
            self._starts.append(batch.start)
            self.end = batch.end
        self.grown.set()
        self.grown = asyncio.Event()  # whoever waits next, waits for the next
        return first

    def read(self, offset: int, most_bytes: int) -> bytes:
        """Whole batches from the one that holds the offset on; at least one if there is one."""
        found: list[bytes] = []
        size = 0
        for batch in self._from(offset):
            if found and size + len(batch.data) > most_bytes:
                break
            found.append(batch.data)
            size += len(batch.data)
        return b"".join(found)

    def delete_before(self, offset: int) -> None:
        """Forget what is in front of an offset."""
        self.first = max(self.first, min(offset, self.end))
        while self._batches and self._batches[0].end <= self.first:
            del self._batches[0], self._starts[0]

    def offset_at(self, timestamp_ms: int) -> tuple[int, int]:
        """Offset and timestamp of the first record that is not older, or (-1, -1)."""
        for batch in self._from(self.first):
            if batch.max_timestamp >= timestamp_ms:
                for record in MemoryRecords(batch.data).next_batch():
                    if record.timestamp >= timestamp_ms and record.offset >= self.first:
                        return record.offset, record.timestamp
        return -1, -1

    def _from(self, offset: int) -> Iterator[Batch]:
        at = max(0, bisect.bisect_right(self._starts, offset) - 1)
        return (batch for batch in self._batches[at:] if batch.end > offset)


def _split(data: bytes, start: int) -> Iterator[Batch]:
    at = 0
    while at < len(data):
        size = _batch_bytes(data, at)
        end = start + _LENGTH.unpack_from(data, at + _LAST_DELTA_AT)[0] + 1
        stamp = struct.unpack_from(">q", data, at + _MAX_TIMESTAMP_AT)[0]
        # The base offset is not part of what the checksum covers: it is the broker's to set.
        yield Batch(start, end, stamp, struct.pack(">q", start) + data[at + 8 : at + size])
        start, at = end, at + size


def _batch_bytes(data: bytes, at: int) -> int:
    if len(data) - at < _HEADER_BYTES or data[at + _MAGIC_AT] != 2:
        raise InvalidBatch("not a record batch of format 2")
    size: int = _LENGTH.unpack_from(data, at + _LENGTH_AT)[0] + _PREFIX_BYTES
    if not _HEADER_BYTES <= size <= len(data) - at:
        raise InvalidBatch("a record batch that says another length")
    return size
