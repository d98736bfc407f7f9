"""What every form of the port `Source` promises."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from daemon.memory import MemoryLog, MemorySource
from daemon.ports import Assignment, OffsetLoss, Source
from daemon.wire.kafka import KafkaRefused, KafkaSource
from monitors.records import Partition, RawRecord
from monitors.settings import KafkaSettings

# Nothing here waits for time to pass; a broker on a machine that does much else takes its time.
PATIENCE_SECONDS = 90.0


class Memory:
    """The world of `MemorySource`."""

    def __init__(self) -> None:
        self._log = MemoryLog()
        self._topics = 0

    def topic(self, partitions: int = 1) -> str:
        self._topics += 1
        self._log.create(f"topic-{self._topics}", partitions)
        return f"topic-{self._topics}"

    def settings(self, **fields: Any) -> KafkaSettings:
        return KafkaSettings(**({"start": "earliest"} | fields))

    def source(self, settings: KafkaSettings) -> Source:
        return MemorySource(self._log, settings)

    def produce(self, topic: str, values: Sequence[bytes | None], partition: int = 0, **fields: Any) -> None:
        if "headers" in fields:
            fields["headers"] = tuple(fields["headers"])
        for value in values:
            self._log.append(Partition(topic, partition), value, **fields)

    def delete_before(self, partition: Partition, offset: int) -> None:
        self._log.expire(partition, offset)

    def recreate(self, topic: str, partitions: int = 1) -> None:
        self._log.create(topic, partitions)


class Broker:
    """The world of `KafkaSource`."""

    def __init__(self, kafka: Any) -> None:
        self.kind = kafka.kind
        self.topic = kafka.topic
        self.settings = kafka.settings
        self.produce = kafka.produce
        self.delete_before = kafka.delete_before
        self.recreate = kafka.recreate

    def source(self, settings: KafkaSettings) -> Source:
        return KafkaSource(settings)


@pytest.fixture(
    params=[
        "memory",
        pytest.param("real_kafka", marks=pytest.mark.kafka),
        pytest.param("dev_kafka", marks=pytest.mark.kafka),
    ]
)
def world(request: pytest.FixtureRequest) -> Memory | Broker:
    return Memory() if request.param == "memory" else Broker(request.getfixturevalue(request.param))


@pytest.fixture
def join(world: Memory | Broker) -> Iterator[Callable[[KafkaSettings], Source]]:
    """Makes members of a group, and closes those that are left."""
    members: list[Source] = []

    def make(settings: KafkaSettings) -> Source:
        members.append(world.source(settings))
        return members[-1]

    yield make
    for member in members:
        member.close()


def until_assigned(*members: Source) -> list[Assignment]:
    """
    Poll all these members until each has heard what it owns.

    At the same time, as they would in processes of their own: a group settles once all its members have
    joined, so that none hears a thing while one of them is not polled.
    """
    heard: dict[int, Assignment] = {}
    deadline = time.monotonic() + PATIENCE_SECONDS

    def listen(index: int) -> None:
        while len(heard) < len(members) and time.monotonic() < deadline:
            assert members[index].poll(0.3) == [], "a record before anybody said where to start"
            news = members[index].assignment()
            if news is not None:
                heard[index] = news

    with ThreadPoolExecutor(len(members)) as pool:
        list(pool.map(listen, range(len(members))))
    assert len(heard) == len(members), f"only {len(heard)} of {len(members)} members heard what they own"
    return [heard[index] for index in range(len(members))]


@contextmanager
def polled(source: Source) -> Iterator[None]:
    """Meanwhile poll this member, which has nothing to read."""
    stop = threading.Event()

    def keep_polling() -> None:
        while not stop.is_set():
            assert source.poll(0.3) == []

    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(keep_polling)
        try:
            yield
        finally:
            stop.set()
        polling.result()


def until_settled(source: Source) -> list[Assignment]:
    """Poll until partitions are assigned; everything that was heard on the way."""
    heard: list[Assignment] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (heard and heard[-1].partitions) and time.monotonic() < deadline:
        records = source.poll(0.3)
        if (news := source.assignment()) is not None:
            heard.append(news)
        else:
            assert records == [], "a record before anybody said where to start"
    return heard


def read(source: Source, count: int) -> list[RawRecord]:
    """Poll until there are so many records, or too long."""
    records: list[RawRecord] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(records) < count and time.monotonic() < deadline:
        records += source.poll(0.2)
    return records


def values(records: Sequence[RawRecord]) -> list[bytes | None]:
    return [record.value for record in records]


def test_a_lone_member_owns_every_partition_of_every_topic(world: Any, join: Any) -> None:
    predictions, labels = world.topic(2), world.topic(1)
    source = join(world.settings(topic=predictions, labels_topic=labels))
    (assignment,) = until_assigned(source)
    assert set(assignment.partitions) == {
        Partition(predictions, 0),
        Partition(predictions, 1),
        Partition(labels, 0),
    }


def test_an_assignment_is_told_once(world: Any, join: Any) -> None:
    source = join(world.settings(topic=world.topic()))
    until_assigned(source)
    source.seek({})
    source.poll(0.2)
    assert source.assignment() is None


def test_nothing_is_read_before_seek(world: Any, join: Any) -> None:
    topic = world.topic()
    world.produce(topic, [b"1", b"2"])
    source = join(world.settings(topic=topic))
    until_assigned(source)
    for _ in range(4):
        assert source.poll(0.2) == []


def test_reading_goes_on_from_the_given_offsets(world: Any, join: Any) -> None:
    topic = world.topic(2)
    for partition in (0, 1):
        world.produce(topic, [b"0", b"1", b"2", b"3"], partition)
    source = join(world.settings(topic=topic))
    until_assigned(source)
    going_on = source.seek({Partition(topic, 0): 1, Partition(topic, 1): 3})
    assert going_on == {Partition(topic, 0): 1, Partition(topic, 1): 3}
    records = read(source, 4)
    assert [r.offset for r in records if r.partition.index == 0] == [1, 2, 3]
    assert [r.offset for r in records if r.partition.index == 1] == [3]
    assert source.losses() == []


@pytest.mark.parametrize(("start", "expected"), [("earliest", 0), ("latest", 3)])
def test_partitions_not_named_start_where_the_settings_say(
    world: Any, join: Any, start: str, expected: int
) -> None:
    topic = world.topic()
    world.produce(topic, [b"0", b"1", b"2"])
    source = join(world.settings(topic=topic, start=start))
    until_assigned(source)
    assert source.seek({}) == {Partition(topic, 0): expected}
    world.produce(topic, [b"3"])
    assert values(read(source, 4 - expected)) == [b"0", b"1", b"2", b"3"][expected:]


def test_a_record_comes_whole(world: Any, join: Any) -> None:
    topic = world.topic()
    world.produce(topic, [b"\xff\x00"], key=b"k", headers=[("h", b"v")], timestamp_ms=1_700_000_000_123)
    world.produce(topic, [None], key=b"gone")
    source = join(world.settings(topic=topic))
    until_assigned(source)
    source.seek({})
    first, second = read(source, 2)
    assert first == RawRecord(Partition(topic, 0), 0, 1_700_000_000_123, b"k", b"\xff\x00", (("h", b"v"),))
    assert (second.key, second.value, second.headers) == (b"gone", None, ())


def test_a_newcomer_stands_by_and_disturbs_nobody(world: Any, join: Any) -> None:
    topic = world.topic(2)
    settings = world.settings(topic=topic)
    first = join(settings)
    until_assigned(first)
    first.seek({})
    second = join(settings)
    with polled(first):
        assert until_assigned(second) == [Assignment(())]
    assert first.assignment() is None, "the active member was disturbed"
    world.produce(topic, [b"a"], 0)
    world.produce(topic, [b"b"], 1)
    assert sorted(values(read(first, 2))) == [b"a", b"b"]
    assert second.poll(0.2) == []


def test_an_owner_that_was_not_told_where_to_start_lets_others_join(world: Any, join: Any) -> None:
    topic = world.topic(2)
    world.produce(topic, [b"0"])
    settings = world.settings(topic=topic)
    owner = join(settings)
    (owned,) = until_assigned(owner)
    newcomer = join(settings)
    with polled(owner):
        assert until_assigned(newcomer) == [Assignment(())]
    assert owner.assignment() is None, "the owner was disturbed"
    owner.seek({})
    assert {record.partition for record in read(owner, 1)} < set(owned.partitions)


def test_owner_and_standby_know_that_kafka_answers_and_the_owner_where_the_log_ends(
    world: Any, join: Any
) -> None:
    topic = world.topic(2)
    world.produce(topic, [b"0", b"1", b"2"], 1)
    settings = world.settings(topic=topic)
    first, second = join(settings), join(settings)
    assignments = until_assigned(first, second)
    owner, standby = (first, second) if assignments[0].partitions else (second, first)
    owner.seek({})
    read(owner, 3)
    owner.drained()
    assert owner.ends() == {Partition(topic, 0): 0, Partition(topic, 1): 3}
    assert standby.ends() == {}
    assert owner.reachable() and standby.reachable()


def test_the_standby_takes_over_when_the_active_member_leaves(world: Any, join: Any) -> None:
    topic = world.topic()
    settings = world.settings(topic=topic)
    first, second = join(settings), join(settings)
    assignments = until_assigned(first, second)
    active, standby = (first, second) if assignments[0].partitions else (second, first)
    world.produce(topic, [b"1"])
    active.close()
    (taken,) = until_assigned(standby)
    assert taken.partitions == (Partition(topic, 0),)
    standby.seek({})
    assert values(read(standby, 1)) == [b"1"]


def test_who_joins_anew_owns_nothing_until_it_is_told(world: Any, join: Any) -> None:
    topic = world.topic(2)
    world.produce(topic, [b"0", b"1"])
    source = join(world.settings(topic=topic))
    (before,) = until_assigned(source)
    source.seek({})
    assert len(read(source, 2)) == 2
    source.rejoin()
    world.produce(topic, [b"2"])
    heard = [news for news in until_settled(source) if news.partitions]
    assert heard == [before], "told again, though it is the same"
    source.seek({Partition(topic, 0): 1})
    assert values(read(source, 2)) == [b"1", b"2"]


def test_offsets_gone_before_the_start_are_a_loss(world: Any, join: Any) -> None:
    topic = world.topic()
    partition = Partition(topic, 0)
    world.produce(topic, [b"0", b"1", b"2", b"3"])
    world.delete_before(partition, 3)
    source = join(world.settings(topic=topic))
    until_assigned(source)
    assert source.seek({partition: 1}) == {partition: 3}
    assert source.losses() == [OffsetLoss(partition, expected=1, available=3)]
    assert source.losses() == []
    assert values(read(source, 1)) == [b"3"]


def test_offsets_gone_while_reading_are_a_loss(world: Any, join: Any) -> None:
    topic = world.topic()
    partition = Partition(topic, 0)
    world.produce(topic, [b"0", b"1", b"2", b"3"])
    source = join(world.settings(topic=topic))
    until_assigned(source)
    source.seek({partition: 0})
    world.delete_before(partition, 2)
    assert values(read(source, 2)) == [b"2", b"3"]
    assert source.losses() == [OffsetLoss(partition, expected=0, available=2)]


def test_an_offset_beyond_the_end_means_another_log(world: Any, join: Any) -> None:
    topic = world.topic()
    partition = Partition(topic, 0)
    world.produce(topic, [b"old"] * 5)
    world.recreate(topic)
    world.produce(topic, [b"new"])
    source = join(world.settings(topic=topic))
    until_assigned(source)
    assert source.seek({partition: 5}) == {partition: 0}
    assert source.losses() == [OffsetLoss(partition, expected=5, available=0)]
    assert values(read(source, 1)) == [b"new"]


def test_another_log_of_the_same_name_is_read_from_its_start(world: Any, join: Any) -> None:
    """However long it has grown meanwhile: offsets alone do not tell."""
    topic = world.topic()
    partition = Partition(topic, 0)
    world.produce(topic, [b"old"] * 3)
    settings = world.settings(topic=topic)
    source = join(settings)
    until_assigned(source)
    source.seek({})
    log = source.log_id(partition)
    assert len(read(source, 3)) == 3
    source.close()
    world.recreate(topic)
    world.produce(topic, [b"new"] * 5)
    source = join(settings)
    until_assigned(source)
    assert source.seek({partition: 3}, {partition: log}) == {partition: 0}
    assert source.losses() == [OffsetLoss(partition, expected=3, available=0)]
    assert values(read(source, 5)) == [b"new"] * 5
    assert source.log_id(partition) != log
    assert source.seek({partition: 5}, {partition: source.log_id(partition)}) == {partition: 5}
    assert source.losses() == []


def test_a_topic_that_is_made_anew_while_it_is_read_is_read_from_its_start(world: Any, join: Any) -> None:
    topic = world.topic()
    partition = Partition(topic, 0)
    world.produce(topic, [b"old"] * 3)
    source = join(world.settings(topic=topic))
    until_assigned(source)
    source.seek({})
    log = source.log_id(partition)
    assert len(read(source, 3)) == 3
    world.recreate(topic)
    world.produce(topic, [b"new"] * 5)
    seen: list[RawRecord] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    losses: list[OffsetLoss] = []
    while values(seen)[-5:] != [b"new"] * 5 or not losses:
        assert time.monotonic() < deadline, (seen, losses)
        seen += source.poll(0.2)
        if source.assignment() is not None:  # none of it was there for a moment
            source.seek({partition: 3}, {partition: log})
        losses += source.losses()
    # Until Kafka's metadata say so, the new log is read where the old one ended.
    assert [(loss.partition, loss.available) for loss in losses] == [(partition, 0)]
    assert losses[0].expected in (3, 5)
    assert [record.offset for record in seen][-5:] == [0, 1, 2, 3, 4]


def test_drained_names_the_partitions_with_nothing_left(world: Any, join: Any) -> None:
    topic = world.topic(2)
    world.produce(topic, [b"0", b"1"], 0)
    source = join(world.settings(topic=topic))
    until_assigned(source)
    source.seek({})
    assert source.drained() == {Partition(topic, 1)}
    assert len(read(source, 2)) == 2
    assert source.drained() == {Partition(topic, 0), Partition(topic, 1)}


def test_a_standby_has_drained_nothing(world: Any, join: Any) -> None:
    settings = world.settings(topic=world.topic())
    first, second = join(settings), join(settings)
    assignments = until_assigned(first, second)
    standby = second if assignments[0].partitions else first
    standby.seek({})
    assert standby.drained() == frozenset()


def test_the_cluster_has_one_name(world: Any, join: Any) -> None:
    topic = world.topic()
    one, other = join(world.settings(topic=topic)), join(world.settings(topic=topic))
    assert one.cluster_id() == other.cluster_id() != ""


def test_committing_is_for_others_and_moves_nothing(world: Any, join: Any) -> None:
    topic = world.topic()
    partition = Partition(topic, 0)
    world.produce(topic, [b"0", b"1", b"2"])
    settings = world.settings(topic=topic)
    first = join(settings)
    until_assigned(first)
    first.seek({})
    first.commit({partition: 2})
    first.commit({})
    first.close()
    second = join(settings)
    until_assigned(second)
    second.seek({partition: 0})
    assert values(read(second, 3)) == [b"0", b"1", b"2"]


def test_held_partitions_are_left_alone_and_nothing_of_them_is_lost(world: Any, join: Any) -> None:
    topic = world.topic(2)
    held, other = Partition(topic, 0), Partition(topic, 1)
    world.produce(topic, [b"a0", b"a1"], 0)
    world.produce(topic, [b"b0"], 1)
    source = join(world.settings(topic=topic))
    until_assigned(source)
    source.seek({})
    assert len(read(source, 3)) == 3
    source.hold([held])
    world.produce(topic, [b"a2", b"a3"], 0)
    world.produce(topic, [b"b1"], 1)
    assert values(read(source, 1)) == [b"b1"]
    assert source.poll(1.0) == []
    assert held not in source.drained()
    world.produce(topic, [b"a4"], 0)
    source.hold([])
    assert [(r.partition, r.value) for r in read(source, 3)] == [(held, b"a2"), (held, b"a3"), (held, b"a4")]
    world.produce(topic, [b"b2"], 1)
    assert [(r.partition, r.value) for r in read(source, 1)] == [(other, b"b2")]
    assert source.losses() == []


# --- sharing by index -----------------------------------------------------------------------------


class Sharer:
    """A member that answers each assignment at once, and keeps what it reads."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.owned: frozenset[Partition] = frozenset()
        self.heard: list[frozenset[Partition]] = []
        self.records: list[RawRecord] = []

    def turn(self, offsets: Mapping[Partition, int]) -> None:
        records = self.source.poll(0.2)
        if (news := self.source.assignment()) is not None:
            self.owned = frozenset(news.partitions)
            self.heard.append(self.owned)
            self.source.seek({one: offsets[one] for one in self.owned & offsets.keys()})
        else:
            self.records += records


