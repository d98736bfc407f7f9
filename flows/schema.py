"""Schemas: which columns a model takes, and whether each is a number or a category."""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec
import numpy as np

if TYPE_CHECKING:
    import pandas as pd

ColumnType = Literal["numeric", "categorical"]

# A stray string among numbers is a producer's slip, not a category.
_NUMERIC_SHARE = 0.95


class Schema(msgspec.Struct, frozen=True):
    """A model's columns in its own order; the same frame for its trainer, the gate and whoever serves it."""

    columns: dict[str, ColumnType]

    @classmethod
    def of(cls, features: "pd.DataFrame", stated: Mapping[str, ColumnType]) -> Self:
        """Read the types off the values, where `drift.types` doesn't state them."""
        return cls(
            {str(name): stated.get(str(name)) or _type_of(features[name]) for name in features.columns}
        )

    @property
    def numeric(self) -> list[str]:
        """The columns that are numbers."""
        return [name for name, type_ in self.columns.items() if type_ == "numeric"]

    @property
    def categorical(self) -> list[str]:
        """The columns that are categories."""
        return [name for name, type_ in self.columns.items() if type_ == "categorical"]

    def arrange(self, features: "pd.DataFrame") -> "pd.DataFrame":
        """
        The frame as the model knows it: floats, and strings in object columns.

        Whatever a column cannot hold, and every column that is not there, is missing (nan).
        Columns that the model doesn't know are left out.
        """
        import pandas as pd

        rows = len(features)
        arranged = {
            name: _arranged(features[name] if name in features else pd.Series([None] * rows), type_)
            for name, type_ in self.columns.items()
        }
        return pd.DataFrame(arranged, columns=list(self.columns))

    def encode(self) -> str:
        """As JSON, for a tag."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> Self:
        """From `encode`'s JSON."""
        return msgspec.json.decode(text, type=cls)


def _values(column: "pd.Series") -> list[Any]:
    """As Python's own types, also where an object column holds numpy's."""
    return [value.item() if isinstance(value, np.generic) else value for value in column.tolist()]


def _only_numbers(column: "pd.Series") -> bool:
    """numpy's own numbers, which need no look at each value."""
    return isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf"


def _type_of(column: "pd.Series") -> ColumnType:
    if _only_numbers(column):
        return "numeric"
    values = _values(column)
    known = [value for value in values if not _missing(value)]
    numeric = sum(_is_number(value) for value in known)
    return "numeric" if numeric >= _NUMERIC_SHARE * len(known) else "categorical"


def _arranged(column: "pd.Series", type_: ColumnType) -> "pd.Series":
    import pandas as pd

    if type_ == "numeric" and _only_numbers(column):
        floats = column.to_numpy(dtype=float)
        return pd.Series(np.where(np.isfinite(floats), floats, np.nan))
    values = _values(column)
    if type_ == "numeric":
        return pd.Series([_float(value) for value in values], dtype=float)
    spelled = np.empty(len(values), dtype=object)
    spelled[:] = [_category(value) for value in values]
    return pd.Series(spelled, dtype=object)


def _missing(value: Any) -> bool:
    # `value != value` is true of nan and of pandas' NaT; pd.NA says neither.
    return value is None or type(value).__name__ == "NAType" or bool(value != value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, Decimal))


def _float(value: Any) -> float:
    if _missing(value) or not _is_number(value):
        return math.nan
    number = float(value)
    return number if math.isfinite(number) else math.nan


def _category(value: Any) -> Any:
    if _missing(value):
        return math.nan
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(int(value)) if isinstance(value, bool) else str(value)
