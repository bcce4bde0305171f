"""Commits against a group and a producer that refuse: who is dropped, what is repeated, what is never sent twice."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from streamflow.clock import VirtualClock
from streamflow.errors import (
    ConfigurationError,
    FatalError,
    IndeterminateCommitError,
    LogFullError,
    LogUnavailableError,
    ProducerFencedError,
    ProductionError,
    TaskMigratedError,
)
from streamflow.log.api import (
    Admin,
    AtomicCommit,
    Group,
    GroupStatistics,
    Membership,
    OffsetMark,
    Producer,
    TransactionalProducer,
)
from streamflow.log.batch import SealedBatch
from streamflow.model.record import TopicPartition
from streamflow.runtime.at_least_once import AtLeastOnce
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.exactly_once import ExactlyOnce
from streamflow.runtime.task_view import Sealed
from streamflow.sensors import Sensors
from tests.runtime.waiting import until

SESSION_S = 10.0
A, B, OUT = TopicPartition("a", 0), TopicPartition("b", 0), TopicPartition("out", 0)


class FakeOutputs:
    def __init__(self) -> None:
        self.batches: list[tuple[TopicPartition, SealedBatch]] = []

    @property
    def waiting(self) -> bool:
        return bool(self.batches)

    def seal(self) -> list[tuple[TopicPartition, SealedBatch]]:
        sealed, self.batches = self.batches, []
        return sealed


class FakeTask:
    """A task that has processed up to `position`."""

    def __init__(self, tp: TopicPartition) -> None:
        self.tp = tp
        self.name = str(tp)
        self.position = 0
        self.committed = {tp: 0}
        self.lost = False
        self.outputs = FakeOutputs()
        self.anchor = tp
        self.commit_id = ""
        self.commit_ids_under_way: set[str] = set()
        self.checked_generation = -1
        self.tables = None

    def seal(self) -> Sealed:
        return Sealed(cast(Any, self), self.uncommitted(), self.outputs.seal(), False, {}, [])

    def is_committed_as(self, commit_id: str) -> None:
        self.commit_id = commit_id
        self.commit_ids_under_way.clear()

    def work(self, position: int) -> None:
        self.position = position
        self.outputs.batches.append((OUT, SealedBatch(bytearray(b"%d" % position), 1, 0)))

    def uncommitted(self) -> dict[TopicPartition, OffsetMark]:
        return {self.tp: OffsetMark(self.position)} if self.position > self.committed[self.tp] else {}

    def set_committed(self, offsets: dict[TopicPartition, OffsetMark]) -> None:
        self.committed.update({tp: mark.offset for tp, mark in offsets.items()})


class FakeGroup:
    def __init__(self) -> None:
        self.membership: Membership | None = Membership("g", "me", 7)
        self.assignment = frozenset({A, B})
        self.commits: list[dict[TopicPartition, int]] = []
        self.refuse: Callable[[], None] = lambda: None
        self.silent_s: float | None = 0.1
        self.marks: dict[TopicPartition, OffsetMark] = {}
        # How many commits are stored without an answer; a rebalance follows each.
        self.loses_answers = 0

    def statistics(self) -> GroupStatistics:
        return GroupStatistics(last_heartbeat_age_s=self.silent_s)

    async def committed(self, partitions: list[TopicPartition]) -> dict[TopicPartition, OffsetMark | None]:
        return {tp: self.marks.get(tp) for tp in partitions}

    async def commit(self, offsets: dict[TopicPartition, OffsetMark], membership: Membership) -> None:
        self.refuse()
        if self.loses_answers:
            self.loses_answers -= 1
            self.marks.update(offsets)
            self.membership = Membership("g", "me", 8)
            raise LogUnavailableError("no answer")
        self.commits.append({tp: mark.offset for tp, mark in offsets.items()})


class FakeProducer:
    """Refuses as `decide` says, else keeps."""

    def __init__(self) -> None:
        self.stored: list[tuple[list[bytes], dict[TopicPartition, int], int]] = []
        self.decide: Callable[[AtomicCommit], None] = lambda commit: None
        self.enqueued: list[bytes] = []
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None
        self.opening: asyncio.Event | None = None
        self.is_slow = False
        self.unanswered: list[asyncio.Future[int]] = []

    async def commit(self, commit: AtomicCommit) -> dict[TopicPartition, int]:
        if self.gate is not None:
            await self.gate.wait()
        self.decide(commit)
        offsets = {tp: mark.offset for tp, mark in commit.offsets.items()}
        generation = commit.membership.generation if commit.membership else -1
        self.stored.append(([batch.unstamped() for _, batch in commit.outputs], offsets, generation))
        return {}

    async def enqueue(self, tp: TopicPartition, batch: SealedBatch) -> "asyncio.Future[int]":
        if self.gate is not None:
            await self.gate.wait()
        self.enqueued.append(batch.unstamped())
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if self.is_slow:
            self.unanswered.append(future)
        elif self.error is None:
            future.set_result(0)
        else:
            future.set_exception(self.error)
        return future


class Fixture:
    def __init__(self, kind: type[ExactlyOnce] | type[AtLeastOnce]) -> None:
        self.producer, self.group, self.clock = FakeProducer(), FakeGroup(), VirtualClock()
        self.opened = 0
        group = lambda: cast(Group, self.group)  # noqa: E731
        self.delivery: ExactlyOnce | AtLeastOnce
        if kind is ExactlyOnce:
            self.delivery = ExactlyOnce("orders-1", self._open, cast(Admin, None), group, Sensors(), self.clock)
            self.delivery.patience_s = 0.05
        else:
            producer = cast(Producer, self.producer)
            self.delivery = AtLeastOnce(producer, group, Sensors(), self.clock, SESSION_S)
        self.overtaken: list[Any] = []
        self.delivery.overtaken = self.overtaken.append
        self.a, self.b = FakeTask(A), FakeTask(B)
        self.a.work(5)
        self.b.work(3)

    def mark_of(self, task: FakeTask) -> str:
        return CommitMark(task.commit_id).metadata()

    @asynccontextmanager
    async def _open(self, transactional_id: str) -> AsyncGenerator[TransactionalProducer]:
        assert transactional_id == "orders-1"
        self.opened += 1
        if self.producer.opening is not None:
            await self.producer.opening.wait()
        yield cast(TransactionalProducer, self.producer)

    async def commit(self) -> None:
        if isinstance(self.delivery, ExactlyOnce) and not self.opened:
            await self.delivery.__aenter__()
        await self.delivery.commit(cast(Any, [self.a, self.b]))

    async def commit_over_time(self) -> None:
        committing = asyncio.ensure_future(self.commit())
        while not committing.done():
            await asyncio.sleep(0)
            self.clock.advance(1)
        await committing


async def test_one_commit_over_all_tasks() -> None:
    at = Fixture(ExactlyOnce)
    await at.commit()
    assert at.producer.stored == [([b"5", b"3"], {A: 5, B: 3}, 7)]
    assert (at.a.committed, at.b.committed) == ({A: 5}, {B: 3})
    await at.commit()
    assert len(at.producer.stored) == 1  # nothing moved, nothing is sent
    assert at.delivery.trying_since_s is None


async def test_a_task_that_another_worker_has_committed_for_meanwhile_starts_anew() -> None:
    at = Fixture(ExactlyOnce)
    await at.commit()
    at.group.marks = {A: OffsetMark(9, CommitMark("theirs").metadata()), B: OffsetMark(3, at.mark_of(at.b))}
    at.a.work(6)
    at.b.work(4)
    await at.commit()  # no rebalance: nobody can have had them
    at.group.marks[B] = OffsetMark(4, at.mark_of(at.b))
    at.group.membership = Membership("g", "me", 9)
    at.a.work(7)
    at.b.work(5)
    await at.commit()
    assert [stored[1:] for stored in at.producer.stored[1:]] == [({A: 6, B: 4}, 7), ({B: 5}, 9)]
    assert at.a.lost
    assert at.overtaken == [at.a]


async def test_a_task_that_has_moved_away_is_dropped_and_the_others_are_committed() -> None:
    at = Fixture(ExactlyOnce)

    def refuse_a(commit: AtomicCommit) -> None:
        if A in commit.offsets:
            raise TaskMigratedError("a is gone")

    at.producer.decide = refuse_a
    await at.commit()
    assert at.producer.stored == [([b"3"], {B: 3}, 7)]
    assert (at.a.lost, at.b.lost) == (True, False)
    at.producer.decide = lambda commit: None
    at.a.work(9)  # it has not been closed yet; what it does now stands on dropped work
    at.b.work(4)
    await at.commit()
    assert at.producer.stored[1:] == [([b"4"], {B: 4}, 7)]


async def test_nothing_is_committed_for_a_task_that_is_another_workers_in_this_generation() -> None:
    """What was looked up before the partition was this member's would say nothing of what its owner commits after."""
    at = Fixture(ExactlyOnce)
    at.group.assignment = frozenset({B})  # the session was over, and a new one began before anybody was told
    await at.commit()
    at.group.assignment = frozenset({A, B})
    at.a.work(9)
    await at.commit()
    assert at.producer.stored == [([b"3"], {B: 3}, 7)]
    assert at.overtaken == [at.a]


