"""Static members (KIP-345) on every log: who comes back has what it had, and of two with one name the later stays."""

import asyncio
import time
from contextlib import asynccontextmanager

import pytest

from streamflow.errors import InstanceTakenError, TaskMigratedError
from streamflow.log.api import Assigned, AtomicCommit, Given, GroupSettings, Lost, NewTopic, OffsetMark, Told
from streamflow.model.record import TopicPartition
from tests.contracts.records import Watched, batch, read_to, spread, until


def settings(instance_id, session_timeout_ms=10_000, **others):
    return GroupSettings(session_timeout_ms, heartbeat_interval_ms=100, instance_id=instance_id, **others)


def tell_all(members, counts):
    given = spread(members, counts)
    names = ",".join(sorted(str(member.instance_id) for member in members)).encode()
    return {member_id: Given(each.partitions, b"among " + names) for member_id, each in given.items()}


@asynccontextmanager
async def member(log, group_id, topic, its_settings, assignor=tell_all, **watching):
    async with (
        log.group(group_id, frozenset({topic}), assignor, its_settings) as group,
        Watched(group, **watching) as watched,
    ):
        yield watched


def standing(watched):
    """What changes when a rebalance happens."""
    return watched.group.membership, watched.group.statistics().rebalances, list(watched.events), set(watched.owned)


@asynccontextmanager
async def two(log, other, group_id, topic):
    """`a` and `b`, each with two of four partitions, at rest; and what `a` had and how `b` stood when `a` ended."""
    await log.admin.create([NewTopic(topic, 4)])
    async with member(other, group_id, topic, settings("b")) as b:
        async with member(log, group_id, topic, settings("a")) as a:
            await until(lambda: len(a.owned) == len(b.owned) == 2)
            await asyncio.sleep(0.5)
            assert b.group.membership.generation == a.group.membership.generation
            before = set(a.owned), a.group.membership, standing(b)
        yield b, *before


async def test_who_comes_back_in_time_has_what_it_had_and_the_others_notice_nothing(open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log, open_log() as other, two(log, other, group_id, topic) as (b, had, was, b_before):
        for _ in range(2):
            await asyncio.sleep(0.5)
            async with member(log, group_id, topic, settings("a")) as back:
                await until(lambda back=back: back.owned)
                generation = was.generation
                assert back.events == [Told(b"among a,b", generation), Assigned(frozenset(had), generation)]
                now = back.group.membership
                assert (now.generation, now.instance_id) == (generation, "a")
                assert now.member_id != was.member_id
                (one, *_) = had
                await back.group.commit({one: OffsetMark(7, "back")}, now)
                assert await back.group.committed([one]) == {one: OffsetMark(7, "back")}
                with pytest.raises(TaskMigratedError):
                    await back.group.commit({one: OffsetMark(8)}, was)
                async with log.transactional_producer(name("back")) as producer:
                    await producer.commit(AtomicCommit([], {one: OffsetMark(9)}, now))
                    with pytest.raises(TaskMigratedError):
                        await producer.commit(AtomicCommit([], {one: OffsetMark(10)}, was))
                await asyncio.sleep(1)
                assert standing(b) == b_before


async def test_of_two_with_one_name_the_older_stops_and_commits_nothing(open_log, name):
    topic, group_id = name("t"), name("g")
    source, out = TopicPartition(topic, 0), TopicPartition(name("out"), 0)
    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(topic, 1), NewTopic(out.topic, 1)])
        async with (
            log.group(group_id, frozenset({topic}), spread, settings("same")) as older,
            log.transactional_producer(name("older")) as producer,
        ):
            event = await asyncio.wait_for(older.next_event(), 20)
            assert event == Assigned(frozenset({source}), older.membership.generation)
            was = older.membership
            async with member(other, group_id, topic, settings("same"), spread) as newer:
                await until(lambda: newer.owned == {source})
                with pytest.raises(TaskMigratedError):
                    await older.commit({source: OffsetMark(5)}, was)
                with pytest.raises(TaskMigratedError):
                    await producer.commit(AtomicCommit([(out, batch(b"no"))], {source: OffsetMark(5)}, was))
                with pytest.raises(
                    InstanceTakenError, match=f"(?s){group_id}.*instance_id 'same'.*instance_id of its own"
                ):
                    await asyncio.wait_for(older.next_event(), 10)
                assert older.membership is None
                with pytest.raises(TaskMigratedError):
                    await older.commit({source: OffsetMark(5)}, was)
                assert await newer.group.committed([source]) == {source: None}
                await newer.group.commit({source: OffsetMark(3)}, newer.group.membership)
                assert newer.events == [Assigned(frozenset({source}), was.generation)]
        end = (await log.admin.end_offsets([out]))[out]
        if end:  # on Kafka what was aborted takes room
            async with log.reader("out") as reader:
                reader.add(out, 0)
                assert await read_to(reader, out, end) == []


