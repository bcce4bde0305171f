"""`--processes N`: start worker processes, start crashed ones again, serve their metrics as one.

What a child's end means: 1 or 2 - it failed or was refused, and so would the others: all stop with that code; 0 in a
bounded run - it was done; anything else is a crash, or somebody has stopped this one alone, and it is started again
after a growing pause.

A bounded run (`--until-end`) is told of here and by no child: where it began is noted before the first one starts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence

import anyio
from anyio.abc import Process, TaskGroup, TaskStatus

from streamflow.cli.banner import announce
from streamflow.cli.child import environment_of
from streamflow.cli.conclusion import conclude
from streamflow.cli.errors import FAILED, REFUSED
from streamflow.cli.fleet import Fleet, Member
from streamflow.cli.options import Session
from streamflow.cli.signals import HANDLED, Requests
from streamflow.error_groups import one_error
from streamflow.runtime.group_run import GroupRun
from streamflow.runtime.http_client import HttpClient
from streamflow.runtime.status import Outcome
from streamflow.runtime.worker import Worker
from streamflow.web.overview import overview_of
from streamflow.web.passed_on import PassedOn
from streamflow.web.server import address_of, listen, serving
from streamflow.web.site import build_site

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
HEALTHY_S = 60.0
"""A process that ran for so long starts with the first pause again."""
_MORE_S = 10.0

logger = logging.getLogger("streamflow.supervisor")


def supervise(session: Session, processes: int, *, until_end: bool, json: bool) -> int:
    """Run worker processes until they are done, one fails, or a signal comes.

    Args:
        session: The command's.
        processes: How many, >= 1.
        until_end: Whether they run until everything that was there at the start is processed.
        json: Whether to print how that went as a JSON object.

    Returns:
        The exit code.
    """
    started_s = time.monotonic()
    supervisor = _Supervisor(session, processes)
    with one_error():
        outcome = anyio.run(supervisor.run, until_end)
    if outcome is not None:
        as_log = session.settings.log_format == "json"
        conclude(outcome, time.monotonic() - started_s, as_json_line=json, as_log=as_log)
    return supervisor.code


class _Supervisor:
    def __init__(self, session: Session, processes: int) -> None:
        self._session = session
        self._bounded: GroupRun | None = None
        self._settings = session.settings
        # Never run: it knows the guarantee. Both lines refuse, once, what each child would.
        session.app.topology()
        facade = Worker(session.app, session.settings)
        self._overview = overview_of(session.app, session.settings, facade.address, facade.guarantee)
        self._client = HttpClient()
        self._fleet = Fleet([Member(index) for index in range(processes)], self._client)
        self._running: dict[int, Process] = {}
        self._tasks: TaskGroup | None = None
        self._told_to_stop = anyio.Event()
        self.code = 0
        # Read from by the children; the only write end closes when this process ends, however it ends.
        self._watch_fd, self._hold_fd = os.pipe()

    @property
    def _stopping(self) -> bool:
        return self._told_to_stop.is_set()

    async def run(self, until_end: bool) -> Outcome | None:
        """Start the processes and keep them; how a bounded run went, where it did not fail."""
        if until_end:
            self._bounded = GroupRun(self._session.app, self._settings)
        outcome: Outcome | None = None
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(os.close, self._hold_fd)
            stack.callback(os.close, self._watch_fd)
            web = await self._serve(stack)
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                await tasks.start(self._signals)
                announce(self._overview, web, len(self._fleet.members), self._settings.log_format)
                if self._bounded is not None:
                    await self._bounded.begin()
                try:
                    async with anyio.create_task_group() as children:
                        for member in self._fleet.members:
                            children.start_soon(self._keep, member)
                finally:
                    self._kill()
                outcome = await self._outcome()
                tasks.cancel_scope.cancel()
        return outcome

    async def _outcome(self) -> Outcome | None:
        if self._bounded is None or self.code:
            return None
        return await self._bounded.end(finished=not self._stopping)

    async def _serve(self, stack: contextlib.AsyncExitStack) -> str:
        if not self._settings.web:
            return "off"
        settings = self._settings
        listener = listen(settings.web_host, settings.web_port)
        await stack.enter_async_context(self._client)
        for member in self._fleet.members:
            # Bound here, so that the port is known and stays the same over restarts. Workers of other machines ask for
            # tables there.
            own = listen(settings.web_host if settings.serve_tables else "127.0.0.1", 0)
            member.listener = stack.enter_context(contextlib.closing(own))
        tables = PassedOn(self._fleet.urls, self._client).routes() if settings.serve_tables else []
        await stack.enter_async_context(serving(build_site(self._fleet, lambda: self._overview, tables), listener))
        return address_of(listener)

    # --- one process -----------------------------------------------------------------------------------------------

    async def _keep(self, member: Member) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._stopping:
            started = time.monotonic()
            code = await self._run_once(member)
            if (code == 0 and self._bounded is not None) or self._stopping:
                member.state = "stopped"
                if code in {FAILED, REFUSED} and self.code == 0:
                    self.code = code
                return
            if code in {FAILED, REFUSED}:
                logger.error("process %d exited with %d; stopping all", member.index, code)
                self.code = code
                self._stop()
                return
            if time.monotonic() - started > HEALTHY_S:
                pause_s = FIRST_PAUSE_S
            member.restarts += 1
            member.state = f"restarting after {_told(code)}"
            logger.error("process %d ended with %s; starting it again in %.1f s", member.index, _told(code), pause_s)
            with anyio.move_on_after(pause_s):
                await self._told_to_stop.wait()
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
        member.state = "stopped"

    async def _run_once(self, member: Member) -> int:
        environment, inherited = environment_of(member.index, self._watch_fd, member.listener)
        # A session of its own: Ctrl-C on a terminal reaches only the supervisor, which then tells each child once.
        process = await anyio.open_process(
            _command(),
            stdin=None,
            stdout=None,
            stderr=None,
            env=environment,
            pass_fds=inherited,
            start_new_session=True,
        )
        self._running[member.index] = process
        member.started(process.pid)
        logger.info("process %d started (pid %d)", member.index, process.pid)
        try:
            if self._stopping:
                process.terminate()
            return await process.wait()
        finally:
            member.ended()
            del self._running[member.index]

    # --- stopping --------------------------------------------------------------------------------------------------

    async def _signals(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        requests = Requests()
        with anyio.open_signal_receiver(*HANDLED) as received:
            task_status.started()
            async for number in received:
                first = requests.is_first(number)
                if first:
                    self._stop()
                elif first is False:
                    self._kill()
                    os._exit(128 + number)

    def _stop(self) -> None:
        if self._stopping:
            return
        self._told_to_stop.set()
        if self._bounded is not None:
            self._bounded.request_stop()
        logger.info("stopping %d processes", len(self._running))
        for process in list(self._running.values()):
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        if self._tasks is not None:
            self._tasks.start_soon(self._kill_later)

    async def _kill_later(self) -> None:
        await anyio.sleep(self._settings.shutdown_timeout_s + _MORE_S)
        if self._running:
            logger.error("processes %s did not stop in time; killing them", sorted(self._running))
            self.code = self.code or FAILED
            self._kill()

    def _kill(self) -> None:
        for process in list(self._running.values()):
            with contextlib.suppress(ProcessLookupError):
                process.kill()


def _command() -> Sequence[str]:
    """This very command line in a fresh interpreter; the environment tells it that it is a child."""
    return [sys.executable, *sys.orig_argv[1:]]


def _told(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"
