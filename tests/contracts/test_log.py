"""Every promise of `streamflow/log/api.py`, on every log. What one cannot do is asked of it, not known by its name."""

import asyncio
import itertools
import time
from contextlib import AsyncExitStack
from dataclasses import replace

import anyio
import pytest

from streamflow.errors import (
    ConfigurationError,
    GroupInUseError,
    OffsetOutOfRangeError,
    ProducerFencedError,
    ProductionError,
    RetriableError,
    TaskMigratedError,
    UnknownTopicError,
)
from streamflow.log import codec
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
)
from streamflow.log.batch import BatchBuilder
from streamflow.model.record import TopicPartition
from tests.contracts.records import (
    DEADLINE_S,
    Watched,
    batch,
    numbered,
    read_to,
    receive,
    records,
    spread,
    until,
    values,
)

SETTINGS = GroupSettings(session_timeout_ms=6000, heartbeat_interval_ms=200)
PATIENT = GroupSettings(session_timeout_ms=60_000, heartbeat_interval_ms=200)


# --- order -----------------------------------------------------------------------------------------------------------


async def test_records_are_read_in_offset_order_and_batches_in_the_order_enqueued(open_log, name):
    tps = [TopicPartition(name("t"), number) for number in range(2)]
    async with open_log() as log:
        await log.admin.create([NewTopic(tps[0].topic, 2)])
        async with log.producer() as producer, log.reader("source") as reader:
            futures = {tp: [] for tp in tps}
            for first in range(0, 3000, 10):
                for tp in tps:
                    futures[tp].append(await producer.enqueue(tp, numbered(range(first, first + 10))))
            await producer.flush()
            for tp in tps:
                bases = [future.result() for future in futures[tp]]
                assert bases == sorted(set(bases))
                reader.add(tp, 0)
                found = await read_to(reader, tp, bases[-1] + 10)
                assert values(found) == [b"%d" % number for number in range(3000)]
                assert [r.offset for r in found] == [base + i for base in bases for i in range(10)]


async def test_producers_side_by_side_lose_nothing_and_keep_each_ones_order(open_log, name):
    tp = TopicPartition(name("t"), 0)

    async def write(log, who):
        async with log.producer() as producer:
            for number in range(100):
                await producer.enqueue(tp, batch(b"%d %d" % (who, number)))
            await producer.flush()

    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(tp.topic, 1)])
        await asyncio.gather(write(log, 0), write(log, 1), write(other, 2))
        async with log.reader("source") as reader:
            reader.add(tp, 0)
            found = values(await read_to(reader, tp, 300))
    for who in range(3):
        assert [v for v in found if v.startswith(b"%d " % who)] == [b"%d %d" % (who, n) for n in range(100)]


# --- durability and content ------------------------------------------------------------------------------------------


async def test_what_was_acknowledged_is_there_for_who_connects_later(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with AsyncExitStack() as keeps_memory_alive:
        await keeps_memory_alive.enter_async_context(open_log())
        async with open_log() as log:
            await log.admin.create([NewTopic(tp.topic, 1)])
            async with log.producer() as producer:
                assert await (await producer.enqueue(tp, batch(b"kept"))) == 0
        async with open_log() as log, log.reader("source") as reader:
            reader.add(tp, 0)
            assert values(await read_to(reader, tp, 1)) == [b"kept"]


@pytest.mark.parametrize("compression", sorted(codec.COMPRESSIONS))
async def test_every_compression_and_everything_a_record_has_comes_back(open_log, name, compression):
    tp = TopicPartition(name("t"), 0)
    wanted = [
        (1_700_000_000_000, b"key", b"value" * 100, [("trace", b"1"), ("trace", b"2"), ("empty", None)]),
        (1_600_000_000_000, None, b"", []),
        (1_700_000_000_001, b"", None, []),
    ]
    builder = BatchBuilder(codec.COMPRESSIONS[compression], 10_000)
    for record in wanted:
        assert builder.append(*record)
    async with open_log() as log:
        await log.admin.create([NewTopic(tp.topic, 1)])
        async with log.producer() as producer, log.reader("source") as reader:
            await (await producer.enqueue(tp, batch(b"before")))
            await (await producer.enqueue(tp, builder.seal()))
            reader.add(tp, 1)
            reader.ask(tp)
            (fetched,) = await receive(reader)
            assert max(one.max_timestamp_ms for one in fetched.batches) == 1_700_000_000_001
            assert fetched.size_bytes >= fetched.batches[-1].size_bytes > 0
            found = [(r.offset, r.timestamp, r.key, r.value, r.headers) for r in records(fetched)]
    assert found == [(offset, *record) for offset, record in enumerate(wanted, 1)]


# --- reader ----------------------------------------------------------------------------------------------------------


async def test_only_what_was_asked_for_is_fetched_once_however_often_it_was_asked_for(open_log, name):
    asked, silent = (TopicPartition(name("t"), number) for number in range(2))
    async with open_log() as log:
        await log.admin.create([NewTopic(asked.topic, 2)])
        async with log.producer() as producer, log.reader("source") as reader:
            for tp in (asked, silent):
                await (await producer.enqueue(tp, batch(b"1")))
                reader.add(tp, 0)
            assert reader.end_offset(asked) is None
            for _ in range(3):
                reader.ask(asked)
            (fetched,) = await receive(reader)
            assert (fetched.tp, fetched.next_offset, fetched.end_offset) == (asked, 1, 1)
            assert reader.end_offset(asked) == 1
            for tp in (asked, silent):
                await (await producer.enqueue(tp, batch(b"2")))
            with pytest.raises(TimeoutError):  # nobody has asked again
                await asyncio.wait_for(reader.receive(), 0.3)
            reader.ask(asked)
            reader.ask(silent)
            answers = {}
            while len(answers) < 2:
                for fetched in await receive(reader):
                    assert fetched.tp not in answers
                    answers[fetched.tp] = values(records(fetched))
            assert answers == {asked: [b"2"], silent: [b"1", b"2"]}


async def test_an_answer_holds_about_a_mebibyte_of_a_partition(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(tp.topic, 1)])
        async with log.producer() as producer, log.reader("source") as reader:
            for number in range(40):
                await producer.enqueue(tp, batch(b"%03d" % number + bytes(99_000)))
            await producer.flush()
            reader.add(tp, 0)
            found, position = [], 0
            while position < 40:
                reader.ask(tp)
                (fetched,) = await receive(reader)
                assert fetched.size_bytes <= 1_300_000
                found += [value[:3] for value in values(records(fetched))]
                position = fetched.next_offset
    assert found == [b"%03d" % number for number in range(40)]


