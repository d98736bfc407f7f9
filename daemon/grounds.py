"""Grounds: what a window was judged from, so that it can be judged again years later and compared."""

import hashlib
from typing import Literal

import msgspec

from monitors.drift import WindowRows
from monitors.settings import DataSettings, GateSettings, ModelSettings, TrainingSettings


class Grounds(msgspec.Struct, frozen=True):
    """
    Digests of a window's rows, of the settings and of the reference; a version that learns has none.

    `evidently` names the columns that Evidently itself scored, because its word differed from ours.
    """

    rows: str
    settings: str
    reference: str = ""
    engine: Literal["compiled", "evidently"] = "compiled"
    evidently: tuple[str, ...] = ()


class JudgedBy(msgspec.Struct, frozen=True):
    """The settings that decisions depend on, as text, and the digest they are kept under."""

    digest: str
    body: str

    @classmethod
    def of(cls, settings: ModelSettings) -> "JudgedBy":
        """
        What has no say in a window's judgement is left out: changing it changes no digest.

        >>> one = JudgedBy.of(ModelSettings())
        >>> one == JudgedBy.of(ModelSettings(gate=GateSettings(resamples=9)))
        True
        >>> one == JudgedBy.of(ModelSettings(reference_rows=9))
        False
        """
        kept = msgspec.structs.replace(
            settings,
            schedule="",
            label_horizon_seconds=0.0,
            max_pending_rows=0,
            max_pending_seconds=0.0,
            data=DataSettings(),
            training=TrainingSettings(),
            gate=GateSettings(),
        )
        body = msgspec.json.encode(kept).decode()
        return cls(digest_of(body.encode()), body)


def rows_digest(rows: WindowRows) -> str:
    """The same for the same records in the same order, coordinates included; to the last bit."""
    return digest_of(msgspec.msgpack.encode(rows.records))


def digest_of(data: bytes) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(data).hexdigest()
