"""What user code stands in: a record's turn, or a process that can send at once.

Declarations (topics, agents) have no connection of their own. They find where to send to here: inside a record's turn
the send joins the turn's stage; elsewhere it goes through the sender that the running app registered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias
from weakref import WeakKeyDictionary

from streamflow.errors import ClosedError
from streamflow.model.record import Headers, RecordMetadata
from streamflow.state.stage import PlainStage, Stage

Outgoing: TypeAlias = tuple[Any, Any, Any, int | None, int | None, Headers]
"""A record to send as user code gives it: topic, key, value, partition, timestamp, headers (see `Topic.send`)."""


class RunningApp(Protocol):
    """An app, as far as it matters here: topics and agents import this module, so it cannot import theirs."""

    id: str


class Turn(Protocol):
    """The turn of one record (or one `take` batch) in one agent; or what stands for it elsewhere."""

    @property
    def record(self) -> Any:
        """The record in hand, the last one of a unit; None between records, and where there is none."""

    @property
    def owner(self) -> asyncio.Task[Any] | None:
        """The task that the agent runs in; None where it is no agent's turn."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """That task's loop."""

    @property
    def stages(self) -> Mapping[str, Stage]:
        """What the turn sees of the tables that it may touch, by full name."""
        ...

    @property
    def at_hand(self) -> Mapping[str, PlainStage]:
        """Those that may be touched without looking who asks, since the agent's own code runs."""
        ...

    def may_touch(self) -> bool:
        """Whether the caller works for the turn: it is the agent, or a task that it waits for.

        Raises:
            ClosedError: It is a thread of the agent's, which would read neither this turn's writes nor the last ones.
        """
        ...

    def check_alive(self) -> None:
        """Raise `ClosedError` where the caller does not work for the turn."""

    def refuse_table(self, table: Any) -> None:
        """Raise what says why a table that is not among `stages` may not be touched; else it is read as elsewhere."""

    def timestamp_ms(self) -> int:
        """Event time of the record in hand."""
        ...

    def send(self, outgoing: Outgoing) -> Callable[[], Awaitable[None]] | None:
        """Add an output to the turn's stage.

        Returns:
            What waits for room, in a turn whose outputs do not wait for its end; who can wait calls it.

        Raises:
            ProductionError: It cannot be encoded or is too large.
            ClosedError: The caller outlived its turn.
        """

    def refuse_ask(self, agent: Any) -> None:
        """Raise `TopologyError` if asking that agent from here could never be answered."""


class Sender(Protocol):
    """Sends at once, outside any record's turn."""

    async def send(self, outgoing: Outgoing) -> RecordMetadata:
        """Send and wait for the log, and before that for room where too much is on its way."""
        ...

    def send_nowait(self, outgoing: Outgoing) -> None:
        """Send without waiting; a failure is logged and counted.

        Raises:
            WouldBlock: (anyio's) Too much is on its way, or the topic was not described yet: `send` waits.
        """

    async def ask(self, agent: Any, value: Any, *, key: Any, timeout_s: float) -> Any:
        """Send to an agent and wait for its first answer."""


current_turn: ContextVar[Turn | None] = ContextVar("streamflow_turn", default=None)
"""The turn the caller is in. It is set to None inside timers and tasks."""

_senders: WeakKeyDictionary[RunningApp, dict[int | None, Sender]] = WeakKeyDictionary()
"""Per app and event loop (by its id): a sender belongs to the loop it was opened on."""


def sender_of(app: RunningApp) -> Sender:
    """The sender of an app that runs in this process.

    Raises:
        ClosedError: It does not run; the message says what to write.
    """
    senders = _senders.get(app, {})
    sender = senders.get(_loop_id())
    if sender is None:
        where = "runs on another event loop of this process" if senders else "is not running in this process"
        raise ClosedError(
            f"app {app.id!r} {where}: send from inside an agent, a timer or a task, "
            "or within `async with app.client() as client:` or `async with app.running():`"
        )
    return sender


@contextmanager
def registered_sender(app: RunningApp, sender: Sender) -> Generator[None]:
    """Make `sender` the app's while the block runs (the newest wins; the one before comes back after)."""
    senders, loop_id = _senders.setdefault(app, {}), _loop_id()
    before = senders.get(loop_id)
    senders[loop_id] = sender
    try:
        yield
    finally:
        if before is None:
            senders.pop(loop_id, None)
        else:
            senders[loop_id] = before


def _loop_id() -> int | None:
    try:
        return id(asyncio.get_running_loop())
    except RuntimeError:
        return None
