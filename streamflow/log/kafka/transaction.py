"""Exactly-once on Kafka: outputs and offsets as one transaction per commit.

A commit opens a transaction, sends its batches to their leaders and its offsets to the group's coordinator side by
side, and commits. What goes wrong before that last request is aborted, and the producer takes a new identity: an old
one is never used again (its sequence numbers may be spent, its requests may still be under way). When that last request
is not answered, the outcome is unknown here, and this producer is of no use any more.

Whether an identity is still ours, the coordinator says: a new one is asked for as the successor of the old one. Only a
transaction that has outlived its time-out makes an exception: the coordinator has fenced it itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any

import anyio

from streamflow.errors import (
    ClosedError,
    IndeterminateCommitError,
    InternalError,
    ProducerFencedError,
    RetriableError,
    StreamFlowError,
    TaskMigratedError,
)
from streamflow.log.api import AtomicCommit, Membership, OffsetMark, TransactionalProducer
from streamflow.log.kafka.attempt import Attempt
from streamflow.log.kafka.client import Client
from streamflow.log.kafka.memberships import Memberships
from streamflow.log.kafka.producer import Identity
from streamflow.log.kafka.transaction_coordinator import TransactionCoordinator
from streamflow.log.kafka.transaction_offsets import MembershipRefusedError, TransactionOffsets
from streamflow.log.kafka.transaction_outputs import TransactionOutputs
from streamflow.log.tasks import cancel_again
from streamflow.model.record import TopicPartition

logger = logging.getLogger("streamflow.kafka")

_OPEN_TIMEOUT_S = 30.0
_CLOSE_TIMEOUT_S = 5.0
_ABORT_TIMEOUT_S = 1.0


class KafkaTransactionalProducer(TransactionalProducer):
    """A `TransactionalProducer`; enter it with `async with`, which takes the transactional id over.

    Args:
        client: The data loop's connections.
        limits: `max.message.bytes` per topic, filled by whoever describes topics.
        transactional_id: A later producer with the same id fences this one.
        memberships: The groups of this process.
    """

    def __init__(
        self, client: Client, limits: Mapping[str, int], transactional_id: str, memberships: Memberships
    ) -> None:
        timeout_ms = client.options.transaction_timeout_ms
        self._client = client
        self._id = transactional_id
        self._memberships = memberships
        self._timeout_s = timeout_ms / 1000
        self._coordinator = TransactionCoordinator(client, transactional_id, timeout_ms, (self, "coordinator"))
        self._outputs = TransactionOutputs(client, limits, transactional_id, (self, "produce"), timeout_ms)
        self._offsets = TransactionOffsets(client, transactional_id, (self, "offsets"))
        self._identity = Identity(-1, -1)
        self._opened_at: float | None = None
        self._is_deciding = False
        self._of_no_use: StreamFlowError | None = None
        self._one_at_a_time = asyncio.Lock()
        self._committing: asyncio.Task[Mapping[TopicPartition, int]] | None = None
        self._closed = False

    async def __aenter__(self) -> KafkaTransactionalProducer:
        try:
            self._identity = await self._take_over(Attempt(max(self._timeout_s, _OPEN_TIMEOUT_S)))
        except BaseException:
            self._client.close_lane(self)
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closed = True
        if (task := self._committing) is not None:  # its caller was cancelled twice
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task], timeout=_CLOSE_TIMEOUT_S)
                task.cancel()
                await asyncio.wait([task])
        if self._opened_at is not None and self._of_no_use is None:  # else readers wait until it times out
            with anyio.move_on_after(_ABORT_TIMEOUT_S, shield=True):
                with suppress(ProducerFencedError):
                    await self._abort(ClosedError("the producer is closed"))
        self._client.close_lane(self)

    # --- contract ------------------------------------------------------------------------------------------------

    async def commit(self, commit: AtomicCommit) -> Mapping[TopicPartition, int]:
        async with self._one_at_a_time:
            while self._committing is not None:  # whoever asked for it was cancelled twice
                await asyncio.wait([self._committing])
            self._raise_if_of_no_use()
            task = self._committing = asyncio.create_task(self._commit(commit), name=f"commit {self._id}")
            task.add_done_callback(self._on_committed)
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                if not self._is_deciding:
                    task.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([task])
                if task.cancelled():  # nothing is stored
                    raise
                cancel_again()
            if task.cancelled() and self._of_no_use is not None:
                raise self._of_no_use
            return task.result()

    def abandon(self) -> None:
        if (task := self._committing) is not None:
            self._of_no_use = IndeterminateCommitError(
                f"transactional id {self._id!r}: the commit was abandoned before the brokers answered"
            )
            task.cancel()

    def _raise_if_of_no_use(self) -> None:
        if isinstance(self._of_no_use, ProducerFencedError):
            raise ProducerFencedError(str(self._of_no_use))
        if self._closed or self._of_no_use is not None:
            why = f"can commit nothing after: {self._of_no_use}" if self._of_no_use else "is closed"
            raise ClosedError(f"the producer of transactional id {self._id!r} {why}")

    def _on_committed(self, task: asyncio.Task[Mapping[TopicPartition, int]]) -> None:
        self._committing = None
        if not task.cancelled():
            task.exception()  # seen, also when nobody waits any more

    # --- one commit ----------------------------------------------------------------------------------------------

    async def _commit(self, commit: AtomicCommit) -> Mapping[TopicPartition, int]:
        sent = self._current(commit)
        if not commit.outputs and not commit.offsets:
            return {}
        try:
            if self._opened_at is not None:
                await self._settle()
            ends = await self._send(commit, sent)
            await self._end()
        except MembershipRefusedError as error:
            if (why := await self._why_refused(error, commit, sent)) is None:
                raise
            raise why from error
        except (IndeterminateCommitError, ProducerFencedError) as error:
            self._of_no_use = error
            raise
        except StreamFlowError:
            raise
        except Exception as exc:
            self._of_no_use = InternalError(f"the commit of {self._id!r} failed: {exc!r}")
            raise self._of_no_use from exc
        return ends

    def _current(self, commit: AtomicCommit) -> Membership | None:
        if commit.membership is not None:
            return self._memberships.current(commit.offsets, commit.membership)
        if commit.offsets:
            raise TaskMigratedError("a commit of offsets needs the membership under which they are owned")
        return None

    async def _why_refused(
        self, error: MembershipRefusedError, commit: AtomicCommit, sent: Membership | None
    ) -> StreamFlowError | None:
        """Nothing is stored by now; a group of this process has more to say, once its round is over."""
        if commit.membership is None or sent is None:
            return None
        return await self._memberships.why_refused(error.told, commit.offsets, commit.membership, sent)

    async def _send(self, commit: AtomicCommit, membership: Membership | None) -> dict[TopicPartition, int]:
        """Everything but the end; what fails is aborted."""
        attempt = Attempt(self._timeout_s)
        await self._outputs.find_leaders({tp for tp, _ in commit.outputs}, attempt)
        self._opened_at = time.monotonic()
        try:
            steps: list[Coroutine[Any, Any, dict[TopicPartition, int]]] = []
            if commit.outputs:
                steps.append(self._send_outputs(commit, attempt))
            if commit.offsets and membership is not None:
                steps.append(self._send_offsets(commit.offsets, membership, attempt))
            # Both to their ends, also when one fails: an abort must not overtake a request that is under way.
            told = await asyncio.gather(*steps, return_exceptions=True)
            failures = [each for each in told if isinstance(each, BaseException)]
            if failures:
                raise min(failures, key=lambda failure: isinstance(failure, RetriableError))
        except StreamFlowError as error:
            await self._abort(error)
            raise
        return {tp: end for each in told if isinstance(each, dict) for tp, end in each.items()}

    async def _send_outputs(self, commit: AtomicCommit, attempt: Attempt) -> dict[TopicPartition, int]:
        version = self._coordinator.version
        with attempt:
            if version == 1:
                tps = dict.fromkeys(tp for tp, _ in commit.outputs)
                await self._coordinator.add_partitions(self._identity, tps, attempt)
            return await self._outputs.store(commit.outputs, self._identity, version, attempt)

    async def _send_offsets(
        self, offsets: Mapping[TopicPartition, OffsetMark], membership: Membership, attempt: Attempt
    ) -> dict[TopicPartition, int]:
        version = self._coordinator.version
        with attempt:
            if version == 1:
                await self._coordinator.add_offsets(self._identity, membership.group_id, attempt)
            await self._offsets.store(offsets, membership, self._identity, version, attempt)
        return {}

    async def _end(self) -> None:
        self._is_deciding = True
        try:
            identity = await self._coordinator.commit(self._identity, Attempt(self._timeout_s))
        except RetriableError as error:
            self._is_deciding = False
            await self._abort(error)
            raise
        finally:
            self._is_deciding = False
        self._opened_at = None
        self._take(identity)

    # --- a new identity ------------------------------------------------------------------------------------------

    async def _abort(self, error: StreamFlowError) -> None:
        """Abort now, so that nobody waits for the time-out; what does not succeed is done before the next commit."""
        logger.debug("transactional id %s: aborting: %s", self._id, error)
        try:
            await self._settle()
        except ProducerFencedError:
            raise
        except StreamFlowError as exc:
            logger.warning("transactional id %s: could not abort yet: %s", self._id, exc)

    async def _settle(self) -> None:
        """End what may be open and take a new identity.

        Raises:
            ProducerFencedError: Somebody else has the id.
            RetriableError: It did not come about in time.
        """
        attempt = Attempt(self._timeout_s)
        try:
            expected = await self._coordinator.abort(self._identity, attempt)
            identity = await self._coordinator.init(expected, attempt)
        except ProducerFencedError:
            if not self._has_timed_out():
                raise
            identity = await self._take_over(attempt)
        self._opened_at = None
        self._outputs.restart()
        self._take(identity)

    async def _take_over(self, attempt: Attempt) -> Identity:
        """Take the id from whoever has it, and make sure of it.

        A request for it that was not answered, of this producer or of one before, may be carried out after ours and
        would fence us; a second request, as the successor of the first, notices.
        """
        while True:
            taken = await self._coordinator.init(None, attempt)
            try:
                return await self._coordinator.init(taken, attempt)
            except ProducerFencedError as error:
                logger.debug("%s; taking it again", error)

    def _has_timed_out(self) -> bool:
        return self._opened_at is not None and time.monotonic() - self._opened_at >= self._timeout_s

    def _take(self, identity: Identity) -> None:
        if identity != self._identity:
            self._identity = identity
            self._outputs.restart_sequences()
