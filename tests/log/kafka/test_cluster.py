"""Three brokers: leaders and coordinators that move, brokers that die."""

import asyncio
import time

import pytest

from streamflow.errors import RetriableError
from streamflow.log.api import GroupSettings, NewTopic, OffsetMark
from streamflow.log.kafka.log import KafkaLog
from streamflow.log.kafka.options import Kafka
from streamflow.model.record import TopicPartition
from tests.contracts.records import Watched, numbered, receive, spread, until
from tests.log.kafka.committing import Committer

pytestmark = [pytest.mark.kafka, pytest.mark.slow]


async def test_a_leader_that_dies_is_replaced_and_nothing_is_lost_doubled_or_reordered(kafka_cluster):
    tps = [TopicPartition("moving", number) for number in range(3)]
    total = 1500
    config = {"min.insync.replicas": "2"}
    async with KafkaLog(Kafka(servers=kafka_cluster.bootstrap), client_id="test") as log:
        await log.admin.create([NewTopic("moving", 3, replication=3, config=config)])
        found = {tp: [] for tp in tps}
        async with log.producer() as producer, log.reader("source") as reader:

            async def read():
                for tp in tps:
                    reader.add(tp, 0)
                    reader.ask(tp)
                while any(not found[tp] or found[tp][-1] != total - 1 for tp in tps):
                    for fetched in await receive(reader):
                        assert fetched.error is None
                        found[fetched.tp] += [int(r.value) for one in fetched.batches for r in one.open()]
                        reader.ask(fetched.tp)

            async def write():
                for first in range(0, total, 10):
                    for tp in tps:
                        await producer.enqueue(tp, numbered(range(first, first + 10)))
                    await asyncio.sleep(0.01)
                await producer.flush()

            async with asyncio.timeout(40):
                reading, writing = asyncio.create_task(read()), asyncio.create_task(write())
                await asyncio.sleep(0.5)
                victim = kafka_cluster.brokers[log._client.leader(tps[0])]
                await asyncio.to_thread(victim.kill)
                await writing
                await reading
        await asyncio.to_thread(victim.start)
        assert found == {tp: list(range(total)) for tp in tps}


async def test_a_coordinator_that_dies_is_replaced(kafka_cluster):
    settings = GroupSettings(session_timeout_ms=6000, heartbeat_interval_ms=100)
    options = Kafka(servers=kafka_cluster.bootstrap)
    async with KafkaLog(options, client_id="test") as log:
        await log.admin.create([NewTopic("owned", 4, replication=3)])
        topics = frozenset({"owned"})
        async with (
            log.group("g", topics, spread, settings) as first,
            log.group("g", topics, spread, settings) as second,
            Watched(first) as a,
            Watched(second) as b,
        ):
            await until(lambda: (len(a.owned), len(b.owned)) == (2, 2))
            (tp, *_) = a.owned
            await first.commit({tp: OffsetMark(1)}, first.membership)
            owned = set(a.owned), set(b.owned)
            victim = kafka_cluster.brokers[await log._client.coordinator("group", "g")]
            await asyncio.to_thread(victim.kill)
            async with asyncio.timeout(25):
                while True:
                    try:
                        await first.commit({tp: OffsetMark(2)}, first.membership)
                        break
                    except RetriableError:
                        await asyncio.sleep(0.05)
                assert await second.committed([tp]) == {tp: OffsetMark(2)}
            assert (a.owned, b.owned) == owned
        await asyncio.to_thread(victim.start)


async def test_who_leads_a_partition_whose_leader_died_is_asked_for_its_offsets(kafka_cluster):
    """Nothing else refreshes the metadata meanwhile: a worker that asks what became of its commit does only that."""
    tp = TopicPartition("asked", 0)
    async with KafkaLog(Kafka(servers=kafka_cluster.bootstrap), client_id="test") as log:
        await log.admin.create([NewTopic("asked", 1, replication=3)])
        async with log.producer() as producer:
            await producer.enqueue(tp, numbered(range(3)))
            await producer.flush()
        assert await log.admin.end_offsets([tp]) == {tp: 3}
        dead = kafka_cluster.brokers[log._client.leader(tp)]
        await asyncio.to_thread(dead.kill)
        try:
            async with asyncio.timeout(20):
                assert await log.admin.end_offsets([tp]) == {tp: 3}
        finally:
            await asyncio.to_thread(dead.start)


async def test_a_topic_is_created_when_every_broker_knows_it(kafka_cluster, monkeypatch):
    """One that hears of it late may be the next to be asked: a worker was refused at its start by what it had made."""
    async with KafkaLog(Kafka(servers=kafka_cluster.bootstrap), client_id="test") as log:
        await log.admin.topics()
        client, late = log._client, log._client.nodes[1]
        send, hears_at = client.send, time.monotonic() + 2

        async def send_late(node, call, *args, **kwargs):
            answer = await send(node, call, *args, **kwargs)
            if node == late and "Metadata" in repr(call) and time.monotonic() < hears_at:
                answer.topics = [(3, *topic[1:3], [], *topic[4:]) for topic in answer.topics]
            return answer

        monkeypatch.setattr(client, "send", send_late)
        await log.admin.create([NewTopic("young", 3, replication=3)])
        for _ in range(20):
            assert "young" in await log.admin.describe(["young"])


@pytest.mark.parametrize("victim", ["transaction coordinator", "leader"])
async def test_commits_go_on_exactly_once_when_a_broker_dies(kafka_cluster, victim, name):
    total = 80
    async with KafkaLog(Kafka(servers=kafka_cluster.bootstrap), client_id="test") as log:
        committer = Committer(log, name)
        await committer.create(replication=3)
        async with committer.joined(), asyncio.timeout(60):
            for number in range(total):
                await committer.commit(number)
                if number == 30:
                    if victim == "leader":
                        node = log._client.leader(committer.outputs[0])
                    else:
                        node = await log._client.coordinator("transaction", committer.transactional_id)
                    broker = kafka_cluster.brokers[node]
                    killing = asyncio.create_task(asyncio.to_thread(broker.kill))
            await killing
            await committer.check(range(total))
        await asyncio.to_thread(broker.start)


async def test_bootstrap_servers_that_are_away_are_passed_over(kafka_cluster):
    dead = kafka_cluster.brokers[2]
    await asyncio.to_thread(dead.kill)
    try:
        async with KafkaLog(Kafka(servers=f"127.0.0.1:1,{kafka_cluster.bootstrap}"), client_id="test") as log:
            await log.admin.topics()
    finally:
        await asyncio.to_thread(dead.start)
