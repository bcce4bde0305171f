import contextlib
import datetime
import decimal
import enum
import math
import struct
import types
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NewType, TypedDict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.errors import DeserializationError, ProductionError, SchemaError
from streamflow.model.serde import NeedSchema, bind_codec


class Order(msgspec.Struct):
    order_id: int
    user: str


class Cancel(msgspec.Struct, tag="cancel"):
    order_id: int


class Place(msgspec.Struct, tag="place"):
    order_id: int


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Row(TypedDict):
    name: str
    size: int


@dataclass
class Sample:
    at: datetime.datetime
    by: uuid.UUID
    cost: decimal.Decimal
    tags: frozenset[str]


UserId = NewType("UserId", str)


def value(form: Any, serializer: Any = None):
    return bind_codec(form, serializer, topic="orders", part="value")


def key(form: Any, serializer: Any = None):
    return bind_codec(form, serializer, topic="orders", part="key")


LONGS = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
ORDERS = st.builds(Order, order_id=LONGS, user=TEXT)
SAMPLES = st.builds(
    Sample,
    at=st.datetimes(timezones=st.just(datetime.UTC)),
    by=st.uuids(),
    cost=st.decimals(allow_nan=False, allow_infinity=False),
    tags=st.frozensets(TEXT),
)
SHAPES = [
    (str, TEXT),
    (UserId, TEXT),
    (bytes, st.binary()),
    (int, LONGS),
    (float, st.floats(allow_nan=False)),
    (bool, st.booleans()),
    (Order, ORDERS),
    (Order | None, ORDERS | st.none()),
    (int | None, LONGS | st.none()),
    (list[Order], st.lists(ORDERS)),
    (dict[str, int], st.dictionaries(TEXT, LONGS)),
    (tuple[str, int], st.tuples(TEXT, LONGS)),
    (Row, st.fixed_dictionaries({"name": TEXT, "size": LONGS})),
    (Colour, st.sampled_from(Colour)),
    (Cancel | Place, st.builds(Cancel, LONGS) | st.builds(Place, LONGS)),
    (Literal["on", "off"], st.sampled_from(["on", "off"])),
    (Sample, SAMPLES),
]


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("serializer", [None, "json", "msgpack"])
@pytest.mark.parametrize(("form", "values"), SHAPES, ids=[str(form) for form, _ in SHAPES])
def test_what_is_written_is_read_back(form, values, serializer, part):
    codec = bind_codec(form, serializer, topic="t", part=part)
    if form is float and serializer == "json":
        values = values.filter(math.isfinite)  # JSON has no infinity: msgspec writes null

    @given(values)
    def round_trip(given_value):
        data = codec.encode(given_value)
        assert data is None or type(data) is bytes
        assert codec.decode(data) == given_value
        if type(given_value) is codec.exact_type:
            assert codec.fast_encode(given_value) == data
            assert codec.fast_decode(data) == given_value

    round_trip()


@given(st.dictionaries(TEXT, LONGS, min_size=2))
def test_equal_keys_have_equal_bytes(entries):
    codec = key(dict[str, int])
    turned = dict(reversed(list(entries.items())))
    assert codec.encode(entries) == codec.encode(turned)
    assert key(frozenset[str]).encode(frozenset(entries)) == key(frozenset[str]).encode(frozenset(turned))


@given(st.binary())
def test_any_bytes_either_decode_or_give_the_one_error(data):
    for form in (Order, str, int, float, Sample, list[Order], Row, Any):
        with contextlib.suppress(DeserializationError):
            value(form).decode(data)


@pytest.mark.parametrize(
    ("form", "given_value", "data"),
    [
        (str, "é", "é".encode()),
        (bytes, b"\x00\xff", b"\x00\xff"),
        (bytes, bytearray(b"ab"), b"ab"),
        (int, -2, b"\xff" * 7 + b"\xfe"),
        (float, 2.5, struct.pack(">d", 2.5)),
        (float, 2, struct.pack(">d", 2.0)),
        (bool, True, b"true"),
        (Order, Order(1, "ann"), b'{"order_id":1,"user":"ann"}'),
        (UserId, UserId("ann"), b"ann"),
        (int | str, 7, b"7"),
        (Colour, Colour.RED, b'"red"'),
    ],
)
def test_bytes_follow_from_the_type(form, given_value, data):
    assert value(form).encode(given_value) == data
    assert key(form).encode(given_value) == data


