"""Being the only member of an app's group for a while: who changes its offsets otherwise is fenced like a worker."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager

import anyio

from streamflow.config import Settings
from streamflow.error_groups import one_error
from streamflow.errors import GroupInUseError, RetriableError, TaskMigratedError
from streamflow.log.api import Group, GroupSettings, Log, Lost, OffsetMark
from streamflow.model.record import TopicPartition
from streamflow.runtime.assignment.assignor import TaskAssignor

_JOIN_S = 30.0
_ALIVE_EVERY_S = 0.3
_COMMIT_TRIES = 50
_RETRY_S = 0.2


async def refuse_live_members(log: Log, app_id: str, settings: Settings, what: str) -> None:
    """Make sure that no worker of an app runs.

    Args:
        log: The open log.
        app_id: The app's id, which is its group.
        settings: For the session time-out, in the message.
        what: What is refused, for the message.

    Raises:
        GroupInUseError: One runs.
    """
    members = await log.admin.group_members(app_id)
    if members:
        raise GroupInUseError(
            f"{what} is refused while workers of app {app_id!r} are live: {', '.join(members)}. Stop them first; one "
            f"that was killed is gone at the latest after its session_timeout_ms ({settings.session_timeout_ms:,} ms)"
        )


class HeldGroup:
    """All partitions of an app's group in one hand. Made by `held_group`.

    Args:
        group: The membership.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._member_id = ""
        self._lost = ""

    async def committed(self, partitions: Sequence[TopicPartition]) -> Mapping[TopicPartition, OffsetMark | None]:
        """See `log.api.Group`."""
        return await self._group.committed(partitions)

    async def commit(self, offsets: Mapping[TopicPartition, OffsetMark]) -> None:
        """Commit offsets.

        Raises:
            GroupInUseError: A worker was started meanwhile and has had partitions; nothing was stored.
        """
        for left in range(_COMMIT_TRIES, 0, -1):
            membership = self._group.membership
            # What was lost and came back is not what was read: a worker may have committed in between.
            if self._lost or (membership is not None and membership.member_id != self._member_id):
                raise _overtaken(self._lost or "this process was let go by the group")
            try:
                if membership is not None:
                    return await self._group.commit(offsets, membership)
            except TaskMigratedError as exc:
                raise _overtaken(str(exc)) from exc
            except RetriableError:
                if left == 1:
                    raise
            await anyio.sleep(_RETRY_S)
        raise _overtaken("this process is not in the group any more")

    async def stay(self) -> None:
        """Say that this member gets on, until cancelled: it must not be taken for one that hangs."""
        while True:
            self._group.report_progress()
            await anyio.sleep(_ALIVE_EVERY_S)

    async def watch(self) -> None:
        """Note what is lost, until cancelled; what is asked for is kept, and goes when this member leaves."""
        while True:
            event = await self._group.next_event()
            if isinstance(event, Lost):
                self._lost = event.reason

    async def own(self, partitions: frozenset[TopicPartition]) -> None:
        """Wait until this member owns all of it."""
        with anyio.move_on_after(_JOIN_S):
            while not partitions <= self._group.assignment:
                await self._group.next_event()
        membership = self._group.membership
        if membership is None or not partitions <= self._group.assignment:
            raise _overtaken(f"this process did not get all partitions within {_JOIN_S:g} s")
        self._member_id = membership.member_id


def _overtaken(why: str) -> GroupInUseError:
    return GroupInUseError(f"a worker was started meanwhile: {why}. No offsets were changed; stop it and try again")


@asynccontextmanager
async def held_group(
    log: Log, app_id: str, settings: Settings, sub_topologies: Mapping[str, Sequence[str]], counts: Mapping[str, int]
) -> AsyncGenerator[HeldGroup]:
    """Join an app's group and own all of its partitions while the block runs; workers that start meanwhile wait.

    Args:
        log: The open log.
        app_id: The app's id.
        settings: Time-outs of the group.
        sub_topologies: Source topics by sub-topology.
        counts: Partition count of the topics to own.

    Raises:
        GroupInUseError: Another member came first.
    """
    everything = frozenset(TopicPartition(topic, number) for topic, count in counts.items() for number in range(count))
    timing = GroupSettings(
        session_timeout_ms=settings.session_timeout_ms,
        heartbeat_interval_ms=settings.heartbeat_interval_ms,
        rebalance_timeout_ms=max(settings.rebalance_timeout_ms, settings.max_poll_interval_ms),
        max_poll_interval_ms=settings.max_poll_interval_ms,
    )
    with one_error():
        async with (
            log.group(app_id, frozenset(counts), TaskAssignor(sub_topologies), timing) as group,
            anyio.create_task_group() as tasks,
        ):
            held = HeldGroup(group)
            tasks.start_soon(held.stay)
            await held.own(everything)
            tasks.start_soon(held.watch)
            yield held
            tasks.cancel_scope.cancel()
