"""What the worker answers over HTTP: `/metrics`, `/live`, `/ready`, `/status.json` and a page for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from streamflow.metrics import CONTENT_TYPE
from streamflow.runtime.status import WorkerStatus
from streamflow.web.overview import Overview
from streamflow.web.page import render

_encode_json = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class ProcessView:
    """One worker process as the site sees it.

    Attributes:
        index: Its number among several; None for the only one.
        status: None when it does not answer.
        reason: Why not.
        starting: Whether it was started only just now, and is not to be held dead.
    """

    index: int | None
    status: WorkerStatus | None
    reason: str = ""
    starting: bool = False

    @property
    def name(self) -> str:
        """How to name it to people."""
        return "the worker" if self.index is None else f"process {self.index}"

    @property
    def not_live(self) -> str:
        """Why it makes no progress; empty when it does."""
        if self.status is None:
            return "" if self.starting else f"{self.name}: {self.reason}"
        return "" if self.status.live else f"{self.name}: {self.status.live_reason}"

    @property
    def not_ready(self) -> str:
        """Why it is not ready; empty when it is."""
        if self.status is None:
            return f"{self.name}: {self.reason}"
        return "" if self.status.ready else f"{self.name} is {self.status.busy}"


class Source(Protocol):
    """Where the site's answers come from: one worker, or the supervisor of several."""

    async def metrics(self) -> bytes:
        """Prometheus' text format."""
        ...

    async def processes(self) -> Sequence[ProcessView]:
        """The state of every worker process."""
        ...


def build_site(source: Source, overview: Callable[[], Overview], more: Sequence[Route] = ()) -> Starlette:
    """Make the site.

    Args:
        source: Where its answers come from.
        overview: What the page says about the app; asked for each page.
        more: What else it answers.
    """

    async def metrics(_: Request) -> Response:
        return Response(await source.metrics(), media_type=CONTENT_TYPE)

    async def live(_: Request) -> Response:
        views = await source.processes()
        return _health("live", [view.not_live for view in views])

    async def ready(_: Request) -> Response:
        views = await source.processes()
        return _health("ready", [view.not_ready for view in views])

    async def status(_: Request) -> Response:
        return Response(_encode_json(await source.processes()), media_type="application/json")

    async def page(_: Request) -> Response:
        return HTMLResponse(render(overview(), await source.processes()))

    answers = {"/metrics": metrics, "/live": live, "/ready": ready, "/status.json": status, "/": page}
    return Starlette(routes=[Route(path, answer, methods=["GET"]) for path, answer in answers.items()] + [*more])


def _health(question: str, objections: Sequence[str]) -> Response:
    reasons = [objection for objection in objections if objection]
    answer: dict[str, object] = {question: not reasons}
    if reasons:
        answer["reason"] = "; ".join(reasons)
    return Response(_encode_json(answer), status_code=503 if reasons else 200, media_type="application/json")