@pytest.mark.parametrize(
    ("serializer", "form", "given_value", "data"),
    [
        ("json", str, "a", b'"a"'),
        ("json", int, 7, b"7"),
        ("json", None, {"a": [1]}, b'{"a":[1]}'),
        ("msgpack", Order, Order(1, "ann"), msgspec.msgpack.encode(Order(1, "ann"))),
        ("msgpack", None, [1], b"\x91\x01"),
        ("str", None, "a", b"a"),
        ("int", None, 1, b"\0\0\0\0\0\0\0\1"),
        ("float", None, 0.0, b"\0" * 8),
        ("raw", None, b"a", b"a"),
    ],
)
def test_serializers_by_name(serializer, form, given_value, data):
    codec = value(form, serializer)
    assert codec.encode(given_value) == data
    assert codec.decode(data) == given_value


@pytest.mark.parametrize("form", [str, bytes, int, float, Order, Order | None, Any, list[int]])
def test_none_is_written_as_null(form):
    assert value(form).encode(None) is None


@pytest.mark.parametrize(
    ("form", "data"), [(Order | None, b"null"), (Any, b"null"), (list[int] | None, None), (str | None, None)]
)
def test_null_reads_as_none_where_the_type_allows_it(form, data):
    codec = value(form)
    assert codec.allows_none
    assert codec.decode(data) is None


def test_null_elsewhere_is_an_error_that_says_what_to_declare():
    for form in (Order, str, bytes, int, list[int]):
        assert not value(form).allows_none
        with pytest.raises(
            DeserializationError, match=r"is null, and its type is .*: to take nulls, declare value_type="
        ):
            value(form).decode(None)
    with pytest.raises(DeserializationError, match="got `null`"):
        value(Order).decode(b"null")


def test_a_type_left_out_is_bytes_and_a_key_left_out_may_be_null():
    assert value(None).type is bytes
    assert not value(None).allows_none
    assert key(None).decode(None) is None
    assert key(None).decode(b"a") == b"a"


@pytest.mark.parametrize(
    ("form", "data", "message"),
    [
        (Order, b'{"order_id":"x","user":"ann"}', r"expected `int`, got `str` at `\$.order_id`"),
        (Order, b'{"order_id":1}', r"missing required field `user` at `\$`"),
        (list[Order], b'[{"order_id":1,"user":2}]', r"expected `str`, got `int` at `\$\[0\].user`"),
        (Order, b'{"order_id', "truncated"),
        (Order, b"", "truncated; the 0 bytes are b''"),
        (Order, b"\xff\xfe", r"malformed.*b'\\xff\\xfe'"),
        (str, b"a\xff", "expected UTF-8, got byte 0xff at position 1"),
        (int, b"123", r"expected 8 bytes \(big-endian, as Kafka's Long\), got 3"),
        (float, b"1", r"expected 8 bytes \(big-endian, as Kafka's Double\), got 1"),
        (Annotated[str, msgspec.Meta(min_length=2)], b"a", "of length >= 2"),
        (Annotated[int, msgspec.Meta(ge=0)], b"\xff" * 8, "expected `int` >= 0"),
        (Order, b"[" + b" " * 200, "the 201 bytes begin with "),
    ],
)
def test_what_does_not_decode_says_where_and_what_was_expected(form, data, message):
    for part in ("key", "value"):
        codec = bind_codec(form, topic="orders", part=part)
        with pytest.raises(DeserializationError, match=message) as raised:
            codec.decode(data)
        assert str(raised.value).startswith(f"the {part} of topic 'orders' does not decode as ")
        assert len(str(raised.value)) < 400
        assert str(codec.explain(raised.value.__cause__, data)) == str(raised.value)


@pytest.mark.parametrize(
    ("form", "given_value", "message"),
    [
        (Order, {"order_id": 1}, r"takes Order, not dict \{'order_id': 1\}"),
        (Order, Cancel(1), r"takes Order, not Cancel"),
        (Order | None, 3, "takes Order | None, not int 3"),
        (list[int], {1}, r"takes list\[int\], not set"),
        (str, b"a", "takes str, not bytes b'a'"),
        (bytes, "a", "takes bytes, not str 'a'"),
        (int, True, "takes int, not bool True"),
        (float, True, "takes float, not bool True"),
        (int, 1.5, "takes int, not float"),
        (int, 2**63, "it does not fit into 8 bytes"),
        (str, "\ud800", "surrogates not allowed"),
        (Order, Order(types.SimpleNamespace(), "a"), "cannot be written: Encoding objects of type"),
        (Order, Order(1, "x" * 1000), None),
    ],
)
def test_what_does_not_encode_names_topic_part_and_type(form, given_value, message):
    codec = value(form)
    if message is None:
        assert codec.encode(given_value)
        return
    with pytest.raises(ProductionError, match=message) as raised:
        codec.encode(given_value)
    assert str(raised.value).startswith("the value of topic 'orders' takes ")


