"""Doctor: is everything that the daemon stands on there, permitted, as deployed, and in step?"""

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from daemon import checks
from daemon.checks import Check
from daemon.config import Config
from daemon.errors import RetrainDaemonError

DISTRIBUTION = "retrain-daemon"
# Beyond this, event times look like the future, and deadlines are judged wrongly.
SKEW_SECONDS = 5.0


def examine(config: Config, probe: bool = False) -> Iterator[Check]:
    """
    Everything `check --online` looks at, then permissions, pins, the ledger and clocks.

    It only reads, but with `probe`: then one record is written to a topic of its own, deleted after.
    """
    yield from checks.offline(config)
    yield from pins()
    yield from _ledger(config)
    online = list(checks.online(config))
    yield from online
    if any(check.subject == "kafka" and check.verdict == "failed" for check in online):
        yield Check("note", "permissions", "not looked at: Kafka does not answer")
    else:
        yield from _kafka(config, probe)
    yield from _prefect(config)


def pins(distribution: str = DISTRIBUTION) -> Iterator[Check]:
    """Whether what is installed is what we are known to work with."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        found = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        yield Check("note", "pins", f"{distribution} is not installed, only run: its pins are not known")
        return
    python = found["Requires-Python"] or ""
    if not SpecifierSet(python).contains(platform.python_version(), prereleases=True):
        yield Check("failed", "pins", f"Python {platform.python_version()} is not {python}")
    wanted = [Requirement(text) for text in importlib.metadata.requires(distribution) or ()]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    unfit = [problem for one in wanted if (problem := _unfit(one))]
    for problem in unfit:
        yield Check("failed", "pins", f"{problem}; install with `pip install -c constraints.txt`")
    if not unfit:
        yield Check("ok", "pins", f"{len(wanted)} of {len(wanted)} packages are as stated")


def _unfit(requirement: Any) -> str:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} {version} is installed, and {requirement.specifier} is needed"


def _ledger(config: Config) -> Iterator[Check]:
    from daemon.ledger import Ledger

    try:
        ledger = Ledger(config.ledger.url)
    except RetrainDaemonError as error:
        yield Check("failed", "ledger", str(error))
        return
    try:
        refused, waiting = ledger.refused_count(), ledger.waiting_count()
    finally:
        ledger.close()
    text = f"{waiting} events wait to be delivered"
    yield Check("ok", "ledger", text)
    if refused:
        yield Check("note", "ledger", f"{refused} events were refused by Prefect: see `explain`")


# Kafka


def _kafka(config: Config, probe: bool) -> Iterator[Check]:
    from daemon.wire.kafka_admin import allowed, clock_of, newest_times

    topics = {name: ("DESCRIBE", "READ") for name in config.mappings}
    topics[config.kafka.dead_letter_topic] = ("DESCRIBE", "WRITE")
    try:
        rights = allowed(config.kafka, list(topics))
        yield from _permissions(topics, rights.topics)
        yield _permission(f"group {config.kafka.group}", ("READ",), rights.group)
        yield from _times(newest_times(config.kafka, list(config.mappings)))
        if probe:
            asked, theirs, answered = clock_of(config.kafka)
            yield _skew("clock of Kafka", asked, theirs, answered)
        else:
            yield Check(
                "note", "clock of Kafka", "it tells nobody its time; --probe writes a record to see it"
            )
    except RetrainDaemonError as error:
        yield Check("failed", "kafka", str(error))


def _permissions(
    topics: Mapping[str, Sequence[str]], granted: Mapping[str, frozenset[str] | None]
) -> Iterator[Check]:
    for topic, needed in topics.items():
        if topic in granted:
            yield _permission(f"topic {topic}", needed, granted[topic])


def _permission(subject: str, needed: Sequence[str], granted: frozenset[str] | None) -> Check:
    subject = f"permissions, {subject}"
    if granted is None:
        return Check("note", subject, "not told: by a broker that tells none, or as no member joined yet")
    missing = [name for name in needed if name not in granted]
    if missing:
        return Check("failed", subject, f"{', '.join(missing)} is not granted; have it granted to our user")
    return Check("ok", subject, ", ".join(needed))


def _times(newest: Mapping[str, tuple[datetime, bool]]) -> Iterator[Check]:
    """A record from the future tells of a clock that is ahead; one from the past of nothing."""
    for topic, (time, by_broker) in newest.items():
        ahead = (time - datetime.now(UTC)).total_seconds()
        whose = "Kafka's" if by_broker else "its producer's"
        if ahead > SKEW_SECONDS:
            text = (
                f"the newest record is {ahead:.0f} s ahead of this host's clock, by {whose}; set both by NTP"
            )
            yield Check("failed", f"times, topic {topic}", text)
        else:
            yield Check("ok", f"times, topic {topic}", f"the newest record's is not ahead, by {whose} clock")


# Prefect


def _prefect(config: Config) -> Iterator[Check]:
    from daemon.wire.prefect import PrefectApi, PrefectError

    try:
        with PrefectApi(config.prefect.api_url) as api:
            asked, theirs, answered = api.clock()
            server = str(api.call("GET", "/admin/version"))
    except PrefectError as error:
        yield Check("failed", "clock of Prefect", str(error))
        return
    yield _skew("clock of Prefect", asked, theirs, answered, 1.0)
    ours = importlib.metadata.version("prefect")
    same = ours.split(".")[:2] == server.split(".")[:2]
    text = f"server {server}, client {ours}"
    yield Check("ok" if same else "note", "version of Prefect", text)


def _skew(
    subject: str, asked: datetime, theirs: datetime, answered: datetime, grain_seconds: float = 0.0
) -> Check:
    """
    How far another clock is from ours at least; what the answer took on its way counts for neither.

    >>> at = [datetime(2026, 1, 1, 0, 0, second, tzinfo=UTC) for second in (0, 1, 2, 30)]
    >>> _skew("clock", at[0], at[1], at[2]).verdict, _skew("clock", at[0], at[3], at[1]).text[:17]
    ('ok', 'is 29.0 s ahead o')
    """
    ahead = (theirs - answered).total_seconds()
    behind = (asked - theirs).total_seconds() - grain_seconds
    skew = max(ahead, behind, 0.0)
    if skew <= SKEW_SECONDS:
        return Check("ok", subject, f"within {max(skew, grain_seconds):.1f} s of this host's")
    where = "ahead of" if ahead > behind else "behind"
    return Check("failed", subject, f"is {skew:.1f} s {where} this host's clock; set both by NTP")
