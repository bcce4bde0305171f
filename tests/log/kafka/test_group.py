"""Consumer groups on the real broker: rebalances that stop nobody, deaths, zombies, blocked loops."""

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time

import aiokafka
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from streamflow.errors import FatalError, RetriableError, TaskMigratedError
from streamflow.log.api import (
    Assigned,
    AtomicCommit,
    Given,
    GroupSettings,
    Lost,
    Membership,
    NewTopic,
    OffsetMark,
    Revoked,
    Shorter,
    Told,
)
from streamflow.log.kafka import wire_group
from streamflow.log.kafka.log import KafkaLog
from streamflow.log.kafka.options import Kafka
from streamflow.model.record import TopicPartition
from tests.contracts.records import Watched, spread, until
from tests.kafka.proxy import Proxy, api_key
from tests.ports import free_port

pytestmark = pytest.mark.kafka

JOIN_GROUP, SYNC_GROUP = 11, 14
SETTINGS = GroupSettings(session_timeout_ms=6000, heartbeat_interval_ms=100)
PATIENT = GroupSettings(session_timeout_ms=60_000, heartbeat_interval_ms=100)
SHORT = GroupSettings(session_timeout_ms=1000, heartbeat_interval_ms=100)


@contextlib.asynccontextmanager
async def member(log, group_id, topic, settings=SETTINGS, assignor=spread, **options):
    async with (
        log.group(group_id, frozenset({topic}), assignor, settings) as group,
        Watched(group, **options) as watched,
    ):
        yield watched


def partitions(topic, count):
    return frozenset(TopicPartition(topic, number) for number in range(count))


async def commit_again(group, offsets):
    """As the runtime does: repeat with the current membership while a rebalance is under way."""
    async with asyncio.timeout(10):
        while True:
            if group.membership is not None:
                try:
                    return await group.commit(offsets, group.membership)
                except RetriableError:
                    pass
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("count", [2, 3])
async def test_what_the_broker_would_not_keep_is_told_in_short(open_log, name, count, caplog):
    """It keeps what all are told in one record, and refuses a round whose record is too large."""
    topic, group_id, long = name("t"), name("g"), random.randbytes(400_000)

    def assignor(members, counts):
        given = spread(members, counts)
        return {one: Given(each.partitions, long, [Shorter(b"short", "the rest")]) for one, each in given.items()}

    async with open_log() as log, contextlib.AsyncExitStack() as stack:
        await log.admin.create([NewTopic(topic, count)])
        joining = [member(log, group_id, topic, assignor=assignor) for _ in range(count)]
        members = [await stack.enter_async_context(each) for each in joining]
        await until(lambda: [len(each.owned) for each in members] == [1] * count)
        expected = long if count == 2 else b"short"
        await until(lambda: all(each.events and told_last(each) == expected for each in members))
    assert (f"its {count} members are not told the rest" in caplog.text) == (count == 3)


def told_last(watched):
    return next((event.told for event in reversed(watched.events) if isinstance(event, Told)), None)


async def test_a_third_member_takes_from_both_and_what_stays_is_never_mentioned(open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 6)])
        async with member(log, group_id, topic) as a:
            await until(lambda: len(a.owned) == 6)
            async with member(log, group_id, topic) as b:
                await until(lambda: (len(a.owned), len(b.owned)) == (3, 3))
                kept = set(a.owned), set(b.owned)
                seen = len(a.events), len(b.events)
                async with member(log, group_id, topic) as c:
                    await until(lambda: (len(a.owned), len(b.owned), len(c.owned)) == (2, 2, 2))
                    assert a.owned <= kept[0]
                    assert b.owned <= kept[1]
                    for one, before in ((a, seen[0]), (b, seen[1])):
                        assert [type(event) for event in one.events[before:]] == [Revoked]
                    assert a.group.assignment == a.owned
                    assert c.group.statistics().rebalances > 0


async def test_kept_partitions_commit_all_through_a_rebalance(open_log, name):
    topic, group_id = name("t"), name("g")
    kept = TopicPartition(topic, 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 2)])
        async with member(log, group_id, topic, revoke=False) as a:
            await until(lambda: len(a.owned) == 2)
            offset, stop = 0, False

            async def commit_on():
                nonlocal offset
                while not stop:
                    await commit_again(a.group, {kept: OffsetMark(offset + 1)})
                    offset += 1

            committing = asyncio.create_task(commit_on())
            async with member(log, group_id, topic) as b:
                await until(lambda: isinstance(a.events[-1], Revoked))
                at_revocation = offset
                (moving,) = a.events[-1].partitions
                assert moving != kept
                # The owner commits what moves, under the new generation, before it lets go.
                await commit_again(a.group, {moving: OffsetMark(77, "last words")})
                a.answer(a.events[-1])
                await until(lambda: b.owned == {moving})
                assert await b.group.committed([moving]) == {moving: OffsetMark(77, "last words")}
                with pytest.raises(TaskMigratedError):
                    await a.group.commit({moving: OffsetMark(78)}, a.group.membership)
                await until(lambda: offset > at_revocation + 5)
                stop = True
                await committing
                assert await b.group.committed([kept]) == {kept: OffsetMark(offset)}


