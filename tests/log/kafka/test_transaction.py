"""Transactions on real brokers of both versions, every failure on purpose: each ends as the contract says."""

import asyncio
import gc
import sys
import time
from contextlib import asynccontextmanager

import pytest

from streamflow.errors import (
    ClosedError,
    ConfigurationError,
    IndeterminateCommitError,
    ProducerFencedError,
    ProductionError,
    RetriableError,
    TaskMigratedError,
)
from streamflow.log.api import AtomicCommit, Membership, OffsetMark
from streamflow.log.kafka.attempt import Attempt
from streamflow.log.kafka.log import KafkaLog
from streamflow.log.kafka.options import Kafka
from tests.contracts.records import DEADLINE_S, batch, receive, until, values
from tests.kafka import jars
from tests.kafka.broker import Broker
from tests.kafka.fixtures import unavailable
from tests.kafka.proxy import Proxy, api_key
from tests.log.kafka.committing import Committer
from tests.ports import free_port

pytestmark = pytest.mark.kafka

PRODUCE, INIT_PRODUCER_ID, TXN_OFFSET_COMMIT, END_TXN = 0, 22, 28, 26
SHORT_MS = 1500
"""A transaction time-out that a test can wait for."""


@pytest.fixture(scope="module", params=["version 2", "version 1"])
def proxied(request, tmp_path_factory):
    """A broker that is reached through a port where a test puts a `Proxy`: (broker, that port)."""
    port = free_port()
    try:
        broker = Broker(
            tmp_path_factory.mktemp("kafka-proxied"),
            config={"advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}"},
            pom=jars.POM if request.param == "version 2" else jars.OLD_POM,
        )
    except jars.JarsMissingError as error:
        unavailable(str(error))
        raise
    with broker:
        yield broker, port


@pytest.fixture
def committing(proxied, name):
    """`async with committing() as (committer, proxy)`; options are those of `Kafka`."""

    @asynccontextmanager
    async def make(**options):
        broker, port = proxied
        async with (
            Proxy(port, int(broker.bootstrap.split(":")[1])) as proxy,
            KafkaLog(Kafka(servers=f"127.0.0.1:{port}", **options), client_id="test") as log,
        ):
            committer = Committer(log, name)
            await committer.create()
            async with committer.joined():
                await committer.commit(0)
                yield committer, proxy

    return make


def once(key, verdict):
    """Decides about the first request of a kind; all others pass."""
    left = [verdict]
    return lambda chunk: left.pop() if left and api_key(chunk) == key else "pass"


async def started(proxy, key, gate):
    """Holds the next request of a kind at `gate`, and waits until it is there."""
    arrived = asyncio.Event()

    def decide(chunk):
        if api_key(chunk) != key or arrived.is_set():
            return "pass"
        arrived.set()
        return gate

    proxy.on_request = decide
    return arrived


# --- what readers see --------------------------------------------------------------------------------------------


async def test_readers_see_all_of_a_commit_at_once_and_nothing_of_an_open_one(committing):
    async with committing() as (committer, proxy):
        log, gate = committer.log, asyncio.Event()
        await committer.check([0])
        stable = await log.admin.end_offsets(committer.outputs)
        sent = await started(proxy, END_TXN, gate)
        commit = asyncio.create_task(committer.producer.commit(committer.numbered(1)))
        await sent.wait()
        marks = await log.admin.high_watermarks(committer.outputs)
        assert all(marks[tp] > stable[tp] for tp in committer.outputs)
        assert await log.admin.end_offsets(committer.outputs) == stable
        reading = asyncio.create_task(committer.read())  # its target is the high watermark: it waits
        knowing = asyncio.create_task(committer.commit_id())
        async with log.reader("peek", isolation="read_uncommitted") as reader:
            reader.add(committer.outputs[0], stable[committer.outputs[0]])
            reader.ask(committer.outputs[0])
            (fetched,) = await receive(reader)
            assert values(r for one in fetched.batches for r in one.open()) == [b"1"]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in (commit, reading, knowing))
        gate.set()
        async with asyncio.timeout(DEADLINE_S):
            ends = await commit
            assert await reading == [[b"0", b"1"]] * 3
            assert await knowing == "1"
        assert ends == marks


