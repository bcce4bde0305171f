"""A Kafka cluster as a `Log`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import anyio

from streamflow.errors import AuthorizationError, ConfigurationError
from streamflow.log.api import (
    Admin,
    Assignor,
    Group,
    GroupSettings,
    Isolation,
    Log,
    Producer,
    Reader,
    TransactionalProducer,
)
from streamflow.log.kafka.admin import KafkaAdmin
from streamflow.log.kafka.client import Client
from streamflow.log.kafka.fetch import KafkaReader
from streamflow.log.kafka.group import KafkaGroup
from streamflow.log.kafka.memberships import Memberships
from streamflow.log.kafka.options import Kafka
from streamflow.log.kafka.producer import KafkaProducer
from streamflow.log.kafka.transaction import KafkaTransactionalProducer

_POLL_S = 0.1


class KafkaLog(Log):
    """A connection to a cluster.

    Args:
        options: Where it is and how to authenticate.
        client_id: How this process names itself to the brokers.
    """

    def __init__(self, options: Kafka, *, client_id: str) -> None:
        self._options = options
        self._client = Client(options, client_id)
        self._limits: dict[str, int] = {}
        self._admin = KafkaAdmin(self._client, self._limits)
        self._memberships = Memberships()
        self._stack = AsyncExitStack()

    @property
    def address(self) -> str:
        return self._options.address

    @property
    def admin(self) -> Admin:
        return self._admin

    async def __aenter__(self) -> KafkaLog:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._client)
            try:
                await self._client.refresh()
            except AuthorizationError as exc:
                raise ConfigurationError(str(exc)) from exc
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self._stack.__aexit__(*exc_info)

    def reader(self, lane: str, *, isolation: Isolation = "read_committed") -> AbstractAsyncContextManager[Reader]:
        return KafkaReader(self._client, lane, isolation=isolation)

    def producer(self, *, delivery_timeout_s: float = 120.0) -> AbstractAsyncContextManager[Producer]:
        return KafkaProducer(self._client, self._limits, delivery_timeout_s=delivery_timeout_s)

    def transactional_producer(self, transactional_id: str) -> AbstractAsyncContextManager[TransactionalProducer]:
        return KafkaTransactionalProducer(self._client, self._limits, transactional_id, self._memberships)

    @asynccontextmanager
    async def group(
        self,
        group_id: str,
        topics: frozenset[str],
        assignor: Assignor,
        settings: GroupSettings,
        says: bytes = b"",
    ) -> AsyncGenerator[Group]:
        async with KafkaGroup(self._client, group_id, topics, assignor, settings, says) as group:
            self._memberships.add(group)
            try:
                yield group
            finally:
                self._memberships.remove(group)

    async def changed(self) -> None:
        await anyio.sleep(_POLL_S)