async def test_a_commit_between_join_and_sync_is_retriable(open_log, name):
    """A member joined and its leader has not assigned yet: the broker answers 27 or 22, and nothing is lost."""
    topic, group_id = name("t"), name("g")
    tp = TopicPartition(topic, 0)

    def assignor(members, counts):
        if len(members) > 1:
            slow_until = time.monotonic() + 0.5
            while time.monotonic() < slow_until:  # in the control thread: nobody else is held up
                time.sleep(0.01)
        return spread(members, counts)

    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 2)])
        async with member(log, group_id, topic, assignor=assignor) as a:
            await until(lambda: len(a.owned) == 2)
            async with member(log, group_id, topic, assignor=assignor) as b:
                refused = set()
                deadline = time.monotonic() + 10
                while not b.owned and time.monotonic() < deadline:
                    try:
                        await a.group.commit({tp: OffsetMark(1)}, a.group.membership)
                    except RetriableError as error:
                        refused.add(str(error).split("(")[1].split()[0])
                    await asyncio.sleep(0.01)
                assert refused <= {"REBALANCE_IN_PROGRESS", "ILLEGAL_GENERATION"}
                assert refused
                await commit_again(a.group, {tp: OffsetMark(9)})
                assert await b.group.committed([tp]) == {tp: OffsetMark(9)}


async def test_a_transaction_commits_between_join_and_sync_under_the_new_generation(open_log, name):
    """However long the leader takes to assign: nobody gets what is claimed, so what stays need not wait for it."""
    topic, group_id = name("t"), name("g")
    tp = TopicPartition(topic, 0)
    assigning = []

    def assignor(members, counts):
        if len(members) > 1:
            began_s = time.monotonic()
            time.sleep(1)  # in the control thread: nobody else is held up
            assigning.append((began_s, time.monotonic()))
        return spread(members, counts)

    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 2)])
        async with (
            member(log, group_id, topic, assignor=assignor) as a,
            log.transactional_producer(name("id")) as producer,
        ):
            await until(lambda: len(a.owned) == 2)
            first = a.group.membership
            async with member(log, group_id, topic, assignor=assignor) as b:
                committed = []
                async with asyncio.timeout(15):
                    while not b.owned:
                        began_s, under = time.monotonic(), a.group.membership
                        with contextlib.suppress(RetriableError):
                            await producer.commit(AtomicCommit([], {tp: OffsetMark(len(committed))}, under))
                            committed.append((began_s, time.monotonic(), under))
                meanwhile = {
                    under.generation
                    for began_s, ended_s, under in committed
                    if assigning[0][0] < began_s and ended_s < assigning[0][1]
                }
                assert meanwhile == {first.generation + 1}
                assert await b.group.committed([tp]) == {tp: OffsetMark(len(committed) - 1)}


@contextlib.asynccontextmanager
async def process(broker, group_id, topic, session_timeout_ms, *more):
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.log.kafka.group_member",
        broker.bootstrap,
        group_id,
        topic,
        str(session_timeout_ms),
        *map(str, more),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        child._transport.close()


async def told(child, kind):
    """The next event of a kind."""
    async with asyncio.timeout(15):
        while line := await child.stdout.readline():
            event = json.loads(line)
            if event[0] == kind:
                return event[1]
    raise AssertionError("the process ended")


async def test_the_partitions_of_a_killed_process_go_to_the_others(kafka_broker, open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 4)])
        async with process(kafka_broker, group_id, topic, 1000) as child:
            assert await told(child, "Assigned") == [0, 1, 2, 3]
            async with member(log, group_id, topic, SHORT) as a:
                await until(lambda: len(a.owned) == 2)
                child.kill()
                killed = time.monotonic()
                await until(lambda: a.owned == partitions(topic, 4))
                assert time.monotonic() - killed < 5


