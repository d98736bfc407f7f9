"""
A broker for trying things out where no Java is: Kafka's protocol, one node, everything in memory.

It serves topics, keys, headers, timestamps, compressed batches, consumer groups, committed offsets and
deleting records. It has no retention, no transactions, no authentication, no encryption, no deduplication
for idempotent producers, and forgets everything when it ends. `start` never uses it.
"""

import argparse
import asyncio
import atexit
import contextlib
import struct
import subprocess
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kafka.protocol import admin, consumer, metadata, producer

from daemon.dev_groups import Code, Groups, State, new_member_id
from daemon.dev_log import InvalidBatch, PartitionLog
from daemon.errors import RetrainDaemonError
from daemon.wire.local_kafka import LocalKafka, java_and_maven

READY = "development broker ready at "
START_SECONDS = 30.0
NODE = 1
MAX_REQUEST_BYTES = 100 * 1024 * 1024
_FRAME = struct.Struct(">i")
_HEAD = struct.Struct(">hhi")

_NO_ID = uuid.UUID(int=0)
# What is spoken, and in which versions: low enough that requests name topics and not their ids.
_VERSIONS = {
    "Produce": (3, 9),
    "Fetch": (4, 11),
    "ListOffsets": (1, 5),
    "Metadata": (1, 10),
    "OffsetCommit": (2, 7),
    "OffsetFetch": (1, 5),
    "FindCoordinator": (0, 2),
    "JoinGroup": (2, 5),
    "Heartbeat": (0, 3),
    "LeaveGroup": (0, 3),
    "SyncGroup": (0, 3),
    "ApiVersions": (0, 3),
    "CreateTopics": (0, 4),
    "DeleteTopics": (0, 3),
    "DeleteRecords": (0, 1),
    "DescribeGroups": (0, 4),
    "ListGroups": (0, 2),
    "InitProducerId": (0, 1),
}


def _message(name: str) -> Any:
    return next(
        getattr(module, name) for module in (metadata, producer, consumer, admin) if hasattr(module, name)
    )


_REQUESTS = {name: _message(f"{name}Request") for name in _VERSIONS}
_RESPONSES = {name: _message(f"{name}Response") for name in _VERSIONS}
_NAMES = {request.API_KEY: name for name, request in _REQUESTS.items()}


