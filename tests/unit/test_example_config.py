"""The example config and the code say the same."""

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from daemon.config import DEFAULT_WINDOW_SECONDS, Config, load
from daemon.config_tree import _leaves
from monitors.settings import ModelSettings

EXAMPLE = Path(__file__).parents[2] / "retrain-daemon.example.toml"


def written() -> dict[str, Any]:
    """The example with what it only mentions (`# key = value`) put in."""
    text = re.sub(r"^# (?=\[|\w+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)
    return tomllib.loads(text)


def leaves(
    table: dict[str, Any], known: set[tuple[str, ...]], above: tuple[str, ...] = ()
) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for name, value in table.items():
        key = (*above, "NAME" if above in (("models",), ("topics",)) else name)
        found |= leaves(value, known, key) if isinstance(value, dict) and key not in known else {key}
    return found


def test_every_key_of_the_code_is_in_the_example_and_the_other_way_round() -> None:
    known = set(_leaves(Config))
    expected = {key for key in known if key[0] != "topics"} | {("topics", "NAME", "id")}
    assert leaves(written(), known) == expected


def test_the_example_shows_the_defaults() -> None:
    shown = msgspec.to_builtins(msgspec.convert(tomllib.loads(EXAMPLE.read_text()), Config))
    window = shown["models"]["fraud"]["window"]
    assert window.pop("seconds") == DEFAULT_WINDOW_SECONDS
    default = msgspec.to_builtins(Config(models={"fraud": ModelSettings()}))
    del default["models"]["fraud"]["window"]["seconds"]
    assert shown == default


def test_the_example_can_be_loaded() -> None:
    assert list(load(EXAMPLE, {}).models) == ["fraud"]


def test_what_is_only_mentioned_is_of_the_right_type() -> None:
    mentioned = written()
    del mentioned["models"]["fraud"]["window"]["seconds"]
    config = msgspec.convert(mentioned, Config)
    assert config.models["fraud"].window.rows == 1000
    assert config.models["fraud"].gate.floor == 0.8


def test_every_number_says_what_it_counts() -> None:
    for line in EXAMPLE.read_text().splitlines():
        match = re.match(r"(\w+) = [\d.]+(.*)$", line)
        if match and not match[1].endswith(("_share", "seed")):
            assert "#" in match[2], line
