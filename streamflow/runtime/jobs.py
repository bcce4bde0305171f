"""Timers, crontabs and tasks: user code that runs beside the agents.

Their sends leave at once, at least once. With `on_leader=True` they run only in the worker that owns the leader task
(partition 0 of the first sub-topology), and what one turn sends joins that task's next commit, fenced like the rest.

A timer or crontab that raises is logged and counted and comes again at its next time; a task that raises stops the
worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import Any

import anyio

from streamflow.clock import Clock
from streamflow.error_groups import one_error
from streamflow.errors import ClosedError, FatalError, StreamFlowError
from streamflow.processing.agent import Agent
from streamflow.processing.context import Outgoing, current_turn
from streamflow.processing.declarations import Declarations
from streamflow.processing.hooks import Action, BackgroundTask, Crontab, Timer
from streamflow.runtime.cancellation import call_user
from streamflow.runtime.feed import SLICE_S
from streamflow.runtime.outputs import Staged, write
from streamflow.runtime.task import Task
from streamflow.sensors import Sensors
from streamflow.state.stage import PlainStage, Stage

logger = logging.getLogger("streamflow.jobs")

_LEADER_POLL_S = 0.25


class _MovedOn(StreamFlowError):
    """What ran in the leader task did not get on: that task is another worker's by now."""


class LeaderTurn:
    """A turn in the leader task: what it sends joins that task's outputs when it is done.

    Args:
        task: The leader task.
        at_once: Do not wait for the turn's end: it may never come.
    """

    def __init__(self, task: Task, *, at_once: bool) -> None:
        self._task = task
        self._at_once = at_once
        self._stage: list[Staged] = []
        self._open = True
        self._slice_started_s = perf_counter()

    # Tables are read here as elsewhere outside of records: what is committed; and changed by `update_async`.
    record = None
    owner: asyncio.Task[Any] | None = None
    loop: asyncio.AbstractEventLoop | None = None
    stages: Mapping[str, Stage] = {}
    at_hand: Mapping[str, PlainStage] = {}

    def send(self, outgoing: Outgoing) -> Callable[[], Awaitable[None]] | None:
        """See `processing.context.Turn.send`."""
        if not self._open:
            raise ClosedError("a leader's turn is over; await everything before the function returns")
        self._check_held()
        topic, key, value, partition, timestamp_ms, headers = outgoing
        at_ms = self._task.clock.now_ms() if timestamp_ms is None else timestamp_ms
        headers = list(headers)
        key_bytes = topic.key_codec.encode(key, headers)
        self._stage.append(self._task.outputs.to(topic).encode(key_bytes, value, partition, at_ms, headers))
        if not self._at_once:
            return None
        write(self._stage)
        self._stage.clear()
        return self._wait

    async def _wait(self) -> None:
        """Let others run after a slice of time, and wait while too much is in no commit: it may send without end."""
        if perf_counter() - self._slice_started_s > SLICE_S:
            await asyncio.sleep(0)
            self._slice_started_s = perf_counter()
        if self._task.is_full():
            await self._task.make_room()

    @property
    def is_held(self) -> bool:
        """Whether the leader task is this worker's still."""
        return _is_held(self._task)

    def _check_held(self) -> None:
        if not self.is_held:
            raise ClosedError(f"the leader task {self._task.name} has moved to another worker, or the worker stops")

    def refuse_ask(self, agent: Agent[Any, Any, Any]) -> None:
        """Asking is allowed: the turn blocks no record."""

    def refuse_table(self, table: object) -> None:
        """Tables are read as elsewhere; see `stages`."""

    def may_touch(self) -> bool:
        """No: see `stages`."""
        return False

    def timestamp_ms(self) -> int:
        """The clock's time."""
        return self._task.clock.now_ms()

    def check_alive(self) -> None:
        """Nothing to check: tables are not written in this turn."""

    def done(self) -> None:
        """The turn succeeded: its sends join the task's outputs, if it still is ours."""
        self.flush()
        self._open = False

    def flush(self) -> None:
        """Move what was sent so far into the task's outputs."""
        self._check_held()
        write(self._stage)
        self._stage.clear()


def _is_held(leader: Task) -> bool:
    """Whether what is sent in a leader task is taken by it: it is open, and not about to go."""
    return not leader.lost and leader.state not in ("created", "closing", "closed")