def until(what: Callable[[], bool], *sharers: Sharer, offsets: Mapping[Partition, int] | None = None) -> None:
    """Let these members take turns, at the same time, until it is so."""
    deadline = time.monotonic() + PATIENCE_SECONDS

    def work(sharer: Sharer) -> None:
        while not what() and time.monotonic() < deadline:
            sharer.turn(offsets or {})

    with ThreadPoolExecutor(len(sharers)) as pool:
        list(pool.map(work, sharers))
    assert what(), f"they own {[sorted(one.owned) for one in sharers]}"


def shared(sharers: Sequence[Sharer], partitions: int) -> Callable[[], bool]:
    """Whether the indexes of all topics are in as many parts as there are members, none of them empty."""

    def holds() -> bool:
        parts = [frozenset(one.index for one in sharer.owned) for sharer in sharers]
        return (
            all(parts) and sum(map(len, parts)) == partitions and len(frozenset().union(*parts)) == partitions
        )

    return holds


def test_members_by_model_share_out_the_indexes(world: Any, join: Any) -> None:
    predictions, labels = world.topic(4), world.topic(4)
    settings = world.settings(topic=predictions, labels_topic=labels, sharing="by-model")
    members = [Sharer(join(settings)), Sharer(join(settings))]
    until(shared(members, 4), *members)
    for member in members:
        assert {one.index for one in member.owned if one.topic == predictions} == {
            one.index for one in member.owned if one.topic == labels
        }, "labels go where the predictions go"
        assert len(member.owned) == 4
    for index in range(4):
        world.produce(predictions, [b"p%d" % index], index)
        world.produce(labels, [b"l%d" % index], index)
    until(lambda: sum(len(member.records) for member in members) == 8, *members)
    for member in members:
        assert {record.partition for record in member.records} == member.owned


