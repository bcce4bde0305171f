"""The standbys and warm-ups of one worker: stores of tasks that run elsewhere, kept near to where those are.

Which ones, the leader of the group tells (`runtime/assignment`). One fetch lane reads for all of them; what the group
has committed, which bounds what they may have, is looked up once for all. How far each is goes into what this worker
says of itself at the next round, and one that is level with all that it is to take over asks for that round.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

import anyio
import anyio.abc

from streamflow.clock import Clock
from streamflow.errors import RetriableError, StreamFlowError
from streamflow.log.api import Log
from streamflow.model.record import TopicPartition
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.dormant_state import DormantState
from streamflow.runtime.fetch_places import FetchPlaces
from streamflow.runtime.followed import Marks
from streamflow.runtime.layout import Layout
from streamflow.runtime.local_state import LocalState, LocalStates
from streamflow.runtime.standby import Standby
from streamflow.runtime.standby_surroundings import StandbySurroundings
from streamflow.runtime.status import StandbyStatus
from streamflow.sensors import Sensors
from streamflow.state.store import Checkpoint

logger = logging.getLogger("streamflow.standbys")

_MARKS_EVERY_S = 1.0
_MARKS_UNLIMITED_EVERY_S = 5.0
_ENDS_EVERY_S = 5.0
_DORMANT_EVERY_S = 5.0
_REFUSED_S = 600.0
_FETCHES = 8
_DORMANT_AFTER_S = 0.5
"""After a store was closed: the others that are closed with it are measured with it."""


class Standbys:
    """Opens, follows and closes standbys; made by `open`.

    Args:
        app: The app's id, which is its group.
        layout: How its work is cut into tasks.
        shared: What they share.
        group: Task group the standbys run in.

    Attributes:
        dormant: The stores that nobody follows.
        told: The tasks to be a standby of.
        warm_ups: The tasks that are to come here.
    """

    def __init__(
        self,
        app: str,
        layout: Layout,
        shared: StandbySurroundings,
        group: anyio.abc.TaskGroup,
    ) -> None:
        self._app = app
        self._layout = layout
        self._shared = shared
        self._reader = shared.reader
        self._admin = shared.admin
        self._clock = shared.clock
        self._fail = shared.fail
        self._group = group
        self._subs = {sub.name: sub for sub in layout.sub_topologies if sub.tables}
        self._held: dict[TaskId, Standby] = {}
        self._is_new = anyio.Event()
        # Of those that did not get on, and are not followed any more: until when they are refused, monotonic.
        self._refused: dict[TaskId, float] = {}
        self._no_room_until_s = 0.0
        self._dormant_due_s = 0.0
        self.dormant = DormantState(layout, shared.local, shared.admin, shared.clock)
        self.told: frozenset[TaskId] = frozenset()
        self.warm_ups: frozenset[TaskId] = frozenset()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        app: str,
        layout: Layout,
        local: LocalStates,
        log: Log,
        clock: Clock,
        sensors: Sensors,
        fail: Callable[[StreamFlowError], None],
    ) -> AsyncGenerator[Standbys]:
        """Keep standbys while the block runs; none before the first `follow`.

        Args:
            app: See the class.
            layout: See the class.
            local: Opens stores.
            log: The log.
            clock: Time.
            sensors: Metrics hooks.
            fail: Told what stops the worker.
        """
        async with log.reader("standby") as reader, anyio.create_task_group() as group:
            shared = StandbySurroundings(local, reader, FetchPlaces(_FETCHES), log.admin, clock, sensors, fail)
            opened = cls(app, layout, shared, group)
            if opened._subs:
                await opened._look_for_dormant()
                group.start_soon(opened._receive)
                group.start_soon(opened._follow_marks)
                group.start_soon(opened._follow_ends)
            try:
                yield opened
            finally:
                group.cancel_scope.cancel()

    # --- which ones --------------------------------------------------------------------------------------------

    async def follow(
        self, standby: Iterable[TaskId], warm_up: Iterable[TaskId], running: Callable[[TaskId], bool]
    ) -> None:
        """Be told what to follow: what was told before and is not any more ends.

        Args:
            standby: Tasks to keep a copy of.
            warm_up: Tasks that are to come here.
            running: Whether a task has its store open here; it is followed when it has closed it.
        """
        self.told, self.warm_ups = frozenset(standby), frozenset(warm_up)
        wanted = self.told | self.warm_ups
        async with anyio.create_task_group() as ending:  # each closes a store, and what was assigned waits for all
            for task in self._held.keys() - wanted:
                ending.start_soon(self.end, task)
        self.go_on(running)

    def go_on(self, running: Callable[[TaskId], bool]) -> None:
        """Begin what was told and is not followed yet.

        Args:
            running: See `follow`.
        """
        for task in sorted(self.told | self.warm_ups):
            if task not in self._held and self._is_possible(task) and not running(task):
                self._begin(task)
        for task, standby in self._held.items():
            standby.is_warm_up = task in self.warm_ups

    def _is_possible(self, task: TaskId) -> bool:
        """Whether it is a task of this version of the app that has tables."""
        sub = self._subs.get(task.sub_topology)
        return sub is not None and bool(self._layout.of_task(sub, task.partition))

    def _begin(self, task: TaskId) -> None:
        sub = self._subs[task.sub_topology]
        standby = Standby(
            sub,
            task.partition,
            self._layout.of_task(sub, task.partition),
            self._shared,
        )
        self._held[task] = standby
        self._group.start_soon(standby.run, name=f"standby {standby.name}")
        self._is_new.set()

    async def end(self, task: TaskId) -> None:
        """End the following of a task, if it is followed; its store stays where it is."""
        standby = self._held.pop(task, None)
        if standby is not None:
            self._remember(task, standby)
            lag = standby.lag
            await standby.close()
            if standby.left_at is not None:
                self.left(task, standby.left_at, lag)
            elif standby.rebuilds:
                self.dormant.taken(task)

    def _remember(self, task: TaskId, standby: Standby) -> None:
        """The next round is not to begin anew with what does not get on."""
        until_s = self._clock.monotonic() + _REFUSED_S
        if standby.given_up:
            self._refused[task] = until_s
        else:
            self._refused.pop(task, None)
        if standby.has_no_room:
            self._no_room_until_s = until_s

    async def hand_over(self, task: TaskId) -> LocalState | None:
        """End the following of a task that comes here, and give its open store; None where none is open."""
        self.dormant.taken(task)
        self._refused.pop(task, None)
        self.told, self.warm_ups = self.told - {task}, self.warm_ups - {task}  # it has come
        standby = self._held.pop(task, None)
        return None if standby is None else await standby.hand_over()

    def left(self, task: TaskId, checkpoint: Checkpoint, lag: int | None, *, ran: bool = False) -> None:
        """A store was closed; see `DormantState.left`."""
        self.dormant.left(task, checkpoint, lag, ran=ran)
        now_s = anyio.current_time()
        soon_s = now_s + _DORMANT_AFTER_S  # also where it is overdue, as there was nothing to measure
        self._dormant_due_s = soon_s if self._dormant_due_s <= now_s else min(self._dormant_due_s, soon_s)
        self._is_new.set()

    # --- what they are asked -----------------------------------------------------------------------------------

    def lags(self) -> dict[TaskId, int]:
        """How far behind each task's state is that is here and not in its hands, nor was until just now."""
        lags = dict(self.dormant.lags)
        for task, standby in self._held.items():
            if (lag := standby.lag) is not None:
                lags[task] = lag
            elif standby.given_up:
                lags.pop(task, None)
        return lags

    def lag_of(self, task: TaskId) -> int | None:
        """How far behind the state of one task is; None where there is none or that is not known."""
        if (standby := self._held.get(task)) is not None and standby.lag is not None:
            return standby.lag
        return 0 if task in self.dormant.ran else self.dormant.lags.get(task)

    def held(self) -> Mapping[TaskId, Standby]:
        """Those that are followed now."""
        return self._held

    def warm(self, tasks: Iterable[TaskId], acceptable_lag_records: int) -> frozenset[TaskId]:
        """Those of these tasks that are followed and near enough.

        Args:
            tasks: Warm-ups.
            acceptable_lag_records: See the setting.
        """
        lags = {task: standby.lag for task in tasks if (standby := self._held.get(task)) is not None}
        return frozenset(task for task, lag in lags.items() if lag is not None and lag <= acceptable_lag_records)

    def stuck(self) -> frozenset[TaskId]:
        """Those that are to be followed, and do not get on."""
        return frozenset(task for task, standby in self._held.items() if standby.is_stuck)

    def refused(self) -> frozenset[TaskId]:
        """Tasks that cannot be followed here, now or for a while."""
        now_s = self._clock.monotonic()
        self._refused = {task: until_s for task, until_s in self._refused.items() if until_s > now_s}
        held = {task for task, standby in self._held.items() if standby.given_up}
        return frozenset(held | (self._refused.keys() - self._held.keys()))

    @property
    def has_room(self) -> bool:
        """Whether the disk can take more copies, as far as that is known."""
        if any(standby.has_no_room for standby in self._held.values()):
            return False
        return self._clock.monotonic() >= self._no_room_until_s

    def status(self) -> tuple[StandbyStatus, ...]:
        """A snapshot of each, in order of name."""
        return tuple(self._held[task].status() for task in sorted(self._held))

    # --- following ---------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        """Hand what is fetched to those that follow it."""
        while True:
            try:
                arrived = await self._reader.receive()
            except StreamFlowError as error:
                self._fail(error)
                return
            by_tp: dict[TopicPartition, Standby] = {
                tp: standby for standby in self._held.values() for tp in standby.partitions
            }
            for fetched in arrived:
                if fetched.tp in by_tp:
                    by_tp[fetched.tp].take(fetched)

    async def _follow_marks(self) -> None:
        """Look up what the group has committed, for all that are followed; at once for new ones."""
        told = False
        while True:
            self._is_new = anyio.Event()
            # Who comes while the log answers may have a store that is ahead of the answer.
            asked = list(self._held.values())
            dormant = self.dormant.noted() if anyio.current_time() >= self._dormant_due_s else {}
            if dormant:
                self._dormant_due_s = anyio.current_time() + _DORMANT_EVERY_S  # sooner, if one is closed from now on
            if asked or dormant:
                try:
                    now_ms = self._clock.now_ms()
                    marks = await self._marks()
                    told = False
                    for standby in asked:
                        standby.heard(marks, now_ms)
                    if dormant:
                        await self.dormant.measure(dormant, marks)
                except RetriableError as error:
                    self._dormant_due_s = 0.0
                    if not told:
                        logger.warning("looking how far standbys may follow: %s; trying until it succeeds", error)
                    told = True
                except StreamFlowError as error:
                    self._fail(error)
                    return
            is_limited = any(standby.is_limited for standby in asked)
            pause_s = _MARKS_EVERY_S if is_limited or told else _MARKS_UNLIMITED_EVERY_S
            if len(self.dormant) and not told:
                pause_s = min(pause_s, max(0.0, self._dormant_due_s - anyio.current_time()))
            with anyio.move_on_after(pause_s):
                await self._is_new.wait()

    async def _follow_ends(self) -> None:
        """Look where changelogs end that are read as far as they go: one that is level hears nothing else of them."""
        told = False
        while True:
            partitions = sorted({tp for standby in self._held.values() for tp in standby.unlimited})
            try:
                now_ms = self._clock.now_ms()
                ends = await self._admin.high_watermarks(partitions) if partitions else {}
                told = False
                for standby in self._held.values():
                    standby.ends_seen(ends, now_ms)
            except RetriableError as error:
                if not told:
                    logger.warning("looking for the ends of changelogs: %s; trying until it succeeds", error)
                told = True
            except StreamFlowError as error:
                self._fail(error)
                return
            await anyio.sleep(_ENDS_EVERY_S)

    async def _marks(self) -> Marks:
        return await self._admin.group_offsets(self._app)

    async def _look_for_dormant(self) -> None:
        """Know before the first round what is here, if the log answers; else it is known by the next one."""
        await self.dormant.look()
        if len(self.dormant):
            try:
                await self.dormant.measure(self.dormant.noted(), await self._marks())
            except RetriableError as error:
                logger.warning("looking how far the local state is behind: %s", error)
