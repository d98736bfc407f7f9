"""The development broker: what it does beyond the contract, and what it says it does not."""

import asyncio
import subprocess
import sys

import pytest

from daemon.dev_broker import READY, DevBroker
from daemon.dev_groups import Code, Group, Groups, State
from daemon.dev_log import InvalidBatch, PartitionLog

SESSION_SECONDS = 10.0


async def joined(group: Group, *names: str) -> None:
    """These members join at once, and the leader gives each its own name."""
    codes = await asyncio.gather(
        *(group.join(name, {"p": b""}, SESSION_SECONDS, SESSION_SECONDS) for name in names)
    )
    assert codes == [Code.NONE] * len(names)
    given = {name: name.encode() for name in names}
    synced = await asyncio.gather(
        *(group.sync(name, group.generation, given if name == group.leader else {}) for name in names)
    )
    assert synced == [Code.NONE] * len(names)


def test_members_that_join_together_are_one_generation() -> None:
    async def scenario() -> None:
        group = Group()
        await joined(group, "a", "b")
        assert (group.state, group.generation) == (State.STABLE, 1)
        assert {name: one.assignment for name, one in group.members.items()} == {"a": b"a", "b": b"b"}

    asyncio.run(scenario())


def test_a_silent_member_is_dropped_and_the_others_told() -> None:
    async def scenario() -> None:
        group = Group()
        await joined(group, "a", "b")
        now = asyncio.get_running_loop().time()
        assert group.heartbeat("a", 1, now + SESSION_SECONDS) is Code.NONE
        group.evict(now + SESSION_SECONDS + 1)
        assert list(group.members) == ["a"]
        assert group.heartbeat("a", 1, now + SESSION_SECONDS) is Code.REBALANCE_IN_PROGRESS
        assert group.heartbeat("b", 1, now) is Code.UNKNOWN_MEMBER

    asyncio.run(scenario())


def test_a_follower_does_not_wait_for_a_leader_that_died() -> None:
    async def scenario() -> None:
        group = Group()
        await asyncio.gather(*(group.join(name, {"p": b""}, SESSION_SECONDS, 1.0) for name in "ab"))
        follower = "b" if group.leader == "a" else "a"
        waiting = asyncio.ensure_future(group.sync(follower, group.generation, {}))
        await asyncio.sleep(0)
        group.leave(group.leader)
        assert await asyncio.wait_for(waiting, 1) is Code.REBALANCE_IN_PROGRESS

    asyncio.run(scenario())


def test_a_stale_member_may_not_commit() -> None:
    async def scenario() -> None:
        groups = Groups()
        await joined(groups.of("g"), "a")
        assert groups.may_commit("g", "a", 1) is Code.NONE
        assert groups.may_commit("g", "a", 0) is Code.ILLEGAL_GENERATION
        assert groups.may_commit("g", "gone", 1) is Code.UNKNOWN_MEMBER

    asyncio.run(scenario())


@pytest.mark.parametrize("data", [b"x", b"\x00" * 61, b"\x00" * 16 + b"\x02" + b"\xff" * 60])
def test_what_is_no_record_batch_is_refused_whole(data: bytes) -> None:
    async def scenario() -> None:
        log = PartitionLog()
        with pytest.raises(InvalidBatch):
            log.append(data)
        assert log.end == 0

    asyncio.run(scenario())


@pytest.mark.kafka(broker="development broker")
def test_it_says_where_it_is_and_ends_with_its_parent() -> None:
    command = [sys.executable, "-P", "-m", "daemon.dev_broker", "--port", "0", "--with-parent"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        line = process.stdout.readline()
        assert line.startswith(READY + "127.0.0.1:")
        process.stdin.close()
        assert process.wait(timeout=60) == 0


@pytest.mark.kafka(broker="development broker")
def test_it_is_honest_about_transactions() -> None:
    from kafka import KafkaProducer
    from kafka.errors import KafkaError

    with DevBroker() as broker:
        producer = KafkaProducer(
            bootstrap_servers=broker.bootstrap_servers, transactional_id="t", max_block_ms=3_000
        )
        with pytest.raises(KafkaError):
            producer.init_transactions()
        producer.close(timeout=0)
