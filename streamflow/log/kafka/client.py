"""Connections to a cluster, its metadata, and the only place where other libraries' exceptions are translated.

A client belongs to one event loop and has no task of its own: whoever meets a stale leader calls `refresh`. When no
known broker answers, the bootstrap servers are asked again, so a cluster that moved altogether is found.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import anyio

from streamflow.errors import LogUnavailableError, RetriableError, StreamFlowError
from streamflow.log.kafka import codes, wire
from streamflow.log.kafka.options import Kafka
from streamflow.model.record import TopicPartition

logger = logging.getLogger("streamflow.kafka")

T = TypeVar("T")

_CLOSING_KEPT = 64
_IDLE_MS = 540_000  # below the broker's 10 minutes, so that we close first
_MAX_THROTTLE_S = 60.0
_LOOKUP_TIMEOUT_S = 10.0  # metadata and coordinators: another broker can answer them too
_COORDINATOR_KIND = {"group": 0, "transaction": 1}


@dataclass(slots=True)
class TopicMetadata:
    """What is known of a topic.

    Attributes:
        leaders: Node per partition; -1 where there is none at present.
        is_internal: Kafka's own.
        id: What tells it from another one of its name; `wire.NO_ID` from a broker before Kafka 2.8.
    """

    leaders: dict[int, int] = field(default_factory=dict)
    is_internal: bool = False
    id: bytes = wire.NO_ID


class Client:
    """The connections of one event loop.

    Args:
        options: The cluster.
        client_id: How this process names itself.
    """

    def __init__(self, options: Kafka, client_id: str) -> None:
        self.options = options
        self.client_id = client_id
        self.request_timeout_ms = options.request_timeout_ms
        self.topics: dict[str, TopicMetadata] = {}
        self.unknown_since: dict[str, float] = {}
        self.topic_errors: dict[str, int] = {}
        # Of each topic all that it was told of, oldest first: more than one where it was made anew.
        self._ids: dict[str, list[bytes]] = {}
        self.controller = -1
        self._brokers: dict[int, tuple[str, int]] = {}
        self._connections: dict[tuple[int, Hashable], wire.Connection] = {}
        self._connecting: dict[tuple[int, Hashable], asyncio.Lock] = {}
        self._muted_until: dict[int, float] = {}
        # Nodes that did not answer since the last metadata: what they led is others' by now, or will be.
        self._silent: set[int] = set()
        self._wanted: set[str] = set()
        self._refreshing = asyncio.Lock()
        self._refresh_started = -1.0
        self._connect_options: dict[str, Any] = {}
        self._closing: list[wire.Connection] = []
        self._closed = False

    async def __aenter__(self) -> Client:
        self._connect_options = {
            "client_id": self.client_id,
            "security_protocol": self.options.security_protocol,
            "ssl_context": self.options.make_ssl_context(),
            "sasl_mechanism": self.options.sasl_mechanism,
            "sasl_plain_username": self.options.sasl_username,
            "sasl_plain_password": self.options.sasl_password,
            "sasl_oauth_token_provider": self.options.sasl_token and wire.TokenProvider(self.options.sasl_token),
            "max_idle_ms": _IDLE_MS,
        }
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closed = True
        for connection in self._connections.values():
            self._close(connection)
        self._connections.clear()
        await asyncio.gather(*(connection.closed(wire.CLOSE_TIMEOUT_S) for connection in self._closing))
        self._closing.clear()

    def _close(self, connection: wire.Connection, reason: wire.CloseReason | None = None) -> None:
        connection.close(reason)
        self._closing.append(connection)
        if len(self._closing) > _CLOSING_KEPT:  # the old ones are closed by now
            del self._closing[: _CLOSING_KEPT // 2]

    # --- sending -------------------------------------------------------------------------------------------------

    async def send(self, node: int, call: wire.Call, lane: Hashable = None, *, timeout_s: float | None = None) -> Any:
        """Send a request and wait for its response.

        Args:
            node: Broker id.
            call: The request.
            lane: Requests of one lane share a connection and are answered in order: one that parks needs its own.
            timeout_s: For the answer, where it is shorter than the client's.

        Raises:
            RetriableError: No connection, no answer in time, or the connection broke: the outcome is unknown.
            AuthorizationError: The credentials were refused.
            ConfigurationError: TLS or versions do not fit.

        Cancellation: the request may have been processed.
        """
        connection = self._connections.get((node, lane))
        if connection is None or not connection.connected():
            connection = await self._connect(node, lane)
        muted = self._muted_until.get(node)
        if muted is not None:
            await self._wait_muted(node, muted)
        try:
            if timeout_s is None:
                response = await connection.send(call)
            else:
                with anyio.fail_after(timeout_s):
                    response = await connection.send(call)
        except TimeoutError as exc:
            # A late answer would delay the next request; the next one opens a connection of its own.
            self._close(connection, wire.CloseReason.CONNECTION_TIMEOUT)
            self._silent.add(node)
            raise codes.translated(exc, self._what(call, node)) from exc
        except StreamFlowError:
            raise
        except Exception as exc:
            self._silent.add(node)
            raise codes.translated(exc, self._what(call, node)) from exc
        if response.throttle_time_ms > 0:
            throttle_s = min(response.throttle_time_ms / 1000, _MAX_THROTTLE_S)
            self._muted_until[node] = time.monotonic() + throttle_s
        return response

    async def _wait_muted(self, node: int, until: float) -> None:
        await anyio.sleep(until - time.monotonic())
        if self._muted_until.get(node) == until:
            del self._muted_until[node]

    def _what(self, call: wire.Call, node: int) -> str:
        host, port = self._brokers.get(node, ("?", 0))
        return f"kafka broker {node} ({host}:{port}), {call!r}"

    async def _connect(self, node: int, lane: Hashable) -> wire.Connection:
        key = (node, lane)
        lock = self._connecting.setdefault(key, asyncio.Lock())
        async with lock:
            connection = self._connections.get(key)
            if connection is not None and connection.connected():
                return connection
            if connection is not None:
                self._close(connection)
            if node not in self._brokers:
                raise RetriableError(f"kafka broker {node} is not known (any more)")
            try:
                connection = await self._open(*self._brokers[node])
            except StreamFlowError:
                self._silent.add(node)
                raise
            self._connections[key] = connection
            return connection

    async def _open(self, host: str, port: int) -> wire.Connection:
        what = f"kafka broker {host}:{port}"
        if self._closed:
            raise LogUnavailableError(f"{what}: this client is closed")
        try:
            with anyio.fail_after(self.options.connect_timeout_ms / 1000):
                return await wire.connect(
                    host, port, request_timeout_ms=self.request_timeout_ms, **self._connect_options
                )
        except StreamFlowError:
            raise
        except Exception as exc:
            raise codes.translated(exc, what) from exc

    async def ready(self, node: int, lane: Hashable) -> None:
        """Have a connection of this lane: what fails before the next request is sent fails here.

        Raises:
            As `send`; nothing was sent.
        """
        connection = self._connections.get((node, lane))
        if connection is None or not connection.connected():
            await self._connect(node, lane)

    def close_lane(self, owner: object) -> None:
        """Close the connections of the lanes (owner, ...): a request may still be parked on them."""
        for key in [key for key in self._connections if isinstance(key[1], tuple) and key[1][0] is owner]:
            self._close(self._connections.pop(key))
        for key in [key for key in self._connecting if isinstance(key[1], tuple) and key[1][0] is owner]:
            del self._connecting[key]

    # --- metadata ------------------------------------------------------------------------------------------------

    def leader(self, tp: TopicPartition) -> int | None:
        """The node that leads a partition; None while nobody does or it is not known."""
        topic = self.topics.get(tp.topic)
        node = -1 if topic is None else topic.leaders.get(tp.partition, -1)
        return None if node < 0 else node

    @property
    def nodes(self) -> list[int]:
        """The brokers known."""
        return list(self._brokers)

    def controller_node(self) -> int:
        """The controller, or any broker where it is not known (that hands the request on).

        Raises:
            RetriableError: None is known.
        """
        if self.controller in self._brokers:
            return self.controller
        if not self._brokers:
            raise RetriableError("no kafka broker is known yet")
        return random.choice(list(self._brokers))

    async def refresh(self, topics: Iterable[str] = ()) -> None:
        """Ask for the metadata of these topics and of all that were asked for before; never creates a topic.

        Raises:
            LogUnavailableError: No broker answers.
            AuthorizationError: The credentials were refused.
        """
        self._wanted.update(topics)
        asked = time.monotonic()
        async with self._refreshing:
            if self._refresh_started > asked:
                return  # somebody else's refresh began after we asked: it is ours too
            started = time.monotonic()
            self._take(await self._ask_for(wire.metadata(sorted(self._wanted))))
            self._refresh_started = started

    def forget(self, topics: Iterable[str]) -> None:
        """Stop asking for topics."""
        for topic in topics:
            self._wanted.discard(topic)
            self.topics.pop(topic, None)
            self.unknown_since.pop(topic, None)
            self._ids.pop(topic, None)

    async def metadata(self, topics: list[str] | None) -> Any:
        """One metadata response; None asks for all topics.

        Raises:
            LogUnavailableError: No broker answers.
        """
        return await self._ask_for(wire.METADATA(topics, False, False, False))

    async def _ask_for(self, call: wire.Call) -> Any:
        failure: StreamFlowError | None = None
        try:
            response = await self._ask_known(call)
        except RetriableError as exc:
            failure = exc
        else:
            if response.brokers:
                return response
        for host, port in random.sample(self.options.bootstrap, len(self.options.bootstrap)):
            try:
                response = await self._ask_bootstrap(host, port, call)
            except RetriableError as exc:
                failure = exc
            else:
                if response.brokers:
                    return response
        raise LogUnavailableError(f"no broker of {self.options.address} answers: {failure}") from failure

    async def all_know(self, topics: Sequence[str]) -> bool:
        """Whether every broker that answers knows a leader of every partition: whichever is asked next."""
        call = wire.METADATA(list(topics), False, False, False)
        for node in list(self._brokers):
            try:
                response = await self.send(node, call, timeout_s=_LOOKUP_TIMEOUT_S)
            except RetriableError:
                continue  # it reads what it has missed before it answers again
            leaders = {name: {each[2] for each in parts} for code, name, _, parts, _ in response.topics if not code}
            if not all(-1 not in leaders.get(name, {-1}) for name in topics):
                return False
        return True

    async def ask_any(self, call: wire.Call) -> Any:
        """Ask any broker; those that do not answer are passed over.

        Raises:
            RetriableError: None answers; the metadata are read anew for the next attempt.
        """
        if not self._brokers:
            await self.refresh()
        try:
            return await self._ask_known(call)
        except RetriableError:
            await self.refresh()
            raise

    async def _ask_known(self, call: wire.Call) -> Any:
        failure = RetriableError("no kafka broker is known yet")
        for node in random.sample(list(self._brokers), len(self._brokers)):
            try:
                return await self.send(node, call, timeout_s=_LOOKUP_TIMEOUT_S)
            except RetriableError as exc:
                failure = exc
        raise failure

    async def _ask_bootstrap(self, host: str, port: int, call: wire.Call) -> Any:
        connection = await self._open(host, port)
        try:
            with anyio.fail_after(_LOOKUP_TIMEOUT_S):
                return await connection.send(call)
        except StreamFlowError:
            raise
        except Exception as exc:
            raise codes.translated(exc, f"kafka broker {host}:{port}") from exc
        finally:
            self._close(connection)

    def _take(self, response: Any) -> None:
        brokers = {node: (host, port) for node, host, port, *_ in response.brokers}
        for node, address in self._brokers.items():
            if brokers.get(node) != address:
                self._drop_connections(node)
        self._brokers = brokers
        self._silent.clear()
        self.controller = response.controller_id
        for code, name, *rest in response.topics:
            if code == codes.NONE:
                id_ = rest.pop(0) if isinstance(rest[0], bytes) else wire.NO_ID
                is_internal, partitions = rest[:2]
                if self._is_of_before(name, id_):
                    continue
                leaders = {partition: leader for _error, partition, leader, *_ in partitions}
                self.topics[name] = TopicMetadata(leaders, is_internal, id_)
                self.unknown_since.pop(name, None)
                self.topic_errors.pop(name, None)
                continue
            self.topic_errors[name] = code
            if code == codes.UNKNOWN_TOPIC_OR_PARTITION:
                self.topics.pop(name, None)
                self.unknown_since.setdefault(name, time.monotonic())

    def _is_of_before(self, name: str, id_: bytes) -> bool:
        """Whether a broker tells of a topic that was deleted: it has not heard yet of the one that was made since."""
        ids = self._ids.setdefault(name, [])
        if id_ in ids[:-1]:
            return True
        if id_ != wire.NO_ID and id_ not in ids:
            ids.append(id_)
        return False

    def topic_id(self, topic: str) -> bytes:
        """What tells a topic from another one of its name; `wire.NO_ID` where it is not known."""
        known = self.topics.get(topic)
        return wire.NO_ID if known is None else known.id

    def _drop_connections(self, node: int) -> None:
        for key in [key for key in self._connections if key[0] == node]:
            self._close(self._connections.pop(key))

    def unknown_for_s(self, topic: str) -> float:
        """How long the cluster has been saying that a topic does not exist; 0 when it does."""
        since = self.unknown_since.get(topic)
        return 0.0 if since is None else time.monotonic() - since

    async def coordinator(self, kind: Literal["group", "transaction"], key: str) -> int:
        """The node that coordinates a group or a transactional id.

        Raises:
            RetriableError: Not available at present.
            AuthorizationError: This user may not use it.
        """
        response = await self.ask_any(wire.FIND_COORDINATOR(key, _COORDINATOR_KIND[kind]))
        if response.error_code:
            raise codes.error(response.error_code, f"find the coordinator of {kind} {key}")
        node: int = response.node_id
        self._brokers.setdefault(node, (response.host, response.port))
        return node

    # --- by leader -----------------------------------------------------------------------------------------------

    async def leaders(self, partitions: Iterable[TopicPartition]) -> Mapping[int, list[TopicPartition]]:
        """Partitions by the node that leads them; who does not answer is asked for no longer than another leads.

        Raises:
            UnknownTopicError: One does not exist.
            RetriableError: One has no leader at present.
        """
        partitions = list(partitions)
        if any((node := self.leader(tp)) is None or node in self._silent for tp in partitions):
            await self.refresh({tp.topic for tp in partitions})
        by_node: dict[int, list[TopicPartition]] = {}
        for tp in partitions:
            node = self.leader(tp)
            if node is None:
                known = tp.topic in self.topics and tp.partition in self.topics[tp.topic].leaders
                code = 5 if known else self.topic_errors.get(tp.topic, codes.UNKNOWN_TOPIC_OR_PARTITION)
                raise codes.error(code, f"use {tp}")
            by_node.setdefault(node, []).append(tp)
        return by_node


def backoff_s(failures: int, *, first_s: float = 0.02, cap_s: float = 1.0) -> float:
    """How long to wait after this many failures in a row (>= 1): doubling, capped, with jitter."""
    wait: float = min(cap_s, first_s * 2.0 ** min(failures - 1, 16))
    return wait * random.uniform(0.8, 1.2)


async def retried(attempt: Callable[[], Awaitable[T]], *, timeout_s: float) -> T:
    """Repeat a call while it raises `RetriableError`, for at most this long; then its last error is raised."""
    deadline = time.monotonic() + timeout_s
    failures = 0
    while True:
        try:
            return await attempt()
        except RetriableError:
            failures += 1
            wait = backoff_s(failures)
            if time.monotonic() + wait > deadline:
                raise
        await anyio.sleep(wait)
