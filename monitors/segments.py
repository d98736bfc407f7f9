"""Segments: the parts of a window that its records name, the largest by name and the rest together."""

from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

MOST_NAMED = 20
OTHERS = "(others)"
LONGEST_NAME = 120
_NOWHERE = 255


class Segments(msgspec.Struct, frozen=True, array_like=True):
    """
    Which rows are in which segment; of hostile many segments no more than some are told apart.

    `places` holds a byte for each row: the place of its segment among `names`, or 255 where it names none.

    >>> segments = Segments.of(["eu", None, "us", "eu"])
    >>> segments.names, list(segments.parts())
    (('eu', 'us'), [('eu', [0, 3]), ('us', [2])])
    """

    names: tuple[str, ...] = ()
    places: bytes = b""

    @classmethod
    def of(cls, named: Sequence[str | None]) -> "Segments":
        """Of the segments that rows name, in the rows' order; the largest come first."""
        short = [name[:LONGEST_NAME] if name else "" for name in named]
        counts = Counter(short)
        del counts[""]
        if not counts:
            return cls()
        ordered = sorted(counts, key=lambda name: (-counts[name], name))
        largest = [name for name in ordered if name != OTHERS][:MOST_NAMED]
        names = (*largest, OTHERS) if len(largest) < len(counts) else tuple(largest)
        places = {name: place for place, name in enumerate(names)} | {"": _NOWHERE}
        return cls(names, bytes(places.get(name, len(largest)) for name in short))

    @property
    def complete(self) -> bool:
        """No segment was pooled with others: one that isn't named isn't there."""
        return OTHERS not in self.names

    def parts(self) -> Iterator[tuple[str, list[int]]]:
        """Each segment with the numbers of its rows."""
        rows: list[list[int]] = [[] for _ in self.names]
        for row, place in enumerate(self.places):
            if place != _NOWHERE:
                rows[place].append(row)
        yield from zip(self.names, rows, strict=True)
