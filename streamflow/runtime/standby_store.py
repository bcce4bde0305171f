"""The local store of one standby: opened where the task's would be, written while there is room, closed or handed over.

It has one user at a time. A full disk is waited out; what is damaged is set aside, so that the next one begins anew.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import anyio
import anyio.to_thread
import msgspec

from streamflow.clock import Clock
from streamflow.errors import StateCorruptedError, StateFullError
from streamflow.processing.topology import SubTopology
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.local_state import LocalState, LocalStates
from streamflow.state.store import Checkpoint, StoreBatch

logger = logging.getLogger("streamflow.standbys")

_RETRY_FULL_S = 1.0
_FULL_FOR_S = 60.0


class StandbyStore:
    """Holds the store of a task that runs elsewhere.

    Args:
        sub: The task's sub-topology, which has tables.
        partition: The task's partition.
        local: Opens stores.
        clock: Time.

    Attributes:
        state: The store, while it is open here.
        left_at: How far it was when it was closed; None before that, and where there is none.
        full_since_s: Since when room on the disk is waited for, monotonic; None while it is not.
    """

    def __init__(self, sub: SubTopology, partition: int, local: LocalStates, clock: Clock) -> None:
        self.state: LocalState | None = None
        self.left_at: Checkpoint | None = None
        self.full_since_s: float | None = None
        self._sub = sub
        self._partition = partition
        self._local = local
        self._clock = clock

    @property
    def has_no_room(self) -> bool:
        """Whether it has been waiting for room on the disk for long."""
        return self.full_since_s is not None and self._clock.monotonic() - self.full_since_s >= _FULL_FOR_S

    async def open(self, mark: CommitMark) -> None:
        """Open it.

        Args:
            mark: What the task's last commit says.

        Raises:
            StateError: It cannot be opened.
        """

        async def attempt() -> None:
            with anyio.CancelScope(shield=True):
                self.state = await self._local.open(self._sub, self._partition, mark)

        await self._until_there_is_room(attempt)

    def check(self, mark: CommitMark | None) -> None:
        """See `LocalStates.check`."""
        self._local.check(self._sub, self._partition, mark)

    async def write(
        self, changes: Mapping[str, dict[bytes, bytes | None]], positions: Mapping[str, int], level_at_ms: int
    ) -> None:
        """Write changes, as soon as there is room.

        Args:
            changes: By table: stored keys and values; None deletes.
            positions: By table: the offset that follows what the store has then.
            level_at_ms: When it had all that was there; wall clock.
        """
        await self._until_there_is_room(partial(self.write_once, changes, positions, level_at_ms))

    async def write_once(
        self, changes: Mapping[str, dict[bytes, bytes | None]], positions: Mapping[str, int], level_at_ms: int
    ) -> None:
        """Write changes, or fail where there is no room; see `write`.

        Raises:
            StateFullError: There is no room.
        """
        assert self.state is not None
        store = self.state.store
        checkpoint = store.checkpoint
        batch = StoreBatch(
            msgspec.structs.replace(
                checkpoint, changelogs={**checkpoint.changelogs, **positions}, caught_up_at_ms=level_at_ms
            )
        )
        batch.changes.update(changes)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(store.write, batch)

    async def _until_there_is_room(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Do what needs room on the disk; a full one is waited out."""
        try:
            while True:
                try:
                    return await attempt()
                except StateFullError as error:
                    if self.full_since_s is None:
                        self.full_since_s = self._clock.monotonic()
                        name = f"{self._sub.name}-{self._partition}"
                        logger.warning("%s; the standby of task %s goes on when there is room", error, name)
                await self._clock.sleep(_RETRY_FULL_S)
        finally:
            self.full_since_s = None

    def hand_over(self) -> LocalState | None:
        """Give the open store away; None where none is open."""
        state, self.state = self.state, None
        return state

    async def close(self) -> None:
        """Close it, and remember how far it is."""
        if self.state is not None:
            self.left_at = self.state.store.checkpoint
            await self._close()

    async def set_aside(self, damage: StateCorruptedError) -> None:
        """Close it and put it where it is not found again.

        Args:
            damage: Why.
        """
        with anyio.CancelScope(shield=True):
            state, self.left_at = await self._close(), None
            if state is not None:
                await anyio.to_thread.run_sync(state.set_aside, damage.reason, str(damage))

    async def _close(self) -> LocalState | None:
        state = self.hand_over()
        if state is not None:
            await anyio.to_thread.run_sync(state.store.close)
        return state
