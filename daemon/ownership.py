"""Ownership: what this member decides on just now, told to the threads beside the loop."""

from collections.abc import Collection, Mapping

import msgspec

from monitors.records import Partition


class Term(msgspec.Struct, frozen=True):
    """
    One stretch of being the owner; what was told in an earlier one may have come to nothing.

    `indexes` are the partition indexes that are owned; None: all there is.
    """

    number: int
    indexes: frozenset[int] | None = None

    def models(self, homes: Mapping[str, Partition], known: Collection[str]) -> frozenset[str] | None:
        """
        The models to look after, at home in one of our indexes; None: all of them.

        Whoever owns index 0 looks after the models of the configuration that nobody has met yet.
        """
        if self.indexes is None:
            return None
        unmet = set(known).difference(homes) if 0 in self.indexes else set()
        return frozenset(unmet.union(name for name, home in homes.items() if home.index in self.indexes))


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

    def begin(self, indexes: Collection[int] | None = None) -> None:
        """Another term, with these partition indexes, or with all there is."""
        self._number += 1
        self._term = Term(self._number, None if indexes is None else frozenset(indexes))

    def end(self) -> None:
        """Others decide from now on."""
        self._term = None
