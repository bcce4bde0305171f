"""Runs one agent function over one feed, and calls it anew after an error (its locals are then lost)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from time import perf_counter
from typing import Any

import anyio
import anyio.to_thread

from streamflow.errors import ProcessingError, ProductionError, RecordError
from streamflow.log.batch import LogRecord
from streamflow.processing.context import current_turn
from streamflow.processing.places import place_of_yield
from streamflow.processing.stream import Stream
from streamflow.runtime.cancellation import stray
from streamflow.runtime.derived import Copier, Processor
from streamflow.runtime.feed import Feed, processing_error
from streamflow.runtime.own_code import while_it_runs
from streamflow.runtime.turn import NO_HEADERS

_THREAD_BATCH_RECORDS = 256
_THREAD_BATCH_S = 0.05


class AgentRun:
    """One coroutine of one agent in one task.

    Args:
        agent: The agent.
        feed: Where its records come from.
    """

    def __init__(self, agent: Processor, feed: Feed[Any]) -> None:
        self.agent = agent
        self.feed = feed
        self._yielded_at = ""

    async def run(self) -> None:
        """Run until cancelled (after the feed was cut, or its records were lost)."""
        self.feed.loop = asyncio.get_running_loop()
        self.feed.owner = asyncio.current_task()
        current_turn.set(self.feed)
        body = self._body()
        while True:
            self.feed.call = object()
            try:
                await while_it_runs(body(), self.feed)
            except (Exception, SystemExit) as exc:  # sys.exit(0) is no success
                if self.feed.task.is_closing:
                    return  # it made something of its cancellation
                await self._failed(exc)
            except asyncio.CancelledError as cancelled:
                error = stray(cancelled)
                if error is None:
                    raise
                error.__cause__ = cancelled
                await self._failed(error)
            else:
                if self.feed.task.is_closing:
                    return
                await self._returned()

    def _body(self) -> Callable[[], Coroutine[Any, Any, None]]:
        agent = self.agent
        if isinstance(agent, Copier):
            return partial(self._copy, agent)
        if agent.kind == "generator":
            return partial(self._over_generator, agent.fn)
        if agent.kind == "stream":
            return partial(self._over_stream, agent.fn)
        if agent.thread:
            return partial(self._in_thread, agent.fn)
        return partial(self._per_record_async if agent.is_async else self._per_record, agent.fn)

    # --- the forms of an agent -----------------------------------------------------------------------------------

    async def _over_generator(self, function: Callable[..., AsyncGenerator[Any, None]]) -> None:
        emit = self.feed.emitter()
        async with aclosing(function(Stream(self.feed))) as results:
            try:
                async for result in results:
                    emit(result)
            except ProductionError:
                self._yielded_at = place_of_yield(results)
                raise

    async def _over_stream(self, function: Callable[..., Awaitable[Any]]) -> None:
        await function(Stream(self.feed))

    async def _per_record(self, function: Callable[..., Any]) -> None:
        emit = self.feed.emitter()
        async for value in self.feed:
            emit(function(value))

    async def _per_record_async(self, function: Callable[..., Awaitable[Any]]) -> None:
        emit = self.feed.emitter()
        async for value in self.feed:
            emit(await function(value))

    async def _copy(self, copier: Copier) -> None:
        """Copy records into a derived topic, with a new key where it has one."""
        feed = self.feed
        (topic,) = copier.sink_topics
        async for value in feed:
            if copier.rekey is None:
                feed.copy_to(topic, feed.record_key())
            else:
                feed.copy_to(topic, topic.key_codec.encode(copier.rekey(value), NO_HEADERS))

    async def _in_thread(self, function: Callable[..., Any]) -> None:
        """Process what is there in one hop to a worker thread; each record keeps a stage of its own."""
        feed = self.feed
        async for first in feed:
            rest = feed.take_rest(_THREAD_BATCH_RECORDS)
            done, error = await anyio.to_thread.run_sync(self._work_through, function, first, rest)
            feed.thread_id = None
            feed.finish_many(done, rest)
            if error is not None:
                raise error
            if len(done) <= len(rest):
                feed.put_back()

    def _work_through(
        self, function: Callable[..., Any], first: Any, rest: list[LogRecord]
    ) -> tuple[list[list[Any]], BaseException | None]:
        """In the worker thread: the stages of the records that succeeded, and the error of the one that did not.

        It comes back early when its time is over, when the task is to stop, and for a record that does not decode:
        that one is looked at on the event loop.
        """
        feed = self.feed
        feed.thread_id = threading.get_ident()
        done: list[list[Any]] = []
        value = first
        until_s = perf_counter() + _THREAD_BATCH_S
        for number in range(len(rest) + 1):
            if number:
                record = rest[number - 1]
                if feed.stopping or perf_counter() > until_s:
                    break
                try:
                    value = feed.codec.decode(record.value, record.headers)
                except Exception:
                    break
                feed.record = record
            try:
                feed.emit(function(value))
                done.append(feed.close_stage())
            except (Exception, SystemExit) as exc:
                return done, exc
        return done, None

    # --- failures ------------------------------------------------------------------------------------------------

    async def _failed(self, exc: BaseException) -> None:
        feed = self.feed
        if feed.task.lost:
            await feed.park()  # whatever it stood on; the records are processed elsewhere, or here by a new task
        error = processing_error(feed, exc, self._yielded_at)
        self._yielded_at = ""
        if not feed.in_hand():
            feed.task.failed(self.agent, error, [])
            await feed.park()
        if await feed.settle(error, feed.count_attempt()):
            feed.put_back()

    async def _returned(self) -> None:
        error: RecordError = ProcessingError(
            f"agent {self.agent.name!r} returned before its stream ended: it must go on asking for records "
            "(`async for ...` without break or return); to pass records over, use continue"
        )
        await self._failed(error)
