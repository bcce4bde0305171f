"""A producer-only connection of an app: sends and asks, runs nothing."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any, TypeVar, cast, overload

from streamflow.clock import Clock, SystemClock
from streamflow.config import Settings
from streamflow.error_groups import one_error
from streamflow.errors import ConfigurationError
from streamflow.log.codec import compression_number
from streamflow.log.connect import connect
from streamflow.model.record import Headers, RecordMetadata
from streamflow.processing.agent import Agent
from streamflow.processing.context import registered_sender
from streamflow.processing.declarations import Declarations
from streamflow.processing.topic import Topic
from streamflow.runtime.internal_topics import prepare_topics
from streamflow.runtime.sending import ProcessSender
from streamflow.runtime.targets import KnownTargets
from streamflow.sensors import Sensors

K = TypeVar("K")
V = TypeVar("V")
R = TypeVar("R")


class Client:
    """Sends to an app's topics; use it as `async with`.

    While it is open, `topic.send(...)` and `agent.ask(...)` of the app work in this process as well.

    Args:
        app: The app.
        settings: Resolved settings.
        clock: Time; None is the system's.
    """

    def __init__(self, app: Declarations, settings: Settings, *, clock: Clock | None = None) -> None:
        self._app = app
        self._settings = settings
        self._clock = clock or SystemClock()
        self._log = connect(settings.broker, clock=self._clock, client_id=f"streamflow-{app.id}-client")
        self._stack = AsyncExitStack()
        self._sender: ProcessSender | None = None

    @property
    def address(self) -> str:
        """The log's absolute address, without secrets."""
        return self._log.address

    async def __aenter__(self) -> Client:
        """Connect, and create the app's topics that do not exist yet.

        Raises:
            LogUnavailableError: Nobody answers.
            TopologyError: Topics do not fit the declarations.
        """
        with one_error():
            await self._open()
        return self

    async def _open(self) -> None:
        async with AsyncExitStack() as stack:
            log = await stack.enter_async_context(self._log)
            descriptions = await prepare_topics(self._app, self._app.topology(), self._settings, log.admin)
            known = KnownTargets(log.admin, compression_number(self._settings.compression))
            known.add_all(self._app, descriptions)
            self._sender = await stack.enter_async_context(
                ProcessSender.open(self._app, self._settings, log, known, self._clock, Sensors())
            )
            stack.enter_context(registered_sender(self._app, self._sender))
            self._stack = stack.pop_all()

    async def __aexit__(self, *exc_info: Any) -> None:
        """Send what waits, and disconnect."""
        self._sender = None
        with one_error():
            await self._stack.__aexit__(*exc_info)

    @overload
    async def send(
        self,
        topic: Topic[K, V] | Agent[K, V, Any],
        *,
        key: K | None = None,
        value: V | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
        headers: Headers = (),
    ) -> RecordMetadata: ...
    @overload
    async def send(
        self,
        topic: str,
        *,
        key: Any = None,
        value: Any = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
        headers: Headers = (),
    ) -> RecordMetadata: ...
    async def send(
        self,
        topic: Topic[Any, Any] | Agent[Any, Any, Any] | str,
        *,
        key: Any = None,
        value: Any = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
        headers: Headers = (),
    ) -> RecordMetadata:
        """Send a record and wait for the log, and before that for room where too much is on its way.

        Args:
            topic: A topic of the app, an agent (its first topic), or a topic's name.
            key: Of its key type; of an agent over `group_by`, see `Agent.key_of`.
            value: Of its value type; None is a tombstone.
            partition: Where to; None lets the key decide.
            timestamp_ms: Milliseconds since the epoch, UTC; None is now.
            headers: Record headers.

        Returns:
            Where the log put it.

        Raises:
            ProductionError: It cannot be encoded or is too large.
            LogUnavailableError: The log did not answer in time.

        Delivery: durable when it returns.
        Cancellation: the record may or may not be written.
        """
        if isinstance(topic, Agent):
            key = topic.key_of(value, key)
        return await self._opened().send((self._topic(topic), key, value, partition, timestamp_ms, headers))

    async def ask(self, agent: Agent[K, V, R], value: V, *, key: K | None = None, timeout_s: float = 30.0) -> R:
        """Send a value to an agent and wait for its first answer.

        Args:
            agent: The agent.
            value: Of its topic's value type.
            key: Of its topic's key type; None is a null key, or the one it groups by (`Agent.key_of`).
            timeout_s: Seconds to wait.

        Returns:
            What it yields first (or returns) for the value, `None` included.

        Raises:
            AskError: The agent failed on it, or yielded nothing.
            TimeoutError: No answer in time.
        """
        key = agent.key_of(value, key)
        return cast(R, await self._opened().ask(agent, value, key=key, timeout_s=timeout_s))

    def _opened(self) -> ProcessSender:
        if self._sender is None:
            raise ConfigurationError("open the client first: async with app.client() as client: ...")
        return self._sender

    def _topic(self, topic: Topic[Any, Any] | Agent[Any, Any, Any] | str) -> Topic[Any, Any]:
        if isinstance(topic, Agent):
            return topic.input_topics[0]
        if isinstance(topic, Topic):
            return topic
        try:
            return self._app.topics[topic]
        except KeyError:
            raise ConfigurationError(
                f"app {self._app.id!r} has no topic {topic!r}; it has: {', '.join(sorted(self._app.topics)) or 'none'}"
            ) from None
