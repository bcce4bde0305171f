"""What an agent's stream pulls from: what both kinds of feed share, and what becomes of a record that fails.

Invariants: while the agent has a record in hand, `positions()` names that record; while it waits, what comes after
the last one. So a snapshot of positions and outputs taken at any moment is consistent.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from operator import length_hint
from time import perf_counter
from typing import Any, Generic, TypeVar

from streamflow.errors import (
    ClosedError,
    ConfigurationError,
    DeserializationError,
    ProcessingError,
    ProductionError,
    RecordError,
    StreamFlowError,
)
from streamflow.log.batch import LogRecord
from streamflow.model.record import TopicPartition
from streamflow.processing.places import place_in
from streamflow.processing.stream import Event, View
from streamflow.runtime.derived import Copier, Processor
from streamflow.runtime.outputs import Staged
from streamflow.runtime.record_errors import Drop, RecordErrors
from streamflow.runtime.task_view import TaskView
from streamflow.runtime.turn import Turn

_RUN_S = 0.004
SLICE_S = 0.01
_MAX_RUN_RECORDS = 512
_FIRST_RUN_RECORDS = 8

T = TypeVar("T")
NO_RECORDS: Iterator[Any] = iter(())
END_UNIT = object()


class Feed(Turn, Generic[T]):
    """A stream's source in one task; `T` is what a run consists of (records, or records with their ledger entries).

    Args:
        task: The task.
        agent: The agent.
        errors: Decides about records that fail.
    """

    def __init__(self, task: TaskView, agent: Processor, errors: RecordErrors) -> None:
        super().__init__(task, agent)
        self.errors = errors
        self.records: Iterator[T] = NO_RECORDS
        self.stopping = False
        self.was_cut = asyncio.Event()
        self.parked = asyncio.Event()
        # Whether it waits for StreamFlow's time with a unit in hand: for a back-off, or for the rest of a unit.
        self.waits_for_time = False
        self._failing: tuple[TopicPartition, int] | None = None
        self._attempts = 0
        self._seen: LogRecord | None = None
        self._seen_at_s = 0.0
        self._asking = False
        self._run_length = 0
        self._run_records = _FIRST_RUN_RECORDS
        self._run_started_s = 0.0
        self._slice_started_s = 0.0
        self._set_source(self.source, self.tp)

    def _set_source(self, topic: Any, tp: TopicPartition) -> None:
        self.source, self.tp = topic, tp
        codec = topic.value_codec
        self.codec = codec
        copies = isinstance(self.agent, Copier) and self.agent.rekey is None
        self.decode: Callable[[Any], Any] = _as_it_is if copies else codec.fast_decode or self._decode_with_headers

    def _decode_with_headers(self, data: bytes | None) -> Any:
        record = self.record
        return self.codec.decode(data, record.headers if record is not None else [])

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    @abstractmethod
    async def __anext__(self) -> Any:
        """See `processing.stream.Source`."""

    @abstractmethod
    async def take(self, max_records: int, within_s: float | None, view: View) -> list[Any]:
        """See `processing.stream.Source`."""

    @abstractmethod
    def finish(self) -> None:
        """The unit in hand is done: its stage joins the outputs, the position passes it."""

    @abstractmethod
    def put_back(self) -> None:
        """Drop the stage and put the unit in hand back in front, to be processed again."""

    def take_rest(self, max_records: int) -> list[LogRecord]:
        """Take more records along with the one in hand, for a worker thread; this feed takes one at a time."""
        return []

    def finish_many(self, stages: list[list[Staged]], rest: list[LogRecord]) -> None:
        """Give the stages back that a worker thread made; the next record, if any, is the unit in hand."""
        for stage in stages:
            self.stage[:] = stage

    # --- between runs ------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Hand out nothing more: the agent is parked when it asks for its next record."""
        self.stopping = True
        self.was_cut.set()
        self.records = NO_RECORDS
        self.task.inputs.wake()

    def _account_run(self) -> None:
        """Tell the metrics about the run that ends, and size the next one."""
        done = self._run_length - length_hint(self.records)
        self._run_length = 0
        now = perf_counter()
        if done > 0:
            seconds = now - self._run_started_s
            self.task.sensors.records_processed(self.agent.name, self.tp.topic, done, seconds)
            fitting = int(_RUN_S * done / seconds) if seconds > 0 else _MAX_RUN_RECORDS
            self._run_records = max(1, min(fitting, self._run_records * 2, _MAX_RUN_RECORDS))

    async def _yield_slice(self) -> None:
        """Let the others run when this agent had its slice of time."""
        if perf_counter() - self._slice_started_s > SLICE_S:
            await asyncio.sleep(0)
            self._slice_started_s = perf_counter()

    def _check_asker(self) -> None:
        if asyncio.current_task() is not self.owner or self._asking:
            raise ClosedError(
                f"agent {self.agent.name!r}: its stream is asked for a record from another task, or for two at once. A "
                "record is done when the next one is asked for, so a wrapper must not read ahead; use take() for "
                "batches and concurrency= for parallel work"
            )

    async def park(self) -> None:
        """Wait to be cancelled: there are no more records for this agent."""
        self.parked.set()
        await asyncio.Event().wait()

    # --- views -------------------------------------------------------------------------------------------------

    def event(self, value: Any) -> Event[Any, Any]:
        """See `processing.stream.Source`."""
        record = self.record
        if record is None:
            raise ClosedError("there is no record in hand")
        key = self._decode_key(record)
        timestamp_ms = self.timestamp_ms()
        return Event(key, value, record.headers, timestamp_ms, self.tp.topic, self.tp.partition, record.offset)

    def _decode_key(self, record: LogRecord) -> Any:
        return self.source.key_codec.decode(record.key, record.headers)

    def as_view(self, value: Any, view: View) -> Any:
        """See `processing.stream.Source`."""
        if view == "events":
            return self.event(value)
        if view == "items":
            record = self.record
            return (self._decode_key(record) if record is not None else None, value)
        return value

    # --- units of take -----------------------------------------------------------------------------------------

    def decode_for_unit(self, record: LogRecord, view: View, is_first: bool) -> Any:
        """The item of one record of a unit; `END_UNIT` when it does not decode.

        Then the unit is handed out without it, since its fate must not hang on theirs; where it is the first,
        `resolve_for_unit` decides about it.
        """
        try:
            item = self.as_view(self.decode(record.value), view)
        except Exception:
            return END_UNIT
        if record.headers:
            if is_first:
                self.forget_headers()
            self.take_headers(record)
        return item

    async def resolve_for_unit(self, record: LogRecord, view: View) -> Any:
        """The item of the first record of a unit whose fast decoding failed, or `Drop` when it was passed over."""
        item = await self.decode_or_resolve(record, view)
        if item is not Drop:
            self._take_headers_again(record)
        return item

    # --- progress -----------------------------------------------------------------------------------------------

    def in_hand_s(self) -> float:
        """How long the agent has had a record in its hands, in seconds; 0 while it has none, or StreamFlow waits.

        It counts from the first call that sees the record, and is called every 100 ms: the hot path reads no clock.
        """
        if self.record is None or self.waits_for_time:
            return 0.0
        now = perf_counter()
        if self.record is not self._seen:
            self._seen, self._seen_at_s = self.record, now
        return now - self._seen_at_s

    # --- failures -----------------------------------------------------------------------------------------------

    def count_attempt(self) -> int:
        """How often the unit in hand has failed, this time included."""
        in_hand = self.in_hand()
        first = (in_hand[0][0], in_hand[0][1].offset) if in_hand else None
        self._attempts = self._attempts + 1 if first == self._failing else 1
        self._failing = first
        return self._attempts

    async def decode_or_resolve(self, record: LogRecord, view: View = "values") -> Any:
        """Decode a record whose fast decoding failed; the policy decides when it really is undecodable.

        Returns:
            What `view` shows, or `Drop` when the record is to be passed over (its unit is already finished).
        """
        attempt = 0
        while True:
            try:
                item = await self._decode_fully(record, view)
            except RecordError as error:
                attempt += 1
                error.at(self.tp.topic, self.tp.partition, record.offset)
                self._take_headers_again(record)
                if not await self.settle(error, attempt):
                    return Drop
            else:
                if attempt:
                    self._take_headers_again(record)
                return item

    def _take_headers_again(self, record: LogRecord) -> None:
        if record.headers:
            self.forget_headers()
            self.take_headers(record)

    async def resolve(self, view: View) -> tuple[bool, Any]:
        """See `processing.stream.Source`."""
        record = self.record
        if record is None:
            raise ClosedError("there is no record in hand")
        item = await self.decode_or_resolve(record, view)
        return item is not Drop, item

    async def _decode_fully(self, record: LogRecord, view: View) -> Any:
        value = await self.codec.decode_loading(record.value, record.headers)
        if view == "values":
            return value
        await self.source.key_codec.decode_loading(record.key, record.headers)
        return self.as_view(value, view)

    async def settle(self, error: RecordError, attempt: int) -> bool:
        """Let the policy act on the unit in hand after its `attempt`-th failure.

        Returns:
            True to try again (after the back-off), False when the unit was passed over.

        Raises:
            RecordError: The policy is to stop; inside a stream this parks the agent instead.
        """
        self.drop_stage()
        decision = self.errors.decide(error, attempt)
        if decision.retry_after_s is not None:
            await self._back_off(decision.retry_after_s)
            return True
        letters: list[Staged] = []
        if decision.dead_letter is not None:
            try:
                letters = self.errors.dead_letters(self, decision.dead_letter, error, attempt)
            except RecordError as unwritable:
                unwritable.__cause__ = error
                error, decision = self._placed(unwritable), self.errors.stop()
        self.answer_error(error)
        self.forget_headers()
        if decision.stop:
            self.task.failed(self.agent, error, list(self.stage))
            self.stage.clear()
            await self.park()
        self.stage.extend(letters)
        self.finish()
        return False

    def _placed(self, error: RecordError) -> RecordError:
        (tp, record), *_ = self.in_hand()
        return error.at(tp.topic, tp.partition, record.offset)

    async def _back_off(self, delay_s: float) -> None:
        """Wait before the next try; a feed that is cut meanwhile is parked with the unit in hand."""
        self.waits_for_time = True
        try:
            await self.task.clock.wait(self.was_cut, delay_s)
            if self.stopping:
                await self.park()
        finally:
            self.waits_for_time = False
            self._seen = None