async def test_no_membership_drops_everything() -> None:
    at = Fixture(ExactlyOnce)
    at.group.membership = None
    await at.commit()
    assert at.producer.stored == []
    assert at.a.lost
    assert at.b.lost


async def test_what_was_lost_with_the_membership_is_dropped_without_waiting_for_another() -> None:
    """A process that was stopped wakes up to a session that is over: nothing is left to commit."""
    at = Fixture(ExactlyOnce)
    at.group.membership = None
    at.a.lost = at.b.lost = True
    await asyncio.wait_for(at.commit(), 5)
    assert at.producer.stored == []


async def test_a_new_generation_that_came_while_the_old_one_was_refused_is_not_waited_for() -> None:
    at = Fixture(ExactlyOnce)
    at.delivery.patience_s = 60.0  # type: ignore[union-attr]

    def refuse_old(commit: AtomicCommit) -> None:
        if commit.membership == Membership("g", "me", 7):
            at.group.membership = Membership("g", "me", 8)  # before the refusal is known
            raise TaskMigratedError("generation 7 is over")

    at.producer.decide = refuse_old
    await asyncio.wait_for(at.commit(), 5)
    assert at.producer.stored == [([b"5", b"3"], {A: 5, B: 3}, 8)]


async def test_a_failed_commit_is_repeated_as_it_was() -> None:
    at = Fixture(ExactlyOnce)
    failures = [LogUnavailableError("away")] * 3

    def fail(commit: AtomicCommit) -> None:
        if failures:
            at.a.work(50)  # work goes on meanwhile
            assert at.delivery.trying_since_s is not None
            raise failures.pop()

    at.producer.decide = fail
    await at.commit_over_time()
    assert at.producer.stored == [([b"5", b"3"], {A: 5, B: 3}, 7)]
    await at.commit()
    assert at.producer.stored[1][1] == {A: 50}


