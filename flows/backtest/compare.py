"""Comparing: two policies on the same stream, what they differ in and what they decided."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from flows.backtest.facts import Facts
from flows.backtest.told import columns, shown
from monitors.settings import ModelSettings


class Difference(NamedTuple):
    """A key that the two state otherwise."""

    key: str
    one: Any
    other: Any


def differences(one: ModelSettings, other: ModelSettings) -> list[Difference]:
    """
    The keys in which two models' settings differ, by name.

    >>> differences(ModelSettings(reference_rows=9), ModelSettings())
    [Difference(key='reference_rows', one=9, other=5000)]
    """
    ours, theirs = _flat(msgspec.to_builtins(one)), _flat(msgspec.to_builtins(other))
    return [
        Difference(key, ours.get(key), theirs.get(key))
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def comparison(one: Facts, other: Facts, found: list[Difference]) -> Iterator[str]:
    """For a person, line by line."""
    yield "Keys that differ" + ("" if found else ": none")
    if found:
        yield from columns([("", "this policy", "the other"), *((f[0], str(f[1]), str(f[2])) for f in found)])
    yield ""
    yield from columns(
        [
            ("", "this policy", "the other"),
            (one.metric, shown(one.live, one.metric), shown(other.live, other.metric)),
            ("retrainings", str(one.started), str(other.started)),
            *(
                (action, str(one.happened.count(action)), str(other.happened.count(action)))
                for action in ("promoted", "refused")
            ),
            ("episodes", str(len(one.happened.episodes)), str(len(other.happened.episodes))),
        ]
    )
    yield ""
    yield "Decisions"
    ours, theirs = _decisions(one), _decisions(other)
    rows = sorted(ours.keys() | theirs.keys())
    told = [(f"row {row:,}", ours.get(row, "-"), theirs.get(row, "-")) for row in rows]
    yield from columns([("", "this policy", "the other"), *told]) if told else ["  neither asked for any"]


def comparison_object(other: Facts, found: list[Difference]) -> dict[str, Any]:
    """What `--compare` adds to the last line of `--json`."""
    return {"keys": {key: [ours, theirs] for key, ours, theirs in found}, **other.json_object()}


def _decisions(facts: Facts) -> dict[int, str]:
    """By the first row after the window at which it was decided."""
    happened = facts.happened
    told: dict[int, list[str]] = {}
    for episode in happened.episodes:
        row = happened.windows[episode.window].end_row
        told.setdefault(row, []).append(f"episode {episode.number} ({episode.signal})")
    for asked in happened.requests:
        row = happened.windows[asked.window].end_row
        told.setdefault(row, []).append(f"attempt {asked.attempt} {asked.outcome.action}")
    return {row: ", ".join(parts) for row, parts in told.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
