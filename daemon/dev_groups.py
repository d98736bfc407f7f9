"""The development broker's consumer groups: who is a member, who leads, what each was given."""

import asyncio
import uuid
from collections.abc import Iterable, Mapping
from enum import IntEnum, StrEnum

import msgspec

JOIN_GRACE_SECONDS = 0.1
EVICTION_SECONDS = 0.25


class Code(IntEnum):
    """The error codes of the Kafka protocol that this broker uses."""

    NONE = 0
    OFFSET_OUT_OF_RANGE = 1
    CORRUPT_MESSAGE = 2
    UNKNOWN_TOPIC = 3
    ILLEGAL_GENERATION = 22
    INCONSISTENT_PROTOCOL = 23
    UNKNOWN_MEMBER = 25
    REBALANCE_IN_PROGRESS = 27
    UNSUPPORTED_VERSION = 35
    TOPIC_EXISTS = 36
    INVALID_PARTITIONS = 37
    INVALID_REQUEST = 42
    MEMBER_ID_REQUIRED = 79


class State(StrEnum):
    """Where a group is, in Kafka's words."""

    EMPTY = "Empty"
    JOINING = "PreparingRebalance"
    SYNCING = "CompletingRebalance"
    STABLE = "Stable"


class Member(msgspec.Struct):
    """One consumer, as it described itself when it last joined."""

    id: str
    protocols: dict[str, bytes]
    session_seconds: float
    rebalance_seconds: float
    seen: float
    joined: asyncio.Future[Code]
    synced: asyncio.Future[Code]
    assignment: bytes = b""


class Group:
    """One consumer group: join, then sync, then stable until somebody comes or goes."""

    def __init__(self) -> None:
        self.state = State.EMPTY
        self.generation = 0
        self.leader = ""
        self.protocol = ""
        self.members: dict[str, Member] = {}
        self._round: asyncio.Task[None] | None = None

    async def join(
        self, member_id: str, protocols: Mapping[str, bytes], session_seconds: float, rebalance_seconds: float
    ) -> Code:
        """Take part in the next generation; returns once it has begun."""
        loop = asyncio.get_running_loop()
        member = Member(
            member_id,
            dict(protocols),
            session_seconds,
            rebalance_seconds,
            loop.time(),
            loop.create_future(),
            loop.create_future(),
        )
        before = self.members.get(member_id)
        if before is not None:
            _settle([before.joined, before.synced], Code.REBALANCE_IN_PROGRESS)
        self.members[member_id] = member
        self._rebalance()
        if self._round is None or self._round.done():
            self._round = loop.create_task(self._gather())
        return await member.joined

    async def sync(self, member_id: str, generation: int, assignments: Mapping[str, bytes]) -> Code:
        """Hand in the leader's assignments, or wait for them."""
        code = self.check(member_id, generation)
        if code or self.state is State.JOINING:
            return code or Code.REBALANCE_IN_PROGRESS
        member = self.members[member_id]
        if member_id == self.leader and self.state is State.SYNCING:
            for one in self.members.values():
                one.assignment = assignments.get(one.id, b"")
            self.state = State.STABLE
            _settle((one.synced for one in self.members.values()), Code.NONE)
        return await member.synced

    def heartbeat(self, member_id: str, generation: int, now: float) -> Code:
        """Note that the member lives; tells it to join again while the group is changing."""
        code = self.check(member_id, generation)
        if member_id in self.members:
            self.members[member_id].seen = now
        return code or (Code.REBALANCE_IN_PROGRESS if self.state is State.JOINING else Code.NONE)

    def leave(self, member_id: str) -> Code:
        if member_id not in self.members:
            return Code.UNKNOWN_MEMBER
        self._drop(member_id)
        return Code.NONE

    def check(self, member_id: str, generation: int) -> Code:
        """Whether this member may speak for this generation."""
        if member_id not in self.members:
            return Code.UNKNOWN_MEMBER
        return Code.NONE if generation == self.generation else Code.ILLEGAL_GENERATION

    def evict(self, now: float) -> None:
        """Drop members that were silent for their whole session."""
        silent = [
            one.id
            for one in self.members.values()
            if now - one.seen > one.session_seconds and not self._waits_to_join(one)
        ]
        for member_id in silent:
            self._drop(member_id)

    def common_protocols(self, protocols: Iterable[str]) -> list[str]:
        """Those of these protocols that every member speaks, in the given order."""
        return [name for name in protocols if all(name in one.protocols for one in self.members.values())]

    def _waits_to_join(self, member: Member) -> bool:
        return self.state is State.JOINING and not member.joined.done()

    def _drop(self, member_id: str) -> None:
        member = self.members.pop(member_id)
        _settle([member.joined, member.synced], Code.UNKNOWN_MEMBER)
        if self.members:
            self._rebalance()
        else:
            self.state = State.EMPTY

    def _rebalance(self) -> None:
        """From now on heartbeats tell every member to join again."""
        if self.state is State.SYNCING:
            _settle((one.synced for one in self.members.values()), Code.REBALANCE_IN_PROGRESS)
        self.state = State.JOINING

    async def _gather(self) -> None:
        """Wait until every member has joined again or was given up, then begin a generation."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + max(one.rebalance_seconds for one in self.members.values())
        await asyncio.sleep(JOIN_GRACE_SECONDS)
        while self._missing() and loop.time() < deadline:
            await asyncio.sleep(JOIN_GRACE_SECONDS / 5)
        for member_id in self._missing():
            self._drop(member_id)
        if self.members:
            self._begin()

    def _missing(self) -> list[str]:
        return [one.id for one in self.members.values() if one.joined.done()]

    def _begin(self) -> None:
        first = next(iter(self.members.values()))
        now = asyncio.get_running_loop().time()
        self.generation += 1
        self.leader = first.id
        self.protocol = self.common_protocols(first.protocols)[0]
        self.state = State.SYNCING
        for one in self.members.values():
            one.seen = now
        _settle((one.joined for one in self.members.values()), Code.NONE)


class Groups:
    """All groups, and the offsets they committed."""

    def __init__(self) -> None:
        self.by_name: dict[str, Group] = {}
        self.offsets: dict[tuple[str, str, int], tuple[int, str]] = {}

    def of(self, name: str) -> Group:
        return self.by_name.setdefault(name, Group())

    def may_commit(self, name: str, member_id: str, generation: int) -> Code:
        """Members must be of the present generation; whoever commits without being one may."""
        return self.of(name).check(member_id, generation) if member_id else Code.NONE

    async def evict_forever(self) -> None:
        while True:
            await asyncio.sleep(EVICTION_SECONDS)
            now = asyncio.get_running_loop().time()
            for group in self.by_name.values():
                group.evict(now)


def new_member_id() -> str:
    return f"member-{uuid.uuid4().hex[:12]}"


def _settle(futures: Iterable[asyncio.Future[Code]], code: Code) -> None:
    for future in futures:
        if not future.done():
            future.set_result(code)