class Broker:
    """Answers requests; what it knows is in its topics and groups."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.cluster_id = f"development-{uuid.uuid4().hex[:8]}"
        self.topics: dict[str, list[PartitionLog]] = {}
        self._ids: dict[str, uuid.UUID] = {}
        self.groups = Groups()
        self._producers = 0
        self._handlers: dict[str, Callable[[Any, int], Awaitable[Any]]] = {
            name: getattr(self, f"_on_{_snake(name)}") for name in _VERSIONS
        }

    async def serve(self, ready: Callable[[int], None]) -> None:
        """Listen until cancelled; `ready` hears the port."""
        server = await asyncio.start_server(self._converse, self.host, self.port)
        self.port = server.sockets[0].getsockname()[1]
        ready(self.port)
        async with server:
            await asyncio.gather(server.serve_forever(), self.groups.evict_forever())

    # --- the connection --------------------------------------------------------------------------

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request after the other, as Kafka does it: answers keep the order of the questions."""
        try:
            while True:
                (size,) = _FRAME.unpack(await reader.readexactly(_FRAME.size))
                if not 0 < size <= MAX_REQUEST_BYTES:
                    return
                answer = await self._answer(await reader.readexactly(size))
                if answer is not None:
                    writer.write(answer)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def _answer(self, data: bytes) -> bytes | None:
        key, version, correlation = _HEAD.unpack_from(data)
        name = _NAMES.get(key)
        if name is None:
            raise ConnectionError(f"API {key} is not spoken here")  # hanging up is Kafka's answer, too
        if name == "ApiVersions" and version > _VERSIONS[name][1]:
            response, version = _api_versions(0, Code.UNSUPPORTED_VERSION), 0
        else:
            request = _REQUESTS[name].decode(data, version=version, header=True)
            response = await self._handlers[name](request, version)
        if response is None:
            return None
        # The version decides which header is written, so it has to be there first.
        response.API_VERSION = version
        response.with_header(correlation_id=correlation)
        return bytes(response.encode(header=True, framed=True))

    # --- the cluster -----------------------------------------------------------------------------

    async def _on_api_versions(self, request: Any, v: int) -> Any:
        return _api_versions(v, Code.NONE)

    async def _on_metadata(self, request: Any, v: int) -> Any:
        response = _RESPONSES["Metadata"]
        names = list(self.topics) if request.topics is None else [topic.name for topic in request.topics]
        node = response.MetadataResponseBroker(
            version=v, node_id=NODE, host=self.host, port=self.port, rack=None
        )
        return response(
            version=v,
            throttle_time_ms=0,
            brokers=[node],
            cluster_id=self.cluster_id,
            controller_id=NODE,
            topics=[self._described(name, v) for name in names],
        )

    def _described(self, name: str, v: int) -> Any:
        kind = _RESPONSES["Metadata"].MetadataResponseTopic
        partitions = [
            kind.MetadataResponsePartition(
                version=v,
                error_code=Code.NONE,
                partition_index=index,
                leader_id=NODE,
                leader_epoch=0,
                replica_nodes=[NODE],
                isr_nodes=[NODE],
                offline_replicas=[],
            )
            for index in range(len(self.topics.get(name, ())))
        ]
        code = Code.NONE if name in self.topics else Code.UNKNOWN_TOPIC
        return kind(
            version=v,
            error_code=code,
            name=name,
            topic_id=self._ids.get(name, _NO_ID),
            is_internal=False,
            partitions=partitions,
        )

    async def _on_create_topics(self, request: Any, v: int) -> Any:
        response = _RESPONSES["CreateTopics"]
        results = [
            response.CreatableTopicResult(
                version=v, name=topic.name, error_code=self._create(topic), error_message=None
            )
            for topic in request.topics
        ]
        return response(version=v, throttle_time_ms=0, topics=results)

    def _create(self, topic: Any) -> Code:
        if topic.name in self.topics:
            return Code.TOPIC_EXISTS
        count = 1 if topic.num_partitions == -1 else topic.num_partitions
        if count < 1:
            return Code.INVALID_PARTITIONS
        self.topics[topic.name] = [PartitionLog() for _ in range(count)]
        self._ids[topic.name] = uuid.uuid4()
        return Code.NONE

    async def _on_delete_topics(self, request: Any, v: int) -> Any:
        response = _RESPONSES["DeleteTopics"]
        results = []
        for name in request.topic_names:
            code = Code.UNKNOWN_TOPIC if self.topics.pop(name, None) is None else Code.NONE
            results.append(response.DeletableTopicResult(version=v, name=name, error_code=code))
        return response(version=v, throttle_time_ms=0, responses=results)

    async def _on_delete_records(self, request: Any, v: int) -> Any:
        response = _RESPONSES["DeleteRecords"]
        kind = response.DeleteRecordsTopicResult
        topics = []
        for topic in request.topics:
            results = []
            for wanted in topic.partitions:
                log = self._log(topic.name, wanted.partition_index)
                if log is not None:
                    log.delete_before(log.end if wanted.offset == -1 else wanted.offset)
                results.append(
                    kind.DeleteRecordsPartitionResult(
                        version=v,
                        partition_index=wanted.partition_index,
                        low_watermark=log.first if log else -1,
                        error_code=Code.NONE if log else Code.UNKNOWN_TOPIC,
                    )
                )
            topics.append(kind(version=v, name=topic.name, partitions=results))
        return response(version=v, throttle_time_ms=0, topics=topics)

    def _log(self, topic: str, index: int) -> PartitionLog | None:
        logs = self.topics.get(topic, ())
        return logs[index] if 0 <= index < len(logs) else None

    # --- writing and reading ---------------------------------------------------------------------

    async def _on_init_producer_id(self, request: Any, v: int) -> Any:
        self._producers += 1
        # A transaction that could not be aborted would be a lie.
        code = Code.INVALID_REQUEST if request.transactional_id else Code.NONE
        return _RESPONSES["InitProducerId"](
            version=v, throttle_time_ms=0, error_code=code, producer_id=self._producers, producer_epoch=0
        )

    async def _on_produce(self, request: Any, v: int) -> Any:
        response = _RESPONSES["Produce"]
        kind = response.TopicProduceResponse
        topics = [
            kind(
                version=v,
                name=topic.name,
                partition_responses=[
                    self._appended(kind.PartitionProduceResponse, topic.name, data, v)
                    for data in topic.partition_data
                ],
            )
            for topic in request.topic_data
        ]
        return response(version=v, responses=topics, throttle_time_ms=0) if request.acks else None

    def _appended(self, kind: Any, topic: str, data: Any, v: int) -> Any:
        log, code, offset = self._log(topic, data.index), Code.UNKNOWN_TOPIC, -1
        if log is not None:
            try:
                offset, code = log.append(bytes(data.records or b"")), Code.NONE
            except InvalidBatch:
                code = Code.CORRUPT_MESSAGE
        return kind(
            version=v,
            index=data.index,
            error_code=code,
            base_offset=offset,
            log_append_time_ms=-1,
            log_start_offset=log.first if log else -1,
            record_errors=[],
            error_message=None,
        )

    async def _on_fetch(self, request: Any, v: int) -> Any:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + request.max_wait_ms / 1000
        while True:
            grown = [log.grown for log in self._fetched_logs(request)]
            response, size, failed = self._fetch(request, v)
            left = deadline - loop.time()
            if size >= request.min_bytes or failed or left <= 0:
                return response
            await _first_of(grown, left)

    def _fetched_logs(self, request: Any) -> Iterable[PartitionLog]:
        for topic in request.topics:
            for partition in topic.partitions:
                log = self._log(topic.topic, partition.partition)
                if log is not None:
                    yield log

    def _fetch(self, request: Any, v: int) -> tuple[Any, int, bool]:
        response = _RESPONSES["Fetch"]
        kind = response.FetchableTopicResponse
        topics, size, failed = [], 0, False
        for topic in request.topics:
            parts = []
            for wanted in topic.partitions:
                part = self._fetched(kind.PartitionData, topic.topic, wanted, request.max_bytes - size, v)
                size += len(part.records)
                failed = failed or part.error_code != Code.NONE
                parts.append(part)
            topics.append(kind(version=v, topic=topic.topic, partitions=parts))
        answer = response(version=v, throttle_time_ms=0, error_code=Code.NONE, session_id=0, responses=topics)
        return answer, size, failed

    def _fetched(self, kind: Any, topic: str, wanted: Any, room: int, v: int) -> Any:
        log = self._log(topic, wanted.partition)
        code, records = Code.NONE, b""
        if log is None:
            code = Code.UNKNOWN_TOPIC
        elif not log.first <= wanted.fetch_offset <= log.end:
            code = Code.OFFSET_OUT_OF_RANGE
        elif room > 0:
            records = log.read(wanted.fetch_offset, min(wanted.partition_max_bytes, room))
        first, end = (log.first, log.end) if log else (-1, -1)
        return kind(
            version=v,
            partition_index=wanted.partition,
            error_code=code,
            high_watermark=end,
            last_stable_offset=end,
            log_start_offset=first,
            aborted_transactions=None,
            preferred_read_replica=-1,
            records=records,
        )

    async def _on_list_offsets(self, request: Any, v: int) -> Any:
        response = _RESPONSES["ListOffsets"]
        kind = response.ListOffsetsTopicResponse
        topics = [
            kind(
                version=v,
                name=topic.name,
                partitions=[
                    self._listed(kind.ListOffsetsPartitionResponse, topic.name, wanted, v)
                    for wanted in topic.partitions
                ],
            )
            for topic in request.topics
        ]
        return response(version=v, throttle_time_ms=0, topics=topics)

    def _listed(self, kind: Any, topic: str, wanted: Any, v: int) -> Any:
        log = self._log(topic, wanted.partition_index)
        if log is None:
            return kind(
                version=v,
                partition_index=wanted.partition_index,
                error_code=Code.UNKNOWN_TOPIC,
                timestamp=-1,
                offset=-1,
                leader_epoch=-1,
            )
        special = {-1: (log.end, -1), -2: (log.first, -1)}
        offset, stamp = special.get(wanted.timestamp) or log.offset_at(wanted.timestamp)
        return kind(
            version=v,
            partition_index=wanted.partition_index,
            error_code=Code.NONE,
            timestamp=stamp,
            offset=offset,
            leader_epoch=0,
        )

    # --- groups ----------------------------------------------------------------------------------

    async def _on_find_coordinator(self, request: Any, v: int) -> Any:
        return _RESPONSES["FindCoordinator"](
            version=v,
            throttle_time_ms=0,
            error_code=Code.NONE,
            error_message=None,
            node_id=NODE,
            host=self.host,
            port=self.port,
        )

    async def _on_join_group(self, request: Any, v: int) -> Any:
        group = self.groups.of(request.group_id)
        protocols = {one.name: bytes(one.metadata) for one in request.protocols}
        member_id = request.member_id or new_member_id()
        if not group.common_protocols(protocols):
            return _joined(v, Code.INCONSISTENT_PROTOCOL, member_id)
        if not request.member_id and v >= 4:
            return _joined(v, Code.MEMBER_ID_REQUIRED, member_id)
        code = await group.join(
            member_id, protocols, request.session_timeout_ms / 1000, request.rebalance_timeout_ms / 1000
        )
        if code:
            return _joined(v, code, member_id)
        members = group.members.values() if member_id == group.leader else ()
        kind = _RESPONSES["JoinGroup"].JoinGroupResponseMember
        return _joined(
            v,
            Code.NONE,
            member_id,
            generation_id=group.generation,
            protocol_name=group.protocol,
            leader=group.leader,
            members=[
                kind(
                    version=v,
                    member_id=one.id,
                    group_instance_id=None,
                    metadata=one.protocols[group.protocol],
                )
                for one in members
            ],
        )

    async def _on_sync_group(self, request: Any, v: int) -> Any:
        group = self.groups.of(request.group_id)
        given = {one.member_id: bytes(one.assignment) for one in request.assignments}
        code = await group.sync(request.member_id, request.generation_id, given)
        assignment = b"" if code else group.members[request.member_id].assignment
        return _RESPONSES["SyncGroup"](
            version=v,
            throttle_time_ms=0,
            error_code=code,
            protocol_type="consumer",
            protocol_name=group.protocol,
            assignment=assignment,
        )

    async def _on_heartbeat(self, request: Any, v: int) -> Any:
        now = asyncio.get_running_loop().time()
        code = self.groups.of(request.group_id).heartbeat(request.member_id, request.generation_id, now)
        return _RESPONSES["Heartbeat"](version=v, throttle_time_ms=0, error_code=code)

    async def _on_leave_group(self, request: Any, v: int) -> Any:
        response, group = _RESPONSES["LeaveGroup"], self.groups.of(request.group_id)
        if v < 3:
            return response(version=v, throttle_time_ms=0, error_code=group.leave(request.member_id))
        left = [
            response.MemberResponse(
                version=v,
                member_id=one.member_id,
                group_instance_id=None,
                error_code=group.leave(one.member_id),
            )
            for one in request.members
        ]
        return response(version=v, throttle_time_ms=0, error_code=Code.NONE, members=left)

    async def _on_offset_commit(self, request: Any, v: int) -> Any:
        response = _RESPONSES["OffsetCommit"]
        kind = response.OffsetCommitResponseTopic
        code = self.groups.may_commit(
            request.group_id, request.member_id, request.generation_id_or_member_epoch
        )
        topics = []
        for topic in request.topics:
            for one in topic.partitions if not code else ():
                place = (request.group_id, topic.name, one.partition_index)
                self.groups.offsets[place] = (one.committed_offset, one.committed_metadata or "")
            results = [
                kind.OffsetCommitResponsePartition(
                    version=v, partition_index=one.partition_index, error_code=code
                )
                for one in topic.partitions
            ]
            topics.append(kind(version=v, name=topic.name, partitions=results))
        return response(version=v, throttle_time_ms=0, topics=topics)

    async def _on_offset_fetch(self, request: Any, v: int) -> Any:
        response = _RESPONSES["OffsetFetch"]
        kind = response.OffsetFetchResponseTopic
        topics = [
            kind(
                version=v,
                name=name,
                partitions=[
                    self._committed(kind.OffsetFetchResponsePartition, (request.group_id, name, index), v)
                    for index in indexes
                ],
            )
            for name, indexes in self._wanted_offsets(request).items()
        ]
        return response(version=v, throttle_time_ms=0, error_code=Code.NONE, topics=topics)

    def _wanted_offsets(self, request: Any) -> dict[str, list[int]]:
        if request.topics is not None:
            return {topic.name: list(topic.partition_indexes) for topic in request.topics}
        wanted: dict[str, list[int]] = {}
        for group, topic, index in self.groups.offsets:
            if group == request.group_id:
                wanted.setdefault(topic, []).append(index)
        return wanted

    def _committed(self, kind: Any, place: tuple[str, str, int], v: int) -> Any:
        offset, note = self.groups.offsets.get(place, (-1, ""))
        return kind(
            version=v,
            partition_index=place[2],
            committed_offset=offset,
            committed_leader_epoch=-1,
            metadata=note,
            error_code=Code.NONE,
        )

    async def _on_list_groups(self, request: Any, v: int) -> Any:
        response = _RESPONSES["ListGroups"]
        groups = [
            response.ListedGroup(version=v, group_id=name, protocol_type="consumer")
            for name in self.groups.by_name
        ]
        return response(version=v, throttle_time_ms=0, error_code=Code.NONE, groups=groups)

    async def _on_describe_groups(self, request: Any, v: int) -> Any:
        return _RESPONSES["DescribeGroups"](
            version=v, throttle_time_ms=0, groups=[self._described_group(name, v) for name in request.groups]
        )

    def _described_group(self, name: str, v: int) -> Any:
        kind, group = _RESPONSES["DescribeGroups"].DescribedGroup, self.groups.of(name)
        stable = group.state is State.STABLE
        members = [
            kind.DescribedGroupMember(
                version=v,
                member_id=one.id,
                group_instance_id=None,
                client_id="",
                client_host="",
                member_metadata=one.protocols.get(group.protocol, b""),
                member_assignment=one.assignment if stable else b"",
            )
            for one in group.members.values()
        ]
        return kind(
            version=v,
            error_code=Code.NONE,
            group_id=name,
            group_state=str(group.state),
            protocol_type="consumer",
            protocol_data=group.protocol,
            members=members,
            authorized_operations=set(),
        )


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def _api_versions(v: int, code: Code) -> Any:
    response = _RESPONSES["ApiVersions"]
    keys = [
        response.ApiVersion(
            version=v, api_key=key, min_version=_VERSIONS[name][0], max_version=_VERSIONS[name][1]
        )
        for key, name in _NAMES.items()
    ]
    return response(version=v, error_code=code, throttle_time_ms=0, api_keys=keys)