async def test_a_position_may_lie_inside_a_batch(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(tp.topic, 1)])
        async with log.producer() as producer, log.reader("source") as reader:
            await (await producer.enqueue(tp, numbered(range(10))))
            await (await producer.enqueue(tp, numbered(range(10, 20))))
            reader.add(tp, 7)
            assert [r.offset for r in await read_to(reader, tp, 20)] == list(range(7, 20))


async def test_a_parked_fetch_does_not_delay_another_partition_asked_for_later(open_log, name):
    idle, busy = (TopicPartition(name("t"), number) for number in range(2))
    async with open_log() as log:
        await log.admin.create([NewTopic(idle.topic, 2)])
        async with log.producer() as producer, log.reader("source") as reader:
            for number in range(5):
                await producer.enqueue(busy, batch(b"%d" % number))
            await producer.flush()
            reader.add(idle, 0)
            reader.ask(idle)
            waiting = asyncio.create_task(receive(reader))
            await asyncio.sleep(0.3)
            reader.add(busy, 0)
            reader.ask(busy)
            started = time.monotonic()
            (fetched,) = await waiting
            assert fetched.tp == busy
            assert time.monotonic() - started < 0.25  # far less as a rule; a parked fetch lasts 500 ms and more


async def test_a_waiting_reader_is_woken_by_new_records_of_anybody(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(tp.topic, 1)])
        async with other.producer() as producer, log.reader("tail") as reader:
            reader.add(tp, 0)
            for number in range(5):
                reader.ask(tp)
                waiting = asyncio.create_task(receive(reader))
                await asyncio.sleep(0.05)
                await (await producer.enqueue(tp, batch(b"%d" % number)))
                (fetched,) = await waiting
                assert values(records(fetched)) == [b"%d" % number]


async def test_a_removed_partition_never_comes_and_can_be_added_again_elsewhere(open_log, name):
    removed, other = (TopicPartition(name("t"), number) for number in range(2))
    async with open_log() as log:
        await log.admin.create([NewTopic(removed.topic, 2)])
        async with log.producer() as producer, log.reader("source") as reader:
            for tp in (removed, other):
                await (await producer.enqueue(tp, numbered(range(5))))
                reader.add(tp, 0)
                reader.ask(tp)
            reader.remove(removed)
            reader.remove(removed)
            assert [fetched.tp for fetched in await receive(reader)] == [other]
            assert reader.end_offset(removed) is None
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.receive(), 0.3)
            reader.add(removed, 3)
            assert [r.offset for r in await read_to(reader, removed, 5)] == [3, 4]


async def test_adding_a_partition_again_drops_the_fetch_under_way(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(tp.topic, 1)])
        async with log.producer() as producer, log.reader("source") as reader:
            await (await producer.enqueue(tp, numbered(range(10))))
            reader.add(tp, 0)
            reader.ask(tp)
            waiting = asyncio.create_task(receive(reader))
            await asyncio.sleep(0)
            reader.remove(tp)
            reader.add(tp, 8)
            reader.ask(tp)
            (fetched,) = await waiting
            assert [r.offset for r in records(fetched)] == [8, 9]


@pytest.mark.parametrize("offset", [0, 1, 9])
async def test_a_position_outside_the_log_is_an_error_of_its_partition_alone(open_log, name, offset):
    out, fine = (TopicPartition(name("t"), number) for number in range(2))
    async with open_log() as log:
        await log.admin.create([NewTopic(out.topic, 2)])
        async with log.producer() as producer, log.reader("source") as reader:
            for tp in (out, fine):
                await (await producer.enqueue(tp, numbered(range(3))))
                await (await producer.enqueue(tp, numbered(range(3))))
            await log.admin.delete_records({out: 3})
            reader.add(out, offset)
            reader.add(fine, 0)
            reader.ask(out)
            reader.ask(fine)
            answers = {}
            while len(answers) < 2:
                answers |= {fetched.tp: fetched for fetched in await receive(reader)}
            error = answers[out].error
            assert isinstance(error, OffsetOutOfRangeError)
            assert (error.topic, error.partition, error.offset) == (*out, offset)
            assert (error.log_start, error.end_offset) == (3, 6)
            assert len(records(answers[fine])) > 0
            reader.add(out, 3)  # the reader has let it go
            assert [r.offset for r in await read_to(reader, out, 6)] == [3, 4, 5]


async def test_the_end_is_a_position_too(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(tp.topic, 1)])
        async with log.producer() as producer, log.reader("source") as reader:
            await (await producer.enqueue(tp, numbered(range(3))))
            reader.add(tp, 3)
            reader.ask(tp)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.receive(), 0.2)
            await (await producer.enqueue(tp, numbered([3])))
            (fetched,) = await receive(reader)
            assert [r.offset for r in records(fetched)] == [3]


