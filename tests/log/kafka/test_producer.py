"""The idempotent producer on the real broker."""

import asyncio
import gc
import time

import pytest

from streamflow.errors import LogUnavailableError, ProductionError, UnknownTopicError
from streamflow.log.api import NewTopic
from streamflow.log.kafka.log import KafkaLog
from streamflow.log.kafka.options import Kafka
from streamflow.model.record import TopicPartition
from tests.contracts.records import batch, numbered, read_to, values

pytestmark = pytest.mark.kafka


async def read_all(log, tp):
    async with log.reader("check") as reader:
        reader.add(tp, 0)
        return values(await read_to(reader, tp, (await log.admin.end_offsets([tp]))[tp]))


async def test_sequence_numbers_wrap(open_log, name):
    """After 2^31 records of one partition the numbers begin at 0 again, and the broker agrees."""
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log, log.producer() as producer:
        await log.admin.create([NewTopic(tp.topic, 1)])
        await (await producer.enqueue(tp, batch(b"0")))
        partition = producer._partitions[tp]
        partition.identity, partition.next_sequence = None, 0
        producer._identity = None  # a new producer id may begin at any sequence number
        await producer._init_identity(None)
        partition.identity, partition.next_sequence = producer._identity, 2**31 - 3
        for first in range(1, 20, 2):
            await (await producer.enqueue(tp, batch(b"%d" % first, b"%d" % (first + 1))))
        assert partition.next_sequence == 17
        assert not producer.errors
        assert await read_all(log, tp) == [b"%d" % number for number in range(21)]


async def test_a_producer_the_broker_does_not_know_gets_a_new_identity(open_log, name):
    """Out of order with nothing in flight: the batch surely is not stored, so it is stamped anew."""
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log, log.producer() as producer:
        await log.admin.create([NewTopic(tp.topic, 1)])
        await (await producer.enqueue(tp, batch(b"0")))
        producer._partitions[tp].next_sequence = 100  # as if the broker had lost what it acknowledged
        before = producer._partitions[tp].identity
        assert await (await producer.enqueue(tp, batch(b"1"))) == 1
        assert producer._partitions[tp].identity != before
        assert await (await producer.enqueue(tp, batch(b"2"))) == 2
        assert await read_all(log, tp) == [b"0", b"1", b"2"]


async def test_too_large_a_batch_names_the_limit_and_reset_opens_the_partition_again(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log, log.producer() as producer:
        await log.admin.create([NewTopic(tp.topic, 1, config={"max.message.bytes": "1000"})])
        with pytest.raises(ProductionError, match=r"max\.message\.bytes is 1000"):
            await (await producer.enqueue(tp, batch(b"x" * 2000)))
        with pytest.raises(ProductionError):
            await (await producer.enqueue(tp, batch(b"later")))
        with pytest.raises(ProductionError):
            await producer.flush()
        producer.reset(tp)
        assert await (await producer.enqueue(tp, batch(b"after"))) == 0
        await producer.flush()


async def test_enqueue_waits_for_room_and_a_cancelled_wait_takes_nothing(make_broker):
    broker = make_broker()
    tp = TopicPartition("t", 0)
    options = Kafka(servers=broker.bootstrap, producer_buffer_bytes=100_000)
    async with KafkaLog(options, client_id="test") as log, log.producer() as producer:
        await log.admin.create([NewTopic("t", 1)])
        await (await producer.enqueue(tp, batch(b"first")))
        broker.pause()
        for number in range(9):
            await producer.enqueue(tp, batch(b"%d" % number + b"x" * 10_000))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await producer.enqueue(tp, batch(b"cancelled" + b"x" * 10_000))
        waiting = asyncio.create_task(producer.enqueue(tp, batch(b"last" + b"x" * 10_000)))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert producer._buffered_bytes <= 100_000
        broker.resume()
        async with asyncio.timeout(15):
            await (await waiting)
            await producer.flush()
        found = [value[:5] for value in await read_all(log, tp)]
        assert found == [b"first", *(b"%dxxxx" % number for number in range(9)), b"lastx"]
        assert producer._buffered_bytes == 0


async def test_without_an_answer_a_batch_fails_after_its_delivery_time_out_and_makes_no_noise(make_broker):
    broker = make_broker()
    tp, other = TopicPartition("t", 0), TopicPartition("t", 1)
    async with KafkaLog(Kafka(servers=broker.bootstrap), client_id="test") as log:
        await log.admin.create([NewTopic("t", 2)])
        async with log.producer(delivery_timeout_s=1.0) as producer:
            await (await producer.enqueue(tp, batch(b"stored")))
            broker.pause()
            started = time.monotonic()
            lost = [await producer.enqueue(tp, batch(b"%d" % number)) for number in range(3)]
            unheard = await producer.enqueue(other, batch(b"nobody awaits this one"))
            with pytest.raises(LogUnavailableError, match=r"t-0: no acknowledgement within 1 s"):
                await lost[0]
            assert 0.9 < time.monotonic() - started < 5
            with pytest.raises(LogUnavailableError):
                await producer.flush()
            assert all(isinstance(future.exception(), LogUnavailableError) for future in lost)
            del unheard
            gc.collect()
            broker.resume()
            producer.reset(tp)
            async with asyncio.timeout(15):
                await (await producer.enqueue(tp, batch(b"after")))
            # The batches that failed may be there or not, each at most once; nothing that was acknowledged is missing.
            found = await read_all(log, tp)
            assert found[0] == b"stored"
            assert found[-1] == b"after"
            assert sorted(set(found)) == sorted(found)


async def test_a_topic_that_does_not_exist_is_waited_for_and_then_named(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log:
        async with log.producer(delivery_timeout_s=1.0) as producer:
            with pytest.raises((UnknownTopicError, LogUnavailableError), match="does not exist"):
                await (await producer.enqueue(tp, batch(b"x")))
        async with log.producer() as producer:
            future = await producer.enqueue(tp, batch(b"x"))
            await log.admin.create([NewTopic(tp.topic, 1)])
            async with asyncio.timeout(10):
                assert await future == 0
        assert tp.topic in await log.admin.topics()


async def test_nothing_we_ask_creates_a_topic(open_log, name):
    """The broker creates topics that are asked for, unless the request says no."""
    topic = name("t")
    async with open_log() as log, log.reader("source") as reader, log.producer(delivery_timeout_s=0.3) as producer:
        assert await log.admin.describe([topic]) == {}
        reader.add(TopicPartition(topic, 0), 0)
        reader.ask(TopicPartition(topic, 0))
        with pytest.raises(LogUnavailableError):
            await (await producer.enqueue(TopicPartition(topic, 0), batch(b"x")))
        assert topic not in await log.admin.topics()


async def test_many_partitions_share_requests(open_log, name):
    topic = name("t")
    tps = [TopicPartition(topic, number) for number in range(40)]
    async with open_log() as log, log.producer() as producer:
        await log.admin.create([NewTopic(topic, 40)])
        for tp in tps:
            await producer.enqueue(tp, batch(b"warm"))
        await producer.flush()
        calls = 0
        original = log._client.send

        async def counted(*arguments, **options):
            nonlocal calls
            calls += 1
            return await original(*arguments, **options)

        log._client.send = counted
        for tp in tps:
            await producer.enqueue(tp, numbered(range(10)))
        await producer.flush()
        assert calls == 1
