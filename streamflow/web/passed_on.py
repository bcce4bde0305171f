"""Reads of tables at the supervisor of several processes: passed on to one of them, which asks the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import count
from urllib.parse import parse_qsl

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamflow.processing.remote import DEFAULT_READ_S, LONGEST_READ_S
from streamflow.runtime.http_client import HttpClient, UnreachableError
from streamflow.web.table_requests import forwarded
from streamflow.web.tables import KEY, ReadRoute, failure

_MORE_S = 2.0
_PATIENCE_S = 1.0
"""When the next process is asked, too: this one may wait for something, or not run at all."""
_UNAVAILABLE = 503
_KEPT = ("content-type", "cache-control", "retry-after", "streamflow-position", "streamflow-lag")


class PassedOn:
    """Passes reads on to processes in turn.

    Args:
        urls: Where those that run are reached.
        client: Asks them.
    """

    def __init__(self, urls: Callable[[], Iterable[str]], client: HttpClient) -> None:
        self._urls = urls
        self._client = client
        self._turns = count()

    def routes(self) -> list[Route]:
        """What it answers."""
        paths = ["/tables", "/tables/{table}", f"/tables/{{table}}/{{key:{KEY}}}"]
        return [ReadRoute(path, self._answer) for path in paths]

    async def _answer(self, request: Request) -> Response:
        """The first answer that is one; a process that does not answer, or cannot, holds up none that can."""
        urls = list(self._urls())
        first = next(self._turns) % max(1, len(urls))
        target = (request.scope.get("raw_path") or request.scope["path"].encode()).decode("latin-1")
        query = request.scope["query_string"].decode("latin-1")
        within_s = _within_s(query)
        best = _unanswered("no process answers" if urls else "no process runs at present")
        give_up_s = anyio.current_time() + within_s + _MORE_S
        told, answers = anyio.create_memory_object_stream[Response](len(urls))

        async def ask(url: str) -> None:
            told.send_nowait(await self._ask(f"{url}{target}?{query}", forwarded(request), within_s + _MORE_S))

        async with told, answers, anyio.create_task_group() as tasks:
            under_way = 0
            for url in urls[first:] + urls[:first]:
                tasks.start_soon(ask, url)
                under_way += 1
                with anyio.move_on_after(_PATIENCE_S):
                    best = await answers.receive()
                    under_way -= 1
                if best.status_code != _UNAVAILABLE or anyio.current_time() >= give_up_s:
                    break
            while under_way and best.status_code == _UNAVAILABLE:
                with anyio.move_on_after(max(0.0, give_up_s - anyio.current_time())) as waiting:
                    best = await answers.receive()
                under_way = 0 if waiting.cancelled_caught else under_way - 1
            tasks.cancel_scope.cancel()
        return best

    async def _ask(self, url: str, headers: dict[str, str], timeout_s: float) -> Response:
        try:
            answer = await self._client.get(url, headers, timeout_s=timeout_s)
        except UnreachableError as error:
            return _unanswered(str(error))
        kept = {name: answer.headers[name] for name in _KEPT if name in answer.headers}
        return Response(answer.body, answer.status, headers=kept)


def _unanswered(why: str) -> Response:
    return failure(_UNAVAILABLE, why, {"retry-after": "1"})


def _within_s(query: str) -> float:
    """How long a read may take; one that says something else is refused by the process that is asked."""
    with suppress(ValueError):
        said_s = float(dict(parse_qsl(query)).get("timeout_s") or DEFAULT_READ_S)
        if 0 <= said_s <= LONGEST_READ_S:
            return said_s
    return DEFAULT_READ_S
