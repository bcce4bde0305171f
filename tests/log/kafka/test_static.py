"""Static members on the real broker: what only Kafka has, beside tests/contracts/test_static.py."""

import asyncio
import contextlib
import os
import signal

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from streamflow.errors import TaskMigratedError
from streamflow.log.api import GroupSettings, Lost, Membership, NewTopic, OffsetMark
from streamflow.log.kafka import member as member_module
from streamflow.log.kafka import wire_group
from tests.contracts.records import until
from tests.log.kafka.test_group import member, partitions, process, told

pytestmark = pytest.mark.kafka


def static(instance_id, **others):
    return GroupSettings(
        **{"session_timeout_ms": 10_000, "heartbeat_interval_ms": 100, **others, "instance_id": instance_id}
    )


@pytest.fixture
def joins(monkeypatch):
    """The answers to joins, in the version that the test's broker speaks."""
    seen = []
    round_of = member_module.GroupMember._round

    async def watched(self):
        share = await round_of(self)
        seen.append((self._instance_id, self._is_leader))
        return share

    monkeypatch.setattr(member_module.GroupMember, "_round", watched)
    return seen


async def grow(broker, topic, count):
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap)
    await admin.start()
    try:
        await admin.create_partitions({topic: NewPartitions(count)})
    finally:
        await admin.close()


async def test_a_leader_that_comes_back_leads_on(kafka_broker, open_log, name, joins):
    topic, group_id = name("t"), name("g")
    async with open_log(metadata_max_age_ms=300) as log:
        await log.admin.create([NewTopic(topic, 2)])
        async with member(log, group_id, topic, static("leads")) as a:
            await until(lambda: len(a.owned) == 2)
            joining = member(log, group_id, topic, static("follows"))
            b = await joining.__aenter__()
            await until(lambda: len(a.owned) == len(b.owned) == 1)
            await asyncio.sleep(0.5)
        await grow(kafka_broker, topic, 3)  # while nobody leads
        seen, before = len(b.events), len(joins)
        async with member(log, group_id, topic, static("leads")) as back:
            await until(lambda: back.owned | b.owned == partitions(topic, 3))
            assert joins[before] == ("leads", True)  # and it had no round to lead: it saw that the topic has grown
            assert len(b.events) <= seen + 1
            await grow(kafka_broker, topic, 4)
            await until(lambda: back.owned | b.owned == partitions(topic, 4))
        await joining.__aexit__(None, None, None)


async def test_a_broker_without_version_9_of_join_takes_it_back_all_the_same(open_log, name, joins, monkeypatch):
    topic, group_id = name("t"), name("g")

    def oldest(self, versions):
        return self._calls[-1].prepare(versions)

    monkeypatch.setattr(wire_group.Newest, "prepare", oldest)
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 2)])
        joining = member(log, group_id, topic, static("b"))
        async with member(log, group_id, topic, static("a")) as a:
            await until(lambda: len(a.owned) == 2)
            b = await joining.__aenter__()
            await until(lambda: len(a.owned) == len(b.owned) == 1)
            await asyncio.sleep(0.5)
        standing, before = (b.group.membership, list(b.events)), len(joins)
        async with member(log, group_id, topic, static("a")) as back:
            await until(lambda: back.owned == a.owned)
            assert joins[before:] == [("a", False)]
            assert (b.group.membership, b.events) == standing
            b.group.rejoin("the test wants a round")
            await until(
                lambda: b.group.membership.generation == back.group.membership.generation != standing[0].generation
            )
            assert not b.owned & back.owned
        await joining.__aexit__(None, None, None)


async def test_who_was_silent_for_a_round_within_its_session_commits_nothing_of_what_it_had(
    kafka_broker, open_log, name
):
    """The broker keeps a static member that did not join, and the leader hears what it said when it joined last."""
    topic, group_id = name("t"), name("g")
    hasty = {"session_timeout_ms": 20_000, "rebalance_timeout_ms": 1500}
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 2)])
        async with process(kafka_broker, group_id, topic, 20_000, "silent", 1500) as child:
            assert await told(child, "Assigned") == [0, 1]
            zombie = Membership(group_id, *await told(child, "Membership"), "silent")
            os.kill(child.pid, signal.SIGSTOP)
            try:
                async with member(log, group_id, topic, static("b", **hasty)) as b:
                    await until(lambda: b.owned)
                    taken = set(b.owned)
                    for tp in taken:
                        await b.group.commit({tp: OffsetMark(5)}, b.group.membership)
                        with pytest.raises(TaskMigratedError):
                            await b.group.commit({tp: OffsetMark(3)}, zombie)
                    os.kill(child.pid, signal.SIGCONT)
                    assert await told(child, "Lost") == [0, 1]
                    assert len(await told(child, "Assigned")) == 1
                    await until(lambda: len(b.owned) == 1)
                    assert await b.group.committed(sorted(taken)) == dict.fromkeys(taken, OffsetMark(5))
                    assert not any(isinstance(event, Lost) for event in b.events)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGCONT)
