"""Tables over HTTP: `/tables/{table}/{key}` and `/tables/{table}` for everyone, and what workers ask one another.

Any worker answers, for keys that others hold, too. Nothing is written here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeAlias

import msgspec
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from streamflow.errors import (
    ConfigurationError,
    DeserializationError,
    NotHeld,
    ReadFailed,
    RecordError,
    StreamFlowError,
)
from streamflow.model.schema import type_name
from streamflow.model.text import plain, reader_of
from streamflow.processing.declarations import Declarations
from streamflow.processing.global_table import GlobalTable
from streamflow.processing.key_text import range_of
from streamflow.processing.remote import ReadOptions, TableRead
from streamflow.processing.set_table import Pairs, SetTable
from streamflow.processing.table import Table
from streamflow.runtime import global_reads
from streamflow.runtime.committed_reads import Misdirected, NotReadableYet, UnknownTable, key_of
from streamflow.runtime.read_question import PATH, Question
from streamflow.runtime.table_reads import Found, Page, Span, TableReads
from streamflow.web.table_requests import Cursor, Query, forwarded, headers_of, key_in_path, shown_error

logger = logging.getLogger("streamflow.web")

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]
Readable: TypeAlias = Table[Any, Any] | SetTable[Any, Any] | GlobalTable[Any, Any]

_encode_json = msgspec.json.Encoder().encode
_WORDS = ("prefix=", "from=", "to=")


class _KeyConvertor(Convertor[str]):
    """The rest of a path, whatever is in it: a key may have slashes and line ends, and may be empty."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


KEY = "streamflow_key"
"""Name of the convertor of keys in paths."""
register_url_convertor(KEY, _KeyConvertor())


class ReadRoute(Route):
    """A path that is read; other methods are refused in the form of all other errors.

    Args:
        path: The path, as Starlette writes it.
        answer: Answers `GET` and `HEAD`.
    """

    def __init__(self, path: str, answer: Handler) -> None:
        super().__init__(path, answer, methods=["GET", "HEAD"])

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["method"] in {"GET", "HEAD"}:
            return await super().handle(scope, receive, send)
        refused = failure(405, f"{scope['method']} {scope['path']}: tables are only read here", {"allow": "GET, HEAD"})
        await refused(scope, receive, send)


class TableSite:
    """The tables of one worker on the web.

    Args:
        app: The app.
        reads: Gives who reads, once the worker runs; None before and after.
    """

    def __init__(self, app: Declarations, reads: Callable[[], TableReads | None]) -> None:
        self._app = app
        self._reads = reads

    def routes(self) -> list[Route]:
        """What it answers."""
        answers: dict[str, Handler] = {
            "/tables": self._index,
            "/tables/{table}": self._many,
            f"/tables/{{table}}/{{key:{KEY}}}": self._one,
            PATH: self._for_workers,
        }
        return [ReadRoute(path, _answering(answer)) for path, answer in answers.items()]

    # --- for everyone ------------------------------------------------------------------------------------------

    async def _index(self, request: Request) -> Response:
        names: dict[str, Readable] = {**self._app.tables, **self._app.set_tables, **self._app.global_tables}
        return _json([_described(name, names[name]) for name in sorted(names)])

    async def _one(self, request: Request) -> Response:
        query = Query(request, of_one=True)
        return await self._answer_one(request, query, key_in_path(request))

    async def _many(self, request: Request) -> Response:
        query = Query(request, of_one=False)
        if (text := query["key"]) is not None:
            return await self._answer_one(request, query, text)
        table = self._table(request)
        mapping = table.pairs if isinstance(table, SetTable) else table
        span = _span_of(table, query)
        cursor = query.cursor(table.name, span)
        low, high = (cursor.low, cursor.high) if cursor is not None else span or (b"", None)
        await self._allow(table.name, None, request)
        page = await self._page(mapping, (low, high), cursor, query, request)
        second = "member" if isinstance(table, SetTable) else "value"
        pairs = [key for key, _ in page.rows] if isinstance(table, SetTable) else page.rows
        items = [{"key": plain(first), second: plain(other)} for first, other in pairs]
        following = None if page.after is None else Cursor(table.name, low, high, page.after).text()
        return _json({"items": items, "cursor": following}, _headers(page))

    async def _page(
        self,
        mapping: Table[Any, Any] | GlobalTable[Any, Any],
        span: Span,
        cursor: Cursor | None,
        query: Query,
        request: Request,
    ) -> Page:
        after, options = None if cursor is None else cursor.after, query.options(forwarded(request))
        if isinstance(mapping, GlobalTable):
            return await global_reads.page(mapping, span, after, query.limit, options)
        return await self._reader().page(mapping, span, after, query.limit, options)

    async def _answer_one(self, request: Request, query: Query, text: str) -> Response:
        table = self._table(request)
        if isinstance(table, SetTable):
            return await self._members(table, request, query, text)
        if query["in"] is not None:
            raise ConfigurationError(f"in= asks for a member of a set, and {table.name!r} is no set table")
        codec = table.source.key_codec if isinstance(table, GlobalTable) else table.key_codec
        key = reader_of(codec, owner=f"{table.kind} {table.name!r}")(text)
        options = query.options(forwarded(request))
        await self._allow(table.name, key, request)
        if isinstance(table, GlobalTable):
            found = await global_reads.get(table, key, options)
        else:
            found = await self._reader().get(table, key, options)
        if not found.is_there:
            return failure(404, f"{table.kind} {table.name!r} has no key {text!r}", _headers(found))
        return _json({"key": plain(key), "value": plain(found.value)}, _headers(found))

    async def _members(self, table: SetTable[Any, Any], request: Request, query: Query, text: str) -> Response:
        pairs = table.pairs
        key = reader_of(pairs.home_codec, owner=f"set table {table.name!r}")(text)
        options = query.options(forwarded(request))
        await self._allow(table.name, key, request)
        if (member_text := query["in"]) is not None:
            return await self._member(pairs, key, member_text, options)
        low, high = pairs.keys_in_order.prefix((key,))
        cursor = query.cursor(table.name, (low, high))
        after = None if cursor is None else cursor.after
        page = await self._reader().members_page(pairs, key, after, query.limit, options)
        if not page.rows and after is None:
            return failure(404, f"set table {table.name!r} has no key {text!r}", _headers(page))
        following = None if page.after is None else Cursor(table.name, low, high, page.after).text()
        members = [plain(member) for (_, member), _ in page.rows]
        return _json({"key": plain(key), "members": members, "cursor": following}, _headers(page))

    async def _member(self, pairs: Pairs[Any, Any], key: Any, text: str, options: ReadOptions) -> Response:
        member = reader_of(pairs.member_codec, owner=f"set table {pairs.name!r}")(text)
        found = await self._reader().get(pairs, (key, member), options)
        answer = {"key": plain(key), "member": plain(member), "in": found.is_there}
        return _json(answer, _headers(found))

    def _table(self, request: Request) -> Readable:
        name = request.path_params["table"]
        app = self._app
        for kind in (app.set_tables, app.tables, app.global_tables):
            if name in kind:
                return kind[name]
        raise UnknownTable(f"app {app.id!r} has no table {name!r}")

    def _reader(self) -> TableReads:
        reads = self._reads()
        if reads is None:
            raise NotHeld("this worker is starting or stopping")
        return reads

    # --- for other workers -------------------------------------------------------------------------------------

    async def _for_workers(self, request: Request) -> Response:
        question = Question.of_query(request.query_params.get("q", ""))
        committed = self._reader().committed
        committed.check_asker(question)
        table, _ = committed.table(question.table)
        await self._check(table.name, _key_asked(table, question), request)  # who asks counts the read
        answer = await committed.answer(question)
        return Response(answer.data(), media_type="application/msgpack", headers={"cache-control": "no-store"})

    async def _allow(self, table: str, key: Any, request: Request) -> None:
        """Ask the app whether this may be read.

        Raises:
            PermissionError: It may not.
            ReadFailed: The app's function could not say.
        """
        reads = self._reads()
        with nullcontext() if reads is None else reads.counting_failures(table):
            await self._check(table, key, request)

    async def _check(self, table: str, key: Any, request: Request) -> None:
        guard = self._app.reads_guard
        if guard is not None:
            await guard.check(TableRead(table, key, headers_of(request)))


