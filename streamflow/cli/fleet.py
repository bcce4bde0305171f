"""What the supervisor's web server tells: its worker processes, asked over the loopback interface, as one."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import anyio
import msgspec

from streamflow.metrics import fleet_metrics, merge
from streamflow.runtime.http_client import HttpClient, UnreachableError
from streamflow.runtime.status import WorkerStatus
from streamflow.web.site import ProcessView

TIMEOUT_S = 2.0

_decode_views = msgspec.json.Decoder(list[ProcessView]).decode


@dataclass
class Member:
    """One worker process as the supervisor knows it.

    Attributes:
        index: Its number, from 0.
        listener: Where it serves; None without the web.
        pid: Its process id; None while it does not run.
        restarts: How often it crashed and was started again.
        state: What to say while it does not run.
        answered: Whether it has answered since it was started.
    """

    index: int
    listener: socket.socket | None = None
    pid: int | None = None
    restarts: int = 0
    state: str = "starting"
    answered: bool = False

    def started(self, pid: int) -> None:
        """It runs now.

        Args:
            pid: Its process id.
        """
        self.pid, self.answered, self.state = pid, False, "starting"

    @property
    def url(self) -> str | None:
        """Where the supervisor reaches it; None while it does not run, and without the web."""
        if self.pid is None or self.listener is None:
            return None
        host: str = self.listener.getsockname()[0]
        port: int = self.listener.getsockname()[1]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def ended(self) -> None:
        """It does not run any more."""
        self.pid = None


class Fleet:
    """All worker processes; a `web.site.Source`.

    Args:
        members: One each.
        client: Asks them.
    """

    def __init__(self, members: Sequence[Member], client: HttpClient) -> None:
        self.members = members
        self._client = client

    def urls(self) -> list[str]:
        """Where those that run are reached."""
        return [url for member in self.members if (url := member.url) is not None]

    async def metrics(self) -> bytes:
        """Their metrics, each sample with a label `process`, and how often each was started again."""
        texts = await self._ask("/metrics")
        merged = merge({str(index): text.decode() for index, text in texts.items()})
        up = {str(member.index): member.pid is not None for member in self.members}
        return merged + fleet_metrics(up, {str(member.index): member.restarts for member in self.members})

    async def processes(self) -> Sequence[ProcessView]:
        """The state of each."""
        answers = await self._ask("/status.json")
        return [self._view(member, answers.get(member.index)) for member in self.members]

    def _view(self, member: Member, answer: bytes | None) -> ProcessView:
        if answer is not None:
            status: WorkerStatus | None = _decode_views(answer)[0].status
            return ProcessView(member.index, status)
        if member.pid is not None and member.answered:
            return ProcessView(member.index, None, "does not answer")
        return ProcessView(member.index, None, member.state, starting=member.state == "starting")

    async def _ask(self, path: str) -> dict[int, bytes]:
        answers: dict[int, bytes] = {}

        async def ask(member: Member) -> None:
            if (url := member.url) is None:
                return
            try:
                answer = await self._client.get(url + path, {}, timeout_s=TIMEOUT_S)
            except UnreachableError:
                return
            if answer.status == 200:
                member.answered = True
                answers[member.index] = answer.body

        async with anyio.create_task_group() as tasks:
            for member in self.members:
                tasks.start_soon(ask, member)
        return answers