class Jobs:
    """Runs the timers, crontabs and tasks of one worker.

    Args:
        app: The app.
        clock: Time.
        sensors: Metrics hooks.
        leader_task: The leader task where this worker owns it, else None.
        failed: Told when a task raised, which stops the worker.
    """

    def __init__(
        self,
        app: Declarations,
        clock: Clock,
        sensors: Sensors,
        leader_task: Callable[[], Task | None],
        failed: Callable[[StreamFlowError], None],
    ) -> None:
        self._app = app
        self._clock = clock
        self._sensors = sensors
        self._leader_task = leader_task
        self._failed = failed
        self._not_begun = {id(task): task for task in app.tasks}
        self.firing = 0
        self.has_fired = False

    @property
    def is_beginning(self) -> bool:
        """Whether tasks that run here have not come to their first wait yet."""
        leads = self._leader_task() is not None
        return any(leads or not task.on_leader for task in self._not_begun.values())

    def _leader(self) -> Task | None:
        leader = self._leader_task()
        return leader if leader is not None and _is_held(leader) else None

    async def run(self) -> None:
        """Run until cancelled."""
        async with anyio.create_task_group() as group:
            for timer in self._app.timers:
                group.start_soon(self._run_timer, timer, name=f"timer {timer.name}")
            for crontab in self._app.crontabs:
                group.start_soon(self._run_crontab, crontab, name=f"crontab {crontab.name}")
            for task in self._app.tasks:
                group.start_soon(self._run_task, task, name=f"task {task.name}")

    async def _run_timer(self, timer: Timer) -> None:
        due_s = self._clock.monotonic() + timer.interval_s
        while True:
            await self._clock.sleep(max(0.0, due_s - self._clock.monotonic()))
            await self._fire(timer.name, timer.fn, timer.on_leader)
            # Missed times are not made up for: the next one is the first that lies ahead.
            behind_s = self._clock.monotonic() - due_s
            due_s += timer.interval_s * (1 + max(0.0, behind_s // timer.interval_s))

    async def _run_crontab(self, crontab: Crontab) -> None:
        while True:
            due_ms = crontab.next_ms(self._clock.now_ms())
            while (left_ms := due_ms - self._clock.now_ms()) > 0:
                await self._clock.sleep(min(left_ms / 1000, 60.0))  # the wall clock may be set
            await self._fire(crontab.name, crontab.fn, crontab.on_leader)

    async def _fire(self, name: str, fn: Action, on_leader: bool) -> None:
        leader = self._leader() if on_leader else None
        if on_leader and leader is None:
            return
        self.firing += 1
        try:
            await self._turn(fn, leader)
        except _MovedOn as moved:
            logger.info("%s: the leader task has moved while it ran; it comes again at its next time: %s", name, moved)
        except Exception:
            self._sensors.record_error(name, "timer")
            logger.exception("%s raised; it comes again at its next time", name)
        finally:
            self.firing -= 1

    async def _turn(self, fn: Action, leader: Task | None, *, at_once: bool = False) -> None:
        self.has_fired = True
        if leader is None:
            current_turn.set(None)
            await call_user(fn)
            return
        turn = LeaderTurn(leader, at_once=at_once)
        token = current_turn.set(turn)
        try:
            await call_user(fn)
            turn.done()
        except Exception as exc:
            if turn.is_held:
                raise
            raise _MovedOn(f"{type(exc).__name__}: {exc}") from exc
        finally:
            current_turn.reset(token)

    async def _run_task(self, task: BackgroundTask) -> None:
        try:
            if task.on_leader:
                await self._run_leading(task)
            else:
                self.has_fired = True
                current_turn.set(None)
                self._begins(task)
                await call_user(task.fn)
        except Exception as exc:
            error = FatalError(f"task {task.name!r} raised {type(exc).__name__}: {exc}")
            error.__cause__ = exc
            logger.exception("%s", error)
            self._failed(error)

    def _begins(self, task: BackgroundTask) -> None:
        """Note that it has begun, as soon as it waits for the first time."""
        asyncio.get_running_loop().call_soon(self._not_begun.pop, id(task), None)

    async def _run_leading(self, task: BackgroundTask) -> None:
        """Run the task while this worker leads; when leadership comes back, it starts anew."""
        while True:
            leader = self._leader()
            if leader is None:
                await self._clock.sleep(_LEADER_POLL_S)
                continue
            if await self._lead(task, leader):
                return

    async def _lead(self, task: BackgroundTask, leader: Task) -> bool:
        """Run the task while this worker leads; whether it is done."""
        finished = False
        with one_error():
            async with anyio.create_task_group() as group:

                async def lead() -> None:
                    nonlocal finished
                    self._begins(task)
                    try:
                        await self._turn(task.fn, leader, at_once=True)
                        finished = True
                    except _MovedOn as moved:
                        logger.info("%s: the leader task has moved while it ran: %s", task.name, moved)
                    group.cancel_scope.cancel()

                group.start_soon(lead)
                while self._leader() is leader:
                    await self._clock.sleep(_LEADER_POLL_S)
                group.cancel_scope.cancel()
        return finished
