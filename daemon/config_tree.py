"""The config tree: what was written, in the file and in the environment, and where each key stands."""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from daemon.errors import UsageError

ENVIRONMENT_PREFIX = "RETRAIN_DAEMON_"
# The command line's, the tests', and what Kubernetes sets by itself for a service of our name.
_NOT_SETTINGS = re.compile(r"RETRAIN_DAEMON_(CONFIG|TEST_.*|SERVICE_.*|PORT(_.*)?)")
_BARE = re.compile(r"[A-Za-z0-9_-]+")

Key = tuple[str, ...]


class Problem(msgspec.Struct, frozen=True):
    """One thing to mend: which key, where it stands, what is wrong and what to do."""

    key: str
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.key} {self.text}"


class ConfigError(UsageError):
    """The configuration cannot be used; one line for each problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


def dotted(key: Key) -> str:
    """
    A key as TOML would write it.

    >>> dotted(("models", "fraud v2", "kind"))
    'models."fraud v2".kind'
    """
    return ".".join(part if _BARE.fullmatch(part) else f'"{part}"' for part in key)


class Tree:
    """Raw values under their keys, checked against a settings type as they come in."""

    def __init__(self, type_: type[msgspec.Struct]) -> None:
        self.values: dict[str, Any] = {}
        self._type = type_
        self._places: dict[Key, str] = {}
        self._problems: list[Problem] = []

    def read_file(self, path: Path) -> None:
        """Take in a TOML file; one that is not there or is no TOML is an error at once."""
        self.values = _parsed(path)
        for key in _keys(self.values):
            self._places[key] = f"{path} [{dotted(key[:-1])}]" if key[:-1] else str(path)
        self._check(self._type, self.values, ())

    def read_environment(self, environ: Mapping[str, str]) -> None:
        """Take in `RETRAIN_DAEMON_SECTION__KEY` variables, which win over the file."""
        for name, text in sorted(environ.items()):
            if name.startswith(ENVIRONMENT_PREFIX) and not _NOT_SETTINGS.fullmatch(name):
                self._read_variable(name, text)

    def raise_problems(self) -> None:
        if self._problems:
            raise ConfigError(self._problems)

    def place_of(self, key: str) -> str:
        """Where a key was set: the file's section, the variable, or the defaults."""
        parts = tuple(key.split("."))
        known = {dotted(place): where for place, where in self._places.items()}
        for length in range(len(parts), 0, -1):
            if where := known.get(".".join(parts[:length])):
                return where
        return "default"

    def get(self, key: str) -> Any:
        """A raw value; None if it was not set."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def set(self, key: str, value: Any, place: str) -> None:
        """Put a value in, noting where it came from."""
        self._put(tuple(key.split(".")), value, place)

    def _put(self, key: Key, value: Any, place: str) -> None:
        table = self.values
        for part in key[:-1]:
            table = table.setdefault(part, {})
        table[key[-1]] = value
        self._places[key] = place

    def _read_variable(self, name: str, text: str) -> None:
        resolved = self._resolve(name.removeprefix(ENVIRONMENT_PREFIX).split("__"))
        if resolved is None:
            self._problems.append(Problem(name, "environment", _unknown(name, _variables(self._type))))
            return
        key, type_ = resolved
        before = len(self._problems)
        value = _from_text(text, type_)
        self._places[key] = f"environment {name}"
        self._check(type_, value, key)
        if len(self._problems) == before:
            self._put(key, value, f"environment {name}")

    def _resolve(self, parts: Sequence[str]) -> tuple[Key, Any] | None:
        """The key that a variable's name stands for, and its type; None if there is none."""
        key: Key = ()
        type_: Any = self._type
        for part in parts:
            if _is_struct(type_):
                type_ = get_type_hints(type_).get(part.lower())
                name = part.lower()
            elif get_origin(type_) is dict:
                name = _same_name(part, self._table(key))
                type_ = get_args(type_)[1]
            else:
                return None
            if type_ is None or not part:
                return None
            key = (*key, name)
        return None if _is_struct(type_) else (key, type_)

    def _table(self, key: Key) -> dict[str, Any]:
        table: Any = self.values
        for part in key:
            table = table.get(part, {}) if isinstance(table, dict) else {}
        return table if isinstance(table, dict) else {}

    def _check(self, type_: Any, value: Any, key: Key) -> None:
        if _is_struct(type_):
            self._check_section(type_, value, key)
        elif get_origin(type_) is dict and isinstance(value, dict):
            for name, inner in value.items():
                self._check(get_args(type_)[1], inner, (*key, name))
        else:
            self._check_value(type_, value, key)

    def _check_section(self, type_: Any, value: Any, key: Key) -> None:
        if not isinstance(value, dict):
            self._report(key, f"is a section; write [{dotted(key)}] and its keys below")
            return
        hints = get_type_hints(type_)
        for name, inner in value.items():
            if name in hints:
                self._check(hints[name], inner, (*key, name))
            else:
                known = [dotted((*key, sibling)) for sibling in hints]
                self._report(
                    (*key, name), _unknown(dotted((*key, name)), known, _everywhere(self._type, name))
                )

    def _check_value(self, type_: Any, value: Any, key: Key) -> None:
        try:
            msgspec.convert(value, type_)
        except msgspec.ValidationError:
            self._report(key, f"is {_kind(value)}; write {_expectation(type_)}")

    def _report(self, key: Key, text: str) -> None:
        self._problems.append(Problem(dotted(key), self.place_of(dotted(key)), text))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        text = "does not exist; write one with `retrain-daemon init` or name another with --config"
    except tomllib.TOMLDecodeError as error:
        text = f"is no TOML: {error}"
    except UnicodeDecodeError:
        text = "is not UTF-8 text; save it as such"
    except OSError as error:
        text = f"cannot be read ({error.strerror}); check path and permissions"
    raise ConfigError([Problem("configuration", str(path), text)]) from None


