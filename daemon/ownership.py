"""Ownership: what this member decides on just now, told to the threads beside the loop."""

from collections.abc import Iterable

import msgspec


class Term(msgspec.Struct, frozen=True):
    """One stretch of being the owner; what was told in an earlier one may have come to nothing."""

    number: int
    models: frozenset[str]


class Ownership:
    """The present term, if any. Written by the loop; others read `term` once and go by that."""

    def __init__(self) -> None:
        self._number = 0
        self._term: Term | None = None

    @property
    def term(self) -> Term | None:
        """The present term; None while standing by."""
        return self._term

    def is_set(self) -> bool:
        """Whether this member owns anything."""
        return self._term is not None

    def begin(self, models: Iterable[str]) -> None:
        """Another term, with these models."""
        self._number += 1
        self._term = Term(self._number, frozenset(models))

    def end(self) -> None:
        """Others decide from now on."""
        self._term = None