@pytest.mark.usefixtures("missing_topics_are_soon_given_up")
async def test_reading_a_topic_that_does_not_exist_is_an_error_of_its_partition(open_log, name):
    missing, fine = TopicPartition(name("missing"), 0), TopicPartition(name("t"), 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(fine.topic, 1)])
        async with log.producer() as producer, log.reader("source") as reader:
            await (await producer.enqueue(fine, batch(b"1")))
            for tp in (missing, fine):
                reader.add(tp, 0)
                reader.ask(tp)
            answers = {}
            while len(answers) < 2:
                answers |= {fetched.tp: fetched for fetched in await receive(reader)}
            assert isinstance(answers[missing].error, UnknownTopicError)
            assert missing.topic in str(answers[missing].error)
            assert values(records(answers[fine])) == [b"1"]
        assert missing.topic not in await log.admin.topics()


async def test_a_cancelled_receive_loses_no_answer(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(tp.topic, 1)])
        async with log.producer() as producer, log.reader("source") as reader:
            reader.add(tp, 0)
            found, patience, written = [], itertools.cycle([0, 0.0003, 0.001, 0.003, 0.01]), 0
            while len(found) < 60:
                if written < 60:
                    await producer.enqueue(tp, numbered([written]))
                    written += 1
                reader.ask(tp)
                waiting = asyncio.create_task(reader.receive())
                await asyncio.sleep(next(patience))
                waiting.cancel()
                await asyncio.wait([waiting])
                if not waiting.cancelled():
                    found += [r for fetched in waiting.result() for r in records(fetched)]
    assert [r.offset for r in found] == list(range(60))


async def test_lanes_do_not_delay_one_another_and_have_their_own_positions(open_log, name):
    tp, idle = (TopicPartition(name("t"), number) for number in range(2))
    async with open_log() as log:
        await log.admin.create([NewTopic(tp.topic, 2)])
        async with log.producer() as producer, log.reader("source") as source, log.reader("restore") as restore:
            await (await producer.enqueue(tp, numbered(range(3))))
            source.add(idle, 0)
            source.ask(idle)
            waiting = asyncio.create_task(source.receive())
            restore.add(tp, 1)
            assert [r.offset for r in await read_to(restore, tp, 3)] == [1, 2]
            assert not waiting.done()
            waiting.cancel()
            await asyncio.wait([waiting])
            source.add(tp, 0)
            assert [r.offset for r in await read_to(source, tp, 3)] == [0, 1, 2]


async def test_read_uncommitted_reads_at_least_what_read_committed_reads(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(tp.topic, 1)])
        async with log.producer() as producer, log.reader("r", isolation="read_uncommitted") as reader:
            await (await producer.enqueue(tp, batch(b"1")))
            reader.add(tp, 0)
            assert values(await read_to(reader, tp, 1)) == [b"1"]


# --- producer --------------------------------------------------------------------------------------------------------


async def test_leaving_a_producer_flushes_it(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(tp.topic, 1)])
        async with log.producer() as producer:
            futures = [await producer.enqueue(tp, numbered([number])) for number in range(50)]
        assert [future.result() for future in futures] == list(range(50))
        assert await log.admin.end_offsets([tp]) == {tp: 50}


async def test_more_than_the_memory_bound_is_taken_bit_by_bit(open_log, name):
    tp = TopicPartition(name("t"), 0)
    value = bytes(900_000)
    async with open_log() as log:
        await log.admin.create([NewTopic(tp.topic, 1)])
        async with log.producer() as producer:
            async with asyncio.timeout(DEADLINE_S):
                writing = [asyncio.create_task(producer.enqueue(tp, batch(value))) for _ in range(60)]
                futures = await asyncio.gather(*writing)
                assert sorted(await asyncio.gather(*futures)) == list(range(60))


async def test_a_sealed_batch_can_be_written_again(open_log, name):
    tp = TopicPartition(name("t"), 0)
    sealed = numbered(range(3))
    async with open_log() as log:
        await log.admin.create([NewTopic(tp.topic, 1)])
        async with log.producer() as producer, log.reader("source") as reader:
            assert await (await producer.enqueue(tp, sealed)) == 0
            assert await (await producer.enqueue(tp, sealed)) == 3
            reader.add(tp, 0)
            assert values(await read_to(reader, tp, 6)) == [b"0", b"1", b"2"] * 2


async def test_too_large_a_batch_is_refused_and_other_partitions_go_on(open_log, name):
    topic = NewTopic(name("small"), 2, config={"max.message.bytes": "2000"})
    narrow, other = (TopicPartition(topic.name, number) for number in range(2))
    async with open_log() as log:
        await log.admin.create([topic])
        async with log.producer() as producer:
            stored = await producer.enqueue(narrow, batch(bytes(3000)))
            with pytest.raises(ProductionError, match=r"2000"):
                await stored
            assert await (await producer.enqueue(other, batch(b"fits"))) == 0
        assert await log.admin.end_offsets([narrow, other]) == {narrow: 0, other: 1}


async def test_a_failed_batch_fails_the_later_ones_of_its_partition_and_flush_says_so(open_log, name):
    topic = NewTopic(name("small"), 1, config={"max.message.bytes": "2000"})
    tp = TopicPartition(topic.name, 0)
    async with open_log() as log:
        await log.admin.create([topic])
        async with log.producer() as producer:
            await (await producer.enqueue(tp, batch(b"before")))
            await producer.enqueue(tp, batch(bytes(3000)))
            later = await producer.enqueue(tp, batch(b"after"))
            with pytest.raises(ProductionError):
                await producer.flush()
            with pytest.raises(ProductionError):
                await later
            # A future nobody awaits makes no noise: pytest would turn it into an error.
            await producer.enqueue(tp, batch(b"unawaited"))
            assert await log.admin.end_offsets([tp]) == {tp: 1}
            producer.reset(tp)
            producer.reset(tp)
            assert await (await producer.enqueue(tp, batch(b"again"))) == 1


