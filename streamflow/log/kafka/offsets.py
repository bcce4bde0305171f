"""First and last offsets of partitions (ListOffsets)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streamflow.log.kafka import codes, wire
from streamflow.log.kafka.client import Client
from streamflow.model.record import TopicPartition

EARLIEST = -2
LATEST = -1


async def list_offsets(
    client: Client, partitions: Sequence[TopicPartition], timestamp: int, *, stable: bool = False
) -> Mapping[TopicPartition, int]:
    """Ask each partition's leader.

    Args:
        client: Connections.
        partitions: What to ask for.
        timestamp: `EARLIEST`, `LATEST` or milliseconds since the epoch.
        stable: With `LATEST`: the last stable offset instead of the high watermark.

    Raises:
        RetriableError: A leader is away or has moved (the metadata is then refreshed for the next attempt).
        UnknownTopicError: One does not exist.
        AuthorizationError: This user may not read it.
    """
    found: dict[TopicPartition, int] = {}
    for node, led in (await client.leaders(partitions)).items():
        topics: dict[str, list[tuple[int, int]]] = {}
        for tp in led:
            topics.setdefault(tp.topic, []).append((tp.partition, timestamp))
        response = await client.send(node, wire.LIST_OFFSETS(-1, int(stable), list(topics.items())))
        for topic, parts in response.topics:
            for partition, code, _timestamp, offset in parts:
                if code:
                    await client.refresh([topic])
                    raise codes.error(code, f"list offsets of {topic}-{partition}")
                found[TopicPartition(topic, partition)] = offset
    return found