async def test_a_commit_that_goes_on_failing_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    at = Fixture(ExactlyOnce)
    failures = [LogFullError("log x: no room to write")] * 9

    def fail(commit: AtomicCommit) -> None:
        if failures:
            raise failures.pop()

    at.producer.decide = fail
    await at.commit_over_time()
    assert [record.getMessage() for record in caplog.records] == [
        "commit: log x: no room to write; trying again until it succeeds"
    ]


async def test_what_a_cancelled_commit_had_sealed_comes_first_in_the_next() -> None:
    at = Fixture(ExactlyOnce)
    at.producer.gate = asyncio.Event()
    committing = asyncio.ensure_future(at.commit())
    await asyncio.sleep(0)
    committing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await committing
    at.a.work(6)
    at.producer.gate.set()
    await at.commit()
    assert [stored[1] for stored in at.producer.stored] == [{A: 5, B: 3}, {A: 6, B: 3}]
    assert [output for stored in at.producer.stored for output in stored[0]] == [b"5", b"3", b"6"]


async def test_a_rebalance_that_ends_meanwhile_sends_the_commit_again_under_the_new_generation() -> None:
    at = Fixture(ExactlyOnce)
    at.delivery.patience_s = 5.0  # type: ignore[union-attr]

    def refuse_old(commit: AtomicCommit) -> None:
        if commit.membership is not None and commit.membership.generation == 7:
            asyncio.get_running_loop().call_later(0.05, setattr, at.group, "membership", Membership("g", "me", 8))
            raise TaskMigratedError("generation 7 is over")

    at.producer.decide = refuse_old
    await at.commit()
    assert at.producer.stored == [([b"5", b"3"], {A: 5, B: 3}, 8)]
    assert not at.a.lost