async def test_the_limit_of_a_batch_is_kafkas_unless_the_topic_says_otherwise(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(tp.topic, 1)])
        room = 1_048_588 - batch(bytes(1_000_000)).size_bytes
        async with log.producer() as producer:
            assert await (await producer.enqueue(tp, batch(bytes(1_000_000 + room)))) == 0
            with pytest.raises(ProductionError, match="1048588"):
                await (await producer.enqueue(tp, batch(bytes(1_000_001 + room))))


# --- atomic commits --------------------------------------------------------------------------------------------------


class Commits:
    """Two output topics, a source and a member of a group that owns the source."""

    def __init__(self, name) -> None:
        self.source = TopicPartition(name("source"), 0)
        self.outputs = [TopicPartition(name(f"out{number}"), 0) for number in range(2)]
        self.group_id = name("group")
        self.transactional_id = name("worker")

    async def create(self, log) -> None:
        await log.admin.create([NewTopic(tp.topic, 1) for tp in (self.source, *self.outputs)])

    def join(self, log, settings=SETTINGS):
        return log.group(self.group_id, frozenset({self.source.topic}), spread, settings)

    def commit(self, number, membership, *, offsets=True) -> AtomicCommit:
        outputs = [(tp, batch(b"%d" % number)) for tp in self.outputs]
        marks = {self.source: OffsetMark(number + 1, f"commit {number}")} if offsets else {}
        return AtomicCommit(outputs, marks, membership)

    async def read(self, log) -> list[list[bytes | None]]:
        """What readers see of each output once every transaction has ended."""
        ends = await log.admin.high_watermarks(self.outputs)
        async with log.reader("check") as reader:
            for tp in self.outputs:
                reader.add(tp, 0)
            return [values(await read_to(reader, tp, ends[tp])) if ends[tp] else [] for tp in self.outputs]

    async def committed(self, log) -> int:
        """The committed offset, 0 without one."""
        async with self.join(log) as group:
            mark = (await group.committed([self.source]))[self.source]
        return 0 if mark is None else mark.offset


async def test_a_commit_becomes_visible_as_a_whole(open_log, name):
    commits = Commits(name)
    async with open_log() as log:
        await commits.create(log)
        async with (
            log.transactional_producer(commits.transactional_id) as producer,
            commits.join(log) as group,
            Watched(group) as member,
        ):
            await until(lambda: member.owned)
            for number in range(3):
                await producer.commit(commits.commit(number, group.membership))
                assert (await group.committed([commits.source])) == {
                    commits.source: OffsetMark(number + 1, f"commit {number}")
                }
            assert await commits.read(log) == [[b"0", b"1", b"2"]] * 2


async def test_outputs_can_be_committed_without_a_membership(open_log, name):
    commits = Commits(name)
    async with open_log() as log:
        await commits.create(log)
        async with log.transactional_producer(commits.transactional_id) as producer:
            await producer.commit(commits.commit(0, None, offsets=False))
        assert await commits.read(log) == [[b"0"]] * 2
        assert commits.group_id not in await log.admin.groups()


async def test_a_commit_of_who_is_no_member_stores_nothing(open_log, name):
    commits = Commits(name)
    async with open_log() as log:
        await commits.create(log)
        async with log.transactional_producer(commits.transactional_id) as producer:
            async with commits.join(log) as group, Watched(group) as member:
                await until(lambda: member.owned)
                now = group.membership
                bad = [
                    Membership(now.group_id, "nobody", now.generation),
                    Membership(now.group_id, "", now.generation),
                    Membership(now.group_id, now.member_id, -1),
                    Membership(now.group_id, now.member_id, now.generation - 1),
                    Membership(now.group_id, now.member_id, now.generation + 1),
                ]
                for membership in bad:
                    with pytest.raises(TaskMigratedError):
                        await producer.commit(commits.commit(0, membership))
            with pytest.raises(TaskMigratedError):  # it has left
                await producer.commit(commits.commit(0, now))
        async with log.producer() as plain:
            for tp in commits.outputs:
                await (await plain.enqueue(tp, batch(b"seen")))
        assert await commits.read(log) == [[b"seen"]] * 2
        assert await commits.committed(log) == 0


async def test_a_commit_after_the_partition_went_elsewhere_stores_nothing(open_log, name):
    commits = Commits(name)
    async with open_log() as log:
        await commits.create(log)
        async with AsyncExitStack() as stack:
            producer = await stack.enter_async_context(log.transactional_producer(commits.transactional_id))
            founder = None

            def to_the_latest(members, counts):
                ids = [member.member_id for member in members]
                owner = next((member_id for member_id in ids if member_id != founder), ids[0])
                return {i: Given(frozenset({commits.source} if i == owner else ())) for i in ids}

            join = lambda: log.group(  # noqa: E731
                commits.group_id, frozenset({commits.source.topic}), to_the_latest, SETTINGS
            )
            first = await stack.enter_async_context(join())
            old = await stack.enter_async_context(Watched(first))
            await until(lambda: old.owned)
            before = first.membership
            founder = before.member_id
            second = await stack.enter_async_context(join())
            new = await stack.enter_async_context(Watched(second))
            await until(lambda: new.owned)
            for membership in (before, first.membership):
                if membership is not None:
                    with pytest.raises(TaskMigratedError):
                        await producer.commit(commits.commit(0, membership))
            await producer.commit(commits.commit(0, second.membership))
        assert await commits.read(log) == [[b"0"]] * 2
        assert await commits.committed(log) == 1


