"""Columns: which values of a window's rows can be scored under one name, and what the others were."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import itemgetter
from types import NoneType
from typing import Final, Literal

import numpy as np

from monitors.records import Scalar
from monitors.statistics import Floats

Kind = Literal["number", "text"]
Key = int | float | str
"""A category as it is counted: `True`, `1` and `1.0` are one, and so they are in Evidently."""


class _Missing(Enum):
    MISSING = "missing"


MISSING: Final = _Missing.MISSING
"""Stands where a row has no such column at all, which is not the same as null."""

Cell = Scalar | _Missing

_EXACT_INTEGERS = 2**53
_KIND_OF: dict[type, Kind] = {bool: "number", int: "number", float: "number", str: "text"}


@dataclass(frozen=True, slots=True)
class Tally:
    """How many of a window's rows gave what under one column; the rest of the rows was usable."""

    rows: int
    missing: int = 0
    null: int = 0
    wrong_type: int = 0
    infinite: int = 0

    @property
    def usable(self) -> int:
        """Rows that the score is computed from."""
        return self.rows - self.missing - self.null - self.wrong_type - self.infinite


@dataclass(frozen=True, slots=True)
class Numbers:
    """A numeric column: its finite values, sorted."""

    values: Floats
    tally: Tally


@dataclass(frozen=True, slots=True)
class Counts:
    """A categorical column: how often each category occurred."""

    counts: dict[Key, int]
    tally: Tally


class Columns:
    """Turns rows into cells by column, and names the columns that nobody asked for."""

    def __init__(self, names: Sequence[str], known: Iterable[str] = ()) -> None:
        self._names = tuple(names)
        self._known = frozenset(names) | frozenset(known)

    def cells(self, rows: Sequence[Mapping[str, Scalar]]) -> list[Sequence[Cell]]:
        """
        One sequence per column, in the order of the names and of the rows.

        >>> Columns(["a", "b"]).cells([{"a": 1, "b": "x"}, {"a": 2}])
        [[1, 2], ['x', <_Missing.MISSING: 'missing'>]]
        """
        if len(self._names) > 1 and rows:
            try:
                # A complete window is the common case, and this way it is read in C.
                return list(zip(*map(itemgetter(*self._names), rows), strict=True))
            except KeyError:
                pass
        return [[row.get(name, MISSING) for row in rows] for name in self._names]

    def unknown(self, rows: Sequence[Mapping[str, Scalar]]) -> dict[str, int]:
        """
        In how many rows each unknown column occurs, by name.

        >>> Columns(["a"]).unknown([{"a": 1}, {"a": 1, "b": 2}])
        {'b': 1}
        """
        strange = set[str]().union(*rows) - self._known
        return {name: sum(name in row for row in rows) for name in sorted(strange)}


def kind_of(value: Scalar) -> Kind | None:
    """Numbers and text never compare equal; None for null, which includes NaN."""
    if value is None or value != value:
        return None
    return _KIND_OF[type(value)]


def read_numbers(cells: Sequence[Cell]) -> Numbers:
    """
    The usable values of a numeric column; a boolean is not a number here.

    >>> numbers = read_numbers([2, 1.0, None, "x", True, float("inf")])
    >>> numbers.values.tolist(), numbers.tally
    ([1.0, 2.0], Tally(rows=6, missing=0, null=1, wrong_type=2, infinite=1))
    """
    types = Counter(map(type, cells))
    missing, null = types.pop(_Missing, 0), types.pop(NoneType, 0)
    wrong = sum(count for kind, count in types.items() if kind is not float and kind is not int)
    numeric = cells if not (missing or null or wrong) else [c for c in cells if type(c) in (float, int)]
    values = as_floats(numeric)  # type: ignore[arg-type]
    finite = values[np.isfinite(values)]
    not_a_number = int(np.isnan(values).sum())
    infinite = values.size - finite.size - not_a_number
    finite.sort()
    return Numbers(finite, Tally(len(cells), missing, null + not_a_number, wrong, infinite))


def as_floats(numbers: Sequence[int | float]) -> Floats:
    """Integers that no float can hold become infinite, and are then counted as that."""
    try:
        return np.array(numbers, dtype=np.float64)
    except OverflowError:
        return np.array([_as_float(number) for number in numbers], dtype=np.float64)


def _as_float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def read_counts(cells: Sequence[Cell], kinds: frozenset[Kind]) -> Counts:
    """
    How often each category of the stated kinds occurs; a column of both kinds counts JSON texts.

    >>> read_counts([True, 1, 0.0, "1", None], frozenset({"number"}))
    Counts(counts={1: 2, 0: 1}, tally=Tally(rows=5, missing=0, null=1, wrong_type=1, infinite=0))
    """
    types = Counter(map(type, cells))
    missing, null = types.pop(_Missing, 0), types.pop(NoneType, 0)
    right = {kind for kind in types if _KIND_OF[kind] in kinds}
    wrong = sum(count for kind, count in types.items() if kind not in right)
    # Each distinct value is looked at once, because NaN and infinity are no categories.
    distinct = Counter(
        cells if types.total() - wrong == len(cells) else [c for c in cells if type(c) in right]
    )
    key = keyer(kinds)
    counts: Counter[Key] = Counter()
    infinite = 0
    for value, count in distinct.items():
        if value != value:
            null += count
        elif is_infinite(value):
            infinite += count
        else:
            counts[key(value)] += count
    return Counts(dict(counts), Tally(len(cells), missing, null, wrong, infinite))


def is_infinite(value: Cell) -> bool:
    """True of integers, too, that no float can hold."""
    return isinstance(value, (int, float)) and math.isinf(_as_float(value))


def keyer(kinds: frozenset[Kind]) -> Callable[[Cell], Key]:
    """What turns a value into its category, so that categories of one column can be put in order."""
    return _mixed_key if len(kinds) > 1 else _plain_key


def _plain_key(value: Cell) -> Key:
    if isinstance(value, str):
        return value
    assert isinstance(value, (int, float))
    number = _as_float(value)
    return int(number) if number.is_integer() and abs(number) < _EXACT_INTEGERS else number


def _mixed_key(value: Cell) -> Key:
    """`1` and `"1"` stay apart."""
    return json.dumps(_plain_key(value))
