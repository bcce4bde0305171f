"""What each answer of a transaction coordinator means, without a broker."""

from types import SimpleNamespace

import pytest

from streamflow.errors import (
    AuthorizationError,
    IndeterminateCommitError,
    LogUnavailableError,
    ProducerFencedError,
    RetriableError,
)
from streamflow.log.kafka import codes
from streamflow.log.kafka.attempt import Attempt
from streamflow.log.kafka.producer import Identity
from streamflow.log.kafka.transaction_coordinator import TransactionCoordinator
from streamflow.model.record import TopicPartition

OURS, NEXT = Identity(7, 3), Identity(7, 4)
LOST = LogUnavailableError("no answer in time")
AWAY = LogUnavailableError("connection refused")


class ScriptedClient:
    """Answers what the test says, request by request: a code, or an exception instead of an answer."""

    def __init__(self, *script):
        self.script = list(script)
        self.asked = []
        self.looked_up = 0
        self.unreachable = 0

    async def coordinator(self, kind, key):
        assert (kind, key) == ("transaction", "x")
        self.looked_up += 1
        return self.looked_up

    async def ready(self, node, lane):
        if self.unreachable:
            self.unreachable -= 1
            raise AWAY

    async def send(self, node, call, lane=None, *, timeout_s=None):
        name = repr(call)
        if name.startswith("ApiVersions"):
            return SimpleNamespace(error_code=0, highest={0: 12, 26: 5, 28: 5}, features={"transaction.version": 2})
        self.asked.append(name)
        answer = self.script.pop(0)
        if isinstance(answer, Exception):
            raise answer
        topics = [("t", [(0, answer)])]
        return SimpleNamespace(error_code=answer, producer_id=7, producer_epoch=4, topics=topics)


def coordinator(*script, version=2):
    client = ScriptedClient(*script)
    made = TransactionCoordinator(client, "x", 10_000, (None, "coordinator"))  # type: ignore[arg-type]
    made.version = version
    return made, client


async def test_a_commit_is_asked_again_while_the_coordinator_says_later():
    made, client = coordinator(codes.CONCURRENT_TRANSACTIONS, codes.COORDINATOR_LOADING, codes.NONE)
    assert await made.commit(OURS, Attempt(5)) == NEXT
    assert client.asked == ["EndTxn v5"] * 3
    assert client.looked_up == 2  # anew after it was loading


async def test_version_1_keeps_its_identity():
    made, client = coordinator(codes.NONE, version=1)
    assert await made.commit(OURS, Attempt(5)) == OURS
    assert client.asked == ["EndTxn v1"]


@pytest.mark.parametrize("code", [codes.PRODUCER_FENCED, codes.INVALID_PRODUCER_EPOCH, codes.INVALID_TRANSACTION_STATE])
async def test_a_commit_that_is_refused_is_surely_not_stored(code):
    made, _ = coordinator(code)
    with pytest.raises(RetriableError, match=codes.NAMES[code]):
        await made.commit(OURS, Attempt(5))


@pytest.mark.parametrize("first", [codes.COORDINATOR_NOT_AVAILABLE, codes.NOT_COORDINATOR])
async def test_a_commit_refused_after_it_may_have_been_written_down_is_of_unknown_outcome(first):
    made, _ = coordinator(first, codes.PRODUCER_FENCED)
    with pytest.raises(IndeterminateCommitError):
        await made.commit(OURS, Attempt(5))


async def test_a_commit_that_may_have_been_written_down_when_its_time_is_over_is_of_unknown_outcome():
    made, _ = coordinator(*[codes.COORDINATOR_NOT_AVAILABLE] * 1000)
    with pytest.raises(IndeterminateCommitError):
        await made.commit(OURS, Attempt(0.05))


async def test_an_unanswered_commit_is_not_sent_again():
    made, client = coordinator(LOST)
    with pytest.raises(IndeterminateCommitError, match="no answer in time"):
        await made.commit(OURS, Attempt(5))
    assert len(client.asked) == 1


async def test_a_commit_that_was_never_sent_is_surely_not_stored():
    made, client = coordinator(codes.NONE)
    client.unreachable = 3
    assert await made.commit(OURS, Attempt(5)) == NEXT
    client.unreachable = 1000
    with pytest.raises(LogUnavailableError, match="refused"):
        await made.commit(OURS, Attempt(0.05))
    assert len(client.asked) == 1


async def test_an_abort_is_asked_until_it_is_answered():
    made, client = coordinator(LOST, codes.CONCURRENT_TRANSACTIONS, codes.NONE)
    assert await made.abort(OURS, Attempt(5)) == NEXT
    assert len(client.asked) == 3


@pytest.mark.parametrize("code", [codes.INVALID_TRANSACTION_STATE, codes.INVALID_PRODUCER_ID_MAPPING])
async def test_there_may_be_nothing_to_abort(code):
    made, _ = coordinator(code)
    assert await made.abort(OURS, Attempt(5)) == OURS


async def test_an_abort_tells_that_the_id_is_somebody_elses():
    made, _ = coordinator(codes.PRODUCER_FENCED)
    with pytest.raises(ProducerFencedError, match="'x' was taken over"):
        await made.abort(OURS, Attempt(5))


async def test_a_new_identity_is_waited_for_and_agrees_on_the_version():
    made, client = coordinator(codes.CONCURRENT_TRANSACTIONS, LOST, codes.NONE, version=1)
    assert await made.init(OURS, Attempt(5)) == NEXT
    assert made.version == 2
    assert made.has_ended
    assert len(client.asked) == 3


async def test_a_new_identity_where_nothing_was_open_has_ended_nothing():
    made, _ = coordinator(codes.COORDINATOR_LOADING, codes.NONE)
    assert await made.init(None, Attempt(5)) == NEXT
    assert not made.has_ended


async def test_a_new_identity_is_refused_to_who_has_been_succeeded():
    made, _ = coordinator(codes.PRODUCER_FENCED)
    with pytest.raises(ProducerFencedError):
        await made.init(OURS, Attempt(5))


async def test_who_may_not_use_the_id_is_told_which_acls_are_missing():
    made, _ = coordinator(53)
    with pytest.raises(AuthorizationError, match=r"transactional id 'x'.*Write and Describe on the transactional id"):
        await made.init(None, Attempt(5))


async def test_partitions_and_offsets_are_added_once_the_transaction_before_has_ended():
    made, client = coordinator(codes.CONCURRENT_TRANSACTIONS, codes.NONE, codes.NOT_COORDINATOR, codes.NONE, version=1)
    await made.add_partitions(OURS, [TopicPartition("t", 0)], Attempt(5))
    await made.add_offsets(OURS, "g", Attempt(5))
    assert client.asked == ["AddPartitionsToTxn v1"] * 2 + ["AddOffsetsToTxn v1"] * 2


async def test_what_cannot_be_added_is_not_asked_again():
    made, client = coordinator(codes.PRODUCER_FENCED, LOST, codes.TOPIC_AUTHORIZATION_FAILED, version=1)
    for error in (RetriableError, LogUnavailableError, AuthorizationError):
        with pytest.raises(error):
            await made.add_partitions(OURS, [TopicPartition("t", 0)], Attempt(5))
    assert len(client.asked) == 3


async def test_nothing_is_tried_again_once_the_attempt_is_lost():
    made, client = coordinator(codes.CONCURRENT_TRANSACTIONS, codes.NONE, version=1)
    attempt = Attempt(5)
    attempt.lost = True
    with pytest.raises(RetriableError, match="CONCURRENT_TRANSACTIONS"):
        await made.add_offsets(OURS, "g", attempt)
    assert len(client.asked) == 1