def _joined(v: int, code: Code, member_id: str, **fields: Any) -> Any:
    nothing = {"generation_id": -1, "protocol_name": "", "leader": "", "members": []}
    return _RESPONSES["JoinGroup"](
        version=v,
        throttle_time_ms=0,
        error_code=code,
        protocol_type="consumer",
        member_id=member_id,
        **(nothing | fields),
    )


async def _first_of(events: Sequence[asyncio.Event], seconds: float) -> None:
    if not events:
        await asyncio.sleep(seconds)
        return
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


class DevBrokerError(RetrainDaemonError):
    """The development broker did not start."""


class DevBroker:
    """The development broker as a process of its own, with `LocalKafka`'s interface."""

    kind = "development broker"

    def __init__(self, port: int = 0) -> None:
        self._port = port
        self._process: subprocess.Popen[str] | None = None

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> Self:
        if self._process is not None:
            return self
        # Its standard input ends when we do, however we do, and it ends with it.
        command = [
            sys.executable,
            "-P",
            "-m",
            "daemon.dev_broker",
            "--port",
            str(self._port),
            "--with-parent",
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        atexit.register(self.kill)
        self._port = int(self._ready_line().rpartition(":")[2])
        return self

    def stop(self) -> None:
        self._end()

    def kill(self) -> None:
        self._end()

    def restart(self) -> None:
        """Stop and start on the same port; everything it held is gone."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _ready_line(self) -> str:
        process, lines = self._process, list[str]()
        assert process is not None and process.stdout is not None
        said = process.stdout
        reading = threading.Thread(target=lambda: lines.append(said.readline()), daemon=True)
        reading.start()
        reading.join(START_SECONDS)
        if lines and lines[0].startswith(READY):
            return lines[0].strip()
        self._end()
        raise DevBrokerError(
            f"the development broker did not start on port {self._port} within "
            f"{START_SECONDS:.0f} s; run `{sys.executable} -P -m daemon.dev_broker --port 0` "
            "to see why"
        )

    def _end(self) -> None:
        process, self._process = self._process, None
        atexit.unregister(self.kill)
        if process is None:
            return
        process.kill()  # there is nothing that it could keep
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def start_broker(folder: Path) -> LocalKafka | DevBroker:
    """Start a real Apache Kafka where Java and Maven are, else the development broker."""
    return LocalKafka(folder).start() if java_and_maven() else DevBroker().start()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -P -m daemon.dev_broker", description=(__doc__ or "").strip()
    )
    parser.add_argument("--host", default="127.0.0.1", help="Listen on this address (default: 127.0.0.1).")
    parser.add_argument(
        "--port", type=int, default=9092, help="Listen on this port, 0 for any (default: 9092)."
    )
    parser.add_argument("--with-parent", action="store_true", help="End when standard input does.")
    chosen = parser.parse_args(arguments)
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(_run(chosen.host, chosen.port, chosen.with_parent))
    return 0


async def _run(host: str, port: int, with_parent: bool) -> None:
    def say_ready(taken: int) -> None:
        print(f"{READY}{host}:{taken}", flush=True)  # noqa: T201 - whoever started it waits for this line

    serving = asyncio.ensure_future(Broker(host, port).serve(say_ready))
    if with_parent:
        loop = asyncio.get_running_loop()
        threading.Thread(target=_end_with_input, args=(loop, serving), daemon=True).start()
    await serving


def _end_with_input(loop: asyncio.AbstractEventLoop, serving: "asyncio.Future[None]") -> None:
    sys.stdin.read()
    loop.call_soon_threadsafe(serving.cancel)


if __name__ == "__main__":
    sys.exit(main())
