"""Every seam into aiokafka's internals, and the requests of the Kafka protocol that we send ourselves.

Used of aiokafka: its connection (framing, versions, TLS, SASL), its field types and its errors; the record codec stands
in `log/codec.py`. What is missing or has moved is said at import, with the version to pin.

Requests are our own, one fixed version each, all of them spoken by Kafka 2.5 to 4.x. Fetch and Produce, which are sent
thousands of times a second, are packed by hand (`log/kafka/hot.py`); the rest are declared by schema. Those of
groups stand in `log/kafka/wire_group.py`, those of transactions in `log/kafka/wire_transaction.py`, those of
administration in `log/kafka/wire_admin.py`.
"""

from __future__ import annotations

import asyncio
import inspect
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from io import BytesIO
from types import SimpleNamespace
from typing import Any, ClassVar, Protocol

import anyio

from streamflow.errors import LogUnavailableError

CLOSE_TIMEOUT_S = 1.0
_PIN = "StreamFlow needs aiokafka>=0.14,<0.15 (it uses its connections and codec, which are private)"

try:
    import aiokafka.errors as errors
    from aiokafka.abc import AbstractTokenProvider
    from aiokafka.conn import AIOKafkaConnection, CloseReason
    from aiokafka.protocol import admin as _admin
    from aiokafka.protocol.types import (
        AbstractType,
        Array,
        Boolean,
        Bytes,
        CompactArray,
        CompactBytes,
        CompactString,
        Int8,
        Int16,
        Int32,
        Int64,
        Schema,
        String,
        TaggedFields,
    )
except ImportError as exc:  # pragma: no cover - depends on the installation
    raise ImportError(f"{_PIN}; installed: aiokafka {version('aiokafka')}") from exc

__all__ = [
    "CS",
    "ERROR",
    "TAGS",
    "THROTTLE",
    "AIOKafkaConnection",
    "Api",
    "Array",
    "Boolean",
    "Bytes",
    "Call",
    "CloseReason",
    "CompactArray",
    "CompactBytes",
    "Int8",
    "Int16",
    "Int32",
    "Int64",
    "S",
    "Schema",
    "TokenProvider",
    "connect",
    "each",
    "errors",
]


def _check() -> None:
    """Refuse an aiokafka whose internals are not those that this was written against."""
    installed = version("aiokafka")
    wanted = {"client_id", "request_timeout_ms", "ssl_context", "security_protocol", "sasl_oauth_token_provider"}
    has = set(inspect.signature(AIOKafkaConnection).parameters)
    names = ("connect", "send", "close", "connected", "authenticator_oauth")
    if not installed.startswith("0.14.") or wanted - has or not all(hasattr(AIOKafkaConnection, n) for n in names):
        raise ImportError(f"{_PIN}; installed: aiokafka {installed}")


def _hide_secrets() -> None:
    """Keep passwords and tokens out of aiokafka's debug log, which prints every request and response."""
    for name in dir(_admin):
        if name.startswith(("SaslAuthenticateRequest_v", "SaslAuthenticateResponse_v")):
            getattr(_admin, name).__repr__ = lambda self: f"{type(self).__name__}(***)"


_check()
_hide_secrets()


# --- connections -------------------------------------------------------------------------------------------------