async def test_commits_of_what_stays_go_on_under_their_generation_through_rebalances(open_log, name):
    """Nobody is told of what stays, so a generation stays good for it; what came back in between needs a newer one."""
    topic, out = name("two"), TopicPartition(name("out"), 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 2), NewTopic(out.topic, 1)])
        join = lambda: log.group(name("g"), frozenset({topic}), spread, SETTINGS)  # noqa: E731
        async with log.transactional_producer(name("x")) as producer, join() as group, Watched(group) as member:
            await until(lambda: len(member.owned) == 2)
            first, stored = group.membership, 0

            async def commit(tp, *, plain):
                marks = {tp: OffsetMark(stored + 1)}
                while True:
                    try:
                        if plain:
                            await group.commit(marks, first)
                        else:
                            await producer.commit(AtomicCommit([(out, batch(b"%d" % stored))], marks, first))
                        return
                    except RetriableError:
                        await asyncio.sleep(0.01)

            for _ in range(2):
                async with join() as other, Watched(other) as second:
                    joining = asyncio.create_task(until(lambda second=second: second.owned))
                    while not joining.done():
                        await commit(min(member.owned), plain=stored % 2)
                        stored += 1
                    await joining
                    (kept,) = member.owned
                    (moved,) = second.owned
                await until(lambda: len(member.owned) == 2)
                await commit(kept, plain=False)
                stored += 1
                for attempt in (
                    group.commit({moved: OffsetMark(1)}, first),
                    producer.commit(AtomicCommit([], {moved: OffsetMark(1)}, first)),
                ):
                    with pytest.raises(TaskMigratedError):
                        await attempt
            assert group.membership.generation > first.generation + 2
            assert (await group.committed([kept]))[kept] == OffsetMark(stored)


async def test_a_later_producer_of_the_same_id_fences_the_earlier_one(open_log, name):
    commits = Commits(name)
    async with open_log() as log, open_log() as other:
        await commits.create(log)
        async with commits.join(log) as group, Watched(group) as member:
            await until(lambda: member.owned)
            async with log.transactional_producer(commits.transactional_id) as old:
                assert await old.commit(commits.commit(0, group.membership)) == dict.fromkeys(commits.outputs, 1)
                async with other.transactional_producer(commits.transactional_id) as new:
                    with pytest.raises(ProducerFencedError):
                        await old.commit(commits.commit(1, group.membership))
                    with pytest.raises(ProducerFencedError):  # once for all
                        await old.commit(commits.commit(1, group.membership))
                    await new.commit(commits.commit(1, group.membership))
        assert await commits.read(log) == [[b"0", b"1"]] * 2


async def test_a_producer_whose_id_was_fenced_stores_nothing_and_one_that_is_opened_later_does(open_log, name):
    commits = Commits(name)
    async with open_log() as log, open_log() as other:
        await commits.create(log)
        assert not await other.admin.fence_producer(commits.transactional_id)  # nobody has used it yet
        async with commits.join(log) as group, Watched(group) as member:
            await until(lambda: member.owned)
            async with log.transactional_producer(commits.transactional_id) as old:
                await old.commit(commits.commit(0, group.membership))
                async with asyncio.TaskGroup() as tasks:  # by two that have both heard of its death
                    tasks.create_task(other.admin.fence_producer(commits.transactional_id))
                    tasks.create_task(log.admin.fence_producer(commits.transactional_id))
                for _ in range(2):  # once for all
                    with pytest.raises(ProducerFencedError):
                        await old.commit(commits.commit(1, group.membership))
                async with log.transactional_producer(commits.transactional_id) as new:
                    await new.commit(commits.commit(1, group.membership))
                    async with other.transactional_producer(commits.transactional_id + "-another"):
                        assert not await other.admin.fence_producer(commits.transactional_id + "-another")
                    await new.commit(commits.commit(2, group.membership))
        assert await commits.read(log) == [[b"0", b"1", b"2"]] * 2


async def test_an_output_that_cannot_be_written_refuses_the_whole_commit(open_log, name):
    commits = Commits(name)
    async with open_log() as log:
        await commits.create(log)
        async with (
            log.transactional_producer(commits.transactional_id) as producer,
            commits.join(log) as group,
            Watched(group) as member,
        ):
            await until(lambda: member.owned)
            good = commits.commit(0, group.membership)
            bad = AtomicCommit(
                [*good.outputs, (commits.outputs[1], batch(bytes(1_100_000)))], good.offsets, good.membership
            )
            with pytest.raises(ProductionError):
                await producer.commit(bad)
            assert await group.committed([commits.source]) == {commits.source: None}
            await producer.commit(good)
        assert await commits.read(log) == [[b"0"]] * 2
        assert await commits.committed(log) == 1


async def test_an_output_whose_topic_does_not_exist_refuses_the_whole_commit(open_log, name):
    commits = Commits(name)
    nowhere = TopicPartition(name("nowhere"), 0)
    async with open_log() as log:
        await commits.create(log)
        async with log.transactional_producer(commits.transactional_id) as producer:
            good = commits.commit(0, None, offsets=False)
            with pytest.raises(UnknownTopicError, match=nowhere.topic):
                await producer.commit(AtomicCommit([*good.outputs, (nowhere, batch(b"x"))], {}, None))
            await producer.commit(good)
        assert await commits.read(log) == [[b"0"]] * 2


async def test_offsets_without_a_membership_are_refused(open_log, name):
    commits = Commits(name)
    async with open_log() as log:
        await commits.create(log)
        async with log.transactional_producer(commits.transactional_id) as producer:
            with pytest.raises(TaskMigratedError):
                await producer.commit(commits.commit(0, None))
            assert await producer.commit(AtomicCommit([], {}, None)) == {}
        assert await commits.read(log) == [[], []]


async def test_offsets_alone_can_be_committed(open_log, name):
    commits = Commits(name)
    async with open_log() as log:
        await commits.create(log)
        async with (
            log.transactional_producer(commits.transactional_id) as producer,
            commits.join(log) as group,
            Watched(group) as member,
        ):
            await until(lambda: member.owned)
            marks = {commits.source: OffsetMark(7, "an id")}
            assert await producer.commit(AtomicCommit([], marks, group.membership)) == {}
            assert await group.committed([commits.source]) == marks


