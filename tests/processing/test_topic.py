import asyncio
import datetime
from dataclasses import dataclass

import msgspec
import pytest

from streamflow.errors import ClosedError, ConfigurationError, SchemaError, TopologyError
from streamflow.model.record import RecordMetadata
from streamflow.processing.context import current_turn, registered_sender
from streamflow.processing.declarations import Declarations


class Order(msgspec.Struct):
    user: str
    amount: float
    ts: int = 0


@pytest.fixture
def app():
    return Declarations("shop")


def test_what_was_declared_is_there(app):
    topic = app.topic(
        "orders", key_type=str, value_type=Order, partitions=3, replication=2, create=False, config={"x": True, "y": 1}
    )
    assert (topic.app, topic.name, topic.partitions, topic.replication, topic.create) == (app, "orders", 3, 2, False)
    assert (topic.key_type, topic.value_type, topic.internal) == (str, Order, False)
    assert (topic.key_serializer, topic.value_serializer) == ("str", "json")
    assert topic.key_codec.encode("a") == b"a"
    assert topic.value_codec.decode(b'{"user":"ann","amount":1}') == Order("ann", 1.0)
    assert topic.config == {"x": "true", "y": "1"}
    assert topic.place.startswith(__file__)
    assert repr(topic) == "<topic 'orders': str -> Order>"
    assert app.topics == {"orders": topic}


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {}),
        ({"retention_s": 1.5}, {"retention.ms": "1500"}),
        ({"retention_s": float("inf")}, {"retention.ms": "-1"}),
        ({"compacting": True}, {"cleanup.policy": "compact"}),
        ({"compacting": True, "retention_s": 60}, {"cleanup.policy": "compact,delete", "retention.ms": "60000"}),
        ({"config": {"max.message.bytes": 10}}, {"max.message.bytes": "10"}),
    ],
)
def test_the_configuration_it_is_created_with(app, options, config):
    assert app.topic("orders", **options).topic_config() == config


@pytest.mark.parametrize("name", ["", "a b", "ä", "a/b", ".", "..", "a" * 250, None, 3])
def test_a_name_outside_kafkas_alphabet_is_refused(app, name):
    with pytest.raises(ConfigurationError, match="topic"):
        app.topic(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partitions": 0}, "topic 'orders': partitions=0: a topic has at least 1"),
        ({"partitions": True}, "partitions=True"),
        ({"partitions": 1.0}, "partitions=1.0"),
        ({"replication": 0}, "replication=0"),
        ({"replication": -2}, "replication=-2"),
        ({"retention_s": 0}, "retention_s=0: seconds above 0"),
        ({"retention_s": float("nan")}, "retention_s=nan"),
        ({"retention_s": "1d"}, "retention_s='1d'"),
        ({"partitioner": 3}, "partitioner=3"),
        ({"retention_s": 1, "config": {"retention.ms": 1}}, "say the same thing"),
        ({"compacting": True, "config": {"cleanup.policy": "delete"}}, "say the same thing"),
    ],
)
def test_an_option_out_of_range_is_refused(app, options, message):
    with pytest.raises(ConfigurationError) as raised:
        app.topic("orders", **options)
    assert message in str(raised.value)


def test_a_type_that_cannot_be_written_is_refused_where_it_is_declared(app):
    with pytest.raises(SchemaError, match="topic 'orders', value_type"):
        app.topic("orders", value_type=asyncio.Future)


def test_the_same_declaration_twice_is_one_topic(app):
    first = app.topic("orders", key_type=str, value_type=Order, partitions=2)
    assert app.topic("orders", key_type=str, value_type=Order, partitions=2) is first


