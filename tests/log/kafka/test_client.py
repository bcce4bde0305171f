"""Connections without a broker: muting, exceptions, unknown addresses."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from streamflow.errors import LogUnavailableError, RetriableError
from streamflow.log.kafka import wire, wire_group
from streamflow.log.kafka.client import Client, backoff_s, retried
from streamflow.log.kafka.log import KafkaLog
from streamflow.log.kafka.options import Kafka
from tests.ports import free_port


class Answering:
    """A connection that answers at once."""

    def __init__(self, throttle_ms=0, error=None):
        self.throttle_ms, self.error, self.was_closed = throttle_ms, error, False

    def connected(self):
        return not self.was_closed

    async def send(self, request, expect_response=True):
        if self.error is not None:
            raise self.error
        return SimpleNamespace(throttle_time_ms=self.throttle_ms)

    def close(self, reason=None, exc=None):
        self.was_closed = True

    async def closed(self, timeout_s):
        pass


CALL = wire_group.HEARTBEAT("g", 1, "m", None)


async def client_with(connection):
    client = Client(Kafka(servers="127.0.0.1:1"), "test")
    await client.__aenter__()
    client._brokers[1] = ("h", 9)
    client._connections[1, None] = connection
    return client


async def test_a_broker_that_throttles_is_left_alone_for_that_long():
    client = await client_with(Answering(throttle_ms=1000))
    started = time.monotonic()
    await client.send(1, CALL)
    assert time.monotonic() - started < 0.9
    await client.send(1, CALL)
    assert 0.99 <= time.monotonic() - started < 10


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError("gone"), wire.errors.KafkaConnectionError("x")])
async def test_what_the_connection_raises_is_translated_with_its_cause(error):
    connection = Answering(error=error)
    client = await client_with(connection)
    with pytest.raises(LogUnavailableError, match=r"kafka broker 1 \(h:9\), Heartbeat v3") as info:
        await client.send(1, CALL)
    assert info.value.__cause__ is error
    assert connection.was_closed == isinstance(error, TimeoutError)  # a late answer would delay the next request


async def test_a_broker_that_nobody_knows_is_retriable():
    client = await client_with(Answering())
    with pytest.raises(RetriableError, match="7"):
        await client.send(7, CALL)


async def test_an_address_where_nobody_listens_is_named():
    port = free_port()
    with pytest.raises(LogUnavailableError, match=f"kafka://127.0.0.1:{port}"):
        async with KafkaLog(Kafka(servers=f"127.0.0.1:{port}"), client_id="test"):
            pass


async def test_a_listener_that_is_no_kafka_is_given_up_in_time():
    accepted = []
    server = await asyncio.start_server(lambda reader, writer: accepted.append(writer), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    options = Kafka(servers=f"127.0.0.1:{port}", connect_timeout_ms=300)
    with pytest.raises(LogUnavailableError, match="no answer in time"):
        async with KafkaLog(options, client_id="test"):
            pass
    for writer in accepted:
        writer.transport.abort()
    server.close()
    await server.wait_closed()


@pytest.mark.kafka
async def test_a_cluster_that_moved_altogether_is_found_by_its_bootstrap_servers(kafka_broker):
    client = Client(Kafka(servers=kafka_broker.bootstrap), "test")
    async with client:
        await client.refresh()
        client._brokers = dict.fromkeys((7, 8), ("127.0.0.1", free_port()))
        client._drop_connections(1)
        await client.refresh()
        assert client.nodes == [1]


def test_back_off_doubles_up_to_its_cap():
    waits = [backoff_s(failures) for failures in range(1, 40)]
    assert all(0.016 <= wait <= 1.2 for wait in waits)
    assert waits[0] < 0.03 < 0.8 <= waits[-1]


async def test_retried_gives_up_with_the_last_error():
    attempts = 0

    async def attempt():
        nonlocal attempts
        attempts += 1
        raise RetriableError(f"attempt {attempts}")

    with pytest.raises(RetriableError) as info:
        await retried(attempt, timeout_s=0.2)
    assert str(info.value) == f"attempt {attempts}"
    assert 3 <= attempts <= 12


def told_of(topic_id, leader, version=10):
    """What a broker tells of topic `t`."""
    parts = [(0, 0, leader, 0, [], [], [], {})]
    topic = (0, "t", topic_id, False, parts, 0, {}) if version == 10 else (0, "t", False, parts, 0)
    return SimpleNamespace(brokers=[(1, "h", 1, None)], controller_id=1, topics=[topic])


def test_a_broker_that_has_not_heard_of_the_topic_that_was_made_anew_brings_the_old_one_not_back():
    client = Client(Kafka(servers="h:1"), "test")
    for topic_id, leader in ((b"a" * 16, 1), (b"b" * 16, 2), (b"a" * 16, 1)):
        client._take(told_of(topic_id, leader))
    assert client.topic_id("t") == b"b" * 16
    assert client.topics["t"].leaders == {0: 2}
    client._take(told_of(None, 3, version=8))  # of before Kafka 2.8, in a cluster that is upgraded
    assert client.topics["t"].leaders == {0: 3}
    client.forget(["t"])
    assert client.topic_id("t") == wire.NO_ID