def test_a_newcomer_by_model_takes_its_part_and_leaves_the_rest_in_place(world: Any, join: Any) -> None:
    topic = world.topic(4)
    settings = world.settings(topic=topic, sharing="by-model")
    first = Sharer(join(settings))
    until(lambda: len(first.owned) == 4, first)
    for index in range(4):
        world.produce(topic, [b"0", b"1"], index)
    until(lambda: len(first.records) == 8, first)
    newcomer = Sharer(join(settings))
    read = {Partition(topic, index): 2 for index in range(4)}
    until(shared([first, newcomer], 4), first, newcomer, offsets=read)
    assert first.owned < first.heard[0] and len(first.owned) == 2
    for index in range(4):
        world.produce(topic, [b"2"], index)
    until(lambda: len(first.records) + len(newcomer.records) == 12, first, newcomer)
    assert [(record.partition, record.offset) for record in newcomer.records] == [
        (partition, 2) for partition in (record.partition for record in newcomer.records)
    ]
    assert {record.partition for record in newcomer.records} == newcomer.owned


def test_what_a_member_by_model_leaves_others_take(world: Any, join: Any) -> None:
    topic = world.topic(3)
    settings = world.settings(topic=topic, sharing="by-model")
    members = [Sharer(join(settings)) for _ in range(3)]
    until(shared(members, 3), *members)
    leaving, *staying = members
    before = [member.owned for member in staying]
    leaving.source.close()
    until(shared(staying, 3), *staying)
    for member, had in zip(staying, before, strict=True):
        assert member.owned >= had, "who stays keeps what it had"


