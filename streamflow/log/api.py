"""The contract of a log: what the runtime may rely on, whichever log is behind it.

Promises, all checked by `tests/contracts/` on memory, SQLite and Kafka:

Order
    The records of a partition are read in offset order; two batches enqueued to one partition by one producer are
    stored in that order, also when one of them had to be sent again. Offsets grow; they may have holes.
Durability
    What was acknowledged is read again after any crash of any process (and, on SQLite with `synchronous=FULL`, after a
    power cut). What was not acknowledged may or may not be there; it is there at most once per `enqueue`.
Isolation
    Readers see whole batches, and of an atomic commit all or nothing. Records of an open or aborted transaction are
    never handed out.
Fencing
    A commit carries the membership it was made under; one that lost its partitions gets `TaskMigratedError` and nothing
    of that commit is stored. An atomic commit is also fenced by its transactional id, which has one holder at a time.
Errors
    `RetriableError`: nothing happened or it may have; the call may be repeated. `AuthorizationError`,
    `UnknownTopicError`, `LogCorruptedError`: stop. Third-party exceptions never come through.

Every object that runs something in the background is an asynchronous context manager that owns a task group: nothing
outlives its `async with`. All of it is used from one event loop.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from streamflow.errors import StreamFlowError
from streamflow.log.batch import RecordBatch, SealedBatch
from streamflow.model.record import TopicPartition

Isolation: TypeAlias = Literal["read_committed", "read_uncommitted"]


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Fetched:
    """What one `ask` brought for one partition.

    Attributes:
        tp: The partition.
        batches: Whole batches in order, checksum verified, aborted and control batches left out; may be empty when
            only the position moved (over an aborted transaction, a marker, a compacted hole).
        next_offset: Position after them: the next fetch starts here, and a committed offset may be set to it.
        end_offset: High watermark seen with them.
        size_bytes: Sum of the batches' stored sizes.
        error: An `OffsetOutOfRangeError`, or a fatal error of this partition; the reader has then removed it.
            `UnknownTopicError`: its topic was deleted. SQLite says so at once; Kafka after 10 s, as a broker may not
            have heard of a topic for a moment, and one that was made anew meanwhile is read on.
    """

    tp: TopicPartition
    batches: list[RecordBatch]
    next_offset: int
    end_offset: int
    size_bytes: int = 0
    error: StreamFlowError | None = None


class Reader(ABC):
    """One fetch lane. Back-pressure is not asking: a partition is fetched once per `ask`.

    A parked fetch of one partition never delays another partition that is asked for later by more than a few
    milliseconds.
    """

    @abstractmethod
    def add(self, tp: TopicPartition, offset: int) -> None:
        """Take a partition in at a position (>= 0). Nothing is fetched before `ask`."""

    @abstractmethod
    def remove(self, tp: TopicPartition) -> None:
        """Let a partition go; a fetch under way for it is dropped, `receive` never returns it again."""

    @abstractmethod
    def ask(self, tp: TopicPartition) -> None:
        """Want one more fetch of an added partition; repeating it before the answer changes nothing."""

    @abstractmethod
    async def receive(self) -> list[Fetched]:
        """Wait for answers.

        Returns:
            At least one; at most one per partition. Up to about 1 MiB of batches per partition and answer.

        Raises:
            FatalError: The lane cannot go on (authorization). A log that is away is waited for, with back-off.

        Cancellation: atomic; answers that were not returned come with the next call.
        """

    @abstractmethod
    def end_offset(self, tp: TopicPartition) -> int | None:
        """The newest known high watermark of an added partition; None before the first answer."""


# --- writing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OffsetMark:
    """A committed offset.

    Attributes:
        offset: The next record to process.
        metadata: Free text, at most 4,096 bytes.
    """

    offset: int
    metadata: str = ""


@dataclass(frozen=True, slots=True)
class Membership:
    """Under which group membership a commit is made.

    Attributes:
        group_id: Consumer group.
        member_id: Never empty.
        generation: One in which the partitions were owned, and since which they were kept: through later rounds it
            stays good for them. >= 0; a negative one is refused by every implementation (Kafka would take it unfenced).
        instance_id: The static name it is held under (`GroupSettings.instance_id`); who took that name over fences it.
    """

    group_id: str
    member_id: str
    generation: int
    instance_id: str | None = None


class Producer(ABC):
    """Writes batches at least once, idempotently, in order per partition."""

    @abstractmethod
    async def enqueue(self, tp: TopicPartition, batch: SealedBatch) -> asyncio.Future[int]:
        """Hand a batch over; waits only while the producer's memory bound is reached (back-pressure).

        Args:
            tp: Where to; the topic exists.
            batch: Sealed, not empty.

        Returns:
            A future of the base offset, done when the log has the batch durably. It fails with `ProductionError`
            (too large), `FatalError`, or `LogUnavailableError` once the delivery time-out is over. A failed batch fails
            every later one of that partition until `reset`. A future nobody awaits makes no noise.

        Cancellation: atomic; either the batch was taken or it was not.
        """

    @abstractmethod
    async def flush(self) -> None:
        """Wait until everything enqueued so far is acknowledged or failed; raises the first failure."""

    @abstractmethod
    def reset(self, tp: TopicPartition) -> None:
        """Accept batches of a partition again after one of it failed; without a failure this changes nothing."""


@dataclass(frozen=True, slots=True)
class AtomicCommit:
    """Everything that becomes visible together.

    Attributes:
        outputs: Batches in order, per partition in sequence.
        offsets: Committed offsets of source partitions.
        membership: Under which they are owned; None commits no offsets.
    """

    outputs: Sequence[tuple[TopicPartition, SealedBatch]]
    offsets: Mapping[TopicPartition, OffsetMark]
    membership: Membership | None


class TransactionalProducer(ABC):
    """Writes outputs and offsets as one atomic commit (exactly-once), one commit at a time, in the order of asking.

    After `IndeterminateCommitError` and `ProducerFencedError` it stores nothing any more (and says so by `ClosedError`,
    or `ProducerFencedError` again); after every other error the next commit may follow on the same producer.
    """

    @abstractmethod
    async def commit(self, commit: AtomicCommit) -> Mapping[TopicPartition, int]:
        """Store all of it or nothing.

        What is committed survives when this returns; on Kafka readers see it a few milliseconds later.

        Returns:
            Per output partition the offset after its last record (markers come after it).

        Raises:
            TaskMigratedError: The membership is not in the group any more, or it lost a partition. Nothing was stored.
            RetriableError: Nothing was stored; the same commit may be repeated (so while a rebalance is under way).
            ProductionError: The log refuses a batch for good (too large, invalid); the message names topic and
                partition. Nothing was stored.
            AuthorizationError: This user may not write a topic or commit for the group. Nothing was stored.
            UnknownTopicError: An output topic does not exist (any more). Nothing was stored.
            IndeterminateCommitError: It may have been stored. Close this producer and open one with the same id, which
                settles it either way; then the stable committed offsets tell which.
            ProducerFencedError: A later producer has this one's id, or the id was fenced (`Admin.fence_producer`).
                Nothing was stored.

        Cancellation: before the log is asked to decide, it is given up and nothing is stored. Then the outcome is
        waited for, and the cancellation is raised by the next await; on Kafka `transaction_timeout_ms` bounds that.
        """

    def abandon(self) -> None:  # noqa: B027 - where a commit is decided in this process, there is nothing to abandon
        """Wait no longer for a log that does not answer: the commit under way raises `IndeterminateCommitError` soon.

        For a process that has to end.
        """


# --- groups ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Member:
    """One member as the assignor sees it.

    Attributes:
        member_id: Its id.
        topics: What it subscribes to.
        owned: Partitions it owns now (KIP-429).
        says: What it said with its last join (`Group.say`); the log does not read it. Empty for a member that says
            nothing, such as a worker of an older version.
        instance_id: Its static name (KIP-345), or None.
    """

    member_id: str
    topics: frozenset[str]
    owned: frozenset[TopicPartition]
    says: bytes = b""
    instance_id: str | None = None


class Shorter(NamedTuple):
    """What to tell a member where the log cannot keep all that all members are told.

    Attributes:
        told: Instead of `Given.told`; shorter.
        without: What is missing in it and what that means, for a warning.
    """

    told: bytes
    without: str


@dataclass(frozen=True, slots=True)
class Given:
    """What the assignor gives one member.

    Attributes:
        partitions: What it is to own.
        told: What it is told beside; the log does not read it.
        shorter: What to tell it instead, from the longest to the shortest: what one member is told in short, all are.
    """

    partitions: frozenset[TopicPartition]
    told: bytes = b""
    shorter: Sequence[Shorter] = ()


Assignor: TypeAlias = Callable[[Sequence[Member], Mapping[str, int]], Mapping[str, Given]]
"""Pure: members (sorted by id) and partition counts per topic -> what each member id is given; a member that is left
out is given nothing. The group itself withholds what another member still owns until that member has revoked it
(cooperative, KIP-429)."""


@dataclass(frozen=True, slots=True)
class Assigned:
    """Partitions came: `generation` is the one they were assigned in."""

    partitions: frozenset[TopicPartition]
    generation: int


@dataclass(frozen=True, slots=True)
class Revoked:
    """Partitions are to go to another member: commit and close their tasks, then call `Group.revoked`."""

    partitions: frozenset[TopicPartition]


@dataclass(frozen=True, slots=True)
class Lost:
    """Partitions are gone already (session expired, `max_poll_interval` exceeded): drop their uncommitted work.

    Never said because a topic was deleted: the reader says that, and the worker stops.
    """

    partitions: frozenset[TopicPartition]
    reason: str


@dataclass(frozen=True, slots=True)
class Told:
    """What the assignor tells this member (`Given.told`) has changed.

    Of one round it comes after `Revoked` and before `Assigned`. To have been told nothing yet is to have been told b"".
    Who was told something and then lost its membership, with `Lost` or without partitions to lose, is told anew with
    the next one, be it the same.
    """

    told: bytes
    generation: int


GroupEvent: TypeAlias = Assigned | Revoked | Lost | Told


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """How a group member behaves.

    Attributes:
        session_timeout_ms: Silence after which the others take over; heartbeats never depend on user code.
        heartbeat_interval_ms: How often it says it is alive.
        rebalance_timeout_ms: How long a rebalance waits for a member to revoke.
        max_poll_interval_ms: Silence of `report_progress` after which the member gives its partitions up.
        instance_id: A name that outlives the process (KIP-345), which makes the member static: on exit it does not
            leave, and who joins under the name within the session takes its place. All that it had is assigned to the
            newcomer at once, in the generation that goes on, and the others notice nothing; only when the session is
            over do they take over. If the one before still runs, its `next_event` raises a `FatalError`, and its
            commits a `TaskMigratedError`: of two with one name the later one stays. None: a member that leaves.
    """

    session_timeout_ms: int = 10_000
    heartbeat_interval_ms: int = 300
    rebalance_timeout_ms: int = 60_000
    max_poll_interval_ms: int = 300_000
    instance_id: str | None = None


@dataclass(slots=True)
class GroupStatistics:
    """Counters a group keeps for the metrics.

    Attributes:
        rebalances: Rebalances completed.
        rebalance_s: Seconds spent in them.
        last_heartbeat_age_s: Seconds since the last heartbeat that was answered was sent; None before the first.
    """

    rebalances: int = 0
    rebalance_s: float = 0.0
    last_heartbeat_age_s: float | None = None


@dataclass(frozen=True, slots=True)
class Unheard:
    """A member that holds partitions and may be dead.

    Attributes:
        member: It, in words.
        partitions: How many it holds.
        session_timeout_s: Seconds of silence after which it is let go.
    """

    member: str
    partitions: int
    session_timeout_s: float


class Group(ABC):
    """Membership in a consumer group: joins on entering its context, leaves it (at once, unless static) on exit.

    It speaks deltas: what stays is never mentioned. Heartbeats go on whatever the event loop does.
    """

    @abstractmethod
    async def next_event(self) -> GroupEvent:
        """Wait for the next change, in order.

        Raises:
            FatalError: The group cannot be joined (authorization, protocol mismatch), or another member has joined
                under this one's `instance_id`.

        Cancellation: atomic; an event that was not returned comes with the next call.
        """

    @abstractmethod
    def say(self, words: bytes) -> None:
        """Set what the assignor is told of this member from the next round on (`Member.says`); asks for no round.

        Call it as often as it changes: it costs nothing until then. May be called from any thread.

        Args:
            words: At most some ten kilobytes: the log keeps them for every member.
        """

    @abstractmethod
    def rejoin(self, why: str) -> None:
        """Ask for a new round, to which every member says what it has to say. May be called from any thread.

        Asking again before the round has begun changes nothing, nor does it while this is no member: who joins says
        all it has to say.

        Args:
            why: For the log output.
        """

    @abstractmethod
    def revoked(self, partitions: frozenset[TopicPartition]) -> None:
        """Answer a `Revoked`: their tasks are committed and closed; they may go."""

    @property
    @abstractmethod
    def membership(self) -> Membership | None:
        """For the next commit; None while not a member. Kept partitions commit through a rebalance with it."""

    @property
    @abstractmethod
    def assignment(self) -> frozenset[TopicPartition]:
        """What this member owns now: assigned and neither revoked (answered) nor lost."""

    @abstractmethod
    async def committed(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, OffsetMark | None]:
        """Stable committed offsets (KIP-447: waits out an open transaction on them)."""

    @abstractmethod
    async def commit(self, offsets: Mapping[TopicPartition, OffsetMark], membership: Membership) -> None:
        """Commit offsets alone (at-least-once).

        Raises:
            TaskMigratedError: Fenced; nothing was stored.
            RetriableError: Repeat it with the current membership (a rebalance is under way, coordinator moved).
        """

    @abstractmethod
    def report_progress(self) -> None:
        """The event loop and every agent are getting on; called every few hundred milliseconds."""

    def unheard(self) -> Sequence[Unheard]:
        """Members that hold partitions and were not heard of since this one, which holds none, has joined.

        None where a member joins only when those that are silent are out, as on Kafka.
        """
        return ()

    @abstractmethod
    def statistics(self) -> GroupStatistics:
        """A copy of the counters."""


# --- administration ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewTopic:
    """A topic to create.

    Attributes:
        name: Its name.
        partitions: >= 1.
        replication: Copies; -1 is the broker's default (ignored by SQLite).
        config: Kafka topic configuration; SQLite honours `cleanup.policy`, `retention.ms`, `retention.bytes`,
            `min.compaction.lag.ms`, `delete.retention.ms`, `max.message.bytes`.
    """

    name: str
    partitions: int
    replication: int = -1
    config: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TopicDescription:
    """A topic as it is.

    Attributes:
        name: Its name.
        partitions: How many.
        config: Its configuration (those that differ from the default at least).
        topic_id: Unique per creation, or "" where the log has none.
    """

    name: str
    partitions: int
    config: Mapping[str, str]
    topic_id: str = ""


class Admin(ABC):
    """Topics, offsets, groups."""

    @abstractmethod
    async def describe(self, topics: Sequence[str]) -> Mapping[str, TopicDescription]:
        """Describe topics; one that does not exist is left out (and is not created)."""

    @abstractmethod
    async def topics(self) -> Sequence[str]:
        """Names of all topics, sorted; Kafka's own internal ones left out."""

    @abstractmethod
    async def create(self, topics: Sequence[NewTopic]) -> None:
        """Create topics and wait until they can be used; one that exists is left as it is."""

    @abstractmethod
    async def delete(self, topics: Sequence[str]) -> None:
        """Delete topics; one that does not exist is no error."""

    @abstractmethod
    async def start_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """First offset that is still there."""

    @abstractmethod
    async def end_offsets(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """End offset of what readers may see now (the last stable offset)."""

    @abstractmethod
    async def high_watermarks(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, int]:
        """End offset of what is stored now, open transactions included.

        A `read_committed` reader's position reaches it once they have ended: the target of a restore.
        """

    @abstractmethod
    async def delete_records(self, before: Mapping[TopicPartition, int]) -> None:
        """Purge records below an offset (repartition topics, after commit)."""

    @abstractmethod
    async def groups(self) -> Sequence[str]:
        """Ids of the consumer groups the log knows, sorted."""

    @abstractmethod
    async def group_offsets(self, group_id: str, *, stable: bool = False) -> Mapping[TopicPartition, OffsetMark]:
        """All committed offsets of a group, without joining it.

        Args:
            group_id: The group; one that does not exist has none.
            stable: Wait out open transactions on them, so that no commit under way is missed.
        """

    @abstractmethod
    async def group_members(self, group_id: str) -> Sequence[str]:
        """Who is in a group, in words that help to find them, instance ids with them; empty when nobody is.

        A member that was killed counts until its session is over, unless it is certain that its process has ended:
        only SQLite can tell that, and may take a session to find out about a member on another machine or boot.
        """

    @abstractmethod
    async def fence_producer(self, transactional_id: str) -> bool:
        """End what a producer with this id has left open, for a process that is gone; a commit under way is waited for.

        A producer with this id that lives all the same stores nothing any more: its next commit raises
        `ProducerFencedError`. One that is opened later is as good as any.

        Returns:
            Whether something was open, or was being committed, as far as the log has said.

        Raises:
            AuthorizationError: This user may not use the id.
            RetriableError: It did not come about in time, or it did and the answer was lost.
        """

    @abstractmethod
    async def delete_group(self, group_id: str) -> None:
        """Forget a group with all its committed offsets; one that does not exist is no error.

        Raises:
            GroupInUseError: It has live members; nothing was deleted.
        """


# --- the log -----------------------------------------------------------------------------------------------------


class Log(ABC):
    """A connection to a log: `async with` opens and closes it; what it makes must be closed before it."""

    @property
    @abstractmethod
    def address(self) -> str:
        """The absolute address, for people: never a secret in it."""

    @property
    @abstractmethod
    def admin(self) -> Admin:
        """Administration."""

    @abstractmethod
    async def __aenter__(self) -> Log:
        """Connect.

        Raises:
            LogUnavailableError: Nobody answers within the connection time-out; the message names the address.
            ConfigurationError: The address or the credentials cannot be used.
        """

    @abstractmethod
    async def __aexit__(self, *exc_info: object) -> None:
        """Disconnect."""

    @abstractmethod
    def reader(self, lane: str, *, isolation: Isolation = "read_committed") -> AbstractAsyncContextManager[Reader]:
        """Open a fetch lane.

        Args:
            lane: A name of its own (`source`, `restore`, `tail`): lanes do not delay one another.
            isolation: `read_uncommitted` also returns open transactions.
        """

    @abstractmethod
    def producer(self, *, delivery_timeout_s: float = 120.0) -> AbstractAsyncContextManager[Producer]:
        """Open an idempotent producer; exit flushes (within 5 s) and closes it.

        Args:
            delivery_timeout_s: After this time without an answer a batch fails with `LogUnavailableError`.
        """

    @abstractmethod
    def transactional_producer(self, transactional_id: str) -> AbstractAsyncContextManager[TransactionalProducer]:
        """Open a producer of atomic commits; a later one with the same id fences this one.

        What an earlier one with this id has left open is completed or aborted before this returns, so that stable
        committed offsets read afterwards say what became of it.

        Raises:
            AuthorizationError: This user may not use the id; the message names the missing permission.
            ConfigurationError: The log does not take the transaction time-out.
            RetriableError: The log does not answer, or the earlier transaction does not end.
        """

    @abstractmethod
    def group(
        self,
        group_id: str,
        topics: frozenset[str],
        assignor: Assignor,
        settings: GroupSettings,
        says: bytes = b"",
    ) -> AbstractAsyncContextManager[Group]:
        """Join a consumer group.

        Args:
            group_id: The app's id.
            topics: Existing topics to take part in; no partitions is a legal assignment.
            assignor: Used where this member is the one that assigns; on Kafka it is called in another thread.
            settings: Time-outs.
            says: What it says with its first join, see `Group.say`.
        """

    @abstractmethod
    async def changed(self) -> None:
        """Wait until anything may have been written by anyone (or about 100 ms); for polls of offsets."""