def _key_asked(table: Table[Any, Any], question: Question) -> Any:
    """The key that a question is about; None for several."""
    if question.under is not None:
        return table.home_codec.decode(question.under)
    if question.key is None:
        return None
    key = key_of(table, question.key)
    return key[0] if isinstance(table, Pairs) else key


def _span_of(table: Readable, query: Query) -> Span | None:
    """The range that is asked for; of a set table, its keys are."""
    prefix, start, stop = query["prefix"], query["from"], query["to"]
    if isinstance(table, GlobalTable):
        return range_of(table, table.source.key_codec, prefix=prefix, start=start, stop=stop, words=_WORDS)
    if isinstance(table, Table):
        return range_of(table, table.key_codec, prefix=prefix, start=start, stop=stop, words=_WORDS)
    if prefix is not None:
        raise ConfigurationError(f"prefix= of set table {table.name!r}: give from= and to=, or a key for its members")
    if start is None and stop is None:
        return None
    read_key = reader_of(table.pairs.home_codec, owner=f"set table {table.name!r}")
    bounds = [
        None if text is None else table.pairs.keys_in_order.prefix((read_key(text),))[0] for text in (start, stop)
    ]
    return bounds[0] or b"", bounds[1]


# --- answers --------------------------------------------------------------------------------------------------------


def _answering(handler: Handler) -> Handler:
    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except UnknownTable as error:
            return failure(404, str(error))
        except Misdirected as error:
            return failure(421, str(error))
        except PermissionError as error:
            return failure(403, str(error) or "forbidden")
        except ReadFailed as error:
            return failure(500, str(error))
        except DeserializationError as error:
            return failure(500, shown_error(error))
        except (ConfigurationError, RecordError) as error:
            return failure(400, shown_error(error))
        except (NotHeld, NotReadableYet) as error:
            return failure(503, str(error), {"retry-after": "1"})
        except StreamFlowError as error:
            logger.warning("a read of a table failed: %s", error)
            return failure(503, str(error), {"retry-after": "1"})

    return answered


def _json(answer: object, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    return Response(
        _encode_json(answer),
        status,
        media_type="application/json",
        headers={"cache-control": "no-store", **(headers or {})},
    )


def failure(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that says what is wrong."""
    return _json({"error": text.encode(errors="replace").decode()}, headers, status)


def _headers(read: Found | Page) -> dict[str, str]:
    """What an answer says of itself: how far its partitions are, and how much it may lack."""
    headers = {"streamflow-position": read.position}
    return headers if read.lag is None else {**headers, "streamflow-lag": str(read.lag)}


def _described(name: str, table: Readable) -> dict[str, str]:
    if isinstance(table, SetTable):
        value = f"set of {type_name(table.member_type)}"
        kind, text = "set table", table.pairs.help
    else:
        kind, text, value = table.kind, table.help, type_name(table.value_type)
    return {"table": name, "kind": kind, "key_type": type_name(table.key_type), "value_type": value, "help": text}
