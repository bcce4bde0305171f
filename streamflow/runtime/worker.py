"""A worker: opens the log, joins the group, runs the tasks, commits, and winds all of it down within a deadline.

Phases: refuse what cannot work, prepare topics, open the log's parts, run, finish the records in hand, commit, leave
the group, close. Every task of the event loop belongs to a task group here or below.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import anyio
import anyio.to_thread

from streamflow.clock import Clock, SystemClock
from streamflow.config import Settings
from streamflow.error_groups import one_error
from streamflow.errors import (
    RecordError,
    StreamFlowError,
)
from streamflow.log.api import Group, GroupSettings, Log, TopicDescription
from streamflow.log.codec import compression_number
from streamflow.log.connect import connect
from streamflow.processing.context import registered_sender
from streamflow.processing.declarations import Declarations
from streamflow.processing.holding import registered_holder
from streamflow.processing.topology import Topology
from streamflow.processing.visit import is_visited
from streamflow.runtime.abandoned_transactions import AbandonedTransactions
from streamflow.runtime.assignment.assignor import TaskAssignor
from streamflow.runtime.at_least_once import AtLeastOnce
from streamflow.runtime.births import noting_births
from streamflow.runtime.conversation import Conversation, says
from streamflow.runtime.derived import Processor
from streamflow.runtime.exactly_once import ExactlyOnce
from streamflow.runtime.extent import Extent
from streamflow.runtime.first_assignment import first_assignment, is_idle
from streamflow.runtime.global_tables import GlobalTables
from streamflow.runtime.held_tables import HeldTables
from streamflow.runtime.homes import Homes
from streamflow.runtime.hooks import call_hooks, call_start_hooks
from streamflow.runtime.internal_topics import prepare_topics, repartition_topics
from streamflow.runtime.jobs import Jobs
from streamflow.runtime.layout import Layout
from streamflow.runtime.local_state import LocalStates
from streamflow.runtime.loops import Loops
from streamflow.runtime.open_log import OpenLog, open_log
from streamflow.runtime.outputs import Staged
from streamflow.runtime.purge import Purge
from streamflow.runtime.record_errors import way_past
from streamflow.runtime.restore import Restorer
from streamflow.runtime.routes import Routes
from streamflow.runtime.sending import ProcessSender
from streamflow.runtime.standbys import Standbys
from streamflow.runtime.status import Outcome, Progress, WorkerStatus
from streamflow.runtime.supervision import snapshot
from streamflow.runtime.table_reads import TableReads, reading
from streamflow.runtime.targets import KnownTargets
from streamflow.runtime.task import Surroundings, Task
from streamflow.runtime.task_manager import TaskManager
from streamflow.runtime.until_end import UntilEnd
from streamflow.runtime.wind_down import CLOSE_S, wind_down
from streamflow.sensors import Sensors
from streamflow.state.memory import MemoryStores
from streamflow.state.rocksdb import RocksStores
from streamflow.state.slots import Slot, claim
from streamflow.state.store import Stores

logger = logging.getLogger("streamflow.worker")

_ENDING_S = 0.5  # of the shutdown time, for what comes after the last record was sent
_LAST_PURGE_S = 1.0

_LEAST_UNSENT_BYTES = 1 << 20
_UNSENT_SHARE = 8  # tasks may hold an eighth of the memory budget before they wait


class Worker:
    """Runs one app in this process.

    Args:
        app: The app.
        settings: Resolved settings.
        clock: Time; None is the system's.
        sensors: Metrics hooks; None counts nothing.
        until_end: Stop when everything that was there at the start is processed.
        on_progress: Told how far a bounded run is.

    Attributes:
        url: Where other workers reach its web server, empty where they do not; set before it runs.
    """

    def __init__(
        self,
        app: Declarations,
        settings: Settings,
        *,
        clock: Clock | None = None,
        sensors: Sensors | None = None,
        until_end: bool = False,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.app = app
        self.settings = settings
        self.clock = clock or SystemClock()
        self.sensors = sensors or Sensors()
        self._until_end = until_end
        self._on_progress = on_progress or _no_progress
        self._log = self._connect()
        self.guarantee: str = settings.processing_guarantee or "exactly_once"
        self.state = "starting"
        self._stop = anyio.Event()
        self._started = anyio.Event()
        self._loop_token: Any = None
        self._failure: BaseException | None = None
        self._open: anyio.CancelScope | None = None
        self._log_is_away = False
        self._may_process = False
        self.manager: TaskManager | None = None
        self.group: Group | None = None
        self.global_tables: GlobalTables | None = None
        self.standbys: Standbys | None = None
        self.table_reads: TableReads | None = None
        self.routes = Routes()
        self.conversation: Conversation | None = None
        self.url = ""
        self._delivery: AtLeastOnce | ExactlyOnce | None = None
        self._sender: ProcessSender | None = None
        self._jobs: Jobs | None = None
        self._layout: Layout | None = None
        self._ends: UntilEnd | None = None

    @property
    def address(self) -> str:
        """The log's absolute address, without secrets."""
        return self._log.address

    def _connect(self) -> Log:
        """A log that is not open yet, which is the worker's from now on."""
        self._log = connect(self.settings.broker, clock=self.clock, client_id=f"streamflow-{self.app.id}")
        return self._log

    # --- from outside ------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Ask for a clean stop: finish the records in hand, commit, leave. Safe from threads and signal handlers."""
        if self._loop_token is None:
            self._stop.set()
            return
        self._loop_token.call_soon_threadsafe(self._stop.set)

    async def wait_started(self) -> None:
        """Wait until the first assignment is in force, its tables are restored and its agents run.

        It returns as well when the worker ended.
        """
        await self._started.wait()

    def status(self) -> WorkerStatus:
        """A snapshot."""
        return snapshot(self)

    def last_commit_age_s(self) -> float | None:
        """Seconds since the last commit; None before the first."""
        at_s = self._delivery.last_commit_s if self._delivery is not None else None
        return None if at_s is None else self.clock.monotonic() - at_s

    def uncommitted_for_s(self) -> float:
        """How long a commit has been trying, in seconds; 0 while none is."""
        since_s = self._delivery.trying_since_s if self._delivery is not None else None
        return 0.0 if since_s is None else self.clock.monotonic() - since_s

    async def unsettled(self) -> str:
        """Commit what is done and look whether anything is left to do.

        Returns:
            What is being processed, in words; empty when everything in the log is processed and committed.
        """
        if self.global_tables is not None and (busy := await self.global_tables.unsettled()):
            return busy
        manager, delivery = self.manager, self._delivery
        if manager is None or delivery is None:
            return ""
        if self._stop.is_set():
            return "the worker is stopping"
        await delivery.commit(manager.running())
        if (self._jobs is not None and self._jobs.firing) or (self._sender is not None and self._sender.waiting):
            return "a timer runs or its records are being sent"
        for task in manager.running():
            if (busy := task.unsettled()) or task.uncommitted() or task.outputs.waiting:
                return busy or f"task {task.name} has something to commit"
        ends = await self._log.admin.end_offsets([tp for task in manager.running() for tp in task.committed])
        behind = [
            str(tp)
            for tp, end in ends.items()
            if (owner := manager.task_of(tp)) is not None
            and (owner.awaits_fetch(tp, end) if owner.waits_for_time() else owner.positions().get(tp, 0) < end)
        ]
        return f"records of {', '.join(behind)} are on their way" if behind else ""

    def runs_user_code(self) -> bool:
        """Whether agents, hooks or timers of the app may have begun to run beside the worker."""
        has_fired = self._jobs is not None and self._jobs.has_fired
        return has_fired or (self.manager is not None and self.manager.runs_user_code)

    def outcome(self) -> Outcome | None:
        """How a bounded run went; None for another one, and before it is known where the topics end."""
        return None if self._ends is None else self._ends.outcome()

    # --- the run -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until stopped.

        Raises:
            RefusedError: The worker will not start like this.
            RecordError: A record stopped it (`on_error=sf.Stop()`); it wound down cleanly.
            StreamFlowError: Something else stopped it.

        Cancellation: cuts the wind-down short; what is uncommitted is processed again by the next start.
        """
        self._loop_token = asyncio.get_running_loop()
        try:
            topology = self.app.topology()
            with noting_births(), one_error():
                async with AsyncExitStack() as stack:
                    log = await open_log(stack, self._log, self._connect, self.settings.start_timeout_s, self._stop)
                    if log is not None:
                        with anyio.CancelScope() as self._open:
                            await self._run_unless_stopped(log, topology)
        finally:
            self.state = "stopped"
            self._started.set()
        if self._failure is not None:
            raise self._failure

    async def _run_unless_stopped(self, log: Log, topology: Topology) -> None:
        """Run; a stop that comes while the log keeps the start waiting ends the start where it is."""
        async with anyio.create_task_group() as watch:
            watch.start_soon(self._give_up_start)
            await self._run_on(log, topology)
            watch.cancel_scope.cancel()

    async def _give_up_start(self) -> None:
        await self._stop.wait()
        if not self._may_process and self._open is not None:
            logger.info("stopping: the start was not over yet")
            self._open.cancel()

    async def _run_on(self, log: Log, topology: Topology) -> None:
        descriptions = await prepare_topics(self.app, topology, self.settings, log.admin)
        known = KnownTargets(log.admin, compression_number(self.settings.compression))
        known.add_all(self.app, descriptions)
        async with AsyncExitStack() as stack:
            self._sender = await stack.enter_async_context(
                ProcessSender.open(self.app, self.settings, log, known, self.clock, self.sensors)
            )
            stack.enter_context(registered_sender(self.app, self._sender))
            layout = self._layout = Layout.of(topology, descriptions)
            slot = await self._claim_slot(stack) if layout.counts or self.app.global_tables else None
            stores = self._open_stores(slot)
            stack.callback(stores.close)
            if not await self._restored_globally(stack, log, descriptions, slot, stores):
                return
            await call_start_hooks(self.app.start_hooks)
            stack.push_async_callback(self._call_stop_hooks)
            if not layout.counts:
                await self._run_without_agents()
                return
            if self._until_end:
                extent = Extent(layout, self.app.id)
                await extent.find(log.admin, self.app, self.settings)
                self._ends = UntilEnd(extent, log.admin, self.clock, self._on_progress)
            self._delivery = await self._open_delivery(stack, log, slot)
            restorer = Restorer(
                await stack.enter_async_context(log.reader("restore")), log.admin, self.clock, self.sensors
            )
            budget_bytes, partitions = self.settings.memory_budget_bytes, layout.partitions()
            local = LocalStates(self.app, descriptions, stores, slot, restorer, budget_bytes, partitions)
            reader = await stack.enter_async_context(log.reader("source"))
            self.standbys = standbys = await stack.enter_async_context(
                Standbys.open(self.app.id, layout, local, log, self.clock, self.sensors, self._fail)
            )
            assignor = TaskAssignor.of(layout, self.settings)
            own_id = self._delivery.transactional_id
            words = says(self.settings, self.url, standbys, standbys.lags(), own_id, frozenset()).encode()
            topics = frozenset(layout.counts)
            async with log.group(self.app.id, topics, assignor, self._group_settings(), words) as group:
                self.group = group
                open_parts = OpenLog(group, reader, log.admin, self._delivery)
                await self._process(open_parts, known, layout, local, restorer, standbys)

    async def _open_delivery(self, stack: AsyncExitStack, log: Log, slot: Slot | None) -> AtLeastOnce | ExactlyOnce:
        if self.guarantee == "exactly_once":
            transactional_id = f"{self.app.id}-{uuid4().hex if slot is None else slot.id}"
            exactly_once = ExactlyOnce(
                transactional_id,
                log.transactional_producer,
                log.admin,
                self._current_group,
                self.sensors,
                self.clock,
            )
            return await stack.enter_async_context(exactly_once)
        producer = await stack.enter_async_context(log.producer(delivery_timeout_s=float("inf")))
        session_timeout_s = self.settings.session_timeout_ms / 1000
        return AtLeastOnce(producer, self._current_group, self.sensors, self.clock, session_timeout_s)

    async def _claim_slot(self, stack: AsyncExitStack) -> Slot | None:
        """A directory of this process's own, which has a name for ever; None where nothing is kept on disk."""
        if self._is_in_memory:
            return None
        name = self.settings.instance_id or ""
        slot = await anyio.to_thread.run_sync(claim, self.settings.data_dir, self.app.id, name)
        return stack.enter_context(slot)

    def _open_stores(self, slot: Slot | None) -> Stores:
        return MemoryStores() if slot is None else RocksStores(self.settings.memory_budget_bytes)

    @property
    def _is_in_memory(self) -> bool:
        return self.address.startswith("memory://")

    async def _restored_globally(
        self,
        stack: AsyncExitStack,
        log: Log,
        descriptions: Mapping[str, TopicDescription],
        slot: Slot | None,
        stores: Stores,
    ) -> bool:
        """Open the global tables, and wait until all of them is here; False where a stop is asked for first."""
        self.global_tables = await stack.enter_async_context(
            GlobalTables.open(
                self.app,
                descriptions,
                log,
                stores,
                slot,
                self.settings.memory_budget_bytes,
                self.clock,
                self.sensors,
                self._fail,
            )
        )
        return await self.global_tables.restored(self._stop)

    def _current_group(self) -> Group:
        if self.group is None:
            raise StreamFlowError("the worker is not in its group yet")
        return self.group

    def _group_settings(self) -> GroupSettings:
        return GroupSettings(
            session_timeout_ms=self.settings.session_timeout_ms,
            heartbeat_interval_ms=self.settings.heartbeat_interval_ms,
            rebalance_timeout_ms=self.settings.rebalance_timeout_ms,
            max_poll_interval_ms=self.settings.max_poll_interval_ms,
            instance_id=self.settings.instance_id,
        )

    async def _run_without_agents(self) -> None:
        self._may_process = True
        async with anyio.create_task_group() as group:
            group.start_soon(Jobs(self.app, self.clock, self.sensors, lambda: None, self._fail).run)
            self.state = "running"
            self._started.set()
            if not self._until_end:
                await self._stop.wait()
            group.cancel_scope.cancel()

    async def _process(
        self,
        log: OpenLog,
        known: KnownTargets,
        layout: Layout,
        local: LocalStates,
        restorer: Restorer,
        standbys: Standbys,
    ) -> None:
        """Be a member: process until a stop is asked for, then wind down."""
        self._may_process = True
        ends = self._ends
        async with anyio.create_task_group() as tasks, AsyncExitStack() as stack:
            loops = Loops(self.settings, self.clock, self.sensors, log)
            shared = self._surroundings(log, known, layout, loops)
            manager = self.manager = TaskManager(self.app, layout, self.settings, log, shared, local, standbys, tasks)
            if ends is not None:
                manager.limits = ends.limits
            abandoned = AbandonedTransactions(log.delivery.transactional_id, log.admin.fence_producer, self.clock)
            conversation = self.conversation = Conversation(
                self.settings, lambda: self.url, manager, standbys, self.routes, abandoned, log.group
            )
            manager.on_told = conversation.heard
            tasks.start_soon(self._announce, manager, log)
            stack.enter_context(registered_holder(self.app, HeldTables(manager, layout, shared.homes)))
            self.table_reads = await stack.enter_async_context(
                reading(self.app, layout, manager, log.group, shared.homes, self.routes, self.settings, self.sensors)
            )
            stack.callback(self._reads_no_more)
            purge = Purge(log.admin, self.clock, repartition_topics(self.app), manager.running)
            end_by_s = 0.0  # of a stop that is asked for
            async with anyio.create_task_group() as services:
                loops.start(services, manager, self.runs_user_code)
                services.start_soon(restorer.run)
                services.start_soon(conversation.run)
                services.start_soon(abandoned.run)
                self._jobs = Jobs(self.app, self.clock, self.sensors, self._leader_task, self._fail)
                services.start_soon(self._jobs.run)
                services.start_soon(purge.run)
                if ends is not None:
                    services.start_soon(self._stop_at_end, ends, manager)
                await self._stop.wait()
                self.state = "stopping"
                end_by_s = anyio.current_time() + self.settings.shutdown_timeout_s - _ENDING_S
                if self._sender is not None:
                    self._sender.end_by(end_by_s)
                self._log_is_away = not await wind_down(manager, log.delivery, ends, self.settings.shutdown_timeout_s)
                with anyio.move_on_after(_LAST_PURGE_S):
                    await purge.purge()
                services.cancel_scope.cancel()
            await self._closed(manager, end_by_s)
            tasks.cancel_scope.cancel()

    def _reads_no_more(self) -> None:
        self.table_reads = None

    def _surroundings(self, log: OpenLog, known: KnownTargets, layout: Layout, loops: Loops) -> Surroundings:
        unsent_bytes = self.settings.memory_budget_bytes // (_UNSENT_SHARE * layout.partitions())
        return Surroundings(
            clock=self.clock,
            sensors=self.sensors,
            delivery=log.delivery,
            targets=known.targets,
            failed=self._record_failed,
            fail=self._fail,
            damaged=loops.damaged,
            ask=log.reader.ask,
            end_of=log.reader.end_offset,
            output_waits=loops.output_waits.set,
            max_task_idle_s=self.settings.max_task_idle_ms / 1000,
            max_unsent_bytes=max(_LEAST_UNSENT_BYTES, unsent_bytes),
            homes=Homes(
                self.app.every_topic(), layout.counts, self.sensors, is_strict=not self.address.startswith("kafka://")
            ),
        )

    async def _announce(self, manager: TaskManager, log: OpenLog) -> None:
        """Running begins with the first assignment; to be a member without partitions is one, too.

        Started is who has its tables restored as well: until then they could not be read.
        """
        await first_assignment(manager, log.group, log.admin, self.app.id, self.settings)
        if self.state == "starting":
            self.state = "running"
        for task in manager.running():
            await task.restored.wait()
        self._started.set()

    async def _stop_at_end(self, ends: UntilEnd, manager: TaskManager) -> None:
        await ends.wait(manager, self._may_end)
        self._stop.set()

    def _may_end(self) -> bool:
        """Whether nothing keeps a bounded run whose records are done.

        Tasks are opened, so that a start that has to be refused is, and visits run to their end; where no partition is,
        they have nothing to do.
        """
        manager, jobs, group = self.manager, self._jobs, self.group
        if manager is None or jobs is None or group is None or not self._started.is_set() or not manager.has_restored:
            return False
        return is_idle(group) or not (jobs.is_beginning or is_visited(self.app))

    async def _closed(self, manager: TaskManager, end_by_s: float) -> None:
        """Close the tasks: each notes in its store how far it is, one after the other, in what is left of the time."""
        with anyio.move_on_after(max(CLOSE_S, end_by_s - anyio.current_time())):
            await manager.close()
        if self._log_is_away and self._sender is not None and self._open is not None:
            # Whatever is open would wait for the log once more, one after the other.
            self._sender.abandon()
            self._open.cancel()

    def _leader_task(self) -> Task | None:
        if self.manager is None or self._layout is None or self.group is None:
            return None
        # A process that was stopped and wakes up: another one may lead since, which it has not heard of yet.
        age_s = self.group.statistics().last_heartbeat_age_s
        if age_s is not None and age_s >= self.settings.session_timeout_ms / 1000:
            return None
        task = self.manager.tasks.get((self._layout.leading, 0))
        is_own = task is not None and self.group.assignment.issuperset(
            task.committed
        )  # its loss may not be acted on yet
        return task if is_own else None

    async def _call_stop_hooks(self) -> None:
        with anyio.CancelScope(shield=self._log_is_away or not self._may_process):
            error = await call_hooks("on_stop", self.app.stop_hooks)
            self._failure = self._failure or error

    def _fail(self, error: StreamFlowError) -> None:
        """Something stops the worker, after a clean wind-down; the first error is the one that is raised."""
        self._failure = self._failure or error
        self._stop.set()

    def _record_failed(self, agent: Processor, error: RecordError, answers: list[Staged]) -> None:
        """A record stops the worker: say where and how to get past it, answer who asked, wind down."""
        if self._failure is None:
            self._failure = error
            logger.error("%s", way_past(agent, error), exc_info=error.__cause__)
        if self._sender is not None:
            self._sender.send_answers(answers)
        self._stop.set()


def _no_progress(_: Progress) -> None:
    """Nobody is told."""