@pytest.mark.parametrize("was_stored", [True, False])
async def test_a_commit_without_an_answer_is_looked_up_by_its_id_with_a_new_producer(was_stored: bool) -> None:
    at = Fixture(ExactlyOnce)
    ids: list[str] = []

    def lose_the_answer(commit: AtomicCommit) -> None:
        ids.append(CommitMark.of(commit.offsets[A]).id)
        if len(ids) == 1:
            at.a.work(50)  # work goes on meanwhile, and stands on what may have been committed
            if was_stored:
                at.group.marks = dict(commit.offsets)
            raise IndeterminateCommitError("no answer")

    at.producer.decide = lose_the_answer
    await at.commit()
    assert at.opened == 2
    assert len(ids) == (1 if was_stored else 2)
    assert len(set(ids)) == 1  # sent again as it was
    assert (at.a.committed, at.b.committed) == ({A: 5}, {B: 3})
    await at.commit()
    assert at.producer.stored[-1][:2] == ([b"50"], {A: 50})


async def test_whoever_looks_for_the_outcome_may_be_cancelled_and_the_next_commit_looks_first() -> None:
    """At a stop: what may have been stored is never sent again unseen."""
    at = Fixture(ExactlyOnce)
    answered = asyncio.Event()

    def lose(commit: AtomicCommit) -> None:
        at.producer.decide = lambda commit: None
        at.group.marks = dict(commit.offsets)
        raise IndeterminateCommitError("no answer")

    async def slowly(partitions: list[TopicPartition]) -> dict[TopicPartition, OffsetMark | None]:
        await answered.wait()
        return {tp: at.group.marks.get(tp) for tp in partitions}

    await at.commit()
    at.a.work(6)
    at.producer.decide = lose
    at.group.committed = slowly  # type: ignore[method-assign]
    committing = asyncio.ensure_future(at.commit())
    next_one = asyncio.ensure_future(at.commit())  # waits for its turn
    for _ in range(10):
        await asyncio.sleep(0)
    assert at.opened == 2
    committing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await committing
    answered.set()
    await next_one
    outputs = [output for stored in at.producer.stored for output in stored[0]]
    assert outputs == [b"5", b"3"]  # 6 was stored, without an answer
    assert at.a.committed == {A: 6}


async def test_a_commit_is_looked_up_also_where_the_new_producer_was_not_there_yet() -> None:
    at = Fixture(ExactlyOnce)
    await at.commit()

    def lose(commit: AtomicCommit) -> None:
        at.producer.decide = lambda commit: None
        raise IndeterminateCommitError("no answer")

    at.producer.decide = lose
    at.producer.opening = asyncio.Event()
    at.a.work(6)
    committing = asyncio.ensure_future(at.commit())
    for _ in range(5):
        await asyncio.sleep(0)
    committing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await committing
    at.producer.opening.set()
    at.group.marks = {A: OffsetMark(5, at.mark_of(at.a)), B: OffsetMark(3, at.mark_of(at.b))}
    await at.commit()
    assert [output for stored in at.producer.stored for output in stored[0]] == [b"5", b"3", b"6"]


async def test_of_an_unknown_commit_a_task_that_another_worker_has_committed_for_starts_anew() -> None:
    """Its changelog ends with what the other one wrote: to count that as in the local store would lose it."""
    at = Fixture(ExactlyOnce)

    def lose(commit: AtomicCommit) -> None:
        at.producer.decide = lambda commit: None
        at.group.marks = {A: commit.offsets[A], B: OffsetMark(9, CommitMark("theirs").metadata())}
        raise IndeterminateCommitError("no answer")

    at.producer.decide = lose
    await at.commit()
    assert at.producer.stored == []
    assert (at.a.committed, at.b.committed) == ({A: 5}, {B: 0})
    assert at.overtaken == [at.b]


async def test_an_unknown_commit_of_tasks_that_have_gone_is_dropped() -> None:
    at = Fixture(ExactlyOnce)

    def lose_both(commit: AtomicCommit) -> None:
        at.a.lost = at.b.lost = True
        raise IndeterminateCommitError("no answer")

    at.producer.decide = lose_both
    await at.commit()
    assert at.producer.stored == []
    assert (at.a.committed, at.b.committed) == ({A: 0}, {B: 0})