def test_a_value_whose_repr_raises_is_still_named():
    class Shy:
        def __repr__(self):
            raise RuntimeError

    with pytest.raises(ProductionError, match="takes Order, not Shy"):
        value(Order).encode(Shy())


def test_a_subclass_goes_the_checked_way():
    class Longer(Order):
        more: int = 0

    codec = value(Order)
    assert codec.exact_type is Order
    assert codec.encode(Longer(1, "a")) == b'{"order_id":1,"user":"a","more":0}'


class Shout:
    """A user's codec: upper case on the way out; the body stands in a header where the bytes are empty."""

    def encode(self, value, headers):
        return None if value == "nothing" else value.upper().encode()

    def decode(self, data, headers):
        if data == b"?":
            raise NeedSchema(7)
        return data.decode() or dict(headers)["body"].decode()


class ShoutSerializer:
    def __init__(self):
        self.bound = []

    def bind(self, type, *, topic, part):
        self.bound.append((type, topic, part))
        return Shout()


def test_a_serializer_of_the_users_is_bound_once():
    serializer = ShoutSerializer()
    codec = value(str, serializer)
    assert serializer.bound == [(str, "orders", "value")]
    assert codec.fast_decode is codec.fast_encode is codec.exact_type is None
    assert codec.serializer == "ShoutSerializer"
    assert codec.encode("a") == b"A"
    assert codec.encode("nothing") is None
    assert codec.decode(b"", [("body", b"b")]) == "b"
    assert codec.encode(None) is None
    with pytest.raises(NeedSchema) as raised:
        codec.decode(b"?")
    assert raised.value.id == 7
    with pytest.raises(DeserializationError, match=r"UnicodeDecodeError|expected UTF-8"):
        codec.decode(b"\xff")
    with pytest.raises(DeserializationError, match="KeyError: 'body'"):
        codec.decode(b"")
    with pytest.raises(ProductionError, match="cannot be written: 'int' object has no attribute"):
        codec.encode(3)
    with pytest.raises(DeserializationError, match="null"):
        codec.decode(None)


def test_a_serializer_of_the_users_takes_types_msgspec_does_not_know():
    assert value(types.SimpleNamespace | None, ShoutSerializer()).allows_none
    assert value(None, ShoutSerializer()).type is Any


@pytest.mark.parametrize("as_class", [True, False])
def test_other_names_come_from_entry_points(monkeypatch, as_class):
    class Entry:
        name = "shout"

        def load(self):
            return ShoutSerializer if as_class else ShoutSerializer()

    def entry_points(*, group, name=None):
        assert group == "streamflow.serdes"
        return [Entry()] if name in (None, "shout") else []

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    assert value(str, "shout").encode("a") == b"A"
    assert value(str, "shout").serializer == "shout"
    with pytest.raises(SchemaError, match=r"value_serializer='avro' is not known; there are .*msgpack, shout"):
        value(str, "avro")


class Unknown:
    pass


class Holder(msgspec.Struct):
    items: dict[str, list[Unknown]]


class Dangling(msgspec.Struct):
    other: "Missing"  # noqa: F821


@pytest.mark.parametrize(
    ("form", "serializer", "message"),
    [
        (Unknown, None, r"Unknown has Unknown at `\$`, which msgspec does not know; use a msgspec.Struct"),
        (Holder, None, r"Holder has Unknown at `\$.items\[...\]\[...\]`"),
        (object, None, "object"),
        (Dangling, None, "'Missing' is not defined"),
        (Order | Holder | Cancel, None, "multiple Struct types"),
        ("Order", None, "'Order'"),
        (int, "str", "value_serializer='str' writes str, and value_type is int"),
        (Order, "raw", "value_serializer='raw' writes bytes, and value_type is Order"),
        (Order, Unknown(), "value_serializer=Unknown is not a serializer"),
        (Order, ShoutSerializer, "not a serializer: give an object"),
        (Order, 7, "value_serializer=int is not a serializer"),
    ],
)
def test_what_cannot_be_handled_is_refused_at_declaration(form, serializer, message):
    with pytest.raises(SchemaError, match=message) as raised:
        value(form, serializer)
    assert str(raised.value).startswith("topic 'orders'")
