"""Fetch lanes on the real broker: transactions, lost leaders, dead brokers, damaged connections."""

import asyncio
import contextlib
import time

import pytest
from aiokafka import AIOKafkaProducer

from streamflow.errors import FatalError, LogCorruptedError, OffsetOutOfRangeError
from streamflow.log import codec
from streamflow.log.api import NewTopic
from streamflow.log.kafka.log import KafkaLog
from streamflow.log.kafka.options import Kafka
from streamflow.model.record import TopicPartition
from tests.contracts.records import batch, numbered, read_to, receive, values
from tests.kafka.proxy import Proxy
from tests.ports import free_port

pytestmark = pytest.mark.kafka


@contextlib.asynccontextmanager
async def transactions(broker, transactional_id):
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap, transactional_id=transactional_id)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def test_aborted_transactions_and_markers_are_left_out(kafka_broker, open_log, name):
    topic, expected = name("t"), []
    tp = TopicPartition(topic, 0)
    async with open_log() as log, transactions(kafka_broker, name("tx")) as producer:
        await log.admin.create([NewTopic(topic, 1)])
        for turn in range(6):
            await producer.begin_transaction()
            for number in range(3):
                await producer.send_and_wait(topic, b"%d-%d" % (turn, number), partition=0)
            if turn % 2:
                await producer.abort_transaction()
            else:
                expected += [b"%d-%d" % (turn, number) for number in range(3)]
                await producer.commit_transaction()
        end = (await log.admin.end_offsets([tp]))[tp]
        async with log.reader("source") as reader:
            reader.add(tp, 0)
            assert values(await read_to(reader, tp, end)) == expected
        async with log.reader("other", isolation="read_uncommitted") as reader:
            reader.add(tp, 0)
            assert len(await read_to(reader, tp, end)) == 18


async def test_an_open_transaction_holds_readers_back_and_the_end_offset_with_it(kafka_broker, open_log, name):
    topic = name("t")
    tp = TopicPartition(topic, 0)
    async with open_log() as log, transactions(kafka_broker, name("tx")) as transactional, log.producer() as producer:
        await log.admin.create([NewTopic(topic, 1)])
        await (await producer.enqueue(tp, batch(b"before")))
        await transactional.begin_transaction()
        await transactional.send_and_wait(topic, b"inside", partition=0)
        await (await producer.enqueue(tp, batch(b"after")))
        assert await log.admin.end_offsets([tp]) == {tp: 1}
        async with log.reader("source") as reader:
            reader.add(tp, 0)
            assert values(await read_to(reader, tp, 1)) == [b"before"]
            reader.ask(tp)
            waiting = asyncio.create_task(reader.receive())
            done, _ = await asyncio.wait([waiting], timeout=0.3)
            assert not done
            await transactional.abort_transaction()
            (fetched,) = await asyncio.wait_for(waiting, 10)
            found = values([record for one in fetched.batches for record in one.open()])
            assert found == [b"after"] or values(await read_to(reader, tp, 4)) == [b"after"]


@pytest.mark.parametrize("compression", [None, "gzip", "snappy", "lz4", "zstd"])
async def test_what_others_wrote_compressed_is_read(kafka_broker, open_log, name, compression):
    topic = name("t")
    tp = TopicPartition(topic, 0)
    sent = [b"%d" % number * 50 for number in range(300)]
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        producer = AIOKafkaProducer(
            bootstrap_servers=kafka_broker.bootstrap, compression_type=compression, linger_ms=20
        )
        await producer.start()
        try:
            await asyncio.gather(*[producer.send_and_wait(topic, value, partition=0) for value in sent])
        finally:
            await producer.stop()
        async with log.reader("source") as reader:
            reader.add(tp, 7)
            assert values(await read_to(reader, tp, 300)) == sent[7:]


async def test_a_position_that_retention_has_passed_is_told_with_both_ends(open_log, name):
    topic = name("t")
    gone, other = TopicPartition(topic, 0), TopicPartition(topic, 1)
    async with open_log() as log, log.producer() as producer, log.reader("source") as reader:
        await log.admin.create([NewTopic(topic, 2)])
        for tp in (gone, other):
            await (await producer.enqueue(tp, numbered(range(10))))
        await log.admin.delete_records({gone: 4})
        for tp in (gone, other):
            reader.add(tp, 2)
            reader.ask(tp)
        answers = {}
        while len(answers) < 2:
            answers |= {fetched.tp: fetched for fetched in await receive(reader)}
        error = answers[gone].error
        assert isinstance(error, OffsetOutOfRangeError)
        assert (error.offset, error.log_start, error.end_offset) == (2, 4, 10)
        assert answers[other].next_offset == 10


