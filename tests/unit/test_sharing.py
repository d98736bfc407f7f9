"""Who reads which indexes: everything once, evenly, and moved only where it must be."""

from hypothesis import given
from hypothesis import strategies as st

from daemon.ownership import Term
from daemon.wire.sharing import NEVER, Claim, share, uneven
from monitors.records import Partition

MEMBERS = st.lists(st.sampled_from("abcdefg"), min_size=1, unique=True)
CLAIM = st.builds(Claim, st.integers(NEVER, 3), st.frozensets(st.integers(0, 11)))


def settled(members: list[str], count: int) -> dict[str, tuple[int, ...]]:
    return share(range(count), dict.fromkeys(members, Claim()))


def claims_of(shares: dict[str, tuple[int, ...]], generation: int = 1) -> dict[str, Claim]:
    return {member: Claim(generation, frozenset(indexes)) for member, indexes in shares.items()}


@given(st.dictionaries(st.sampled_from("abcdefg"), CLAIM, min_size=1), st.integers(0, 10))
def test_each_index_has_one_member_and_nobody_much_more_than_another(
    claims: dict[str, Claim], count: int
) -> None:
    shares = share(range(count), claims)
    assert sorted(index for given in shares.values() for index in given) == list(range(count))
    sizes = [len(given) for given in shares.values()]
    assert set(shares) == set(claims) and max(sizes) - min(sizes) <= 1


@given(MEMBERS, st.integers(0, 12))
def test_who_is_settled_stays_so(members: list[str], count: int) -> None:
    before = settled(members, count)
    assert share(range(count), claims_of(before)) == before


@given(MEMBERS, st.integers(0, 12))
def test_a_newcomer_takes_its_part_and_nothing_else_moves(members: list[str], count: int) -> None:
    before = settled(members, count)
    after = share(range(count), claims_of(before) | {"new": Claim()})
    for member in members:
        assert set(after[member]) <= set(before[member])


@given(MEMBERS, st.integers(0, 12), st.data())
def test_who_leaves_is_shared_out_and_nothing_else_moves(
    members: list[str], count: int, data: st.DataObject
) -> None:
    before = settled([*members, "gone"], count)
    claims = claims_of(before)
    del claims["gone"]
    after = share(range(count), claims)
    for member in members:
        assert set(after[member]) >= set(before[member])


def test_a_member_that_was_away_has_lost_what_others_took() -> None:
    claims = {"away": Claim(3, frozenset({0, 1})), "here": Claim(4, frozenset({1, 2, 3}))}
    assert share(range(4), claims) == {"away": (0, 3), "here": (1, 2)}


def test_one_member_has_everything() -> None:
    assert share(range(3), {"m": Claim()}) == {"m": (0, 1, 2)}


def test_topics_with_as_many_partitions_can_be_shared_by_index() -> None:
    even = [Partition(topic, index) for topic in ("a", "b") for index in range(3)]
    assert uneven(even) == ""
    assert uneven([*even, Partition("b", 3)]) == "a has 3 partitions and b has 4 partitions"


def test_who_has_index_0_looks_after_models_that_nobody_met() -> None:
    homes = {"a": Partition("p", 0), "b": Partition("p", 1), "gone": Partition("p", 1)}
    configured = ["a", "b", "new"]
    assert Term(1, frozenset({0})).models(homes, configured) == {"a", "new"}
    assert Term(1, frozenset({1})).models(homes, configured) == {"b", "gone"}
    assert Term(1).models(homes, configured) is None
