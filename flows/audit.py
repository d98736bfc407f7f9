"""Audit: every move of the champion alias, in order, and what may follow from them."""

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

import msgspec

from flows.errors import FlowError
from monitors.baseline import Baseline


class ChampionMoved(FlowError):
    """The champion is not the one that the challenger was judged against: judge again."""


class NoEarlierChampion(FlowError):
    """There is nothing to roll back to."""


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """
    A wish to make `version` the champion in place of `expected` (empty: of none).

    `baseline` is how one that comes back did on the rows that it came back for.
    """

    action: Literal["promoted", "rolled-back"]
    version: str
    expected: str
    reason: str
    at: datetime
    request: str = ""
    run: str = ""
    metric: str = ""
    challenger_score: float | None = None
    champion_score: float | None = None
    baseline: Baseline | None = None


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A move that took place. `sequence` counts from 1 without a gap."""

    sequence: int
    move: Move
    model_version: str
    previous_model_version: str = ""


def already_done(records: Sequence[AuditRecord], move: Move) -> AuditRecord | None:
    """The record of this request's own promotion, if it has been made; it's never made twice."""
    if not move.request:
        return None
    same = (record for record in records if record.move.request == move.request)
    return next((record for record in same if record.move.action == move.action), None)


def require_expected(move: Move, champion: str) -> None:
    """Compare before set: the champion must be the one that the move was decided against."""
    if champion != move.expected:
        raise ChampionMoved(
            f"the champion is version {champion or 'none'}, and version {move.version} was judged against"
            f" {move.expected or 'none'}: judge it against the present champion"
        )


def previous_champion(records: Sequence[AuditRecord], champion: str) -> str:
    """
    The version that the present champion took the place of, when it was promoted.

    It's read from the promotion's record, so that rolling back twice goes back two champions.
    """
    if not champion:
        raise NoEarlierChampion("there is no champion, so there is nothing to roll back")
    if not records or records[-1].move.version != champion:
        raise NoEarlierChampion(
            f"the champion alias was moved to version {champion} by another hand, no audit record tells"
            " from where: set the alias in the registry yourself"
        )
    promotions = [
        record for record in records if record.move.action == "promoted" and record.move.version == champion
    ]
    if not promotions or not promotions[-1].move.expected:
        raise NoEarlierChampion(f"version {champion} is the first champion, there is none before it")
    return promotions[-1].move.expected