async def test_a_position_in_the_topic_before_is_told_wherever_the_one_of_today_ends(open_log, name):
    topic = name("t")
    asked, waiting = TopicPartition(topic, 0), TopicPartition(topic, 1)
    async with open_log() as log, log.producer() as producer, log.reader("source") as reader:
        await log.admin.create([NewTopic(topic, 2)])
        for tp in (asked, waiting):
            await (await producer.enqueue(tp, numbered(range(10))))
            reader.add(tp, 0)
            assert values(await read_to(reader, tp, 10)) == [b"%d" % number for number in range(10)]
        reader.ask(asked)
        await log.admin.delete([topic])
        async with open_log() as another:  # which knows of no topic of before
            await created(another, NewTopic(topic, 2))
            async with another.producer() as anew:
                for tp in (asked, waiting):
                    await (await anew.enqueue(tp, numbered(range(100, 130))))
        reader.ask(waiting)
        errors = {}
        while len(errors) < 2:
            errors |= {fetched.tp: fetched.error for fetched in await receive(reader)}
        for tp, error in errors.items():
            assert isinstance(error, OffsetOutOfRangeError)
            assert error.made_anew
            # What was asked for all the time may have found the new topic before anything was written to it.
            assert (error.offset, error.log_start) == (10, 0)
            assert error.end_offset in ({0, 30} if tp == asked else {30})
            reader.add(tp, error.log_start)
            assert values(await read_to(reader, tp, 30)) == [b"%d" % number for number in range(100, 130)]


async def test_a_position_in_a_topic_of_which_only_the_one_before_is_known_yet_is_read_on(open_log, name):
    """A worker gets a partition that another one has read since the topic was made anew."""
    topic = name("t")
    tp = TopicPartition(topic, 0)
    async with open_log() as log, log.producer() as producer, log.reader("source") as reader:
        await log.admin.create([NewTopic(topic, 1)])
        await (await producer.enqueue(tp, numbered(range(10))))
        before = log._client.topic_id(topic)
        async with open_log() as another:
            await another.admin.delete([topic])
            await created(another, NewTopic(topic, 1))
            async with another.producer() as anew:
                await (await anew.enqueue(tp, numbered(range(100, 130))))
        assert log._client.topic_id(topic) == before
        reader.add(tp, 7)
        assert values(await read_to(reader, tp, 30)) == [b"%d" % number for number in range(107, 130)]
        assert log._client.topic_id(topic) != before


async def created(log, topic):
    """Made when the one before is gone."""
    while True:
        try:
            await log.admin.create([topic])
            return
        except FatalError:
            await asyncio.sleep(0.02)


async def test_many_idle_partitions_do_not_delay_one_that_gets_records(open_log, name):
    """More partitions than connections: each is asked for on its own, then one is written to."""
    topic = name("t")
    tps = [TopicPartition(topic, number) for number in range(12)]
    async with open_log(fetch_max_wait_ms=5000) as log, log.producer() as producer, log.reader("source") as reader:
        await log.admin.create([NewTopic(topic, 12)])
        for tp in tps:
            reader.add(tp, 0)
            reader.ask(tp)
            await asyncio.sleep(0.02)
        worst = 0.0
        for tp in tps:
            started = time.perf_counter()
            await (await producer.enqueue(tp, batch(b"x")))
            (fetched,) = await receive(reader)
            worst = max(worst, time.perf_counter() - started)
            assert fetched.tp == tp
            reader.ask(tp)
        assert worst < 2.0  # a parked long poll would have taken 5 s


async def test_an_idle_lane_costs_little(open_log, name):
    topic = name("t")
    tps = [TopicPartition(topic, number) for number in range(12)]
    async with open_log() as log, log.reader("source") as reader:
        await log.admin.create([NewTopic(topic, 12)])
        for tp in tps:
            reader.add(tp, 0)
            reader.ask(tp)
            await asyncio.sleep(0.005)
        sent = 0
        original = log._client.send

        async def counted(*arguments, **options):
            nonlocal sent
            sent += 1
            return await original(*arguments, **options)

        await asyncio.sleep(1.5)  # the partitions gather in a few long polls
        log._client.send = counted
        await asyncio.sleep(2.0)
        assert sent <= 40


