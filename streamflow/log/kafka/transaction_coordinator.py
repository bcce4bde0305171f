"""What a transactional producer asks its transaction coordinator: an identity, and the two ends of a transaction.

An answer that says "later" is waited out. A request that is not answered is not repeated within a transaction: it may
still be carried out, so its caller aborts and takes a new identity, which that request then no longer fits (KIP-890
tells what delayed requests have done to later transactions). Only what must be answered in the end, the abort and the
new identity, is asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import anyio

from streamflow.errors import (
    ConfigurationError,
    IndeterminateCommitError,
    LogUnavailableError,
    ProducerFencedError,
    RetriableError,
    StreamFlowError,
)
from streamflow.log.kafka import codes, wire
from streamflow.log.kafka.attempt import Attempt
from streamflow.log.kafka.client import Client
from streamflow.log.kafka.producer import Identity
from streamflow.log.kafka.wire_transaction import (
    ADD_OFFSETS_TO_TXN,
    ADD_PARTITIONS_TO_TXN,
    API_VERSIONS,
    END_TXN,
    END_TXN_2,
    transaction_version,
)
from streamflow.model.record import TopicPartition

FENCED = frozenset({codes.INVALID_PRODUCER_EPOCH, codes.PRODUCER_FENCED})
_LATER = codes.COORDINATOR_MOVED | {codes.CONCURRENT_TRANSACTIONS}
_NOTHING_OPEN = frozenset({codes.INVALID_TRANSACTION_STATE, codes.INVALID_PRODUCER_ID_MAPPING})
_MAY_BE_WRITTEN = frozenset({codes.COORDINATOR_NOT_AVAILABLE, codes.NOT_COORDINATOR, codes.UNKNOWN_SERVER_ERROR})

_Code: TypeAlias = Callable[[Any], int]


class TransactionCoordinator:
    """The coordinator of one transactional id, wherever it moves.

    Args:
        client: Connections.
        transactional_id: Whose coordinator.
        timeout_ms: Of its transactions.
        lane: A connection of its own.

    Attributes:
        version: Of the transaction protocol, 1 or 2; known after `init`.
        has_ended: Whether `init` was told to wait for the end of a transaction: it was open, and is aborted by that, or
            was ending.
    """

    def __init__(self, client: Client, transactional_id: str, timeout_ms: int, lane: tuple[object, str]) -> None:
        self.version = 1
        self.has_ended = False
        self._client = client
        self._id = transactional_id
        self._timeout_ms = timeout_ms
        self._lane = lane
        self._node: int | None = None

    # --- identity ------------------------------------------------------------------------------------------------

    async def init(self, expected: Identity | None, attempt: Attempt) -> Identity:
        """Take a new identity; every older one of this id is fenced, and its open transaction is ended.

        Args:
            expected: The identity it follows; None takes the id from whoever has it.
            attempt: The bound.

        Raises:
            ProducerFencedError: Somebody else has the id since `expected`.
            AuthorizationError: This user may not use it.
            ConfigurationError: The brokers do not allow this time-out.
            RetriableError: It did not come about in time.
        """
        what = f"open transactional id {self._id!r}"
        fields = (-1, -1) if expected is None else (expected.producer_id, expected.epoch)
        call = wire.INIT_PRODUCER_ID(self._id, self._timeout_ms, *fields)
        failures = 0
        while True:
            try:
                response = await self._ask(call, what, attempt)
                code = response.error_code
                if not code:
                    self.version = await self._agreed_version(what, attempt)
                    return Identity(response.producer_id, response.producer_epoch)
                self.has_ended |= code == codes.CONCURRENT_TRANSACTIONS
                if code in FENCED:
                    raise self.fenced(code)
                if code == codes.INVALID_TRANSACTION_TIMEOUT:
                    raise ConfigurationError(
                        f"{what}: the brokers do not allow transaction_timeout_ms={self._timeout_ms} "
                        f"({codes.name(code)}); lower it, or raise their transaction.max.timeout.ms"
                    )
                self._on_refused(code)
                raise codes.error(code, what)
            except RetriableError as error:
                failures += 1
                await attempt.pause(failures, error, brief=True)

    async def _agreed_version(self, what: str, attempt: Attempt) -> int:
        versions = await self._ask(API_VERSIONS(), what, attempt)
        if versions.error_code:
            raise codes.error(versions.error_code, what)
        return transaction_version(versions)

    def fenced(self, code: int) -> ProducerFencedError:
        """The error that says so."""
        return ProducerFencedError(
            f"transactional id {self._id!r} was taken over by a later producer ({codes.name(code)}): another worker "
            "has taken this one for dead, or has its slot; nothing was stored"
        )

    # --- within a transaction ------------------------------------------------------------------------------------

    async def add_partitions(self, identity: Identity, tps: Iterable[TopicPartition], attempt: Attempt) -> None:
        """Make partitions part of the transaction (version 1).

        Raises:
            RetriableError, AuthorizationError: They are not; abort.
        """
        topics: dict[str, list[int]] = {}
        for topic, partition in tps:
            topics.setdefault(topic, []).append(partition)
        call = ADD_PARTITIONS_TO_TXN(self._id, identity.producer_id, identity.epoch, list(topics.items()))

        def worst(response: Any) -> int:
            told = {code for _topic, parts in response.topics for _partition, code in parts}
            # Not attempted, as another one was refused: that one says why.
            told -= {codes.NONE, codes.OPERATION_NOT_ATTEMPTED}
            return max(told, default=codes.NONE)

        await self._until_answered(call, worst, f"write to {', '.join(sorted(topics))} transactionally", attempt)

    async def add_offsets(self, identity: Identity, group_id: str, attempt: Attempt) -> None:
        """Make a group's offsets part of the transaction (version 1).

        Raises:
            RetriableError, AuthorizationError: They are not; abort.
        """
        call = ADD_OFFSETS_TO_TXN(self._id, identity.producer_id, identity.epoch, group_id)
        await self._until_answered(call, _error_code, f"commit offsets of group {group_id} transactionally", attempt)

    async def _until_answered(self, call: wire.Call, worst: _Code, what: str, attempt: Attempt) -> None:
        failures = 0
        while True:
            response = await self._ask(call, what, attempt)
            code = worst(response)
            if not code:
                return
            self._on_refused(code)
            error = codes.error(code, what)
            if code == codes.UNKNOWN_TOPIC_OR_PARTITION:  # the coordinator may not have heard of a new topic yet
                error = RetriableError(str(error))
            elif code not in _LATER or not isinstance(error, RetriableError):
                raise error
            failures += 1
            await attempt.pause(failures, error, brief=True)

    # --- its end -------------------------------------------------------------------------------------------------

    async def commit(self, identity: Identity, attempt: Attempt) -> Identity:
        """Commit the transaction.

        Returns:
            The identity of the next transaction.

        Raises:
            RetriableError: It surely was not committed; abort.
            IndeterminateCommitError: It may have been.
        """
        what = f"commit the transaction of {self._id!r}"
        call = self._end_call(identity, committed=True)
        failures = 0
        may_be_committed = False
        while True:
            try:
                await self._reach(what, attempt)  # what fails here was not sent
            except RetriableError as error:
                failures += 1
                await self._pause_commit(failures, error, attempt, may_be_committed)
                continue
            try:
                response = await self._send(call, attempt)
            except StreamFlowError as exc:
                raise IndeterminateCommitError(f"{what}: {exc}; it may be committed") from exc
            code = response.error_code
            if not code:
                return self._next(identity, response)
            self._on_refused(code)
            refused = RetriableError(f"{what}: {codes.name(code)}")
            # The coordinator may have written the decision down and not have heard that its replicas have it.
            may_be_committed |= code in _MAY_BE_WRITTEN
            if code not in _LATER:
                raise _indeterminate(refused) if may_be_committed else refused
            failures += 1
            await self._pause_commit(failures, refused, attempt, may_be_committed)

    async def _pause_commit(self, failures: int, error: RetriableError, attempt: Attempt, may_be: bool) -> None:
        try:
            await attempt.pause(failures, error, brief=True)
        except RetriableError:
            if may_be:
                raise _indeterminate(error) from error
            raise

    async def abort(self, identity: Identity, attempt: Attempt) -> Identity:
        """Abort what may be open.

        Returns:
            The identity to follow.

        Raises:
            ProducerFencedError: The id or its epoch is somebody else's by now, or the transaction timed out.
            RetriableError: It did not come about in time.
        """
        what = f"abort the transaction of {self._id!r}"
        call = self._end_call(identity, committed=False)
        failures = 0
        while True:
            try:
                response = await self._ask(call, what, attempt)
                code = response.error_code
                if not code:
                    return self._next(identity, response)
                if code in _NOTHING_OPEN:
                    return identity
                if code in FENCED:
                    raise self.fenced(code)
                self._on_refused(code)
                raise codes.error(code, what)
            except RetriableError as error:
                failures += 1
                await attempt.pause(failures, error, brief=True)

    def _end_call(self, identity: Identity, *, committed: bool) -> wire.Call:
        end = END_TXN_2 if self.version == 2 else END_TXN
        return end(self._id, identity.producer_id, identity.epoch, committed)

    def _next(self, identity: Identity, response: Any) -> Identity:
        if self.version == 1:
            return identity
        return Identity(response.producer_id, response.producer_epoch)

    # --- asking --------------------------------------------------------------------------------------------------

    async def _ask(self, call: wire.Call, what: str, attempt: Attempt) -> Any:
        await self._reach(what, attempt)
        return await self._send(call, attempt)

    async def _reach(self, what: str, attempt: Attempt) -> None:
        """Know the coordinator and have a connection to it."""
        try:
            with anyio.fail_after(attempt.remaining_s()):
                if self._node is None:
                    self._node = await self._client.coordinator("transaction", self._id)
                await self._client.ready(self._node, self._lane)
        except TimeoutError as exc:
            self._node = None
            raise LogUnavailableError(f"{what}: its coordinator cannot be reached in time") from exc
        except RetriableError:
            self._node = None
            raise

    async def _send(self, call: wire.Call, attempt: Attempt) -> Any:
        if self._node is None:
            raise RetriableError(f"the coordinator of transactional id {self._id!r} is not known")
        try:
            return await self._client.send(self._node, call, self._lane, timeout_s=attempt.remaining_s())
        except RetriableError:
            self._node = None
            raise

    def _on_refused(self, code: int) -> None:
        if code in codes.COORDINATOR_MOVED:
            self._node = None


def _indeterminate(error: RetriableError) -> IndeterminateCommitError:
    return IndeterminateCommitError(f"{error}; it may be committed")


def _error_code(response: Any) -> int:
    code: int = response.error_code
    return code