async def test_a_stopped_process_is_a_zombie_that_commits_nothing(kafka_broker, open_log, name):
    topic, group_id = name("t"), name("g")
    tp = TopicPartition(topic, 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        async with process(kafka_broker, group_id, topic, 1000) as child:
            zombie = Membership(group_id, *await told(child, "Membership"))
            async with member(log, group_id, topic, SHORT) as a:
                os.kill(child.pid, signal.SIGSTOP)
                await until(lambda: a.owned == {tp})
                await a.group.commit({tp: OffsetMark(5)}, a.group.membership)
                with pytest.raises(TaskMigratedError):
                    await a.group.commit({tp: OffsetMark(3)}, zombie)
                os.kill(child.pid, signal.SIGCONT)
                assert await told(child, "Lost") == [0]
                assert await a.group.committed([tp]) == {tp: OffsetMark(5)}


async def test_a_clean_leave_hands_over_at_once(open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 2)])
        async with member(log, group_id, topic, PATIENT) as a:
            await until(lambda: len(a.owned) == 2)
            async with member(log, group_id, topic, PATIENT) as b:
                await until(lambda: (len(a.owned), len(b.owned)) == (1, 1))
            await until(lambda: len(a.owned) == 2)  # the session is over long after this test has given up


async def test_a_loop_that_is_blocked_for_longer_than_the_session_keeps_its_partitions(open_log, name):
    topic, group_id = name("t"), name("g")
    tp = TopicPartition(topic, 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 2)])
        async with member(log, group_id, topic, SHORT) as a:
            await until(lambda: len(a.owned) == 2)
            before = a.group.membership
            time.sleep(3)  # noqa: ASYNC251  # an agent that blocks the loop
            await asyncio.sleep(0)  # what the control thread has told meanwhile is heard
            assert a.group.statistics().last_heartbeat_age_s < 1
            await a.group.commit({tp: OffsetMark(1)}, a.group.membership)
            assert a.group.membership == before
            assert len(a.events) == 1


async def test_a_member_that_is_stuck_is_let_go_and_told_how_to_help_it(open_log, name):
    topic, group_id = name("t"), name("g")
    impatient = GroupSettings(session_timeout_ms=6000, heartbeat_interval_ms=100, max_poll_interval_ms=600)
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        async with member(log, group_id, topic, impatient) as a:
            await until(lambda: bool(a.owned), doing=a.group.report_progress)
            async with member(log, group_id, topic) as b:
                await until(lambda: b.group.membership is not None, doing=a.group.report_progress)
                stale = a.group.membership
                await until(lambda: bool(b.owned))  # nobody reports progress for a
            lost = next(event for event in a.events if isinstance(event, Lost))
            assert "max_poll_interval_ms (600 ms)" in lost.reason
            assert "raise max_poll_interval_ms" in lost.reason
            with pytest.raises(TaskMigratedError):
                await a.group.commit({TopicPartition(topic, 0): OffsetMark(1)}, stale)
            await until(lambda: a.group.membership is not None, doing=a.group.report_progress)
            assert a.group.membership.member_id != stale.member_id


async def test_a_revocation_that_takes_too_long_loses_the_partition(open_log, name):
    topic, group_id = name("t"), name("g")
    hasty = GroupSettings(session_timeout_ms=6000, heartbeat_interval_ms=100, rebalance_timeout_ms=1000)
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 2)])
        async with member(log, group_id, topic, hasty, revoke=False) as a:
            await until(lambda: len(a.owned) == 2)
            async with member(log, group_id, topic, hasty) as b:
                await until(lambda: bool(b.owned))
                lost = a.events[-1]
                assert isinstance(lost, Lost)
                assert "rebalance_timeout_ms (1000 ms)" in lost.reason
                assert lost.partitions == b.owned
                a.group.revoked(lost.partitions)  # too late: it means nothing any more
                assert a.group.assignment == partitions(topic, 2) - b.owned


async def test_a_member_joins_further_rounds_while_it_still_revokes(open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 3)])
        async with member(log, group_id, topic, revoke=False) as a:
            await until(lambda: len(a.owned) == 3)
            async with member(log, group_id, topic) as b:
                await until(lambda: isinstance(a.events[-1], Revoked))
                async with member(log, group_id, topic) as c:
                    await until(lambda: len(a.events) == 3)
                    first, second = a.events[1:]
                    assert isinstance(second, Revoked)
                    assert not first.partitions & second.partitions
                    a.answer(first)
                    a.answer(second)
                    await until(lambda: (len(a.owned), len(b.owned), len(c.owned)) == (1, 1, 1))


async def test_new_partitions_of_a_topic_are_noticed(kafka_broker, open_log, name):
    from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

    topic, group_id = name("t"), name("g")
    async with open_log(metadata_max_age_ms=300) as log:
        await log.admin.create([NewTopic(topic, 1)])
        async with member(log, group_id, topic) as a:
            await until(lambda: len(a.owned) == 1)
            admin = AIOKafkaAdminClient(bootstrap_servers=kafka_broker.bootstrap)
            await admin.start()
            try:
                await admin.create_partitions({topic: NewPartitions(3)})
            finally:
                await admin.close()
            await until(lambda: a.owned == partitions(topic, 3))
            assert [type(event) for event in a.events] == [Assigned, Assigned]


