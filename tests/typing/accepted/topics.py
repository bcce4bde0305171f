"""Topics: every type form that a checker may be given, and every way to leave one out."""

import datetime
import enum
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NewType, TypedDict, assert_type

import msgspec

import streamflow as sf


class Order(msgspec.Struct):
    user: str
    ts: int


@dataclass
class Point:
    x: float
    at: datetime.datetime


class Row(TypedDict):
    name: str


class Colour(enum.Enum):
    RED = "red"


UserId = NewType("UserId", str)

app = sf.App("topics", broker="memory://")

assert_type(app.topic("a", key_type=str, value_type=Order), sf.Topic[str, Order])
assert_type(app.topic("b", key_type=str, value_type=Order | None), sf.Topic[str, Order | None])
assert_type(app.topic("c", key_type=int, value_type=list[Order]), sf.Topic[int, list[Order]])
assert_type(app.topic("d", key_type=UserId, value_type=Row), sf.Topic[UserId, Row])
assert_type(app.topic("e", key_type=Colour, value_type=Point), sf.Topic[Colour, Point])
assert_type(app.topic("f", key_type=uuid.UUID, value_type=dict[str, Any]), sf.Topic[uuid.UUID, dict[str, Any]])
assert_type(app.topic("g", key_type=tuple[str, int], value_type=int | str), sf.Topic[tuple[str, int], int | str])
assert_type(app.topic("h", value_type=Order), sf.Topic[bytes | None, Order])
assert_type(app.topic("i", key_type=str), sf.Topic[str, bytes])
assert_type(app.topic("j"), sf.Topic[bytes | None, bytes])
assert_type(app.topic("k", key_serializer="str", value_serializer="json"), sf.Topic[Any, Any])
assert_type(app.topic("l", key_type=str, value_serializer="json"), sf.Topic[str, Any])
assert_type(app.topic("m", value_type=Order, value_serializer="msgpack"), sf.Topic[bytes | None, Order])
assert_type(app.topic("n", key_serializer="str", value_type=Order), sf.Topic[Any, Order])
app.topic("o", key_type=Annotated[str, msgspec.Meta(min_length=1)], value_type=Literal["on", "off"])

app.topic(
    "everything",
    key_type=str,
    value_type=Order,
    key_serializer="str",
    value_serializer="json",
    partitions=8,
    replication=-1,
    retention_s=3600,
    compacting=True,
    config={"max.message.bytes": 1000, "preallocate": False, "min.insync.replicas": "2"},
    create=False,
    partitioner=lambda key, count: key[0] % count,
    timestamp="ts",
)
app.topic("member", value_type=Order, timestamp=Order.ts)
app.topic("function", value_type=Order, timestamp=lambda order: order.ts * 1000)


class Upper:
    """A codec of the user's own."""

    def encode(self, value: str, headers: sf.Headers) -> bytes | None:
        return value.upper().encode()

    def decode(self, data: bytes, headers: sf.Headers) -> str:
        if not data:
            raise sf.NeedSchema(7)
        return data.decode()


class UpperSerializer:
    def bind(self, type: Any, *, topic: str, part: Literal["key", "value"]) -> sf.Codec[str]:
        return Upper()


serializer: sf.Serializer = UpperSerializer()
assert_type(app.topic("p", key_type=str, value_type=str, value_serializer=serializer), sf.Topic[str, str])