class TokenProvider(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka is untyped
    """aiokafka's OAUTHBEARER provider around a function.

    Args:
        token: Called for every connection.
    """

    def __init__(self, token: Callable[[], Awaitable[str]]) -> None:
        self._token = token

    async def token(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]  # aiokafka's hint is wrong
        try:
            return await self._token()
        except Exception as exc:  # what it says may hold the token
            raise LogUnavailableError(f"kafka: sasl_token() raised {type(exc).__name__}") from exc


class _BearerAuthenticator:
    """OAUTHBEARER (RFC 7628), with the answer looked at: aiokafka's takes a refusal for success."""

    def __init__(self, provider: AbstractTokenProvider) -> None:
        self._provider = provider
        self._sent = False

    async def step(self, payload: bytes | None) -> tuple[bytes, bool] | None:
        if self._sent:
            if payload:
                raise errors.SaslAuthenticationFailed("the token was refused")
            return None
        self._sent = True
        return f"n,,\x01auth=Bearer {await self._provider.token()}\x01\x01".encode(), True


class _KafkaConnection(AIOKafkaConnection):  # type: ignore[misc]  # aiokafka is untyped
    """aiokafka's connection, which can be seen to its end: a socket that outlives its loop is a leak."""

    _transport: Any = None

    def close(self, reason: Any = None, exc: BaseException | None = None) -> Any:
        if self._writer is not None:
            self._transport = self._writer.transport
        return super().close(reason, exc)

    async def closed(self, timeout_s: float) -> None:
        """Wait until the socket is closed, which TLS may drag out; after the time-out it is cut."""
        ended: asyncio.Future[None] | None = self._closed_fut
        if self._transport is None or ended is None:  # it never was open
            return
        with anyio.move_on_after(timeout_s, shield=True):
            await asyncio.shield(ended)
            return
        self._transport.abort()
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(0)

    def authenticator_oauth(self) -> Any:
        provider: Any = self._sasl_oauth_token_provider
        return _BearerAuthenticator(provider)


async def connect(host: str, port: int, **options: Any) -> Connection:
    """Open a connection, learn the broker's versions, authenticate.

    Raises:
        Whatever asyncio, ssl and aiokafka raise: `log/kafka/client.py` translates it.
    """
    connection = _KafkaConnection(host, port, **options)
    try:
        await connection.connect()
    except BaseException:
        connection.close()
        await connection.closed(CLOSE_TIMEOUT_S)
        raise
    return connection


class Connection(Protocol):
    """What we use of aiokafka's connection."""

    def send(self, request: Call, expect_response: bool = True) -> Awaitable[Any]:
        """Write a request; the awaitable is its response or raises."""
        ...

    def connected(self) -> bool:
        """Whether the other side has not closed it."""
        ...

    def close(self, reason: Any = None, exc: BaseException | None = None) -> Any:
        """Close it; every request under way fails."""
        ...

    async def closed(self, timeout_s: float) -> None:
        """Wait until it is."""
        ...


# --- requests ----------------------------------------------------------------------------------------------------

_HEADER = struct.Struct(">hhih")
_CORRELATION = struct.Struct(">i")


class _Encoded:
    """Something aiokafka's connection asks for its bytes."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def encode(self) -> bytes:
        return self._data


class Call:
    """One request under way: what `AIOKafkaConnection.send` takes for a request and its struct.

    Args:
        api: What is asked.
        body: The encoded fields.
    """

    __slots__ = ("_api", "_body")

    def __init__(self, api: ApiVersion, body: bytes) -> None:
        self._api = api
        self._body = body

    @property
    def RESPONSE_TYPE(self) -> ApiVersion:
        """What decodes the response (aiokafka's name for it)."""
        return self._api

    def prepare(self, versions: Mapping[int, tuple[int, int]]) -> Call:
        """Check that this broker speaks the version (aiokafka's name for it)."""
        lowest, highest = versions.get(self._api.key, (0, -1))
        if not lowest <= self._api.version <= highest:
            raise errors.IncompatibleBrokerVersion(
                f"{self._api.name} v{self._api.version} (the broker speaks v{lowest} to v{highest})"
            )
        return self

    def build_request_header(self, correlation_id: int, client_id: str) -> _Encoded:
        """The header, version 1 or 2."""
        name = client_id.encode()
        header = _HEADER.pack(self._api.key, self._api.version, correlation_id, len(name)) + name
        return _Encoded(header + b"\0" if self._api.flexible else header)

    def encode(self) -> bytes:
        """The fields."""
        return self._body

    def parse_response_header(self, buffer: BytesIO) -> SimpleNamespace:
        """The correlation id; a flexible header's tags are skipped."""
        (correlation_id,) = _CORRELATION.unpack(buffer.read(4))
        if self._api.flexible:
            TaggedFields.decode(buffer)
        return SimpleNamespace(correlation_id=correlation_id)

    def __repr__(self) -> str:
        return f"{self._api.name} v{self._api.version}"


class Newest(Call):
    """A call in the newest of several versions that the broker speaks.

    Args:
        calls: The same call in each version, newest first.
    """

    __slots__ = ("_calls",)

    def __init__(self, *calls: Call) -> None:
        super().__init__(calls[0]._api, calls[0]._body)
        self._calls = calls

    def prepare(self, versions: Mapping[int, tuple[int, int]]) -> Call:
        """Choose, see `Call.prepare`."""
        for call in self._calls[:-1]:
            lowest, highest = versions.get(call._api.key, (0, -1))
            if lowest <= call._api.version <= highest:
                return call
        return self._calls[-1].prepare(versions)


class ApiVersion(Protocol):
    """One request type in one version."""

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> int: ...
    @property
    def version(self) -> int: ...
    @property
    def flexible(self) -> bool: ...
    def decode(self, buffer: BytesIO) -> Any:
        """Read the response's fields."""
        ...


class Response(SimpleNamespace):
    """A decoded response: its fields by name."""

    throttle_time_ms: int = 0

    def __repr__(self) -> str:
        return f"Response({', '.join(self.__dict__)})"


class Api:
    """One request type in one version, declared by schema.

    Args:
        name: For messages.
        key: API key.
        version: The version we send.
        request: Its fields in order.
        response: Its response's fields in order.
        flexible: Compact types and tagged fields (KIP-482).
    """

    known: ClassVar[list[Api]] = []

    def __init__(
        self, name: str, key: int, version: int, request: Schema, response: Schema, *, flexible: bool = False
    ) -> None:
        self.name = name
        self.key = key
        self.version = version
        self.flexible = flexible
        self._request = request
        self._response = response
        Api.known.append(self)

    def __call__(self, *fields: Any) -> Call:
        """A request with these fields, in the schema's order; tagged fields are added."""
        return Call(self, self._request.encode([*fields, {}] if self.flexible else fields))

    def decode(self, buffer: BytesIO) -> Response:
        """Read the response."""
        return Response(**dict(zip(self._response.names, self._response.decode(buffer), strict=True)))


class _Uuid(AbstractType[bytes]):  # type: ignore[misc]  # aiokafka is untyped
    """16 bytes: a topic id."""

    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return value

    @classmethod
    def decode(cls, data: BytesIO) -> bytes:
        return data.read(16)


S, CS, TAGS = String("utf-8"), CompactString("utf-8"), ("tags", TaggedFields)
THROTTLE, ERROR = ("throttle_time_ms", Int32), ("error_code", Int16)


def each(*fields: Any, flexible: bool = False) -> Array:
    """An array of structs."""
    return CompactArray(*fields, TAGS) if flexible else Array(*fields)


METADATA = Api(
    "Metadata",
    3,
    8,
    Schema(("topics", Array(S)), ("create", Boolean), ("cluster_acl", Boolean), ("topic_acl", Boolean)),
    Schema(
        THROTTLE,
        ("brokers", each(("node_id", Int32), ("host", S), ("port", Int32), ("rack", S))),
        ("cluster_id", S),
        ("controller_id", Int32),
        (
            "topics",
            each(
                ERROR,
                ("name", S),
                ("is_internal", Boolean),
                (
                    "partitions",
                    each(
                        ERROR,
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", Array(Int32)),
                        ("in_sync", Array(Int32)),
                        ("offline", Array(Int32)),
                    ),
                ),
                ("acl", Int32),
            ),
        ),
        ("cluster_acl", Int32),
    ),
)
_NAMED_TOPIC = CompactArray(("id", _Uuid), ("name", CS), TAGS)
NO_ID = bytes(16)
TOPIC_IDS = Api(
    "Metadata",
    3,
    10,
    Schema(("topics", _NAMED_TOPIC), ("create", Boolean), ("cluster_acl", Boolean), ("topic_acl", Boolean), TAGS),
    Schema(
        THROTTLE,
        ("brokers", each(("node_id", Int32), ("host", CS), ("port", Int32), ("rack", CS), flexible=True)),
        ("cluster_id", CS),
        ("controller_id", Int32),
        (
            "topics",
            each(
                ERROR,
                ("name", CS),
                ("id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    each(
                        ERROR,
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("in_sync", CompactArray(Int32)),
                        ("offline", CompactArray(Int32)),
                        flexible=True,
                    ),
                ),
                ("acl", Int32),
                flexible=True,
            ),
        ),
        ("cluster_acl", Int32),
        TAGS,
    ),
    flexible=True,
)


def metadata(topics: Sequence[str]) -> Call:
    """Ask for the metadata of topics, with their ids where the broker knows them; creates none."""
    named = TOPIC_IDS([(NO_ID, name, {}) for name in topics], False, False, False)
    return Newest(named, METADATA(list(topics), False, False, False))


FIND_COORDINATOR = Api(
    "FindCoordinator",
    10,
    2,
    Schema(("key", S), ("kind", Int8)),
    Schema(THROTTLE, ERROR, ("error_message", S), ("node_id", Int32), ("host", S), ("port", Int32)),
)
LIST_OFFSETS = Api(
    "ListOffsets",
    2,
    2,
    Schema(
        ("replica_id", Int32),
        ("isolation", Int8),
        ("topics", each(("name", S), ("partitions", each(("partition", Int32), ("timestamp", Int64))))),
    ),
    Schema(
        THROTTLE,
        (
            "topics",
            each(
                ("name", S),
                ("partitions", each(("partition", Int32), ERROR, ("timestamp", Int64), ("offset", Int64))),
            ),
        ),
    ),
)
INIT_PRODUCER_ID = Api(
    "InitProducerId",
    22,
    3,
    Schema(
        ("transactional_id", CS),
        ("transaction_timeout_ms", Int32),
        ("producer_id", Int64),
        ("producer_epoch", Int16),
        TAGS,
    ),
    Schema(THROTTLE, ERROR, ("producer_id", Int64), ("producer_epoch", Int16), TAGS),
    flexible=True,
)
