"""Reads of tables wherever they are held: here, by the owner over HTTP, or by a standby where that will do.

What cannot be had now is asked for again, until the time of the read is over: partitions move, workers die, and their
tables are restored. An answer is the owner's or there is none.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any, TypeAlias

import anyio
import msgspec

from streamflow.config import Settings
from streamflow.errors import NotHeld, ReadFailed, StreamFlowError
from streamflow.log.api import Group
from streamflow.model.position import positions_of, text_of
from streamflow.processing.declarations import Declarations
from streamflow.processing.remote import ReadOptions, TableRead, registered_reader
from streamflow.processing.set_table import Pairs
from streamflow.processing.table import Table
from streamflow.processing.topology import SubTopology
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.committed_reads import MOST_ROWS, CommittedReads, Misdirected, NotReadableYet
from streamflow.runtime.homes import Homes
from streamflow.runtime.http_client import HttpClient, Response, UnreachableError
from streamflow.runtime.layout import Layout
from streamflow.runtime.read_question import PATH, Answer, Question
from streamflow.runtime.routes import Routes
from streamflow.runtime.task_manager import TaskManager
from streamflow.sensors import Sensors
from streamflow.state.keys import ByteRange
from streamflow.state.values import MISSING

_AGAIN_S = 0.05
_OTHERS_S = 1.0
"""How long one who is asked instead of the owner, or may be asked instead, is waited for."""
_MORE_S = 0.5
_NEWS_S = 60.0
_HERE = "here"
_MISSED = (Misdirected, NotReadableYet, UnreachableError)

Span: TypeAlias = ByteRange
Ask: TypeAlias = Callable[[tuple[int, ...], float], Question]
"""Makes the question to some partitions, given the seconds that are left."""


@dataclass(frozen=True, slots=True)
class Found:
    """One value.

    Attributes:
        value: It; `MISSING` where there is none.
        partition: The key's.
        position: What the partition had come to, as text.
        lag: See `Answer`.
    """

    value: Any
    partition: int
    position: str
    lag: int | None

    @property
    def is_there(self) -> bool:
        """Whether there is one."""
        return self.value is not MISSING


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows of a range, in key order.

    Attributes:
        rows: Keys and values.
        after: The stored key to go on behind; None at the end.
        position: What the partitions had come to, as text.
        lag: See `Answer`.
    """

    rows: list[tuple[Any, Any]]
    after: bytes | None
    position: str
    lag: int | None


