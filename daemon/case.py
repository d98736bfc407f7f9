"""Case: everything that the ledger holds about one episode."""

from datetime import datetime
from typing import Any

import msgspec

from daemon.errors import RetrainDaemonError, UsageError
from daemon.ledger import Ledger, RequestRow, StoredWindow
from monitors.episodes import Episode, Judged
from monitors.events import Kind


class UnreadableEpisode(RetrainDaemonError):
    """What the ledger holds under this id is no episode (any more)."""


class Window(msgspec.Struct, frozen=True):
    """A judged window as it is written, and what that says; `judged` is None where it says nothing."""

    stored: StoredWindow
    judged: Judged | None
    problem: str = ""

    @property
    def versions(self) -> set[str]:
        """The version, twice said: if one of the two was altered, the window is still found."""
        return {self.stored.version} | ({self.judged.version} if self.judged else set())

    def since(self, start: datetime) -> bool:
        """Whether it starts then or later, by its column or its evidence."""
        times = [_time(self.stored.start), self.judged.start if self.judged else None]
        return any(time is not None and time >= start for time in times)


class Case(msgspec.Struct, frozen=True):
    """
    One episode, from the first drifted window to the one that resolved it (or the newest).

    `before` are the earlier windows of the versions concerned: the policy's state comes from them.
    `pruned` names the versions of which retention has taken the oldest windows.
    """

    episode: Episode
    stage: str
    ended_at: str | None
    windows: tuple[Window, ...]
    before: tuple[Window, ...]
    pruned: frozenset[str]
    requests: tuple[RequestRow, ...]
    events: tuple[dict[str, Any], ...]


class _Told(msgspec.Struct, frozen=True):
    """What is read of an event that was told."""

    resource: dict[str, str]
    payload: dict[str, Any]


def open_case(ledger: Ledger, models: list[str], name: str) -> Case:
    """The case of `MODEL:NUMBER`, of an episode's id or of the beginning of one; `UsageError` if unclear."""
    row = _found(ledger, models, name)
    try:
        episode = msgspec.json.decode(row["state"], type=Episode)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnreadableEpisode(
            f"episode {row['id']}: what the ledger holds cannot be read: {error}"
        ) from error
    if not _aware(episode.since, episode.opened_at):
        raise UnreadableEpisode(f"episode {row['id']}: a time in it has no offset from UTC")
    events = tuple(ledger.events_of(episode.id))
    end = _end_of(events)
    versions = {episode.version, episode.promoted, end[0]} - {""}
    windows = [read_window(stored) for stored in ledger.stored_windows(episode.model)]
    concerned = [window for window in windows if window.versions & versions]
    first = _first(concerned, episode)
    last = _last(concerned, first, end, row["ended_at"])
    return Case(
        episode=episode,
        stage=row["stage"],
        ended_at=row["ended_at"],
        windows=tuple(concerned[first:last]),
        before=tuple(concerned[:first]),
        pruned=frozenset(
            version
            for version in versions
            if sum(window.stored.version == version for window in windows)
            < ledger.judged_count(episode.model, version)
        ),
        requests=tuple(one for one in ledger.requests(episode.model) if one.episode == episode.id),
        events=events,
    )


def names_of_episodes(ledger: Ledger, models: list[str]) -> list[str]:
    """Every episode as `MODEL:NUMBER`, in order."""
    return [f"{model}:{row['number']}" for model in models for row in ledger.episodes(model)]


def _found(ledger: Ledger, models: list[str], name: str) -> dict[str, Any]:
    model, _, number = name.rpartition(":")
    if model and number.isdecimal():
        found = [row for row in ledger.episodes(model) if row["number"] == int(number)]
    else:
        found = ledger.find_episodes(name.lower())
    if len(found) == 1:
        return found[0]
    known = names_of_episodes(ledger, models)
    some = ", ".join(known[-10:]) if known else "none yet"
    if not found:
        raise UsageError(f"{name}: is no episode of this ledger; there are {some}")
    raise UsageError(f"{name}: {len(found)} episodes begin so; give more of the id, or one of {some}")


def read_window(stored: StoredWindow) -> Window:
    """What a stored window says, if it can be read."""
    try:
        judged = msgspec.json.decode(stored.evidence, type=Judged)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return Window(stored, None, str(error))
    if not _aware(judged.start, judged.end, judged.decision.since):
        return Window(stored, None, "a time without an offset from UTC")
    return Window(stored, judged)


def _first(windows: list[Window], episode: Episode) -> int:
    """The window that began the stretch; the earliest one left of it, where that is gone."""
    for number, window in enumerate(windows):
        if episode.version in window.versions and window.since(episode.since):
            return number
    return len(windows)


def _end_of(events: tuple[dict[str, Any], ...]) -> tuple[str, datetime | None]:
    """Version and end of the window that resolved the episode, as was told."""
    for row in events:
        if row["kind"] == Kind.DRIFT_RESOLVED:
            try:
                body = msgspec.json.decode(row["body"], type=_Told)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
            version = body.resource.get("retrain-daemon.version", "")
            return version, _time(body.payload.get("window_end"))
    return "", None


def _last(windows: list[Window], first: int, end: tuple[str, datetime | None], ended_at: str | None) -> int:
    for number, window in enumerate(windows[first:], first):
        if end[1] is not None and end[0] in window.versions:
            judged_end = _time(window.stored.end) if window.judged is None else window.judged.end
            if judged_end == end[1]:
                return number + 1
        elif end[1] is None and ended_at is not None and window.stored.judged_at > ended_at:
            return number
    return len(windows)


def _time(text: object) -> datetime | None:
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return time if _aware(time) else None


def _aware(*times: datetime | None) -> bool:
    return all(time is None or time.tzinfo is not None for time in times)