async def test_the_others_take_over_when_the_session_is_over_and_not_before(open_log, name, least_session_timeout_ms):
    topic, group_id = name("t"), name("g")
    short = settings("a", least_session_timeout_ms)
    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(topic, 4)])
        async with member(other, group_id, topic, settings("b", least_session_timeout_ms)) as b:
            async with member(log, group_id, topic, short) as a:
                await until(lambda: len(a.owned) == len(b.owned) == 2)
                left_s = time.monotonic()
            await until(lambda: len(b.owned) == 4)
            assert time.monotonic() - left_s > least_session_timeout_ms / 2000
            async with member(log, group_id, topic, short) as late:
                await until(lambda: len(late.owned) == len(b.owned) == 2)


async def test_what_it_was_to_give_up_when_it_ended_is_not_forgotten(open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(topic, 2)])
        async with member(log, group_id, topic, settings("a"), revoke=False) as a:
            await until(lambda: len(a.owned) == 2)
            joining = other.group(group_id, frozenset({topic}), tell_all, settings("b"))
            b = await joining.__aenter__()
            await until(lambda: len(a.events) > 2)  # asked to give one up
        async with Watched(b) as watched:
            await asyncio.sleep(0.3)
            assert not watched.owned
            async with member(log, group_id, topic, settings("a")) as back:
                await until(lambda: len(back.owned) == len(watched.owned) == 1)
                assert not back.owned & watched.owned
        await joining.__aexit__(None, None, None)


async def test_who_comes_back_with_other_topics_has_them_assigned(open_log, name):
    topic, added, group_id = name("t"), name("added"), name("g")
    async with open_log() as log, open_log() as other, two(log, other, group_id, topic) as (b, had, _was, _):
        await log.admin.create([NewTopic(added, 2)])
        both = frozenset({topic, added})

        def own_topics(members, counts):
            given = {each.member_id: set(each.owned) for each in members}
            for each in members:
                if added in each.topics:
                    given[each.member_id] |= {TopicPartition(added, number) for number in range(counts[added])}
            return {member_id: Given(frozenset(mine)) for member_id, mine in given.items()}

        async with log.group(group_id, both, own_topics, settings("a")) as group, Watched(group) as back:
            # On Kafka the other one may lead, and gives out what it reads, too.
            await until(lambda: {tp.topic for tp in back.owned | b.owned} == both)
            assert had <= back.owned


async def test_who_comes_back_without_a_topic_is_not_given_it_again(open_log, name):
    topic, dropped, group_id = name("t"), name("dropped"), name("g")
    every = {each: {TopicPartition(each, number) for number in range(2)} for each in (topic, dropped)}
    both = frozenset(every)

    def by_readers(members, counts):
        given = {each.member_id: set() for each in members}
        for each in sorted(counts):
            readers = sorted(member.member_id for member in members if each in member.topics)
            for number in range(counts[each]):
                given[readers[number % len(readers)]].add(TopicPartition(each, number))
        return {member_id: Given(frozenset(mine)) for member_id, mine in given.items()}

    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(each, 2) for each in both])
        async with other.group(group_id, both, by_readers, settings("b")) as group, Watched(group) as b:
            async with log.group(group_id, both, by_readers, settings("a")) as group, Watched(group) as a:
                await until(lambda: {tp.topic for tp in a.owned} == {tp.topic for tp in b.owned} == both)
            async with (
                log.group(group_id, frozenset({topic}), by_readers, settings("a")) as group,
                Watched(group) as back,
            ):
                await until(lambda: b.owned >= every[dropped] and every[topic] <= back.owned | b.owned)
                given = {tp for event in back.events if isinstance(event, Assigned) for tp in event.partitions}
                assert given <= every[topic]


async def test_a_static_member_that_hangs_gives_everything_up_at_once_and_comes_back(open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(topic, 2)])
        async with (
            member(other, group_id, topic, settings("b", 30_000)) as b,
            member(log, group_id, topic, settings("a", 30_000, max_poll_interval_ms=1000)) as a,
        ):
            await until(lambda: len(a.owned) == len(b.owned) == 1, doing=a.group.report_progress)
            await until(lambda: len(b.owned) == 2)  # long before the session is over
            assert not a.owned
            await until(lambda: len(a.owned) == len(b.owned) == 1, doing=a.group.report_progress)


async def test_who_hangs_while_another_takes_its_name_is_the_older_one(open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(topic, 1)])
        impatient = settings("same", 30_000, max_poll_interval_ms=800)
        async with log.group(group_id, frozenset({topic}), spread, impatient) as hanging:
            await until(lambda: hanging.assignment, doing=hanging.report_progress)
            await until(lambda: not hanging.assignment)
            async with member(other, group_id, topic, settings("same"), spread) as newer:
                await until(lambda: newer.owned)
                for _ in range(100):
                    hanging.report_progress()
                    await asyncio.sleep(0.01)
                assert isinstance(await asyncio.wait_for(hanging.next_event(), 10), Assigned)
                assert isinstance(await asyncio.wait_for(hanging.next_event(), 10), Lost)
                with pytest.raises(InstanceTakenError, match="instance_id 'same'"):
                    await asyncio.wait_for(hanging.next_event(), 10)
                await asyncio.sleep(0.3)
                assert newer.owned
                assert newer.group.membership is not None