def _keys(table: Mapping[str, Any], above: Key = ()) -> Iterator[Key]:
    for name, value in table.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from _keys(value, (*above, name))


def _is_struct(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


def _same_name(part: str, table: Mapping[str, Any]) -> str:
    """The name in the file that a variable, which knows no lower case, must mean; else a new one."""
    wanted = re.sub(r"\W", "_", part).lower()
    return next((name for name in table if re.sub(r"\W", "_", name).lower() == wanted), part.lower())


def _variables(type_: Any, above: Key = ()) -> list[str]:
    """The names of all variables that stand for one key."""
    return [ENVIRONMENT_PREFIX + "__".join(key).upper() for key in _leaves(type_, above)]


def _leaves(type_: Any, above: Key = ()) -> Iterator[Key]:
    for name, inner in get_type_hints(type_).items():
        if get_origin(inner) is dict and _is_struct(get_args(inner)[1]):
            yield from _leaves(get_args(inner)[1], (*above, name, "NAME"))
        elif _is_struct(inner):
            yield from _leaves(inner, (*above, name))
        else:
            yield (*above, name)


def _everywhere(type_: Any, name: str) -> list[str]:
    """The keys of that very name in other sections."""
    return [".".join(key) for key in _leaves(type_) if key[-1] == name]


def _unknown(name: str, known: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    near = list(elsewhere)[:2] or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"is no setting; did you mean {' or '.join(near)}?"
    return "is no setting; retrain-daemon.example.toml has them all"


def _from_text(text: str, type_: Any) -> Any:
    """A variable's value in its key's type; text that does not fit stays text and is refused as such."""
    kinds = _alternatives(type_)
    origins = {get_origin(kind) for kind in kinds}
    if dict in origins or (tuple in origins and text.startswith("[")):
        return _from_json(text, text)
    if tuple in origins and (str not in kinds or "," in text):
        return [part.strip() for part in text.split(",") if part.strip()]
    if kinds == {str} or Literal in origins:
        return text
    if str in kinds:
        return text if tuple in origins else _from_json(text, text)
    try:
        return float(text) if type_ is float else msgspec.convert(text.strip(), type_, strict=False)
    except ValueError:
        return text


def _from_json(text: str, otherwise: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return otherwise


def _alternatives(type_: Any) -> set[Any]:
    return set(get_args(type_)) if get_origin(type_) in (UnionType, Union) else {type_}


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _expectation(type_: Any) -> str:
    if get_origin(type_) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(type_))
    if get_origin(type_) is tuple:
        return "a list of texts"
    if get_origin(type_) is dict:
        return "a table"
    kinds = [_WORDS.get(kind) or _expectation(kind) for kind in _in_order(type_) if kind is not type(None)]
    return " or ".join(kinds)


def _in_order(type_: Any) -> tuple[Any, ...]:
    return get_args(type_) if get_origin(type_) in (UnionType, Union) else (type_,)


def _kind(value: Any) -> str:
    """What was written, in words; never the value, which may be a secret."""
    if isinstance(value, bool):
        return "true or false"
    kinds: dict[type, str] = {
        str: "a text",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "a table",
    }
    return next((word for kind, word in kinds.items() if isinstance(value, kind)), "a date or time")
