"""Three brokers of which one dies: who leads and who coordinates, and when all have everything again."""

from __future__ import annotations

import asyncio
from typing import Literal

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from streamflow.errors import RetriableError
from streamflow.log.kafka.log import KafkaLog
from streamflow.model.record import TopicPartition
from tests.kafka.broker import Cluster
from tests.system.harness import until

NODES = 3
REPLICATED = {
    "default.replication.factor": str(NODES),
    "min.insync.replicas": "2",
    "transaction.state.log.min.isr": "2",
    "num.network.threads": "1",  # for each listener
    "log.segment.bytes": str(64 << 20),  # a broker that was killed reads its open segments again
}
_WHOLE_WITHIN_S = 90


class Brokers:
    """The cluster of a run.

    Args:
        cluster: It, running.
        log: A connection of the run's own.
    """

    def __init__(self, cluster: Cluster, log: KafkaLog) -> None:
        self._cluster = cluster
        self._log = log

    async def leader_of(self, tp: TopicPartition) -> int:
        """The node that leads a partition."""

        async def leader() -> int | None:
            await self._log._client.refresh({tp.topic})
            return self._log._client.leader(tp)

        node = await until(leader, f"a leader of {tp}")
        assert isinstance(node, int)
        return node

    async def coordinator_of(self, kind: Literal["group", "transaction"], key: str) -> int:
        """The node that coordinates a group or the transactions of an id."""
        found: list[int] = []

        async def is_found() -> bool:
            try:
                found.append(await self._log._client.coordinator(kind, key))
            except RetriableError:
                return False
            return True

        await until(is_found, f"the coordinator of {kind} {key}")
        return found[0]

    async def kill(self, node: int) -> None:
        """`kill -9` of a broker."""
        await asyncio.to_thread(self._cluster.brokers[node].kill)

    async def are_whole(self) -> None:
        """Start who is dead, and wait until every replica of every partition is in sync: the next one may die then."""
        for broker in self._cluster.brokers.values():
            if not broker.runs:
                await asyncio.to_thread(broker.start)
        admin = AIOKafkaAdminClient(bootstrap_servers=self._cluster.bootstrap)
        await admin.start()
        try:
            await until(lambda: _all_in_sync(admin), "replicas in sync", _WHOLE_WITHIN_S)
        finally:
            await admin.close()


async def _all_in_sync(admin: AIOKafkaAdminClient) -> bool:
    try:
        topics = await admin.describe_topics()
    except KafkaError:
        return False
    return all(len(each["isr"]) == NODES for topic in topics for each in topic["partitions"])