def fenced(at: Fixture, times: int, after: Callable[[], None] = lambda: None) -> Callable[[AtomicCommit], None]:
    """Fences so many producers, each at its first commit."""
    used: set[int] = set()

    def decide(commit: AtomicCommit) -> None:
        assert at.opened not in used, "a fenced producer was used again"
        if len(used) < times:
            used.add(at.opened)
            after()
            raise ProducerFencedError("a later producer has the id orders-1")

    return decide


async def test_a_member_whose_producer_is_fenced_again_and_again_has_a_double() -> None:
    at = Fixture(ExactlyOnce)
    at.producer.decide = fenced(at, 10)
    with pytest.raises(ConfigurationError, match="the data directory was copied"):
        await at.commit_over_time()
    assert at.opened == 10
    assert at.producer.stored == []


async def test_a_member_that_was_taken_for_dead_commits_with_a_new_producer() -> None:
    """By several, that each have some of its tasks and end what it has left at their time."""
    at = Fixture(ExactlyOnce)
    at.producer.decide = fenced(at, 9)
    await at.commit_over_time()
    assert at.opened == 10
    assert at.producer.stored == [([b"5", b"3"], {A: 5, B: 3}, 7)]
    assert (at.a.committed, at.b.committed) == ({A: 5}, {B: 3})


async def test_fences_are_counted_anew_for_a_new_member() -> None:
    """Each session that ends may have its own."""
    at = Fixture(ExactlyOnce)
    for number in range(4):
        at.group.membership = Membership("g", f"member {number}", 7)
        at.producer.decide = fenced(at, 9)
        at.a.work(10 + number)
        await at.commit_over_time()
    assert [offsets[A] for _, offsets, _ in at.producer.stored] == [10, 11, 12, 13]
    assert at.opened == 1 + 4 * 9


async def test_who_is_fenced_and_out_of_the_group_drops_what_is_gone_and_goes_on_with_a_new_producer() -> None:
    """It was stopped for longer than its session: its tasks are lost, and those that it gets later are committed."""
    at = Fixture(ExactlyOnce)

    def hear() -> None:
        at.a.lost = at.b.lost = True
        at.group.membership = None

    at.producer.decide = fenced(at, 1, hear)
    await at.commit_over_time()
    assert at.producer.stored == []
    at.group.membership = Membership("g", "me again", 9)
    at.a, at.b = FakeTask(A), FakeTask(B)
    at.a.work(7)
    await at.commit_over_time()
    assert at.opened == 2
    assert at.producer.stored == [([b"7"], {A: 7}, 9)]


async def test_a_new_producer_is_opened_also_when_whoever_wanted_to_was_cancelled() -> None:
    at = Fixture(ExactlyOnce)
    at.producer.decide = fenced(at, 1)
    await at.delivery.__aenter__()  # type: ignore[union-attr]
    at.producer.opening = asyncio.Event()
    committing = asyncio.ensure_future(at.commit())
    while at.opened < 2:
        await asyncio.sleep(0)
        at.clock.advance(1)
    committing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await committing
    at.producer.opening.set()
    await at.commit_over_time()
    assert at.producer.stored[0] == ([b"5", b"3"], {A: 5, B: 3}, 7)
    assert at.opened == 3


async def test_at_least_once_commits_offsets_after_the_outputs_are_acknowledged() -> None:
    at = Fixture(AtLeastOnce)
    await at.commit()
    assert at.producer.enqueued == [b"5", b"3"]
    assert at.group.commits == [{A: 5, B: 3}]


async def test_a_process_that_was_stopped_sends_nothing_before_it_heard_of_its_group() -> None:
    at = Fixture(AtLeastOnce)
    at.group.silent_s = SESSION_S + 1
    committing = asyncio.ensure_future(at.commit_over_time())
    for _ in range(20):
        await asyncio.sleep(0)
    assert at.producer.enqueued == []
    at.a.lost, at.group.assignment, at.group.silent_s = True, frozenset({B}), 0.1
    await committing
    assert at.producer.enqueued == [b"3"]
    assert at.group.commits == [{B: 3}]


