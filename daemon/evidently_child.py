"""
Evidently's child process: it answers one request at a time, and ends when its parent does or when idle.

A frame is four bytes of length and a MessagePack request or reply; `daemon/evidently_worker.py` is the
other end.
"""

import os
import select
import struct
import sys
import tempfile
import traceback
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from monitors.drift import DriftReport
from monitors.records import PredictionRecord
from monitors.settings import DriftSettings, QualitySettings

if TYPE_CHECKING:
    from monitors.evidently_report import EvidentlyReference

_LENGTH = struct.Struct(">I")
_MAX_REFERENCES = 16


class Terms(msgspec.Struct, frozen=True, tag=True):
    """A reference, as bytes, and the settings that windows are held against it under."""

    reference: bytes
    drift: DriftSettings
    quality: QualitySettings
    kind: str


class Judge(msgspec.Struct, frozen=True, tag=True):
    """Asks for Evidently's scores of a window under the terms of that key."""

    key: str
    records: tuple[PredictionRecord, ...]


class Draw(msgspec.Struct, frozen=True, tag=True):
    """Asks for `<name>.html` and `<name>.json` in a folder."""

    key: str
    records: tuple[PredictionRecord, ...]
    folder: str
    name: str


class Learn(msgspec.Struct, frozen=True, tag=True):
    """Tells the child the terms of a key, once."""

    key: str
    terms: Terms


class Judged(msgspec.Struct, frozen=True, tag=True):
    """Evidently's report of the window."""

    report: DriftReport


class Drawn(msgspec.Struct, frozen=True, tag=True):
    """The names of the files that were written."""

    html: str
    json: str


class Learned(msgspec.Struct, frozen=True, tag=True):
    """The terms are known now."""


class Forgotten(msgspec.Struct, frozen=True, tag=True):
    """The terms were not told, or made room for others."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Where and with what Evidently failed, without a word of the data."""

    reason: str


Request = Learn | Judge | Draw
Reply = Learned | Judged | Drawn | Forgotten | Failed

_REQUESTS: "msgspec.msgpack.Decoder[Request]" = msgspec.msgpack.Decoder(Request)
REPLIES: "msgspec.msgpack.Decoder[Reply]" = msgspec.msgpack.Decoder(Reply)


def write_frame(stream: IO[bytes], data: bytes) -> None:
    rest = memoryview(_LENGTH.pack(len(data)) + data)
    while rest:
        rest = rest[stream.write(rest) :]


def read_frame(stream: IO[bytes]) -> bytes | None:
    """None at the end of the stream, in the middle of a frame as well."""
    header = _read_exactly(stream, _LENGTH.size)
    return _read_exactly(stream, _LENGTH.unpack(header)[0]) if header is not None else None


def _read_exactly(stream: IO[bytes], size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = stream.read(min(size - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)


class Desk:
    """The child's end: keeps references under their keys and answers requests."""

    def __init__(self) -> None:
        self._references: OrderedDict[str, EvidentlyReference] = OrderedDict()

    def answer(self, request: Request) -> Reply:
        """Never raises: whatever goes wrong is a reply."""
        try:
            return self._answer(request)
        except ImportError as error:
            return Failed(f"it cannot be imported: {error}; see the pins in pyproject.toml")
        except Exception as error:  # noqa: BLE001 - the parent must get an answer
            return Failed(_where(error))

    def _answer(self, request: Request) -> Reply:
        if isinstance(request, Learn):
            self._learn(request)
            return Learned()
        reference = self._references.get(request.key)
        if reference is None:
            return Forgotten()
        self._references.move_to_end(request.key)
        if isinstance(request, Judge):
            return Judged(reference.judge(request.records))
        return _draw(reference, request)

    def _learn(self, request: Learn) -> None:
        from monitors.evidently_report import EvidentlyReference
        from monitors.reference import Reference

        terms = request.terms
        self._references[request.key] = EvidentlyReference(
            Reference.from_bytes(terms.reference), terms.drift, terms.quality, terms.kind
        )
        while len(self._references) > _MAX_REFERENCES:
            self._references.popitem(last=False)


def _draw(reference: "EvidentlyReference", request: Draw) -> Drawn:
    html, json = reference.draw(request.records)
    folder = Path(request.folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / f"{request.name}.html", html)
    _write_whole(folder / f"{request.name}.json", json)
    return Drawn(f"{request.name}.html", f"{request.name}.json")


def _write_whole(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _where(error: Exception) -> str:
    """Type and place; the message is left out, because it may quote values."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno} ({last.name})"


def main(argv: Sequence[str]) -> int:
    """Serves requests from standard input until its end, or until nothing came for so many seconds."""
    idle_seconds = float(argv[0])
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    # A library that prints must not end up in the middle of a frame.
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    desk = Desk()
    while select.select([requests], [], [], idle_seconds)[0]:
        data = read_frame(requests)
        if data is None:
            break
        reply = desk.answer(_REQUESTS.decode(data))
        try:
            write_frame(replies, msgspec.msgpack.encode(reply))
        except BrokenPipeError:
            break
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
