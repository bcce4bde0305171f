"""Reads of tables at the supervisor of several processes: passed on to one of them, which asks the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamflow.processing.remote import LONGEST_READ_S
from streamflow.runtime.http_client import HttpClient, UnreachableError
from streamflow.web.table_requests import forwarded
from streamflow.web.tables import KEY, ReadRoute, failure

_MORE_S = 2.0
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
        urls = list(self._urls())
        first = next(self._turns)
        target = (request.scope.get("raw_path") or request.scope["path"].encode()).decode("latin-1")
        query = request.scope["query_string"].decode("latin-1")
        why = "no process runs at present"
        for number in range(len(urls)):
            url = urls[(first + number) % len(urls)]
            try:
                answer = await self._client.get(
                    f"{url}{target}?{query}", forwarded(request), timeout_s=LONGEST_READ_S + _MORE_S
                )
            except UnreachableError as error:
                why = str(error)
                continue
            headers = {name: answer.headers[name] for name in _KEPT if name in answer.headers}
            return Response(answer.body, answer.status, headers=headers)
        return failure(503, why, {"retry-after": "1"})