async def test_several_batches_of_a_partition_are_committed_in_their_order(open_log, name):
    """More batches than go in flight, and commit by commit: sequence numbers have to fit."""
    commits = Commits(name)
    async with open_log() as log:
        await commits.create(log)
        async with log.transactional_producer(commits.transactional_id) as producer:
            for round_ in range(3):
                outputs = [(tp, numbered(range(n, n + 3))) for n in range(0, 60, 3) for tp in commits.outputs]
                ends = await producer.commit(AtomicCommit(outputs, {}, None))
                found = await commits.read(log)
                assert found == [[b"%d" % number for number in range(60)] * (round_ + 1)] * 2
                last = (await log.admin.high_watermarks(commits.outputs)).items()
                assert all(end - 1 <= ends[tp] <= end for tp, end in last)  # a marker may follow


async def test_commits_asked_for_together_follow_one_another(open_log, name):
    commits = Commits(name)
    async with open_log() as log:
        await commits.create(log)
        async with log.transactional_producer(commits.transactional_id) as producer:
            await asyncio.gather(*(producer.commit(commits.commit(n, None, offsets=False)) for n in range(5)))
        assert await commits.read(log) == [[b"%d" % number for number in range(5)]] * 2


async def test_a_commit_whose_caller_is_cancelled_comes_to_its_end(open_log, name):
    commits = Commits(name)
    async with open_log() as log:
        await commits.create(log)
        async with log.transactional_producer(commits.transactional_id) as producer:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await producer.commit(commits.commit(0, None, offsets=False))
            await producer.commit(commits.commit(1, None, offsets=False))
        found = await commits.read(log)
        assert found in ([[b"0", b"1"]] * 2, [[b"1"]] * 2)


# --- groups ----------------------------------------------------------------------------------------------------------


async def test_the_first_member_gets_everything(open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 3)])
        async with log.group(group_id, frozenset({topic}), spread, SETTINGS) as group:
            event = await asyncio.wait_for(group.next_event(), DEADLINE_S)
            everything = frozenset(TopicPartition(topic, number) for number in range(3))
            assert isinstance(event, Assigned)
            assert event.partitions == everything == group.assignment
            assert group.membership.group_id == group_id
            assert group.membership.member_id
            assert group.membership.generation >= event.generation >= 0
            statistics = group.statistics()
            assert statistics.rebalances >= 1
            assert statistics.rebalance_s >= 0
            assert 0 <= statistics.last_heartbeat_age_s < 5
            assert group_id in await log.admin.groups()


async def test_partitions_move_only_after_their_owner_gave_them_back_and_what_stays_is_not_mentioned(open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(topic, 4)])
        async with (
            log.group(group_id, frozenset({topic}), spread, SETTINGS) as one,
            Watched(one, revoke=False) as first,
        ):
            await until(lambda: len(first.owned) == 4)
            async with other.group(group_id, frozenset({topic}), spread, SETTINGS) as two, Watched(two) as second:
                await until(lambda: len(first.events) > 1)
                asked = first.events[-1]
                assert isinstance(asked, Revoked)
                assert len(asked.partitions) == 2
                await asyncio.sleep(0.5)
                assert not second.owned
                assert one.assignment == first.owned  # still its own, and committed under its membership
                moving = next(iter(asked.partitions))
                await one.commit({moving: OffsetMark(5, "before it goes")}, one.membership)
                first.answer(asked)
                assert one.assignment == first.owned
                await until(lambda: len(second.owned) == 2)
                assert second.owned == asked.partitions == two.assignment
                assert (await two.committed([moving]))[moving] == OffsetMark(5, "before it goes")
                assert all(event is asked or isinstance(event, Assigned) for event in first.events)
            # The second has left: its partitions come back, and nothing else is said.
            await until(lambda: len(first.owned) == 4)
            assert isinstance(first.events[-1], Assigned)
            assert first.events[-1].partitions == asked.partitions


async def test_a_member_without_partitions_is_legal_and_takes_over_when_it_is_needed(open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        async with AsyncExitStack() as stack:
            first = stack.enter_async_context(log.group(group_id, frozenset({topic}), spread, PATIENT))
            async with AsyncExitStack() as leaving:
                one = await leaving.enter_async_context(log.group(group_id, frozenset({topic}), spread, PATIENT))
                owner = await leaving.enter_async_context(Watched(one))
                await until(lambda: owner.owned)
                idle = await stack.enter_async_context(Watched(await first))
                await until(lambda: idle.group.membership is not None)
                await asyncio.sleep(0.5)
                assert not idle.owned
                assert len(owner.owned) == 1
            await until(lambda: idle.owned)  # at once: the session is over long after this test has given up


async def test_committed_offsets_come_back_with_their_metadata(open_log, name):
    topic, group_id = name("t"), name("g")
    tps = [TopicPartition(topic, number) for number in range(3)]
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 3)])
        async with log.group(group_id, frozenset({topic}), spread, SETTINGS) as group, Watched(group) as member:
            await until(lambda: len(member.owned) == 3)
            marks = {tps[0]: OffsetMark(7, "ä" * 2048), tps[1]: OffsetMark(0)}
            await group.commit(marks, group.membership)
            assert await group.committed(tps) == {**marks, tps[2]: None}
            await group.commit({tps[0]: OffsetMark(8)}, group.membership)
        assert await log.admin.group_offsets(group_id) == {tps[0]: OffsetMark(8), tps[1]: OffsetMark(0)}
        assert await log.admin.group_offsets(name("nobody")) == {}