def test_more_members_by_model_than_partitions_stand_by(world: Any, join: Any) -> None:
    settings = world.settings(topic=world.topic(1), sharing="by-model")
    members = [Sharer(join(settings)), Sharer(join(settings))]
    until(lambda: sorted(len(one.owned) for one in members if one.heard) == [0, 1], *members)


@pytest.mark.kafka
def test_topics_of_another_number_of_partitions_are_refused_by_model(kafka: Any) -> None:
    predictions, labels = kafka.topic(2), kafka.topic(1)
    settings = kafka.settings(topic=predictions, labels_topic=labels, sharing="by-model")
    with pytest.raises(KafkaRefused, match=f"{labels} has 1 partition.*set kafka.sharing"):
        KafkaSource(settings)


@pytest.mark.kafka
def test_a_member_that_shares_in_another_way_is_refused(real_kafka: Any) -> None:
    settings = real_kafka.settings(topic=real_kafka.topic())
    first = KafkaSource(settings)
    other = KafkaSource(msgspec.structs.replace(settings, sharing="by-model"))
    try:
        until_assigned(first)
        first.seek({})
        with polled(first), pytest.raises(KafkaRefused, match=r"share in another way.*kafka\.sharing"):
            until_assigned(other)
    finally:
        first.close()
        other.close()
