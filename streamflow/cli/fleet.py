"""What the supervisor's web server tells: its worker processes, asked over the loopback interface, as one."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import anyio
import anyio.to_thread
import msgspec

from streamflow.metrics import fleet_metrics, merge
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

    def ended(self) -> None:
        """It does not run any more."""
        self.pid = None


class Fleet:
    """All worker processes; a `web.site.Source`.

    Args:
        members: One each.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members

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
            if member.pid is None or member.listener is None:
                return
            port = member.listener.getsockname()[1]
            answer = await anyio.to_thread.run_sync(_get, port, path, abandon_on_cancel=True)
            if answer is not None:
                member.answered = True
                answers[member.index] = answer

        async with anyio.create_task_group() as tasks:
            for member in self.members:
                tasks.start_soon(ask, member)
        return answers


def _get(port: int, path: str) -> bytes | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return body if answer.status == 200 else None
