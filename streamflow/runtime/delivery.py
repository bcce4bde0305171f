"""How a task's outputs and offsets reach the log: the two processing guarantees behind one face."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from streamflow.runtime.task import Task


class Delivery(Protocol):
    """What tasks and the commit loop need of a guarantee."""

    async def idle(self, task: Task) -> None:
        """The task's input ran empty: send now what need not wait for a commit."""

    async def make_room(self, task: Task) -> None:
        """The task holds as much unsent output as it may: wait until some of it is with the log."""

    async def linger(self, tasks: Iterable[Task]) -> None:
        """Some milliseconds have passed since an output was made."""

    async def commit(self, tasks: Iterable[Task]) -> None:
        """Make everything done so far durable, outputs first, and the positions committed."""
