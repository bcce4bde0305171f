"""One fetch lane: whole record batches from the partitions that were asked for.

Per broker there are a few connections ("slots") over disjoint partitions, so a long poll that is parked at the broker
does not hold up a partition that is asked for later. The last slot polls briefly and is therefore free again within
milliseconds; partitions that turn out idle gather in one long poll. A partition goes idle -> wanted -> in flight ->
answered -> idle; an empty answer sends it back to wanted without troubling anyone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

import anyio

from streamflow.errors import (
    FatalError,
    InternalError,
    LogUnavailableError,
    OffsetOutOfRangeError,
    RefusedError,
    RetriableError,
    StreamFlowError,
    UnknownTopicError,
)
from streamflow.log.api import Fetched, Isolation, Reader
from streamflow.log.kafka import codes
from streamflow.log.kafka.client import Client, backoff_s
from streamflow.log.kafka.hot import FETCH, FetchById, FetchedPartition, FetchLimits, FetchResponse
from streamflow.log.kafka.offsets import EARLIEST, LATEST, list_offsets
from streamflow.log.kafka.records import open_records
from streamflow.log.kafka.slots import Slots
from streamflow.log.kafka.wire import NO_ID, Call, Newest
from streamflow.log.tasks import TaskOwner
from streamflow.model.record import TopicPartition

logger = logging.getLogger("streamflow.kafka")

_SLOTS = 4
_SHORT_WAIT_MS = 5
_UNKNOWN_TOPIC_S = 10.0


class _State(Enum):
    IDLE = auto()
    WANTED = auto()
    IN_FLIGHT = auto()
    ANSWERED = auto()


@dataclass(slots=True, eq=False)
class _Position:
    """Where a partition stands; a new one after `remove` and `add`, so that late answers are known by identity."""

    tp: TopicPartition
    offset: int
    state: _State = _State.IDLE
    end_offset: int | None = None
    failures: int = 0
    was_empty: bool = False
    # Whose offset it is; certain once something was fetched by it: what is known of topics may be old.
    topic_id: bytes = NO_ID
    was_read: bool = False


class KafkaReader(Reader):
    """A `Reader` over `Client.send`; enter it with `async with`.

    Args:
        client: The data loop's connections.
        lane: Name of the lane.
        isolation: `read_uncommitted` also returns open transactions.
    """

    def __init__(self, client: Client, lane: str, *, isolation: Isolation = "read_committed") -> None:
        self.errors: Counter[str] = Counter()
        self._client = client
        self._lane = lane
        self._read_committed = isolation == "read_committed"
        self._positions: dict[TopicPartition, _Position] = {}
        self._pending: dict[_Position, None] = {}
        self._answers: dict[_Position, Fetched] = {}
        self._answered = asyncio.Event()
        self._homeless: dict[_Position, None] = {}
        self._leader_needed = asyncio.Event()
        self._failure: StreamFlowError | None = None
        self._dispatching = False
        self._closed = False
        self._short_polls: set[int] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self._tasks = TaskOwner(f"kafka reader {lane}", on_bug=self._on_bug)

    async def __aenter__(self) -> KafkaReader:
        self._loop = asyncio.get_running_loop()
        self._slots: Slots[list[_Position]] = Slots(self._tasks, _SLOTS, self._fetch, self._on_slot_free)
        self._tasks.start(self._find_leaders())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closed = True
        for timer in self._timers:
            timer.cancel()
        await self._tasks.__aexit__()
        self._client.close_lane(self)

    # --- contract ------------------------------------------------------------------------------------------------

    def add(self, tp: TopicPartition, offset: int) -> None:
        self.remove(tp)
        self._positions[tp] = _Position(tp, offset)

    def remove(self, tp: TopicPartition) -> None:
        position = self._positions.pop(tp, None)
        if position is not None:
            self._pending.pop(position, None)
            self._homeless.pop(position, None)
            self._answers.pop(position, None)

    def ask(self, tp: TopicPartition) -> None:
        position = self._positions.get(tp)
        if position is None:
            raise InternalError(f"{tp} was not added to the {self._lane} lane, or was removed from it")
        if position.state is _State.IDLE:
            self._want(position)

    async def receive(self) -> list[Fetched]:
        while not self._answers:
            if self._failure is not None:
                raise self._failure
            self._answered.clear()
            await self._answered.wait()
        answers, self._answers = self._answers, {}
        for position, fetched in answers.items():
            position.state = _State.IDLE
            if fetched.error is not None:
                self.remove(position.tp)
        return list(answers.values())

    def end_offset(self, tp: TopicPartition) -> int | None:
        position = self._positions.get(tp)
        return None if position is None else position.end_offset

    # --- choosing what to fetch ----------------------------------------------------------------------------------

    def _want(self, position: _Position) -> None:
        position.state = _State.WANTED
        self._pending[position] = None
        self._dispatch_soon()

    def _want_later(self, position: _Position, seconds: float) -> None:
        position.state = _State.WANTED

        def due() -> None:
            self._timers.discard(timer)
            if self._is_current(position):
                self._pending[position] = None
                self._dispatch_soon()

        timer = self._loop.call_later(seconds, due)
        self._timers.add(timer)

    def _dispatch_soon(self) -> None:
        """Once per turn of the loop, so that what is asked for together is fetched together."""
        if not self._dispatching:
            self._dispatching = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        if self._closed:
            return
        by_node: dict[int, list[_Position]] = {}
        made_anew: list[_Position] = []
        for position in self._pending:
            node = self._client.leader(position.tp)
            if node is None:
                self._homeless[position] = None
            elif self._is_of_before(position):
                made_anew.append(position)
            else:
                by_node.setdefault(node, []).append(position)
        if self._homeless:
            for position in self._homeless:
                self._pending.pop(position, None)
            self._leader_needed.set()
        for position in made_anew:
            del self._pending[position]
            position.state = _State.IN_FLIGHT
            self._tasks.start(self._leave(position))
        for node, positions in by_node.items():
            free = self._slots.free(node)
            if not free or (node in self._short_polls and all(position.was_empty for position in positions)):
                continue  # a slot frees itself in a moment; idle partitions then go into one long poll
            for position in positions:
                del self._pending[position]
                position.state = _State.IN_FLIGHT
            if free[-1] == _SLOTS - 1:
                self._short_polls.add(node)
            self._slots.start(node, free[-1], positions)

    def _on_slot_free(self, node: int) -> None:
        if self._pending:
            self._dispatch_soon()

    def _is_of_before(self, position: _Position) -> bool:
        """Whether a position is one in a topic that was deleted: its offset says nothing in one made anew."""
        topic_id = self._client.topic_id(position.tp.topic)
        if not position.was_read:
            position.topic_id = topic_id
        return topic_id not in {NO_ID, position.topic_id}

    def _is_current(self, position: _Position) -> bool:
        return self._positions.get(position.tp) is position

    # --- fetching ------------------------------------------------------------------------------------------------

    async def _fetch(self, node: int, slot: int, positions: list[_Position]) -> None:
        is_short = slot == _SLOTS - 1
        try:
            call = self._call(positions, is_short=is_short)
            response: FetchResponse = await self._client.send(node, call, (self, slot))
        except RetriableError as exc:
            self._count(str(exc), positions)
            self._find_leaders_of(positions)
        except StreamFlowError as exc:
            self._fail(exc)
        else:
            await self._take(positions, response)
        finally:
            if is_short:
                self._short_polls.discard(node)

    def _call(self, positions: list[_Position], *, is_short: bool) -> Call:
        """By the topics' ids, where they are known: one that is made anew is not taken for the one before."""
        options = self._client.options
        wanted = [(position.tp, position.offset) for position in positions]
        limits: FetchLimits = {
            "max_wait_ms": _SHORT_WAIT_MS if is_short else options.fetch_max_wait_ms,
            "max_bytes": options.fetch_max_bytes,
            "max_partition_bytes": options.fetch_max_partition_bytes,
            "read_committed": self._read_committed,
        }
        by_name = FETCH(wanted, **limits)
        ids = {position.tp.topic: position.topic_id for position in positions}
        if NO_ID in ids.values():
            return by_name
        return Newest(FetchById(ids)(wanted, **limits), by_name)

    async def _take(self, positions: list[_Position], response: FetchResponse) -> None:
        told = {part.tp: part for part in response.partitions}
        for position in positions:
            if not self._is_current(position):
                continue
            part = told.get(position.tp)
            if part is None or response.error_code:
                self._count(f"fetch: {codes.name(response.error_code)}", [position])
                self._find_leaders_of([position])
            elif part.error_code:
                await self._take_error(position, part)
            else:
                self._take_records(position, part)

    def _take_records(self, position: _Position, part: FetchedPartition) -> None:
        position.failures = 0
        position.was_read = True
        position.end_offset = part.high_watermark
        aborted = part.aborted if self._read_committed else ()
        opened = open_records(position.tp, part.records, position.offset, aborted)
        moved = opened.next_offset > position.offset
        position.was_empty = not moved
        if not moved and opened.error is None:
            self._want(position)
            return
        position.offset = opened.next_offset
        error = None if moved else opened.error  # good batches first; the next fetch begins at the bad one
        self._answer(
            position,
            Fetched(position.tp, opened.batches, opened.next_offset, part.high_watermark, opened.size_bytes, error),
        )

    def _answer(self, position: _Position, fetched: Fetched) -> None:
        position.state = _State.ANSWERED
        self._answers[position] = fetched
        self._answered.set()

    # --- errors --------------------------------------------------------------------------------------------------

    async def _take_error(self, position: _Position, part: FetchedPartition) -> None:
        self._count(f"fetch: {codes.name(part.error_code)}", [position])
        if part.error_code == codes.OFFSET_OUT_OF_RANGE:
            await self._check_range(position)
            return
        error = codes.error(part.error_code, f"read {position.tp}")
        if isinstance(error, FatalError) and not isinstance(error, UnknownTopicError):
            self._give_up(position, error)
        else:
            self._find_leaders_of([position])

    async def _check_range(self, position: _Position) -> None:
        """A new leader may be behind for a moment: believe it only when the log's ends say so too."""
        tp = position.tp
        try:
            starts = await list_offsets(self._client, [tp], EARLIEST)
            ends = await list_offsets(self._client, [tp], LATEST)
        except StreamFlowError as exc:
            self._count(str(exc), [position])
            self._find_leaders_of([position])
            return
        if starts[tp] <= position.offset <= ends[tp]:
            self._want_later(position, backoff_s(position.failures))
            return
        self._give_up(position, OffsetOutOfRangeError(*tp, position.offset, starts[tp], ends[tp]))

    async def _leave(self, position: _Position) -> None:
        """Say what there is in the topic that was made anew."""
        tp = position.tp
        while self._is_current(position):
            try:
                starts = await list_offsets(self._client, [tp], EARLIEST)
                ends = await list_offsets(self._client, [tp], LATEST)
            except StreamFlowError as exc:
                self._count(str(exc), [position])
                await anyio.sleep(backoff_s(position.failures))
                continue
            self._give_up(position, OffsetOutOfRangeError(*tp, position.offset, starts[tp], ends[tp], made_anew=True))
            return

    def _give_up(self, position: _Position, error: StreamFlowError) -> None:
        if self._is_current(position):
            self._answer(position, Fetched(position.tp, [], position.offset, position.end_offset or 0, error=error))

    def _fail(self, error: StreamFlowError) -> None:
        """The whole lane: credentials, TLS, versions."""
        if isinstance(error, RefusedError):
            fatal = FatalError(str(error))
            fatal.__cause__ = error
            error = fatal
        self._failure = error
        self._answered.set()

    def _on_bug(self, exc: BaseException) -> None:
        error = InternalError(f"the {self._lane} lane failed: {exc!r}")
        error.__cause__ = exc
        self._fail(error)

    def _count(self, what: str, positions: Iterable[_Position]) -> None:
        self.errors[what] += 1
        first = self.errors[what] == 1
        logger.log(logging.WARNING if first else logging.DEBUG, "%s lane: %s; retrying", self._lane, what)
        for position in positions:
            position.failures += 1

    # --- leaders -------------------------------------------------------------------------------------------------

    def _find_leaders_of(self, positions: Iterable[_Position]) -> None:
        for position in positions:
            if self._is_current(position):
                position.state = _State.WANTED
                self._homeless[position] = None
        self._leader_needed.set()

    async def _find_leaders(self) -> None:
        """Refresh the metadata while a partition has no leader or its leader refused it; never a hot loop."""
        failures = 0
        while True:
            await self._leader_needed.wait()
            self._leader_needed.clear()
            positions = list(self._homeless)
            if not positions:
                continue
            failures = min((position.failures for position in positions), default=0)
            if failures:
                await anyio.sleep(backoff_s(failures))
            try:
                await self._client.refresh({position.tp.topic for position in positions})
            except LogUnavailableError as exc:
                self._count(str(exc), positions)
            except StreamFlowError as exc:
                self._fail(exc)
                return
            for position in positions:
                self._rehome(position)
            if self._homeless:
                self._leader_needed.set()

    def _rehome(self, position: _Position) -> None:
        tp = position.tp
        if self._homeless.pop(position, self) is self or not self._is_current(position):
            return
        code = self._client.topic_errors.get(tp.topic, codes.NONE)
        error = codes.error(code, f"read {tp}") if code else None
        is_refused = isinstance(error, FatalError) and not isinstance(error, UnknownTopicError)
        if self._client.leader(tp) is not None and not is_refused:
            self._want(position)
            return
        is_gone = self._client.unknown_for_s(tp.topic) > _UNKNOWN_TOPIC_S
        if is_gone or is_refused:
            self._give_up(position, error or UnknownTopicError(f"read {tp}: the topic does not exist"))
            return
        position.failures += 1
        self._homeless[position] = None
