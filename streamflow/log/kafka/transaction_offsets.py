"""The committed offsets of one transaction, to the group's coordinator, fenced by the membership (KIP-447)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio

from streamflow.errors import LogUnavailableError, RetriableError, TaskMigratedError
from streamflow.log.api import Membership, OffsetMark
from streamflow.log.kafka import codes
from streamflow.log.kafka.attempt import Attempt
from streamflow.log.kafka.client import Client
from streamflow.log.kafka.group import check_membership
from streamflow.log.kafka.producer import Identity
from streamflow.log.kafka.wire_transaction import TXN_OFFSET_COMMIT, TXN_OFFSET_COMMIT_2
from streamflow.model.record import TopicPartition

_LATER = codes.COORDINATOR_MOVED | {
    codes.CONCURRENT_TRANSACTIONS,
    codes.UNKNOWN_TOPIC_OR_PARTITION,  # the coordinator may not have heard of a new topic yet
    codes.REQUEST_TIMED_OUT,
}


class MembershipRefusedError(TaskMigratedError):
    """The coordinator does not take the membership.

    Attributes:
        told: Its codes.
    """

    def __init__(self, membership: Membership, told: set[int]) -> None:
        reason = ", ".join(codes.name(code) for code in sorted(told))
        who = check_membership(membership)
        super().__init__(f"{who} may not commit: the group has moved on ({reason}); nothing was stored")
        self.told = told


class TransactionOffsets:
    """Commits offsets within transactions.

    Args:
        client: Connections.
        transactional_id: Of the producer.
        lane: A connection of its own: the group's may hold a parked join.
    """

    def __init__(self, client: Client, transactional_id: str, lane: tuple[object, str]) -> None:
        self._client = client
        self._id = transactional_id
        self._lane = lane
        self._coordinators: dict[str, int] = {}

    async def store(
        self,
        offsets: Mapping[TopicPartition, OffsetMark],
        membership: Membership,
        identity: Identity,
        version: int,
        attempt: Attempt,
    ) -> None:
        """Store all as part of the transaction, or raise; then the transaction has to be aborted.

        Args:
            offsets: Not empty.
            membership: Under which they are owned.
            identity: Of the transaction.
            version: Of its protocol; version 2 makes the offsets part of the transaction.
            attempt: The bound.

        Raises:
            MembershipRefusedError: The membership is not the group's.
            AuthorizationError: This user may not commit for the group.
            FatalError: Metadata longer than the broker takes.
            RetriableError: Anything else.
        """
        topics: dict[str, list[tuple[Any, ...]]] = {}
        for (topic, partition), mark in offsets.items():
            topics.setdefault(topic, []).append((partition, mark.offset, -1, mark.metadata, {}))
        commit = TXN_OFFSET_COMMIT_2 if version == 2 else TXN_OFFSET_COMMIT
        call = commit(
            self._id,
            membership.group_id,
            identity.producer_id,
            identity.epoch,
            membership.generation,
            membership.member_id,
            membership.instance_id,
            [(topic, parts, {}) for topic, parts in topics.items()],
        )
        what = f"commit offsets of group {membership.group_id} transactionally"
        failures = 0
        while True:
            node = await self._find(membership.group_id, what, attempt)
            try:
                response = await self._client.send(node, call, self._lane, timeout_s=attempt.remaining_s())
            except RetriableError:
                self._coordinators.pop(membership.group_id, None)
                raise
            told = {part[1] for _topic, parts, _tags in response.topics for part in parts} - {codes.NONE}
            if not told:
                return
            error = self._refused(told, membership, what)
            failures += 1
            await attempt.pause(failures, error, brief=True)

    async def _find(self, group_id: str, what: str, attempt: Attempt) -> int:
        node = self._coordinators.get(group_id)
        failures = 0
        while node is None:
            try:
                with anyio.fail_after(attempt.remaining_s()):
                    node = self._coordinators[group_id] = await self._client.coordinator("group", group_id)
            except TimeoutError as exc:
                raise LogUnavailableError(f"{what}: the group's coordinator cannot be found in time") from exc
            except RetriableError as error:
                failures += 1
                await attempt.pause(failures, error)
        return node

    def _refused(self, told: set[int], membership: Membership, what: str) -> RetriableError:
        """Why it has to go again; raises where that is of no use."""
        if migrated := told & codes.MEMBERSHIP_REFUSED:
            raise MembershipRefusedError(membership, migrated)
        code = max(told)
        error = codes.error(code, what)
        if told & codes.COORDINATOR_MOVED:
            self._coordinators.pop(membership.group_id, None)
        if not told <= _LATER:
            raise error
        return error if isinstance(error, RetriableError) else RetriableError(str(error))