def test_another_declaration_of_the_name_is_refused_with_both_places(app):
    app.topic("orders", key_type=str, value_type=Order)
    with pytest.raises(TopologyError) as raised:
        app.topic("orders", key_type=str, value_type=Order | None)
    text = str(raised.value)
    assert "declared twice, with value_type=Order at " in text
    assert "and value_type=Order | None at " in text
    assert text.count(f"{__file__}:") == 2
    with pytest.raises(TopologyError, match=r"partitions=None at .* and partitions=3 at"):
        app.topic("orders", key_type=str, value_type=Order, partitions=3)
    with pytest.raises(TopologyError, match=r"value_serializer='json' at .* and value_serializer='msgpack' at"):
        app.topic("orders", key_type=str, value_type=Order, value_serializer="msgpack")


@dataclass
class Reading:
    at: datetime.datetime
    ms: float


@pytest.mark.parametrize(
    ("form", "timestamp", "value", "answer"),
    [
        (Order, "ts", Order("a", 1.0, 5), 5),
        (Order, Order.ts, Order("a", 1.0, 5), 5),
        (Order, lambda order: order.ts * 1000.0, Order("a", 1.0, 5), 5000),
        (dict[str, int], "ts", {"ts": 7}, 7),
        (Reading, "ms", Reading(datetime.datetime(1970, 1, 1), 8.9), 8),  # noqa: DTZ001
        (Reading, "at", Reading(datetime.datetime(1970, 1, 1, 0, 0, 1), 0), 1000),  # noqa: DTZ001
        (Reading, "at", Reading(datetime.datetime.fromisoformat("1970-01-01T01:00:00.001+01:00"), 0), 1),
    ],
)
def test_the_time_of_a_record_comes_out_of_its_value(app, form, timestamp, value, answer):
    topic = app.topic("orders", value_type=form, timestamp=timestamp)
    assert topic.timestamp_ms_of(value) == answer


def test_a_timestamp_that_is_not_there_is_refused(app):
    assert app.topic("plain", value_type=Order).timestamp_ms_of is None
    with pytest.raises(SchemaError, match=r"topic 'orders', timestamp=: Order has no field 'tss'; did you mean 'ts'\?"):
        app.topic("orders", value_type=Order, timestamp="tss")
    with pytest.raises(ConfigurationError, match="timestamp=: give a field's name"):
        app.topic("orders", value_type=Order, timestamp=3)


class Recorder:
    """A turn and a sender that note what is sent."""

    def __init__(self):
        self.sent = []

    def send(self, outgoing):
        self.sent.append(outgoing)


class RecordingSender(Recorder):
    async def send(self, outgoing):
        super().send(outgoing)
        return RecordMetadata(outgoing[0].name, 0, 1, 2)

    def send_nowait(self, outgoing):
        super().send(outgoing)


MORE = {"partition": 1, "timestamp_ms": 2, "headers": [("a", b"b")]}


async def test_inside_a_turn_a_send_joins_it(app):
    topic, turn = app.topic("orders", key_type=str, value_type=Order), Recorder()
    token = current_turn.set(turn)
    try:
        assert await topic.send(key="k", value=Order("a", 1.0), **MORE) is None
        topic.send_nowait(value=None)
    finally:
        current_turn.reset(token)
    assert turn.sent == [
        (topic, "k", Order("a", 1.0), 1, 2, [("a", b"b")]),
        (topic, None, None, None, None, ()),
    ]


async def test_outside_a_turn_a_send_leaves_at_once(app):
    topic, sender = app.topic("orders", key_type=str, value_type=Order), RecordingSender()
    with registered_sender(app, sender):
        assert await topic.send(key="k", value=Order("a", 1.0), **MORE) == RecordMetadata("orders", 0, 1, 2)
        topic.send_nowait(key="l")
    assert [sent[1] for sent in sender.sent] == ["k", "l"]


async def test_a_send_of_an_app_that_does_not_run_says_what_to_write(app):
    topic = app.topic("orders")
    with pytest.raises(ClosedError, match="app 'shop' is not running in this process: send from inside an agent"):
        await topic.send(value=b"a")
    with pytest.raises(ClosedError, match="not running"):
        topic.send_nowait(value=b"a")
