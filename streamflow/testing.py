"""Tests of apps: the real runtime on a log in memory, with a clock that the test moves.

Example:
    ```
    async with sf.testing.TestApp(app) as test:
        await test.send(orders, Order(...), key="ann")
        await test.settle()
        assert [event.value for event in test.records(totals)] == [...]
    ```
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Generator
from contextlib import AsyncExitStack
from time import perf_counter
from typing import Any, TypeVar

import anyio

from streamflow.app import App
from streamflow.clock import VirtualClock
from streamflow.config import nearest
from streamflow.error_groups import one_error
from streamflow.errors import ClosedError, ConfigurationError
from streamflow.hosting import only_host
from streamflow.model.record import Headers, RecordMetadata
from streamflow.processing.agent import Agent
from streamflow.processing.stream import Event
from streamflow.processing.topic import Topic
from streamflow.runtime.observer import Observer
from streamflow.runtime.worker import Worker
from streamflow.sensors import Sensors
from streamflow.virtual_loop import VirtualLoop, without_threads

__all__ = ["Records", "TestApp", "simulate"]

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

_DAY_MS = 86_400_000
_POLL_S = 0.001
_WAKING_STEPS = 12
_STOP_PATIENCE_S = 0.2
_STOP_LIMIT_S = 12.0


class Records(list[Event[V, K]]):
    """The records of a topic as events, by partition and offset; it may be awaited like the rest of `TestApp`."""

    def __await__(self) -> Generator[Any, None, Records[V, K]]:
        yield from ()
        return self


class TestApp:
    """Runs an app in the test's event loop; use it as `async with`.

    Everything is real except the log's place (memory) and StreamFlow's time, which stands still until `advance`: commit
    interval, back-off, timers, `take(within_s=...)`. What user code itself sleeps, it sleeps in real time.

    Args:
        app: The app; its `broker` is not used.
        start_ms: The clock's start, milliseconds since the epoch, UTC.
        sensors: Told what happens; None counts nothing.
        settings: Any setting of `App`, for this run.

    Raises:
        RefusedError: On entering: the app runs in this process already, in another `TestApp` or `app.running()`.
        StreamFlowError: On exit (and from `settle`), what stopped the worker: with `on_error=sf.Stop()` the record's
        error.
    """

    __test__ = False  # pytest: not a test class

    def __init__(
        self, app: App, *, start_ms: int = 1_700_000_000_000, sensors: Sensors | None = None, **settings: Any
    ) -> None:
        self.app = app
        self.clock = VirtualClock(start_ms)
        given = {
            "commit_interval_ms": _DAY_MS,
            "heartbeat_interval_ms": _DAY_MS // 4,
            "session_timeout_ms": _DAY_MS,
            "web": False,
            **settings,
            "broker": f"memory://test-{uuid.uuid4().hex}",
        }
        self._settings = app.settings(given)
        self._sensors = sensors
        self._stack = AsyncExitStack()
        self._worker: Worker | None = None
        self._observer: Observer | None = None
        self._error: BaseException | None = None
        self._ended = anyio.Event()

    async def __aenter__(self) -> TestApp:
        """Start the worker, and wait until its agents run."""
        with one_error():
            await self._start()
        return self

    async def _start(self) -> None:
        async with AsyncExitStack() as stack:
            stack.enter_context(only_host(self.app, "TestApp"))
            self._observer = await stack.enter_async_context(Observer(self.app, self._settings, self.clock))
            self._worker = Worker(self.app, self._settings, clock=self.clock, sensors=self._sensors)
            tasks = await stack.enter_async_context(anyio.create_task_group())
            tasks.start_soon(self._run)
            stack.push_async_callback(self._stop)
            with anyio.fail_after(30):
                await self._worker.wait_started()
            self._raise_failure()
            self._stack = stack.pop_all()

    async def __aexit__(self, *exc_info: Any) -> None:
        """Stop the worker; raises what stopped it before, unless the test already failed."""
        with one_error():
            await self._stack.__aexit__(*exc_info)
        if exc_info[1] is None:
            self._raise_failure()

    async def _run(self) -> None:
        worker = self._started()
        try:
            await worker.run()
        except Exception as exc:
            self._error = exc
        finally:
            self._ended.set()

    async def _stop(self) -> None:
        self._started().request_stop()
        started_s = perf_counter()
        while not self._ended.is_set():
            await asyncio.sleep(_POLL_S)
            # Time is moved only where a stop waits for it (a commit that is tried again): timers are not to fire now.
            waited_s = perf_counter() - started_s
            if waited_s > _STOP_PATIENCE_S and (left_s := self.clock.next_wake_s()) is not None:
                self.clock.advance(left_s)
            if waited_s > _STOP_LIMIT_S:
                raise RuntimeError(f"the worker did not stop within {_STOP_LIMIT_S:g} s: an agent holds its record")

    def _started(self) -> Worker:
        if self._worker is None:
            raise RuntimeError("write: async with TestApp(app) as test: ...")
        return self._worker

    @property
    def worker(self) -> Worker:
        """The worker that runs the app; `worker.status()` says how it does."""
        return self._started()

    def _observing(self) -> Observer:
        if self._observer is None:
            raise RuntimeError("write: async with TestApp(app) as test: ...")
        return self._observer

    def _raise_failure(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _name_of(self, topic: Topic[Any, Any] | str) -> str:
        name, known = topic if isinstance(topic, str) else topic.name, self.app.every_topic()
        if name not in known:
            raise ConfigurationError(f"app {self.app.id!r} has no topic {name!r}{nearest(name, known)}")
        return name

    # --- what a test does --------------------------------------------------------------------------------------

    async def send(
        self,
        topic: Topic[Any, V] | Agent[Any, V, Any] | str,
        value: V | None = None,
        *,
        key: Any = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
        headers: Headers = (),
    ) -> RecordMetadata:
        """Send a record from outside.

        Args:
            topic: A topic, an agent (its topic), or a topic's name.
            value: Of the topic's type.
            key: Of its key type.
            partition: Where to; None lets the key decide.
            timestamp_ms: Milliseconds since the epoch; None is the clock's now.
            headers: Record headers.

        Returns:
            Where the log put it.

        Raises:
            StreamFlowError: What stopped the worker before.
        """
        chosen = self.app.topics[topic] if isinstance(topic, str) else topic
        try:
            metadata = await chosen.send(
                key=key, value=value, partition=partition, timestamp_ms=timestamp_ms, headers=headers
            )
        except ClosedError:
            self._raise_failure()  # what stopped the worker says more
            raise
        if metadata is None:
            raise RuntimeError("send() belongs outside of agents")
        return metadata

    async def send_bytes(
        self,
        topic: Topic[Any, Any] | str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
        headers: Headers = (),
    ) -> RecordMetadata:
        """Send bytes as they are, whatever the topic's types: a record that does not decode, for example.

        Args:
            topic: A topic of the app, or its name.
            value: The record's value.
            key: Its key.
            partition: Where to; None lets the key decide, and is 0 without one.
            timestamp_ms: Milliseconds since the epoch; None is the clock's now.
            headers: Record headers.

        Returns:
            Where the log put it.
        """
        name = self._name_of(topic)
        at_ms = self.clock.now_ms() if timestamp_ms is None else timestamp_ms
        return await self._observing().put(name, key, value, partition=partition, timestamp_ms=at_ms, headers=headers)

    async def settle(self, *, timeout_s: float = 10.0) -> None:
        """Wait until everything sent so far is processed and committed, all that follows from it included.

        Agents that wait for StreamFlow's time (a back-off, an unfinished `take`) count as settled: move it by
        `advance`.

        Args:
            timeout_s: Real seconds after which it gives up.

        Raises:
            StreamFlowError: What stopped the worker.
            TimeoutError: Something is still being processed; the message says what.
        """
        worker, give_up_s = self._started(), perf_counter() + timeout_s
        while True:
            self._raise_failure()
            if self._ended.is_set():
                break
            if not (busy := await worker.unsettled()):
                await self._let_run()
                if not (busy := await worker.unsettled()):
                    break
            if perf_counter() > give_up_s:
                raise TimeoutError(f"not settled after {timeout_s:g} s: {busy}")
            await _moment()
        self._raise_failure()
        await self._observing().look()

    async def _let_run(self) -> None:
        """Let what was woken get as far as its next wait."""
        for _ in range(_WAKING_STEPS):
            await asyncio.sleep(0)

    async def advance(self, seconds: float) -> None:
        """Move StreamFlow's time, waking what is due in order, and settle after each step.

        Args:
            seconds: How far, >= 0.
        """
        await self.settle()
        left_s = seconds
        while left_s > 0:
            next_s = self.clock.next_wake_s()
            step_s = left_s if next_s is None or next_s > left_s else next_s
            self.clock.advance(step_s)
            left_s -= step_s
            await self._let_run()
            await self.settle()
            if step_s == 0 and left_s > 0 and self.clock.next_wake_s() == 0:
                await asyncio.sleep(_POLL_S)
        await self.settle()

    def records(self, topic: Topic[K, V] | str) -> Records[V, K]:
        """The records a topic had when it settled last.

        Args:
            topic: A topic of the app, or its name.

        Returns:
            Events with keys and values decoded, by partition and offset.

        Raises:
            ConfigurationError: The app has no such topic.
        """
        name = self._name_of(topic)
        return Records(self._observing().records(name))


async def _moment() -> None:
    """Let a little time pass; in a simulation, up to whatever comes next."""
    loop = asyncio.get_running_loop()
    next_s = loop.next_timer_s() if isinstance(loop, VirtualLoop) else None
    await asyncio.sleep(_POLL_S if next_s is None else max(_POLL_S, next_s))


def simulate(fn: Callable[[], Coroutine[Any, Any, T]], *, seed: int = 0) -> T:
    """Run a test in an event loop of its own in which no sleep takes time, and a seed decides what comes first.

    Whenever nothing is left to do, the loop's time jumps to the next timer: `asyncio.sleep(3600)` is over at once, and
    comes after everything that takes less. Which of several ready tasks goes first is drawn from the seed, so that
    other seeds try other orders, and the same one repeats. What is handed to threads runs on the spot. `TestApp` works
    as it always does: its clock stands still until `advance`. Real connections and real threads do not work in it.

    Args:
        fn: An async function without arguments.
        seed: Which order.

    Returns:
        What the function returned.

    Raises:
        NothingLeftError: Everything waits for something that nobody is left to do.
        Exception: What the function raised.
    """
    with without_threads(), asyncio.Runner(loop_factory=lambda: VirtualLoop(seed)) as runner:
        return runner.run(fn())