async def test_a_plain_commit_of_who_is_no_member_stores_nothing(open_log, name):
    topic, group_id = name("t"), name("g")
    tp = TopicPartition(topic, 0)
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        async with log.group(group_id, frozenset({topic}), spread, SETTINGS) as group, Watched(group) as member:
            await until(lambda: member.owned)
            now = group.membership
            for bad in (
                Membership(group_id, "nobody", now.generation),
                Membership(group_id, "", now.generation),
                Membership(group_id, now.member_id, -1),
                Membership(group_id, now.member_id, now.generation + 1),
            ):
                with pytest.raises(TaskMigratedError):
                    await group.commit({tp: OffsetMark(3)}, bad)
            assert await group.committed([tp]) == {tp: None}
        async with log.group(group_id, frozenset({topic}), spread, SETTINGS) as later, Watched(later) as member:
            await until(lambda: member.owned)
            with pytest.raises(TaskMigratedError):
                await later.commit({tp: OffsetMark(3)}, now)
            assert await later.committed([tp]) == {tp: None}


async def test_without_progress_a_member_gives_everything_up_and_rejoins_with_the_next(open_log, name):
    topic, group_id = name("t"), name("g")
    tp = TopicPartition(topic, 0)
    settings = GroupSettings(session_timeout_ms=6000, heartbeat_interval_ms=100, max_poll_interval_ms=800)
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        async with log.group(group_id, frozenset({topic}), spread, settings) as group, Watched(group) as member:
            await until(lambda: member.owned, doing=group.report_progress)
            stale = group.membership
            await until(lambda: any(isinstance(event, Lost) for event in member.events))
            lost = next(event for event in member.events if isinstance(event, Lost))
            assert lost.partitions == {tp}
            assert "max_poll_interval" in lost.reason
            assert group.membership is None
            assert group.assignment == frozenset()
            with pytest.raises(TaskMigratedError):
                await group.commit({tp: OffsetMark(3)}, stale)
            await until(lambda: member.owned, doing=group.report_progress)
            await group.commit({tp: OffsetMark(4)}, group.membership)


@pytest.mark.slow
async def test_a_blocked_event_loop_does_not_cost_the_membership(open_log, name, least_session_timeout_ms):
    topic, group_id = name("t"), name("g")
    settings = GroupSettings(session_timeout_ms=least_session_timeout_ms, heartbeat_interval_ms=200)
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 2)])
        async with (
            log.group(group_id, frozenset({topic}), spread, settings) as one,
            log.group(group_id, frozenset({topic}), spread, settings) as two,
            Watched(one) as first,
            Watched(two) as second,
        ):
            await until(lambda: len(first.owned) == len(second.owned) == 1)
            before = one.membership.member_id
            time.sleep(settings.session_timeout_ms / 1000 + 1.0)  # noqa: ASYNC251 - what an agent must not do
            await asyncio.sleep(0.5)
            assert one.membership.member_id == before
            assert not [event for event in (*first.events, *second.events) if isinstance(event, Lost)]
            await one.commit({next(iter(first.owned)): OffsetMark(1)}, one.membership)


async def test_a_cancelled_next_event_loses_no_event(open_log, name):
    topic, group_id = name("t"), name("g")
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        async with log.group(group_id, frozenset({topic}), spread, SETTINGS) as group:
            for _ in range(20):
                waiting = asyncio.create_task(group.next_event())
                await asyncio.sleep(0)
                waiting.cancel()
                await asyncio.wait([waiting])
                if not waiting.cancelled():
                    event = waiting.result()
                    break
            else:
                event = await asyncio.wait_for(group.next_event(), DEADLINE_S)
            assert isinstance(event, Assigned)


async def test_a_group_tells_its_members_and_is_deleted_only_without_them(open_log, name):
    topic, group_id = name("t"), name("g")
    tp = TopicPartition(topic, 0)
    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(topic, 1)])
        assert await other.admin.group_members(group_id) == []
        await other.admin.delete_group(group_id)  # there is none: no error
        async with log.group(group_id, frozenset({topic}), spread, SETTINGS) as group, Watched(group) as member:
            await until(lambda: member.owned)
            await group.commit({tp: OffsetMark(3, "kept")}, group.membership)
            assert len(await other.admin.group_members(group_id)) == 1
            with pytest.raises(GroupInUseError, match=group_id):
                await other.admin.delete_group(group_id)
            assert await group.committed([tp]) == {tp: OffsetMark(3, "kept")}
            assert member.owned == {tp}
        assert await other.admin.group_members(group_id) == []
        named = replace(SETTINGS, instance_id="till-1")
        async with (
            log.group(name("named"), frozenset({topic}), spread, named) as group,
            log.group(name("named"), frozenset({topic}), spread, SETTINGS) as unnamed,
            Watched(group),
            Watched(unnamed),
        ):
            await until(lambda: group.membership is not None and unnamed.membership is not None)
            told = sorted(await other.admin.group_members(name("named")), key=lambda each: "instance_id" in each)
            assert ["(process" in each or " on 127.0.0.1" in each for each in told] == [True, True]
            assert [each.count("instance_id 'till-1'") for each in told] == [0, 1]
            assert unnamed.membership.member_id[:8] in told[0]
        assert await other.admin.group_offsets(group_id, stable=True) == {tp: OffsetMark(3, "kept")}
        await other.admin.delete_group(group_id)
        assert await other.admin.group_offsets(group_id) == {}
        assert group_id not in await other.admin.groups()
        # The name is free: who joins now starts from nothing.
        async with log.group(group_id, frozenset({topic}), spread, SETTINGS) as group, Watched(group) as member:
            await until(lambda: member.owned)
            assert await group.committed([tp]) == {tp: None}
            await group.commit({tp: OffsetMark(1)}, group.membership)
        assert await other.admin.group_offsets(group_id) == {tp: OffsetMark(1)}


# --- administration --------------------------------------------------------------------------------------------------


