"""The waves in which a transaction's batches go, without a broker."""

import asyncio
from types import SimpleNamespace

import pytest

from streamflow.errors import LogUnavailableError, ProductionError, RetriableError, UnknownTopicError
from streamflow.log.kafka import codes
from streamflow.log.kafka.attempt import Attempt
from streamflow.log.kafka.hot import MAX_PRODUCE_BYTES, ProducedPartition
from streamflow.log.kafka.producer import Identity
from streamflow.log.kafka.transaction_outputs import TransactionOutputs
from streamflow.model.record import TopicPartition
from tests.contracts.records import batch, numbered

A, B, C = (TopicPartition("t", number) for number in range(3))
OURS = Identity(7, 3)


class FakeLeaders:
    """Keeps what it is sent, as a leader does: in sequence, or refused; `refuse` may say otherwise first."""

    def __init__(self):
        self.leads = {A: 1, B: 1, C: 2}
        self.requests = []
        self.stored = {tp: [] for tp in self.leads}
        self.sequences = dict.fromkeys(self.leads, 0)
        self.refuse = lambda request, tp: codes.NONE
        self.lose = lambda request: False
        self.most_in_flight = self.in_flight = 0
        self.refreshed = 0
        self.unknown_s = 0.0

    def leader(self, tp):
        return self.leads.get(tp)

    async def refresh(self, topics):
        self.refreshed += 1

    async def leaders(self, tps):
        if self.unknown_s:
            raise UnknownTopicError("use t: the topic does not exist")

    def unknown_for_s(self, topic):
        return self.unknown_s

    async def send(self, node, call, lane=None, *, timeout_s=None):
        number = len(self.requests)
        request = [(tp, *self.header(data)) for tp, data in call]
        self.requests.append((node, [tp for tp, *_ in request]))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0.001)
        self.in_flight -= 1
        if self.lose(number):
            raise LogUnavailableError("connection lost")
        return SimpleNamespace(partitions=[self.take(number, *each) for each in request])

    def header(self, data):
        return int.from_bytes(data[53:57], "big"), int.from_bytes(data[57:61], "big")

    def take(self, number, tp, sequence, records):
        code = self.refuse(number, tp)
        if not code and sequence != self.sequences[tp]:
            code = codes.OUT_OF_ORDER_SEQUENCE
        if code:
            return ProducedPartition(tp, code, -1, -1)
        offset = sum(self.stored[tp])
        self.stored[tp].append(records)
        self.sequences[tp] = sequence + records
        return ProducedPartition(tp, codes.NONE, offset, 0)


@pytest.fixture
def leaders(monkeypatch):
    for name in ("PRODUCE", "PRODUCE_2"):
        monkeypatch.setattr(f"streamflow.log.kafka.transaction_outputs.{name}", lambda batches, **_: batches)
    return FakeLeaders()


def outputs_to(leaders):
    return TransactionOutputs(leaders, {}, "x", (None, "produce"), 10_000)


async def test_the_first_batch_goes_alone_and_five_follow_at_a_time(leaders):
    outputs = [(A, numbered(range(n))) for n in range(1, 13)]
    ends = await outputs_to(leaders).store(outputs, OURS, 2, Attempt(5))
    assert leaders.stored[A] == list(range(1, 13))
    assert ends == {A: sum(range(1, 13))}
    assert leaders.most_in_flight == 5


async def test_partitions_of_one_leader_share_a_request_and_leaders_are_written_to_side_by_side(leaders):
    outputs = [(tp, batch(b"x")) for tp in (A, B, C)]
    assert await outputs_to(leaders).store(outputs, OURS, 2, Attempt(5)) == {A: 1, B: 1, C: 1}
    assert leaders.requests == [(1, [A, B]), (2, [C])]
    assert leaders.most_in_flight == 2


async def test_a_request_is_cut_to_size(leaders):
    large = batch(bytes(MAX_PRODUCE_BYTES // 2 + 1))
    await outputs_to(leaders).store([(A, large), (B, large)], OURS, 2, Attempt(5))
    assert leaders.requests == [(1, [A]), (1, [B])]


async def test_what_was_refused_for_now_goes_again_in_order(leaders):
    refused = {0: codes.CONCURRENT_TRANSACTIONS, 3: 6, 4: codes.NOT_ENOUGH_REPLICAS}
    leaders.refuse = lambda number, tp: refused.get(number, codes.NONE)
    outputs = [(A, numbered(range(n))) for n in range(1, 9)]
    await outputs_to(leaders).store(outputs, OURS, 2, Attempt(5))
    assert leaders.stored[A] == list(range(1, 9))
    assert leaders.refreshed == 1  # for the leader that has moved only


async def test_sequences_go_on_until_there_is_a_new_identity(leaders):
    to = outputs_to(leaders)
    for _ in range(2):
        await to.store([(A, numbered(range(3)))], OURS, 1, Attempt(5))
    assert leaders.sequences[A] == 6
    to.restart_sequences()
    with pytest.raises(RetriableError, match="OUT_OF_ORDER"):
        await to.store([(A, numbered(range(3)))], OURS, 1, Attempt(5))


async def test_an_unanswered_request_ends_the_attempt_once_the_others_are_answered(leaders):
    leaders.lose = lambda number: number == 1
    to = outputs_to(leaders)
    with pytest.raises(LogUnavailableError, match="lost"):
        await to.store([(A, batch(b"x")) for _ in range(9)], OURS, 2, Attempt(5))
    assert leaders.in_flight == 0
    assert len(leaders.requests) <= 6
    await to.find_leaders([A], Attempt(5))
    assert leaders.refreshed == 1  # it may not lead any more
    await to.find_leaders([A], Attempt(5))
    assert leaders.refreshed == 1


async def test_a_batch_that_is_refused_for_good_is_named(leaders):
    leaders.refuse = lambda number, tp: codes.MESSAGE_TOO_LARGE if tp == B else codes.NONE
    with pytest.raises(ProductionError, match=r"t-1.*MESSAGE_TOO_LARGE"):
        await outputs_to(leaders).store([(A, batch(b"x")), (B, batch(b"x"))], OURS, 2, Attempt(5))


async def test_nothing_goes_again_once_the_attempt_is_lost(leaders):
    leaders.refuse = lambda number, tp: codes.CONCURRENT_TRANSACTIONS
    attempt = Attempt(5)
    attempt.lost = True
    with pytest.raises(RetriableError, match="CONCURRENT_TRANSACTIONS"):
        await outputs_to(leaders).store([(A, batch(b"x"))], OURS, 2, attempt)
    assert len(leaders.requests) == 1


async def test_a_topic_that_may_still_appear_is_waited_for_and_one_that_does_not_is_named(leaders):
    del leaders.leads[A]
    leaders.unknown_s = 0.1
    with pytest.raises(RetriableError, match="does not exist"):
        await outputs_to(leaders).find_leaders([A], Attempt(0.1))
    leaders.unknown_s = 60.0
    with pytest.raises(UnknownTopicError, match="does not exist"):
        await outputs_to(leaders).find_leaders([A], Attempt(5))