class TableReads:
    """The tables of one app, as one of its workers reads them; a `processing.remote.RemoteReader`.

    Args:
        committed: What this worker holds.
        layout: How the app's work is cut into tasks.
        homes: Knows the partitions of table keys.
        routes: Who holds what.
        client: Asks the others.
        sensors: Told of each read.
    """

    def __init__(
        self,
        committed: CommittedReads,
        layout: Layout,
        homes: Homes,
        routes: Routes,
        client: HttpClient,
        sensors: Sensors,
    ) -> None:
        self.committed = committed
        self._layout = layout
        self._homes = homes
        self._routes = routes
        self._client = client
        self._sensors = sensors

    # --- from Python -------------------------------------------------------------------------------------------

    async def value(self, table: Table[Any, Any], key: Any, options: ReadOptions) -> Any:
        await self._allow(table, key, options)
        return (await self.get(table, key, options)).value

    async def entries(
        self, table: Table[Any, Any], low: bytes, high: bytes | None, options: ReadOptions
    ) -> AsyncIterator[tuple[Any, Any]]:
        after: bytes | None = None
        while True:
            await self._allow(table, None, options)
            page = await self.page(table, (low, high), after, MOST_ROWS, options)
            for row in page.rows:
                yield row
            if (after := page.after) is None:
                return

    async def members(self, table: Pairs[Any, Any], key: Any, options: ReadOptions) -> AsyncIterator[Any]:
        after: bytes | None = None
        while True:
            await self._allow(table, key, options)
            page = await self.members_page(table, key, after, MOST_ROWS, options)
            for (_, member), _ in page.rows:
                yield member
            if (after := page.after) is None:
                return

    async def _allow(self, table: Table[Any, Any], key: Any, options: ReadOptions) -> None:
        """Ask the app about what is read for somebody: he must not be told more where this process holds the key.

        Raises:
            PermissionError: It may not be read.
            ReadFailed: Whether it may could not be found out.
        """
        guard = self.committed.guard
        if guard is not None and options.headers is not None:
            with self.counting_failures(table.name):
                await guard.check(TableRead.of_caller(table.name, key, options.headers))

    @contextmanager
    def counting_failures(self, table: str) -> Generator[None]:
        """Count a read of a table that ends by `ReadFailed`."""
        try:
            yield
        except ReadFailed:
            self._sensors.table_read(table, "failed")
            raise

    # --- what is read ------------------------------------------------------------------------------------------

    async def get(self, table: Table[Any, Any], key: Any, options: ReadOptions) -> Found:
        """The committed value of a key.

        Args:
            table: The table.
            key: The key.
            options: How it is to be answered.

        Raises:
            ProductionError: It is no key of the table.
            ConfigurationError: `at` does not fit the table.
            NotHeld: Nobody has answered within the time.
            PermissionError: Who has the partition does not allow it.
            ReadFailed: Who has the partition could not find out whether it is allowed.
            DeserializationError: The value does not decode.
        """
        _, sub = self._checked(table, options)
        store_key = table.keys_in_order.encode(key)
        partition = self._homes.of(sub, table, key)

        def ask(partitions: tuple[int, ...], left_s: float) -> Question:
            question = Question(table.name, partitions, table.keys_in_order.name, key=store_key)
            return self._with(question, options, left_s)

        (answer,) = await self._answers(table, sub, [partition], ask, options)
        rows = await self._decoded(table, answer.rows)
        self._sensors.table_read(table.name, "found" if rows else "absent")
        return Found(rows[0][1] if rows else MISSING, partition, answer.position, answer.lag)

    async def page(
        self, table: Table[Any, Any], span: ByteRange, after: bytes | None, limit: int, options: ReadOptions
    ) -> Page:
        """Rows of a range of all partitions, in key order.

        Args:
            table: The table.
            span: Its stored keys.
            after: `Page.after` of the page before; None for the first one.
            limit: Most rows, from 1 to 1,000.
            options: See `get`.
        """
        _, sub = self._checked(table, options)
        low = span[0] if after is None else max(span[0], _behind(after))

        def ask(partitions: tuple[int, ...], left_s: float) -> Question:
            question = Question(table.name, partitions, table.keys_in_order.name, low=low, high=span[1], limit=limit)
            return self._with(question, options, left_s)

        numbers = range(max(self._layout.counts[topic] for topic in sub.topics))
        return await self._page(table, sub, numbers, ask, limit, options)

    async def members_page(
        self, table: Pairs[Any, Any], key: Any, after: bytes | None, limit: int, options: ReadOptions
    ) -> Page:
        """Pairs of one key of a set table, in the order of the members; see `page`."""
        _, sub = self._checked(table, options)
        table.keys_in_order.prefix((key,))  # says what is wrong with the key
        under = table.home_codec.encode(key)
        low = b"" if after is None else _behind(after)

        def ask(partitions: tuple[int, ...], left_s: float) -> Question:
            question = Question(table.name, partitions, table.keys_in_order.name, under=under, low=low, limit=limit)
            return self._with(question, options, left_s)

        partition = self._homes.of(sub, table, (key, None))
        return await self._page(table, sub, [partition], ask, limit, options)

    async def _page(
        self,
        table: Table[Any, Any],
        sub: SubTopology,
        partitions: Iterable[int],
        ask: Ask,
        limit: int,
        options: ReadOptions,
    ) -> Page:
        answers = await self._answers(table, sub, partitions, ask, options)
        # Behind the last row of an answer that is not complete, others may follow.
        ends = [answer.rows[-1][0] for answer in answers if not answer.is_complete]
        merged = heapq.merge(*(answer.rows for answer in answers))
        rows = list(takewhile(lambda row: not ends or row[0] <= min(ends), merged))
        has_more = bool(ends) or len(rows) > limit
        rows = rows[:limit]
        position = text_of({tp: at for answer in answers for tp, at in positions_of(answer.position).items()})
        lags = [answer.lag for answer in answers if answer.lag is not None]
        self._sensors.table_read(table.name, "found")
        return Page(
            await self._decoded(table, rows), rows[-1][0] if has_more else None, position, sum(lags) if lags else None
        )

    def _with(self, question: Question, options: ReadOptions, left_s: float) -> Question:
        return msgspec.structs.replace(
            question,
            app=self.committed.app_id,
            topic_id=self.committed.topic_id(question.table),
            partly=len(question.partitions) > 1,
            at=options.at,
            stale_ok=options.stale_ok,
            timeout_s=left_s,
        )

    def _checked(self, table: Table[Any, Any], options: ReadOptions) -> tuple[Table[Any, Any], SubTopology]:
        found, sub = self.committed.table(table.name)
        self.committed.check_positions(found, sub, options.at)
        return found, sub

    async def _decoded(self, table: Table[Any, Any], rows: Sequence[tuple[bytes, bytes]]) -> list[tuple[Any, Any]]:
        decode_key, codec = table.keys_in_order.decode, table.changelog.value_codec
        if codec.fast_decode is not None:
            return [(decode_key(store_key), codec.fast_decode(payload)) for store_key, payload in rows]
        return [(decode_key(store_key), await codec.decode_loading(payload, ())) for store_key, payload in rows]

    # --- who is asked ------------------------------------------------------------------------------------------

    async def _answers(
        self, table: Table[Any, Any], sub: SubTopology, partitions: Iterable[int], ask: Ask, options: ReadOptions
    ) -> list[Answer]:
        """Answers that cover all partitions.

        Raises:
            NotHeld: There are none within the time.
            PermissionError: One of those asked does not allow it.
            ReadFailed: One of those asked could not find out whether it is allowed.
        """
        left, answers = set(partitions), list[Answer]()
        give_up_s = anyio.current_time() + options.timeout_s
        for tries in count():
            left_s = max(0.0, give_up_s - anyio.current_time())
            asked = self._asked(table, sub, left, options, tries)
            outcomes: dict[str, Answer | Exception] = {}
            async with anyio.create_task_group() as group:
                for where, numbers in asked.items():
                    question = ask(tuple(numbers), left_s)
                    group.start_soon(self._attempt, where, question, sub, options, outcomes)
            for where, outcome in outcomes.items():
                if isinstance(outcome, Answer):
                    answers.append(outcome)
                    left.difference_update(set(asked[where]) - outcome.without.keys())
                elif not isinstance(outcome, _MISSED):
                    self._sensors.table_read(table.name, "failed" if isinstance(outcome, ReadFailed) else "refused")
                    raise outcome
            if not left:
                return answers
            if anyio.current_time() >= give_up_s:
                self._sensors.table_read(table.name, "unavailable")
                raise NotHeld(f"table {table.name!r}: {self._why_not(sub, sorted(left), outcomes)}")
            await self._routes.changed(min(_AGAIN_S, max(0.0, give_up_s - anyio.current_time())))
        raise AssertionError

    def _asked(
        self, table: Table[Any, Any], sub: SubTopology, partitions: Iterable[int], options: ReadOptions, tries: int
    ) -> dict[str, list[int]]:
        """Which partitions to ask where; those that nobody is known to hold are left out."""
        asked: dict[str, list[int]] = {}
        for partition in sorted(partitions):
            places = self._places(table, sub, partition, options)
            if places:
                asked.setdefault(places[tries % len(places)], []).append(partition)
        return asked

    def _places(self, table: Table[Any, Any], sub: SubTopology, partition: int, options: ReadOptions) -> list[str]:
        """Where a partition may be read, the best place first."""
        task, here = TaskId(sub.name, partition), self.committed
        copies = self._routes.standbys(task) if options.stale_ok else []
        if here.owns(sub, partition):
            return [_HERE, *copies]
        if options.stale_ok and here.has_copy(table, sub, partition, options.at):
            return [_HERE]
        places = [self._routes.owner(task) or "", *copies, *self._routes.formers(task)]
        return [place for place in dict.fromkeys(places) if place]

    async def _attempt(
        self,
        where: str,
        question: Question,
        sub: SubTopology,
        options: ReadOptions,
        outcomes: dict[str, Answer | Exception],
    ) -> None:
        if options.stale_ok:
            question = _briefly(question)  # another one may do as well
        try:
            if where == _HERE:
                outcomes[where] = await self.committed.answer(question)
            else:
                outcomes[where] = await self._ask(where, question, sub, options)
        except (StreamFlowError, PermissionError) as error:
            outcomes[where] = error

    async def _ask(self, where: str, question: Question, sub: SubTopology, options: ReadOptions) -> Answer:
        """Ask another worker, for as long as it is the one to ask."""
        tasks = [TaskId(sub.name, partition) for partition in question.partitions]
        if any(self._routes.owner(task) != where for task in tasks):
            question = _briefly(question)
        response: Response | Exception | None = None
        async with anyio.create_task_group() as group:

            async def unless_moved() -> None:
                owners = [self._routes.owner(task) for task in tasks]
                while self._routes.knows(where) and owners == [self._routes.owner(task) for task in tasks]:
                    await self._routes.changed(_NEWS_S)
                group.cancel_scope.cancel()

            group.start_soon(unless_moved)
            response = await self._asked_by_http(where, question, options)
            group.cancel_scope.cancel()
        if response is None:
            raise Misdirected("the partition has moved")
        return _answer_of(where, response)

    async def _asked_by_http(self, where: str, question: Question, options: ReadOptions) -> Response | Exception:
        """Errors are returned: raised, they would come out of a task group as a group."""
        url = f"{where.rstrip('/')}{PATH}?{question.query()}"
        try:
            return await self._client.get(url, options.headers or {}, timeout_s=question.timeout_s + _MORE_S)
        except UnreachableError as error:
            return error

    def _why_not(self, sub: SubTopology, left: Sequence[int], outcomes: dict[str, Answer | Exception]) -> str:
        said: list[str] = []
        for outcome in outcomes.values():
            said += outcome.without.values() if isinstance(outcome, Answer) else [str(outcome)]
        reasons = list(dict.fromkeys(said))
        for partition in left:
            owner = self._routes.owner(TaskId(sub.name, partition))
            if owner is None and not self.committed.owns(sub, partition):
                reasons.append(f"nobody is known to hold partition {partition}")
            elif owner == "":
                reasons.append(f"partition {partition} is held by a worker that serves no HTTP (`web`)")
        return "; ".join(reasons) or "nobody has answered"