async def test_topics_are_created_described_listed_and_deleted(open_log, name):
    one, two, missing = name("one"), name("two"), name("missing")
    config = {"cleanup.policy": "compact", "retention.ms": "86400000"}
    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(two, 1), NewTopic(one, 3, config=config)])
        described = await other.admin.describe([one, two, missing])
        assert set(described) == {one, two}
        assert (described[one].name, described[one].partitions) == (one, 3)
        assert config.items() <= dict(described[one].config).items()
        listed = [topic for topic in await other.admin.topics() if topic in {one, two, missing}]
        assert listed == [one, two]
        await log.admin.create([NewTopic(one, 5)])  # it exists: left as it is
        assert (await log.admin.describe([one]))[one] == described[one]
        await log.admin.delete([one, missing])
        assert one not in await log.admin.topics()


async def test_a_topic_made_again_is_another_topic(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log:
        ids = []
        for _ in range(2):
            await log.admin.create([NewTopic(tp.topic, 1)])
            ids.append((await log.admin.describe([tp.topic]))[tp.topic].topic_id)
            async with log.producer() as producer, log.reader("source") as reader:
                assert await (await producer.enqueue(tp, numbered(range(3)))) == 0
                reader.add(tp, 0)
                assert len(await read_to(reader, tp, 3)) == 3
            await log.admin.delete([tp.topic])
            async with asyncio.timeout(DEADLINE_S):
                while tp.topic in await log.admin.topics():  # noqa: ASYNC110 - no event tells of it
                    await asyncio.sleep(0.05)
        assert ids[0] != ids[1] or ids == ["", ""]


@pytest.mark.usefixtures("missing_topics_are_soon_given_up")
async def test_a_deleted_topic_is_told_by_the_reader_and_not_by_the_group(open_log, name):
    gone, stays = TopicPartition(name("gone"), 0), TopicPartition(name("stays"), 0)
    topics = frozenset({gone.topic, stays.topic})
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1) for topic in sorted(topics)])
        async with (
            log.reader("source") as reader,
            log.producer() as producer,
            log.group(name("g"), topics, spread, SETTINGS) as group,
            Watched(group) as member,
        ):
            await until(lambda: member.owned == {gone, stays})
            for tp in (gone, stays):
                reader.add(tp, 0)
                reader.ask(tp)
            await log.admin.delete([gone.topic])
            async with asyncio.timeout(DEADLINE_S + 15):
                (fetched,) = await reader.receive()
            assert fetched.tp == gone
            assert isinstance(fetched.error, UnknownTopicError)
            assert gone.topic in str(fetched.error)
            await asyncio.sleep(2 * SETTINGS.heartbeat_interval_ms / 1000)  # the group has met it as well
            assert member.owned == {gone, stays}
            assert await (await producer.enqueue(stays, batch(b"1"))) == 0
            (fetched,) = await reader.receive()
            assert fetched.tp == stays
            assert values(records(fetched)) == [b"1"]
            await group.commit({stays: OffsetMark(1)}, group.membership)


@pytest.mark.parametrize("bad", ["", "..", "with space", "ä", "a/b", "x" * 250])
async def test_a_bad_topic_name_is_refused(open_log, bad):
    async with open_log() as log:
        with pytest.raises(ConfigurationError):
            await log.admin.create([NewTopic(bad, 1)])


async def test_offsets_of_partitions_and_deleting_records(open_log, name):
    tp, empty = (TopicPartition(name("t"), number) for number in range(2))
    async with open_log() as log:
        await log.admin.create([NewTopic(tp.topic, 2)])
        async with log.producer() as producer, log.reader("source") as reader:
            for number in range(4):
                await (await producer.enqueue(tp, numbered(range(number * 5, number * 5 + 5))))
            assert await log.admin.end_offsets([tp, empty]) == {tp: 20, empty: 0}
            assert await log.admin.high_watermarks([tp, empty]) == {tp: 20, empty: 0}
            assert await log.admin.start_offsets([tp, empty]) == {tp: 0, empty: 0}
            await log.admin.delete_records({tp: 12})
            await log.admin.delete_records({tp: 7})  # further back than it is: nothing happens
            assert await log.admin.start_offsets([tp]) == {tp: 12}
            assert await log.admin.end_offsets([tp]) == {tp: 20}
            reader.add(tp, 12)
            assert [r.offset for r in await read_to(reader, tp, 20)] == list(range(12, 20))
            await log.admin.delete_records({tp: 20})
            assert await log.admin.start_offsets([tp]) == {tp: 20}
            assert await (await producer.enqueue(tp, numbered([20]))) == 20


async def test_offsets_of_a_topic_that_does_not_exist(open_log, name):
    async with open_log() as log:
        for ask in (log.admin.start_offsets, log.admin.end_offsets, log.admin.high_watermarks):
            with pytest.raises(UnknownTopicError):
                await ask([TopicPartition(name("missing"), 0)])


# --- the log ---------------------------------------------------------------------------------------------------------


async def test_changed_returns_soon_after_a_write_and_without_one(open_log, name):
    tp = TopicPartition(name("t"), 0)
    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(tp.topic, 1)])
        async with other.producer() as producer:
            waiting = asyncio.create_task(log.changed())
            await (await producer.enqueue(tp, batch(b"1")))
            await asyncio.wait_for(waiting, 2)
        await asyncio.wait_for(log.changed(), 2)


async def test_the_address_says_where_it_is(open_log):
    log = open_log()
    scheme, _, rest = log.address.partition("://")
    assert scheme in {"memory", "sqlite", "kafka"}
    assert rest
    async with log:
        assert log.address == f"{scheme}://{rest}"


async def test_nothing_is_wrapped_when_an_error_leaves_a_block(open_log, name):
    """What a log hands out ends with its block, and the block's own error comes out as it is."""

    class OwnError(Exception):
        pass

    topic = name("t")
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        for make in (
            lambda: log.reader("source"),
            lambda: log.producer(),
            lambda: log.group(name("g"), frozenset({topic}), spread, SETTINGS),
        ):
            with pytest.raises(OwnError):
                async with make():
                    raise OwnError
