"""News: what the threads beside the loop found out, and the loop has to decide on."""

from typing import Literal

import msgspec

from monitors.events import Outcome


class RequestEnded(msgspec.Struct, frozen=True):
    """News: a retraining request has its outcome."""

    model: str
    request: str
    outcome: Outcome


class ChampionMoved(msgspec.Struct, frozen=True):
    """News: the registry's champion was moved by somebody else's hand."""

    model: str
    version: str
    action: Literal["promoted", "rolled-back"]


class ScoresDisputed(msgspec.Struct, frozen=True):
    """News: Evidently itself scored these columns otherwise; details are names and numbers only."""

    model: str
    version: str
    key: int
    columns: tuple[str, ...]
    details: tuple[str, ...]


News = RequestEnded | ChampionMoved | ScoresDisputed