def _as_it_is(data: bytes | None) -> bytes | None:
    return data


def processing_error(feed: Feed[Any], exc: BaseException, yielded_at: str) -> RecordError:
    """What an exception of user code means for the unit in hand.

    Args:
        feed: The agent's.
        exc: What was raised.
        yielded_at: Where the agent yielded the result that raised it; empty where it was no result of a generator.
    """
    who = f"agent {feed.agent.name!r}"
    if isinstance(exc, StreamFlowError) and not isinstance(exc, DeserializationError):
        # Of the code between here and there only one line is the user's, and no traceback is shown.
        who += f" ({yielded_at or place_in(exc) or feed.agent.place})"
    if not isinstance(exc, RecordError):
        error: RecordError = ProcessingError(f"{who} raised {type(exc).__name__}: {exc}")
        error.__cause__ = exc
    else:
        error = exc
        if isinstance(exc, ProductionError):
            error.message = f"{who}: {error.message}"
    in_hand = feed.in_hand()
    if in_hand and error.topic is None:
        tp, record = in_hand[0]
        error.at(tp.topic, tp.partition, record.offset)
    return error


def refuse_take_with_concurrency(agent: Processor) -> ConfigurationError:
    """The error of `take` in an agent with `concurrency` above 1."""
    return ConfigurationError(
        f"agent {agent.name!r}: take() and concurrency={agent.concurrency} exclude each other; a unit of records is "
        "processed by one coroutine. Leave one of them out"
    )