async def numbers_until(reader, tp, last):
    """Reads numbered records until `last` came."""
    found = []
    while not found or found[-1] != last:
        reader.ask(tp)
        for fetched in await receive(reader):
            assert fetched.error is None
            found += [int(record.value) for one in fetched.batches for record in one.open()]
    return found


async def test_a_broker_that_is_killed_loses_nothing_doubles_nothing_and_keeps_the_order(make_broker):
    broker = make_broker()
    tp, total = TopicPartition("t", 0), 3000
    async with KafkaLog(Kafka(servers=broker.bootstrap), client_id="test") as log:
        await log.admin.create([NewTopic("t", 1)])
        async with log.producer() as producer, log.reader("source") as reader:

            async def write():
                # By its last record's timestamp a broker that starts decides whether it still knows a producer.
                now_ms = int(time.time() * 1000)
                for first in range(0, total, 10):
                    await producer.enqueue(tp, numbered(range(first, first + 10), timestamp_ms=now_ms))
                    await asyncio.sleep(0.005)
                await producer.flush()

            reader.add(tp, 0)
            writing = asyncio.create_task(write())
            reading = asyncio.create_task(numbers_until(reader, tp, total - 1))
            await asyncio.sleep(0.4)
            broker.kill()
            await asyncio.sleep(0.2)
            await asyncio.to_thread(broker.start)
            async with asyncio.timeout(25):
                await writing
                assert await reading == list(range(total))
        assert await log.admin.end_offsets([tp]) == {tp: total}


async def test_lost_answers_and_cut_connections_lose_nothing_and_double_nothing(make_broker):
    """The broker has stored the batch, its answer is cut off: what is sent again must be recognised."""
    port, cut_every = free_port(), 15
    answers = 0

    def cut(chunk):
        nonlocal answers
        answers += 1
        return answers % cut_every == 0

    broker = make_broker(config={"advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}"})
    tps = [TopicPartition("t", number) for number in range(3)]
    target = int(broker.bootstrap.split(":")[1])
    async with Proxy(port, target, cut) as proxy, KafkaLog(Kafka(servers=f"127.0.0.1:{port}"), client_id="test") as log:
        await log.admin.create([NewTopic("t", 3)])
        async with log.producer() as producer, log.reader("source") as reader, asyncio.timeout(25):
            for tp in tps:
                reader.add(tp, 0)
            for first in range(0, 2000, 10):
                for tp in tps:
                    await producer.enqueue(tp, numbered(range(first, first + 10)))
                await asyncio.sleep(0.002)
            await producer.flush()
            for tp in tps:
                assert await numbers_until(reader, tp, 1999) == list(range(2000))
        assert await log.admin.end_offsets(tps) == dict.fromkeys(tps, 2000)
        assert proxy.cut_connections > 5
        assert producer.errors


async def test_a_broker_that_hangs_is_waited_for(make_broker):
    broker = make_broker()
    tp = TopicPartition("t", 0)
    options = Kafka(servers=broker.bootstrap, request_timeout_ms=1500, connect_timeout_ms=1000)
    async with KafkaLog(options, client_id="test") as log:
        await log.admin.create([NewTopic("t", 1)])
        async with log.producer() as producer, log.reader("source") as reader:
            reader.add(tp, 0)
            reader.ask(tp)
            broker.pause()
            future = await producer.enqueue(tp, batch(b"x"))
            await asyncio.sleep(2.5)  # longer than the request time-out: the connections are given up
            assert not future.done()
            broker.resume()
            async with asyncio.timeout(15):
                assert await future == 0
                assert values(await read_to(reader, tp, 1)) == [b"x"]


async def test_damaged_bytes_end_the_partition_and_not_the_lane(open_log, name, monkeypatch):
    topic = name("t")
    bad, good = TopicPartition(topic, 0), TopicPartition(topic, 1)
    async with open_log() as log, log.producer() as producer, log.reader("source") as reader:
        await log.admin.create([NewTopic(topic, 2)])
        for tp in (bad, good):
            await (await producer.enqueue(tp, batch(b"poison" if tp == bad else b"fine")))
        right = codec.crc32c
        monkeypatch.setattr(codec, "crc32c", lambda data: right(data) ^ (b"poison" in bytes(data)))
        for tp in (bad, good):
            reader.add(tp, 0)
            reader.ask(tp)
        answers = {}
        while len(answers) < 2:
            answers |= {fetched.tp: fetched for fetched in await receive(reader)}
        assert isinstance(answers[bad].error, LogCorruptedError)
        assert answers[good].error is None
