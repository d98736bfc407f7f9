"""Dead letters: which records could not be read, and how they are sent back once they can be."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from daemon.errors import UsageError
from daemon.ledger import Ledger
from daemon.ports import Sender
from daemon.replay import Log
from monitors.events import OffsetRange
from monitors.records import Partition, RawRecord

PREFIX = "retrain-daemon."
# Ours, in the order in which they are written, before any header that the record brought itself.
HEADERS = ("code", "detail", "topic", "partition", "offset", "timestamp")
REDRIVEN = f"{PREFIX}redriven"


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter: why it is one, and where it was read. Never what was in it."""

    code: str
    detail: str
    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    size: int
    truncated: bool
    at: str
    letter_offset: int
    state: Literal["", "sending", "sent"] = ""

    @property
    def name(self) -> str:
        """What it was, once and for all: a letter that is there twice is sent back once."""
        return f"{self.topic}/{self.partition}/{self.offset}@{self.timestamp_ms}"


class Selection(msgspec.Struct, frozen=True):
    """Which letters are meant; what is not stated selects all. Offsets are those of the record."""

    codes: tuple[str, ...] = ()
    topic: str = ""
    partition: int | None = None
    first: int = 0
    end: int | None = None

    @property
    def everything(self) -> bool:
        """Whether nothing was stated."""
        return self == Selection()

    def takes(self, letter: Letter) -> bool:
        return (
            (not self.codes or letter.code in self.codes)
            and self.topic in ("", letter.topic)
            and self.partition in (None, letter.partition)
            and self.first <= letter.offset
            and (self.end is None or letter.offset < self.end)
        )


class Redriven(msgspec.Struct, frozen=True):
    """What became of one selected letter."""

    topic: str
    partition: int
    offset: int
    code: str
    result: Literal["sent", "skipped", "failed"]
    why: str = ""


def letters(log: Log, topic: str, selection: Selection, states: Mapping[str, str]) -> Iterator[Letter]:
    """The letters of the dead-letter topic that are selected, oldest first, each as often as it is there."""
    for letter, _ in _read(log, topic, states):
        if selection.takes(letter):
            yield letter


def redrive(
    log: Log,
    dead_letter_topic: str,
    ledger: Ledger,
    sender: Sender,
    topics: Sequence[str],
    selection: Selection,
    force: bool = False,
    at_once: int = 500,
) -> Iterator[Redriven]:
    """
    Send the selected letters back to where they were read, and mark them in the ledger.

    A letter is marked before it is sent and once more after: if this process dies in between, nobody
    knows whether it was sent, and it is only sent again with `force`. Letters go to configured topics
    only, whatever their headers say, and never if they were cut.
    """
    seen: set[str] = set()
    waiting: list[tuple[Letter, RawRecord]] = []
    for letter, raw in _read(log, dead_letter_topic, ledger.redrives()):
        if not selection.takes(letter) or letter.name in seen:
            continue
        seen.add(letter.name)
        if why := _unfit(letter, topics, force) or _claimed(ledger, letter, force):
            yield _became(letter, "skipped", why)
            continue
        waiting.append((letter, _restored(letter, raw)))
        if len(waiting) == at_once:
            yield from _sent(ledger, sender, waiting)
            waiting = []
    yield from _sent(ledger, sender, waiting)


def summary(found: Sequence[Letter]) -> dict[str, int]:
    """How many letters there are of each code, the most frequent first."""
    return dict(Counter(letter.code for letter in found).most_common())


def parse_offsets(text: str) -> tuple[int, int | None]:
    """
    An offset, or a half-open range of them.

    >>> parse_offsets("17"), parse_offsets("10:20"), parse_offsets("10:")
    ((17, 18), (10, 20), (10, None))
    """
    first, colon, end = text.partition(":")
    try:
        start = int(first or 0)
        stop = int(end) if end else (None if colon else start + 1)
    except ValueError:
        start, stop = -1, None
    if start < 0 or (stop is not None and stop <= start):
        raise UsageError(f"--offsets {text}: is no range; use 17, 10:20 (the end is left out) or 10:")
    return start, stop


def _read(log: Log, topic: str, states: Mapping[str, str]) -> Iterator[tuple[Letter, RawRecord]]:
    ranges = [
        OffsetRange(one.topic, one.index, first, end) for one, (first, end) in log.bounds(topic).items()
    ]
    for raw in log.read(ranges):
        letter = _letter(raw)
        if letter is not None:
            state: Any = states.get(letter.name, "")
            yield msgspec.structs.replace(letter, state=state), raw


def _letter(raw: RawRecord) -> Letter | None:
    """None for what somebody else has written to the topic."""
    ours = raw.headers[: len(HEADERS)]
    if [name for name, _ in ours] != [PREFIX + name for name in HEADERS]:
        return None
    try:
        code, detail, topic, partition, offset, timestamp = ((value or b"").decode() for _, value in ours)
        numbers = int(partition), int(offset), int(timestamp)
    except ValueError:
        return None
    return Letter(
        code=code,
        detail=detail,
        topic=topic,
        partition=numbers[0],
        offset=numbers[1],
        timestamp_ms=numbers[2],
        size=len(raw.value or b""),
        truncated=_truncated(raw),
        at=datetime.fromtimestamp(raw.timestamp_ms / 1000, UTC).isoformat(timespec="seconds"),
        letter_offset=raw.offset,
    )


def _truncated(raw: RawRecord) -> bool:
    return len(raw.headers) > len(HEADERS) and raw.headers[len(HEADERS)][0] == f"{PREFIX}truncated"


def _unfit(letter: Letter, topics: Sequence[str], force: bool) -> str:
    if letter.truncated:
        return "only its beginning was kept: it was too large for the dead-letter topic"
    if letter.topic not in topics:
        return f"topic {letter.topic} is not read by this configuration"
    if letter.state == "sent" and not force:
        return "was sent back before; --force sends it again"
    if letter.state == "sending" and not force:
        return "was being sent when a redrive was interrupted, look whether it is there; --force sends it"
    return ""


def _claimed(ledger: Ledger, letter: Letter, force: bool) -> str:
    if ledger.claim_redrive(letter.name):
        return ""
    if force:
        ledger.mark_redrive(letter.name, "sending")
        return ""
    return "is being sent by somebody else"


def _restored(letter: Letter, raw: RawRecord) -> RawRecord:
    """The record as it was read, with one header that says where it has been."""
    place = f"{letter.topic}/{letter.partition}/{letter.offset}".encode()
    # An earlier way back is told of by its own letter.
    theirs = tuple(header for header in raw.headers[len(HEADERS) :] if header[0] != REDRIVEN)
    return RawRecord(
        Partition(letter.topic, letter.partition),
        letter.offset,
        letter.timestamp_ms,
        raw.key,
        raw.value,
        (*theirs, (REDRIVEN, place)),
    )


def _sent(ledger: Ledger, sender: Sender, waiting: Sequence[tuple[Letter, RawRecord]]) -> Iterator[Redriven]:
    answers = sender.send([raw for _, raw in waiting]) if waiting else []
    for (letter, _), answer in zip(waiting, answers, strict=True):
        if not answer.problem:
            ledger.mark_redrive(letter.name, "sent")
            yield _became(letter, "sent", "")
            continue
        if answer.certain:
            ledger.forget_redrive(letter.name)
        yield _became(letter, "failed", answer.problem)


def _became(letter: Letter, result: Literal["sent", "skipped", "failed"], why: str) -> Redriven:
    return Redriven(letter.topic, letter.partition, letter.offset, letter.code, result, why)
