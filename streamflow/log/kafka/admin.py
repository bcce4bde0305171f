"""Topics, offsets and groups of a Kafka cluster. No request of ours creates a topic by accident."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar
from uuid import UUID

import anyio

from streamflow.errors import ConfigurationError, GroupInUseError, LogUnavailableError, StreamFlowError
from streamflow.log.api import Admin, NewTopic, OffsetMark, TopicDescription
from streamflow.log.kafka import codes, wire, wire_admin, wire_group
from streamflow.log.kafka.attempt import Attempt
from streamflow.log.kafka.client import Client, backoff_s, retried
from streamflow.log.kafka.offsets import EARLIEST, LATEST, list_offsets
from streamflow.log.kafka.transaction_coordinator import TransactionCoordinator
from streamflow.model.record import TopicPartition

T = TypeVar("T")

_TIMEOUT_S = 30.0
_GONE_TIMEOUT_S = 5.0
_TOPIC_RESOURCE = 2
_ALWAYS_TOLD = frozenset(
    {
        "max.message.bytes",
        "cleanup.policy",
        "retention.ms",
        "retention.bytes",
        "delete.retention.ms",
        "message.timestamp.type",
        "message.timestamp.after.max.ms",
        "message.timestamp.before.max.ms",
    }
)
_PARTITION_DEFAULT_SOURCES = frozenset({5, 6})  # the broker's defaults; all other sources somebody set


class KafkaAdmin(Admin):
    """An `Admin` over `Client.send`. Each call is repeated for up to 30 s while the cluster does not answer.

    Args:
        client: The data loop's connections.
        limits: `max.message.bytes` per topic, kept up to date by `describe` and `create`.
    """

    def __init__(self, client: Client, limits: dict[str, int]) -> None:
        self._client = client
        self._limits = limits

    # --- topics --------------------------------------------------------------------------------------------------

    async def describe(self, topics: Sequence[str]) -> Mapping[str, TopicDescription]:
        async def attempt() -> Mapping[str, TopicDescription]:
            await self._client.refresh(topics)
            self._raise_unusable(topics)
            found = [name for name in topics if name in self._client.topics]
            self._client.forget(set(topics) - set(found))
            configs = await self._configs(found)
            ids = await self._topic_ids(found)
            return {
                name: TopicDescription(
                    name, len(self._client.topics[name].leaders), configs.get(name, {}), ids.get(name, "")
                )
                for name in found
            }

        return await self._retried(attempt)

    async def topics(self) -> Sequence[str]:
        async def attempt() -> Sequence[str]:
            response = await self._client.metadata(None)
            return sorted(name for code, name, is_internal, *_ in response.topics if not code and not is_internal)

        return await self._retried(attempt)

    async def create(self, topics: Sequence[NewTopic]) -> None:
        if topics:
            await self._retried(lambda: self._create(topics))
            names = [topic.name for topic in topics]
            await self._until_usable(names)
            await self._configs(names)

    async def _create(self, topics: Sequence[NewTopic]) -> None:
        fields: list[tuple[Any, ...]] = [
            (t.name, t.partitions, t.replication, [], list(t.config.items())) for t in topics
        ]
        response = await self._controller(wire_admin.CREATE_TOPICS(fields, int(_TIMEOUT_S * 1000), False))
        for name, code, message in response.topics:
            if code in (codes.NONE, codes.TOPIC_ALREADY_EXISTS):
                continue
            if code in (17, 37, 38, 40, 44):  # name, partitions, replication, config, policy
                raise ConfigurationError(f"create topic {name}: {message or codes.name(code)}")
            raise codes.error(code, f"create topic {name}")

    async def _until_usable(self, names: Sequence[str]) -> None:
        """Until the metadata of all brokers show a leader for every partition: the next question may go to any."""
        failures = 0
        with anyio.move_on_after(_TIMEOUT_S):
            while True:
                known = await self._client.all_know(names)
                await self._client.refresh(names)
                topics = [self._client.topics.get(name) for name in names]
                if known and all(topic is not None and -1 not in topic.leaders.values() for topic in topics):
                    return
                failures += 1
                await anyio.sleep(backoff_s(failures, cap_s=0.2))
        raise LogUnavailableError(f"topics {', '.join(names)} were created, but have no leaders after {_TIMEOUT_S:g} s")

    async def delete(self, topics: Sequence[str]) -> None:
        async def attempt() -> None:
            response = await self._controller(wire_admin.DELETE_TOPICS(list(topics), int(_TIMEOUT_S * 1000)))
            for name, code in response.topics:
                if code not in (codes.NONE, codes.UNKNOWN_TOPIC_OR_PARTITION):
                    raise codes.error(code, f"delete topic {name}")

        if topics:
            await self._retried(attempt)
            await self._until_gone(topics)
            self._client.forget(topics)
            for name in topics:
                self._limits.pop(name, None)

    async def _until_gone(self, names: Sequence[str]) -> None:
        """A topic made again at once would else be taken for the old one."""
        failures = 0
        with anyio.move_on_after(_GONE_TIMEOUT_S):
            while True:
                await self._client.refresh(names)
                if not any(name in self._client.topics for name in names):
                    return
                failures += 1
                await anyio.sleep(backoff_s(failures, cap_s=0.2))

    async def _configs(self, names: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
        """What differs from the brokers' defaults, and in any case what records are taken and how long they stay."""
        if not names:
            return {}
        resources = [(_TOPIC_RESOURCE, name, None) for name in names]
        response = await self._client.ask_any(wire_admin.DESCRIBE_CONFIGS(resources, False))
        configs: dict[str, Mapping[str, str]] = {}
        for code, _message, _kind, name, entries in response.resources:
            if code:
                continue  # not allowed to read it: the worker can do without
            config = {
                key: value
                for key, value, _read_only, source, sensitive, _synonyms in entries
                if not sensitive
                and value is not None
                and (source not in _PARTITION_DEFAULT_SOURCES or key in _ALWAYS_TOLD)
            }
            configs[name] = config
            if "max.message.bytes" in config:
                self._limits[name] = int(config["max.message.bytes"])
        return configs

    async def _topic_ids(self, names: Sequence[str]) -> Mapping[str, str]:
        if not names:
            return {}
        call = wire.TOPIC_IDS([(wire.NO_ID, name, {}) for name in names], False, False, False)
        try:
            response = await self._client.ask_any(call)
        except ConfigurationError:
            return {}  # before Kafka 2.8
        return {name: str(UUID(bytes=id_)) for code, name, id_, *_ in response.topics if not code and id_ != wire.NO_ID}

    # --- offsets -------------------------------------------------------------------------------------------------

    async def start_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return await self._retried(lambda: list_offsets(self._client, partitions, EARLIEST))

    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return await self._retried(lambda: list_offsets(self._client, partitions, LATEST, stable=True))

    async def high_watermarks(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        return await self._retried(lambda: list_offsets(self._client, partitions, LATEST))

    async def delete_records(self, before: Mapping[TopicPartition, int]) -> None:
        async def attempt() -> None:
            for node, led in (await self._client.leaders(before)).items():
                call = wire_admin.DELETE_RECORDS(by_topic((tp, before[tp]) for tp in led), int(_TIMEOUT_S * 1000))
                response = await self._client.send(node, call)
                for topic, parts in response.topics:
                    for partition, _low, code in parts:
                        if code and code != codes.OFFSET_OUT_OF_RANGE:
                            await self._client.refresh([topic])
                            raise codes.error(code, f"delete records of {topic}-{partition}")

        if before:
            await self._retried(attempt)

    # --- groups --------------------------------------------------------------------------------------------------

    async def groups(self) -> Sequence[str]:
        async def attempt() -> Sequence[str]:
            await self._client.refresh()
            found: set[str] = set()
            for node in self._client.nodes:
                response = await self._client.send(node, wire_admin.LIST_GROUPS())
                if response.error_code:
                    raise codes.error(response.error_code, "list groups")
                found.update(group for group, _protocol in response.groups)
            return sorted(found)

        return await self._retried(attempt)

    async def group_offsets(self, group_id: str, *, stable: bool = False) -> Mapping[TopicPartition, OffsetMark]:
        async def attempt() -> Mapping[TopicPartition, OffsetMark]:
            node = await self._client.coordinator("group", group_id)
            response = await self._client.send(node, wire_group.OFFSET_FETCH(group_id, None, stable))
            if response.error_code == codes.GROUP_ID_NOT_FOUND:
                return {}
            if response.error_code:
                raise codes.error(response.error_code, f"read the offsets of group {group_id}")
            told = [part[4] for _topic, parts, _tags in response.topics for part in parts]
            if codes.UNSTABLE_OFFSET_COMMIT in told:  # a transaction is open: it ends, by its time-out at the latest
                raise codes.error(codes.UNSTABLE_OFFSET_COMMIT, f"read the offsets of group {group_id}")
            return {
                TopicPartition(topic, partition): OffsetMark(offset, metadata or "")
                for topic, parts, _tags in response.topics
                for partition, offset, _epoch, metadata, code, _ in parts
                if not code and offset >= 0
            }

        return await self._retried(attempt)

    async def group_members(self, group_id: str) -> Sequence[str]:
        async def attempt() -> Sequence[str]:
            node = await self._client.coordinator("group", group_id)
            response = await self._client.send(node, wire_admin.DESCRIBE_GROUPS([group_id], False))
            ((code, _group, _state, _kind, _protocol, members, _operations),) = response.groups
            if code and code != codes.GROUP_ID_NOT_FOUND:
                raise codes.error(code, f"describe group {group_id}")
            return sorted(
                f"{member_id} on {host.lstrip('/')}" + (f" (instance_id {instance_id!r})" if instance_id else "")
                for member_id, instance_id, _client_id, host, *_ in members
            )

        return await self._retried(attempt)

    async def delete_group(self, group_id: str) -> None:
        async def attempt() -> None:
            node = await self._client.coordinator("group", group_id)
            response = await self._client.send(node, wire_admin.DELETE_GROUPS([group_id]))
            ((_group, code),) = response.results
            if code == codes.NON_EMPTY_GROUP:
                who = ", ".join(await self.group_members(group_id)) or "they are just joining or leaving"
                raise GroupInUseError(
                    f"group {group_id!r} has live members: {who}; nothing was deleted. Stop them first; one that was "
                    "killed is gone after its session_timeout_ms"
                )
            if code not in (codes.NONE, codes.GROUP_ID_NOT_FOUND):
                raise codes.error(code, f"delete group {group_id}")

        await self._retried(attempt)

    # --- transactions --------------------------------------------------------------------------------------------

    async def fence_producer(self, transactional_id: str) -> bool:
        owner = object()  # a connection of its own: the coordinator may hold the request while a commit completes
        timeout_ms = self._client.options.transaction_timeout_ms
        coordinator = TransactionCoordinator(self._client, transactional_id, timeout_ms, (owner, "fence"))
        try:
            await coordinator.init(None, Attempt(_TIMEOUT_S))
        finally:
            self._client.close_lane(owner)
        return coordinator.has_ended

    # --- sending -------------------------------------------------------------------------------------------------

    async def _controller(self, call: wire.Call) -> Any:
        await self._client.refresh()
        return await self._client.send(self._client.controller_node(), call)

    async def _retried(self, attempt: Callable[[], Awaitable[T]]) -> T:
        return await retried(attempt, timeout_s=_TIMEOUT_S)

    def _raise_unusable(self, topics: Iterable[str]) -> None:
        for name in topics:
            code = self._client.topic_errors.get(name, codes.NONE)
            if code not in (codes.NONE, codes.UNKNOWN_TOPIC_OR_PARTITION):
                error: StreamFlowError = codes.error(code, f"describe topic {name}")
                raise error


def by_topic(values: Iterable[tuple[TopicPartition, Any]]) -> list[tuple[str, list[Any]]]:
    """The nested form most requests want: topics, in each (partition, *values)."""
    topics: dict[str, list[Any]] = defaultdict(list)
    for (topic, partition), value in values:
        topics[topic].append((partition, *(value if isinstance(value, tuple) else (value,))))
    return list(topics.items())