async def test_a_group_of_other_consumers_is_refused(kafka_broker, open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        consumer = AIOKafkaConsumer(topic, bootstrap_servers=kafka_broker.bootstrap, group_id=group_id)
        await consumer.start()
        try:
            async with log.group(group_id, frozenset({topic}), spread, SETTINGS) as group:
                with pytest.raises(FatalError, match=f"{group_id}.*another protocol"):
                    await asyncio.wait_for(group.next_event(), 10)
        finally:
            await consumer.stop()


async def test_a_session_time_out_the_broker_does_not_allow_is_refused(open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        async with log.group(group_id, frozenset({topic}), spread, GroupSettings(session_timeout_ms=10)) as group:
            with pytest.raises(FatalError, match="session_timeout_ms"):
                await asyncio.wait_for(group.next_event(), 10)


async def test_an_assignor_that_fails_ends_the_group(open_log, name):
    topic, group_id = name("t"), name("g")

    def assignor(members, counts):
        raise ValueError("no idea")

    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        async with log.group(group_id, frozenset({topic}), assignor, SETTINGS) as group:
            with pytest.raises(FatalError, match="no idea"):
                await asyncio.wait_for(group.next_event(), 10)


async def test_committed_waits_out_an_open_transaction(kafka_broker, open_log, name):
    topic, group_id = name("t"), name("g")
    tp = TopicPartition(topic, 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        producer = AIOKafkaProducer(bootstrap_servers=kafka_broker.bootstrap, transactional_id=name("tx"))
        await producer.start()
        try:
            await producer.begin_transaction()
            await producer.send_offsets_to_transaction({aiokafka.TopicPartition(*tp): 12}, group_id)
            async with log.group(group_id, frozenset({topic}), spread, SETTINGS) as group:
                waiting = asyncio.create_task(group.committed([tp]))
                done, _ = await asyncio.wait([waiting], timeout=0.5)
                assert not done
                await producer.commit_transaction()
                assert await asyncio.wait_for(waiting, 10) == {tp: OffsetMark(12)}
        finally:
            await producer.stop()
        assert group_id in await log.admin.groups()
        assert await log.admin.group_offsets(group_id) == {tp: OffsetMark(12)}


async def test_the_group_survives_a_broker_that_is_killed(make_broker):
    broker = make_broker()
    async with KafkaLog(Kafka(servers=broker.bootstrap), client_id="test") as log:
        await log.admin.create([NewTopic("t", 4)])
        async with member(log, "g", "t") as a, member(log, "g", "t") as b:
            await until(lambda: (len(a.owned), len(b.owned)) == (2, 2))
            owned = set(a.owned), set(b.owned)
            (tp, *_) = a.owned
            await a.group.commit({tp: OffsetMark(4)}, a.group.membership)
            broker.kill()
            await asyncio.to_thread(broker.start)
            await commit_again(a.group, {tp: OffsetMark(5)})
            assert await a.group.committed([tp]) == {tp: OffsetMark(5)}
            assert (a.owned, b.owned) == owned


async def test_a_commit_never_goes_out_without_a_member_id_or_generation(open_log, name, monkeypatch):
    topic, group_id = name("t"), name("g")
    tp = TopicPartition(topic, 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        async with log.group(group_id, frozenset({topic}), spread, SETTINGS) as group:
            monkeypatch.setattr(wire_group, "OFFSET_COMMIT", lambda *fields: pytest.fail("sent"))
            for bad in (Membership(group_id, "", 1), Membership(group_id, "m", -1), Membership("other", "m", 1)):
                with pytest.raises(TaskMigratedError):
                    await group.commit({tp: OffsetMark(1)}, bad)


@pytest.mark.parametrize("key", [JOIN_GROUP, SYNC_GROUP], ids=["join", "sync"])
async def test_a_join_on_a_connection_that_is_dead_in_silence_is_asked_again(make_broker, key):
    """Its answer may take as long as the rebalance may; who waits for it on a dead connection is without work."""
    port = free_port()
    broker = make_broker(proxied_ports=[port])
    silent = []

    def decide(request):
        if api_key(request) == key and len(silent) < 1 and armed:
            silent.append(request)
            return "fall silent"
        return "pass"

    armed = False
    async with (
        Proxy(port, broker.proxied(), on_request=decide),
        KafkaLog(Kafka(servers=broker.bootstrap), client_id="test") as log,
        KafkaLog(Kafka(servers=f"127.0.0.1:{port}"), client_id="test") as behind,
    ):
        await log.admin.create([NewTopic("t", 4)])
        async with member(behind, "g", "t", SHORT) as a:
            await until(lambda: len(a.owned) == 4)
            armed = True
            async with member(log, "g", "t", SHORT) as b:
                await until(lambda: silent)
                await until(lambda: (len(a.owned), len(b.owned)) == (2, 2))