async def test_many_commits_leave_nothing_behind(open_log, name):
    total = 1000
    async with open_log() as log:
        committer = Committer(log, name, outputs=1)
        await committer.create()
        async with committer.joined():
            counts = []
            for number in range(total):
                await committer.commit(number)
                if number in (total // 2, total - 1):
                    gc.collect()
                    tasks, connections = len(asyncio.all_tasks()), len(log._client._connections)
                    counts.append((tasks, connections, len(gc.get_objects()) // 500))
            assert counts[0][:2] == counts[1][:2]
            assert counts[1][2] - counts[0][2] <= 1
            assert not committer.met
            await committer.check(range(total))


# --- fencing by the group ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda now: Membership(now.group_id, "nobody", now.generation), "UNKNOWN_MEMBER_ID"),
        (lambda now: Membership(now.group_id, now.member_id, now.generation + 1), "ILLEGAL_GENERATION"),
    ],
    ids=["member", "generation"],
)
async def test_a_membership_that_the_group_does_not_know_commits_neither_offsets_nor_outputs(committing, change, code):
    async with committing() as (committer, _):
        good = committer.numbered(1)
        bad = AtomicCommit(good.outputs, good.offsets, change(good.membership))
        async with KafkaLog(committer.log._options, client_id="elsewhere") as log:  # it knows nothing of the group
            producer = await committer.open(log)
            with pytest.raises(TaskMigratedError, match=code):
                await producer.commit(bad)
            await committer.check([0])
            await producer.commit(good)
            await producer.__aexit__(None, None, None)
        await committer.check([0, 1])


# --- fencing by the transactional id -----------------------------------------------------------------------------


async def test_a_later_producer_aborts_the_open_transaction_and_fences_the_earlier_one(committing):
    async with committing() as (committer, proxy):
        gate = asyncio.Event()
        sent = await started(proxy, END_TXN, gate)
        commit = asyncio.create_task(committer.producer.commit(committer.numbered(1)))
        await sent.wait()
        later = await committer.open()
        await committer.check([0])
        gate.set()
        with pytest.raises(ProducerFencedError, match=committer.transactional_id):
            await commit
        with pytest.raises(ProducerFencedError):
            await committer.producer.commit(committer.numbered(1))
        await later.commit(committer.numbered(1))
        await later.__aexit__(None, None, None)
        await committer.check([0, 1])


async def child(committer, *, servers):
    now = committer.group.membership
    arguments = (servers, committer.transactional_id, committer.outputs[0].topic, committer.source.topic)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.log.kafka.transaction_process",
        *arguments,
        now.group_id,
        now.member_id,
        str(now.generation),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert await process.stdout.readline() == b"sent\n"
    return process


async def test_what_a_killed_process_has_left_open_is_aborted_by_the_next_one(committing):
    async with committing() as (committer, proxy):
        async with asyncio.timeout(DEADLINE_S):
            process = await child(committer, servers=f"127.0.0.1:{proxy.port}")
            process.kill()
            await process.wait()
        stable = await committer.log.admin.end_offsets(committer.outputs)
        assert stable != await committer.log.admin.high_watermarks(committer.outputs)
        before = time.monotonic()
        await committer.reopen()
        await committer.check([0])
        assert time.monotonic() - before < 5  # well before the time-out of 10 s
        await committer.commit(1)
        await committer.check([0, 1])


async def test_what_a_killed_process_has_left_open_is_ended_by_who_fences_it(committing):
    async with committing(transaction_timeout_ms=600_000) as (committer, proxy):
        async with asyncio.timeout(DEADLINE_S):
            process = await child(committer, servers=f"127.0.0.1:{proxy.port}")
            process.kill()
            await process.wait()
            waiting = asyncio.create_task(committer.commit_id())
            await asyncio.sleep(0.3)
            assert not waiting.done()
            assert await committer.log.admin.fence_producer(committer.transactional_id)
            assert await waiting == "0"
            await committer.check([0])
            assert not await committer.log.admin.fence_producer(committer.transactional_id)
            await committer.reopen()
            await committer.commit(1)
        await committer.check([0, 1])


async def test_a_process_that_wakes_up_after_it_was_fenced_commits_nothing(committing):
    async with committing(transaction_timeout_ms=600_000) as (committer, proxy):
        async with asyncio.timeout(DEADLINE_S):
            process = await child(committer, servers=f"127.0.0.1:{proxy.port}")
            await committer.log.admin.fence_producer(committer.transactional_id)
            process.stdin.write(b"go on\n")
            assert await process.stdout.readline() == b"ProducerFencedError\n"
            await process.wait()
        await committer.check([0])


async def test_a_commit_that_is_decided_is_not_undone_by_who_fences_it(committing):
    """The answer is on its way: it may be stored, and is."""
    async with committing() as (committer, proxy):
        proxy.on_request = once(END_TXN, "lose answer")
        with pytest.raises(IndeterminateCommitError):
            await committer.producer.commit(committer.numbered(1))
        await committer.log.admin.fence_producer(committer.transactional_id)
        await committer.check([0, 1])


async def test_a_process_that_wakes_up_after_its_successor_has_begun_commits_nothing(committing):
    async with committing() as (committer, proxy):
        async with asyncio.timeout(DEADLINE_S):
            process = await child(committer, servers=f"127.0.0.1:{proxy.port}")
            await committer.reopen()
            await committer.commit(1)
            process.stdin.write(b"go on\n")
            assert await process.stdout.readline() == b"ProducerFencedError\n"
            await process.wait()
        await committer.check([0, 1])


async def test_a_request_for_the_id_that_arrives_late_does_not_fence_who_has_it_since(committing):
    async with committing() as (committer, proxy):
        await committer.check([0])
        late, confirm = asyncio.Event(), asyncio.Event()
        verdicts = [late, "pass", confirm]
        proxy.on_request = lambda chunk: verdicts.pop(0) if api_key(chunk) == INIT_PRODUCER_ID and verdicts else "pass"
        given_up = asyncio.create_task(committer.open())
        await until(lambda: len(verdicts) == 2)
        given_up.cancel()
        opening = asyncio.create_task(committer.open())
        await until(lambda: not verdicts)
        late.set()
        await asyncio.sleep(0.3)
        confirm.set()
        producer = await opening
        await producer.commit(committer.numbered(1))
        await producer.__aexit__(None, None, None)
        await committer.check([0, 1])


# --- unknown outcomes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verdict", "is_stored"), [("lose answer", True), ("cut", False)])
async def test_the_outcome_of_a_commit_whose_answer_is_lost_is_told_by_its_id(committing, verdict, is_stored):
    async with committing() as (committer, proxy):
        proxy.on_request = once(END_TXN, verdict)
        with pytest.raises(IndeterminateCommitError, match=committer.transactional_id):
            await committer.producer.commit(committer.numbered(1))
        with pytest.raises(ClosedError):
            await committer.producer.commit(committer.numbered(1))
        await committer.reopen()
        assert await committer.commit_id() == ("1" if is_stored else "0")
        await committer.check([0, 1] if is_stored else [0])
        if not is_stored:
            await committer.commit(1)
        await committer.commit(2)
        await committer.check([0, 1, 2])


async def test_an_end_that_arrives_after_its_producer_was_replaced_commits_nothing(committing):
    async with committing(transaction_timeout_ms=SHORT_MS) as (committer, proxy):
        gate = asyncio.Event()
        await started(proxy, END_TXN, gate)
        with pytest.raises(IndeterminateCommitError, match="no answer in time"):
            await committer.producer.commit(committer.numbered(1))
        await committer.reopen()
        assert await committer.commit_id() == "0"
        sent = await started(proxy, PRODUCE, held := asyncio.Event())
        commit = asyncio.create_task(committer.producer.commit(committer.numbered(2)))
        await sent.wait()  # the next transaction is open when the old end arrives
        gate.set()
        await asyncio.sleep(0.3)
        held.set()
        await commit
        await committer.check([0, 2])


# --- time-outs and lost requests before the end ------------------------------------------------------------------


@pytest.mark.parametrize("key", [PRODUCE, TXN_OFFSET_COMMIT], ids=["produce", "offsets"])
@pytest.mark.parametrize("verdict", ["lose answer", "cut"])
async def test_a_request_within_the_transaction_that_is_lost_aborts_it(committing, key, verdict):
    async with committing() as (committer, proxy):
        proxy.on_request = once(key, verdict)
        with pytest.raises(RetriableError):
            await committer.producer.commit(committer.numbered(1))
        await committer.check([0])
        await committer.producer.commit(committer.numbered(1))
        await committer.check([0, 1])


async def test_a_request_that_hangs_aborts_the_transaction_at_its_time_out(committing):
    async with committing(transaction_timeout_ms=SHORT_MS) as (committer, proxy):
        gate = asyncio.Event()
        await started(proxy, PRODUCE, gate)
        with pytest.raises(RetriableError):
            await committer.producer.commit(committer.numbered(1))
        await committer.check([0])
        await committer.producer.commit(committer.numbered(1))
        gate.set()  # the batch arrives after all
        await asyncio.sleep(0.3)
        await committer.check([0, 1])


async def test_a_transaction_that_the_broker_has_timed_out_is_made_again(committing, monkeypatch):
    """Only who was stopped, or is as good as stopped, gets there: otherwise it aborts by itself."""
    async with committing(transaction_timeout_ms=SHORT_MS) as (committer, _):
        producer = committer.producer
        end = producer._coordinator.commit
        stable = await committer.log.admin.end_offsets(committer.outputs)

        async def sleep_first(identity, attempt):
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    now = await committer.log.admin.end_offsets(committer.outputs)
                    if now != stable and now == await committer.log.admin.high_watermarks(committer.outputs):
                        return await end(identity, Attempt(DEADLINE_S))
                    await asyncio.sleep(0.1)

        monkeypatch.setattr(producer._coordinator, "commit", sleep_first)
        with pytest.raises(RetriableError):
            await producer.commit(committer.numbered(1))
        monkeypatch.undo()
        await committer.check([0])
        await producer.commit(committer.numbered(1))
        await committer.check([0, 1])


async def test_answers_lost_at_random_lose_nothing_and_double_nothing(committing):
    async with committing() as (committer, proxy):
        total, answers = 70, 0

        def cut(chunk):
            nonlocal answers
            answers += 1
            return answers % 19 == 0

        proxy.on_answer = cut
        async with asyncio.timeout(60):
            for number in range(1, total):
                await committer.commit(number)
        proxy.on_answer = lambda chunk: False
        await committer.check(range(total))
        assert proxy.cut_connections > 3
        assert committer.met  # which answers are hit is chance; each kind has a test of its own


# --- refusals ----------------------------------------------------------------------------------------------------


async def test_a_batch_that_is_refused_aborts_the_commit_and_names_its_partition(committing):
    async with committing() as (committer, _):
        good = committer.numbered(1)
        tp = committer.outputs[1]
        bad = AtomicCommit([*good.outputs, (tp, batch(bytes(1_100_000)))], good.offsets, good.membership)
        with pytest.raises(ProductionError, match=f"{tp}.*MESSAGE_TOO_LARGE"):
            await committer.producer.commit(bad)
        await committer.check([0])
        await committer.producer.commit(good)
        await committer.check([0, 1])


async def test_metadata_that_the_broker_refuses_is_not_tried_for_ever(committing):
    async with committing() as (committer, _):
        good = committer.numbered(1)
        too_long = {committer.source: OffsetMark(2, "x" * 5000)}
        with pytest.raises(Exception, match="OFFSET_METADATA_TOO_LARGE") as info:
            await committer.producer.commit(AtomicCommit(good.outputs, too_long, good.membership))
        assert not isinstance(info.value, RetriableError)
        await committer.check([0])


async def test_a_time_out_beyond_the_brokers_is_refused_at_once(open_log, name):
    async with open_log(transaction_timeout_ms=10**9) as log:
        with pytest.raises(ConfigurationError, match=r"transaction_timeout_ms=1000000000.*transaction\.max\.timeout"):
            async with log.transactional_producer(name("x")):
                pass


# --- being cancelled ---------------------------------------------------------------------------------------------


async def test_a_cancelled_caller_learns_the_outcome_all_the_same(committing):
    async with committing() as (committer, proxy):
        gate, told = asyncio.Event(), []

        async def caller():
            told.append(await committer.producer.commit(committer.numbered(1)))
            await asyncio.sleep(DEADLINE_S)

        sent = await started(proxy, END_TXN, gate)
        commit = asyncio.create_task(caller())
        await sent.wait()
        commit.cancel()
        await asyncio.sleep(0.1)
        assert not commit.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await commit
        assert [set(ends) for ends in told] == [set(committer.outputs)]
        await committer.check([0, 1])


@pytest.mark.parametrize("key", [PRODUCE, TXN_OFFSET_COMMIT], ids=["produce", "offsets"])
async def test_a_commit_that_is_cancelled_before_its_end_stores_nothing(committing, key):
    async with committing() as (committer, proxy):
        sent = await started(proxy, key, gate := asyncio.Event())
        commit = asyncio.create_task(committer.producer.commit(committer.numbered(1)))
        await sent.wait()
        commit.cancel()
        async with asyncio.timeout(1):
            with pytest.raises(asyncio.CancelledError):
                await commit
        gate.set()
        await committer.commit(2)
        await committer.check([0, 2])


async def test_what_a_cancelled_commit_has_left_open_is_aborted_when_its_producer_is_left(committing):
    async with committing() as (committer, proxy):
        sent = await started(proxy, TXN_OFFSET_COMMIT, asyncio.Event())
        commit = asyncio.create_task(committer.producer.commit(committer.numbered(1)))
        await sent.wait()
        marks = await committer.log.admin.high_watermarks(committer.outputs)
        while await committer.log.admin.high_watermarks(committer.outputs) == marks:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        commit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await commit
        await committer.producer.__aexit__(None, None, None)
        async with asyncio.timeout(5):  # the time-out is 10 s
            await committer.check([0])


async def twice_cancelled(commit):
    """Who insists is let go."""
    for _ in range(2):
        commit.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await commit


async def test_a_commit_whose_caller_is_gone_ends_before_the_next_one_begins(committing):
    async with committing() as (committer, proxy):
        gate = asyncio.Event()
        sent = await started(proxy, END_TXN, gate)
        commit = asyncio.create_task(committer.producer.commit(committer.numbered(1)))
        await sent.wait()
        await twice_cancelled(commit)
        following = asyncio.create_task(committer.producer.commit(committer.numbered(2)))
        await asyncio.sleep(0.2)
        assert not following.done()
        gate.set()
        await following
        await committer.check([0, 1, 2])


async def test_leaving_a_producer_waits_for_the_commit_under_way(committing):
    async with committing() as (committer, proxy):
        gate = asyncio.Event()
        sent = await started(proxy, END_TXN, gate)
        commit = asyncio.create_task(committer.producer.commit(committer.numbered(1)))
        await sent.wait()
        await twice_cancelled(commit)
        leaving = asyncio.create_task(committer.producer.__aexit__(None, None, None))
        await asyncio.sleep(0.2)
        assert not leaving.done()
        gate.set()
        await leaving
        await committer.check([0, 1])


# --- the rest ----------------------------------------------------------------------------------------------------


async def test_sequence_numbers_wrap_within_a_transaction_and_between_transactions(old_kafka_broker, name):
    """In version 2 every transaction begins at 0."""
    async with KafkaLog(Kafka(servers=old_kafka_broker.bootstrap), client_id="test") as log:
        committer = Committer(log, name, outputs=1)
        await committer.create()
        (tp,) = committer.outputs
        async with log.transactional_producer(committer.transactional_id) as producer:
            producer._outputs._sequences[tp] = 2**31 - 5  # who is new to a partition may begin anywhere
            for first in range(0, 12, 4):
                outputs = [(tp, batch(b"%d" % n, b"%d" % (n + 1))) for n in (first, first + 2)]
                await producer.commit(AtomicCommit(outputs, {}, None))
            assert producer._outputs._sequences[tp] == 7
        assert await committer.read() == [[b"%d" % number for number in range(12)]]


async def test_a_closed_producer_says_so_and_its_connections_are_closed(committing):
    async with committing() as (committer, _):
        producer = committer.producer
        assert [key for key in committer.log._client._connections if key[1] == (producer, "coordinator")]
        await committer.reopen()
        assert not [key for key in committer.log._client._connections if key[1] and key[1][0] is producer]
        with pytest.raises(ClosedError):
            await producer.commit(committer.numbered(1))


async def test_topics_have_ids_that_tell_them_from_their_successors(committing):
    async with committing() as (committer, _):
        topic = committer.outputs[0].topic
        before = (await committer.log.admin.describe([topic]))[topic].topic_id
        await committer.log.admin.delete([topic])
        await committer.create()
        after = (await committer.log.admin.describe([topic]))[topic].topic_id
        assert len(before) == len(after) == 36
        assert before != after