async def test_at_least_once_repeats_only_the_offsets_and_leaves_out_what_is_gone() -> None:
    at = Fixture(AtLeastOnce)
    refusals = [TaskMigratedError("rebalance"), LogUnavailableError("moved")]

    def refuse() -> None:
        if refusals:
            at.group.assignment = frozenset({B})
            raise refusals.pop(0)

    at.group.refuse = refuse
    await at.commit_over_time()
    assert at.producer.enqueued == [b"5", b"3"]
    assert at.group.commits == [{B: 3}]
    assert at.a.committed == {A: 0}
    assert at.overtaken == [at.a]
    at.group.assignment = frozenset({A, B})  # before anybody was told that A had gone
    at.a.work(6)
    at.b.work(4)
    await at.commit()
    assert at.group.commits[1:] == [{B: 4}]


async def test_at_least_once_does_not_fall_back_behind_a_worker_that_had_the_partition_meanwhile() -> None:
    """A process that was stopped wakes up: its heartbeat has lost all and got it again before anybody was told."""
    at = Fixture(AtLeastOnce)
    await at.commit()
    at.group.marks = {A: OffsetMark(9, CommitMark("theirs").metadata()), B: OffsetMark(3, at.mark_of(at.b))}
    at.group.membership = Membership("g", "me anew", 9)
    at.a.work(6)
    at.b.work(4)
    await at.commit()
    assert at.group.commits[1:] == [{B: 4}]
    assert at.a.lost
    assert at.overtaken == [at.a]


async def test_at_least_once_sends_what_a_cancelled_send_has_left() -> None:
    at = Fixture(AtLeastOnce)
    at.producer.gate = asyncio.Event()
    committing = asyncio.ensure_future(at.commit())
    await asyncio.sleep(0)
    committing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await committing
    at.producer.gate.set()
    await at.commit()
    assert at.producer.enqueued == [b"5", b"3"]
    assert at.group.commits == [{A: 5, B: 3}]


async def test_a_commit_whose_answer_was_lost_before_a_rebalance_is_known_as_ones_own() -> None:
    at = Fixture(AtLeastOnce)
    tables = SimpleNamespace(
        is_level=True,
        is_pinned=True,
        incarnations={},
        serializers={},
        positions_after=lambda _: {},
        changelogs=dict,
        reached=lambda _: None,
    )
    at.a.tables = cast(Any, tables)
    at.group.loses_answers = 1
    await at.commit_over_time()
    assert not at.a.lost
    assert at.group.commits == [{A: 5, B: 3}]


async def test_a_commit_that_was_given_up_without_an_answer_is_known_as_ones_own_after_others_were_tried() -> None:
    """Two are under way: which of them the log has is not known, and neither is another worker's."""
    at = Fixture(AtLeastOnce)
    at.group.loses_answers = 1
    giving_up = asyncio.ensure_future(at.commit())
    await until(lambda: not at.group.loses_answers)
    giving_up.cancel()  # it waits before its next try
    with pytest.raises(asyncio.CancelledError):
        await giving_up
    given_up = dict(at.group.marks)

    def refuse() -> None:
        at.group.refuse = lambda: None
        at.group.membership = Membership("g", "me", 9)
        raise LogUnavailableError("no answer")

    at.group.refuse = refuse  # the second one does not come to the log
    at.a.work(6)
    await at.commit_over_time()
    assert at.group.marks == given_up
    assert at.overtaken == []
    assert at.group.commits == [{A: 6, B: 3}]


async def test_at_least_once_does_not_line_up_small_batches_behind_a_slow_log() -> None:
    """They would be acknowledged one by one, and the commit would wait for all of them."""
    at = Fixture(AtLeastOnce)
    at.producer.is_slow = True
    tasks = cast(Any, [at.a, at.b])
    for position in range(6, 106):
        at.a.work(position)
        await at.delivery.linger(tasks)
    sent = len(at.producer.enqueued)
    assert 2 < sent < 30
    assert at.a.outputs.waiting  # it gathers meanwhile
    for future in at.producer.unanswered:
        future.set_result(0)
    await asyncio.sleep(0)
    at.producer.is_slow = False
    await at.delivery.linger(tasks)
    assert len(at.producer.enqueued) == 102  # both tasks' first ones, and these 100


async def test_an_output_the_log_refuses_for_good_stops_the_worker() -> None:
    at = Fixture(AtLeastOnce)
    at.producer.error = ProductionError("too large")
    with pytest.raises(FatalError, match="an output could not be written: too large"):
        await at.commit()
    assert at.group.commits == []