@asynccontextmanager
async def reading(
    app: Declarations,
    layout: Layout,
    manager: TaskManager,
    group: Group,
    homes: Homes,
    routes: Routes,
    settings: Settings,
    sensors: Sensors,
) -> AsyncGenerator[TableReads]:
    """Let this process read the tables of an app, its own and those of other workers, while the block runs.

    Args:
        app: The app.
        layout: How its work is cut into tasks.
        manager: This worker's tasks.
        group: Its membership.
        homes: Knows the partitions of table keys.
        routes: Who holds what.
        settings: For the session time-out.
        sensors: Told of each read.
    """
    async with HttpClient() as client:
        committed = CommittedReads(app, layout, manager, group, settings.session_timeout_ms / 1000)
        reads = TableReads(committed, layout, homes, routes, client, sensors)
        with registered_reader(app, reads):
            yield reads


def _briefly(question: Question) -> Question:
    return msgspec.structs.replace(question, timeout_s=min(question.timeout_s, _OTHERS_S))


def _answer_of(where: str, response: Response | Exception) -> Answer:
    if isinstance(response, Exception):
        raise response
    if response.status == 200:
        with suppress(msgspec.MsgspecError):
            return Answer.of_data(response.body)
        raise NotReadableYet(f"{where} gives an answer that is none")
    said = _said(response.body)
    text = response.body.decode(errors="replace") if said is None else said
    if response.status == 403:
        raise PermissionError(text)
    if response.status == 421:
        raise Misdirected(text)
    if response.status == 500 and said is not None:
        raise ReadFailed(said)
    raise NotReadableYet(f"{where}: {response.status} {text}")


class _Failure(msgspec.Struct):
    error: str


def _said(body: bytes) -> str | None:
    """What a worker says is wrong; None where it comes from somebody else, such as a proxy before it."""
    with suppress(msgspec.MsgspecError):
        return msgspec.json.decode(body, type=_Failure).error
    return None


def _behind(store_key: bytes) -> bytes:
    """The smallest key that comes after one."""
    return store_key + b"\0"
