"""Sharing: which member of a group reads which partition indexes, where models are kept apart by key."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import msgspec

from monitors.records import Partition

NEVER = -1


class Claim(msgspec.Struct, frozen=True):
    """The indexes that a member was given last, and in which generation of the group that was."""

    generation: int = NEVER
    indexes: frozenset[int] = frozenset()


def share(indexes: Collection[int], claims: Mapping[str, Claim]) -> dict[str, tuple[int, ...]]:
    """
    Every index to one member; nobody gets two more than anybody else, and nothing moves but for that.

    Of several claims to an index the latest counts: a member that was away has lost what others took.

    >>> share(range(4), {"old": Claim(7, frozenset({0, 1, 2, 3})), "new": Claim()})
    {'new': (2, 3), 'old': (0, 1)}
    """
    kept = _rightful(indexes, claims)
    least, more = divmod(len(indexes), len(claims))
    # Who has most may have one more: that moves least.
    by_wealth = sorted(claims, key=lambda member: (-len(kept[member]), member))
    quotas = {member: least + (rank < more) for rank, member in enumerate(by_wealth)}
    given = {member: kept[member][: quotas[member]] for member in claims}
    free = sorted(set(indexes).difference(*given.values()))
    for member in by_wealth:
        wanted = quotas[member] - len(given[member])
        given[member], free = given[member] + free[:wanted], free[wanted:]
    return {member: tuple(sorted(given[member])) for member in sorted(claims)}


def _rightful(indexes: Iterable[int], claims: Mapping[str, Claim]) -> dict[str, list[int]]:
    kept: dict[str, list[int]] = {member: [] for member in claims}
    for index in sorted(indexes):
        claimants = [member for member, claim in claims.items() if index in claim.indexes]
        if claimants:
            kept[max(claimants, key=lambda member: (claims[member].generation, member))].append(index)
    return kept


def uneven(partitions: Iterable[Partition]) -> str:
    """
    What keeps these topics from being shared out by index, in words; empty if nothing does.

    >>> uneven([Partition("predictions", 0), Partition("predictions", 1), Partition("labels", 0)])
    'labels has 1 partition and predictions has 2 partitions'
    """
    counts = Counter(partition.topic for partition in partitions)
    if len(set(counts.values())) < 2:
        return ""
    return " and ".join(
        f"{topic} has {count} partition{'s' if count > 1 else ''}" for topic, count in sorted(counts.items())
    )
