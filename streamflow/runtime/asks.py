"""`agent.ask`: a record with the address of its answer, and the lane on which answers arrive.

The lane is outside the consumer group: this process reads one partition of the app's reply topic from its end on, and
picks out the answers to its own questions. It is opened by the first question.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from typing import Any

import anyio
import msgspec

from streamflow.clock import Clock
from streamflow.errors import AskError, OffsetOutOfRangeError, RetriableError
from streamflow.log.api import Log
from streamflow.model.record import TopicPartition
from streamflow.model.reply import HEADER_ASK_ID, HEADER_ERROR, ask_headers
from streamflow.processing.agent import Agent
from streamflow.runtime.outputs import Target
from streamflow.runtime.sender import DirectSender

_RETRY_S = 0.2


class Asks:
    """Asks agents and waits for their answers.

    Args:
        log: The log.
        sender: Sends the questions.
        replies: The reply topic.
        clock: For the time-outs.
    """

    def __init__(self, log: Log, sender: DirectSender, replies: Target, clock: Clock) -> None:
        self._log = log
        self._sender = sender
        self._reply_to = TopicPartition(replies.name, random.randrange(replies.partitions))
        self._clock = clock
        self._waiting: dict[bytes, tuple[asyncio.Event, list[Any]]] = {}
        self._needed = asyncio.Event()
        self._ready = asyncio.Event()

    async def run(self) -> None:
        """Read answers until cancelled; sleeps until somebody asks."""
        await self._needed.wait()
        end_offset = await self._end_offset()
        async with self._log.reader("replies") as reader:
            reader.add(self._reply_to, end_offset)
            reader.ask(self._reply_to)
            self._ready.set()
            while True:
                for fetched in await reader.receive():
                    if isinstance(fetched.error, OffsetOutOfRangeError):  # old answers were deleted
                        reader.add(self._reply_to, fetched.error.log_start)
                    elif fetched.error is not None:
                        raise fetched.error
                    for batch in fetched.batches:
                        for record in batch.open():
                            self._arrived(record.value, dict(record.headers))
                    reader.ask(self._reply_to)

    async def _end_offset(self) -> int:
        while True:
            try:
                return (await self._log.admin.end_offsets([self._reply_to]))[self._reply_to]
            except RetriableError:
                await self._clock.sleep(_RETRY_S)

    def _arrived(self, value: bytes | None, headers: dict[str, bytes | None]) -> None:
        waiting = self._waiting.get(headers.get(HEADER_ASK_ID) or b"")
        if waiting is not None:
            event, answer = waiting
            answer[:] = [value, headers.get(HEADER_ERROR)]
            event.set()

    async def ask(self, agent: Agent[Any, Any, Any], value: Any, *, key: Any, timeout_s: float) -> Any:
        """See `processing.context.Sender.ask`."""
        deadline_s = self._clock.monotonic() + timeout_s
        ask_id = uuid.uuid4().hex.encode()
        event, answer = self._waiting[ask_id] = asyncio.Event(), []
        try:
            self._needed.set()
            if not await self._clock.wait(self._ready, timeout_s):
                raise TimeoutError(f"agent {agent.name!r}: the reply topic {self._reply_to.topic!r} cannot be read")
            topic = agent.input_topics[0]
            headers = ask_headers(self._reply_to.topic, self._reply_to.partition, ask_id, agent.name)
            # In real time: no clock of ours moves while a log is away.
            with anyio.move_on_after(max(0.0, deadline_s - self._clock.monotonic())) as sending:
                await self._sender.send((topic, key, value, None, None, headers))
            if sending.cancelled_caught:
                raise TimeoutError(
                    f"agent {agent.name!r}: the log did not take the question within {timeout_s:g} s; it may still "
                    "reach the agent"
                )
            if not await self._clock.wait(event, max(0.0, deadline_s - self._clock.monotonic())):
                raise TimeoutError(
                    f"agent {agent.name!r} did not answer within {timeout_s:g} s: is a worker of the app running, and "
                    "does the agent get as far as this record?"
                )
        finally:
            del self._waiting[ask_id]
        data, error = answer
        if error is not None:
            raise AskError(f"agent {agent.name!r} failed: {error.decode('utf-8', 'replace')}")
        return None if data is None else msgspec.json.decode(data, type=result_type(agent))


def result_type(agent: Agent[Any, Any, Any]) -> Any:
    """The type an agent's answers decode as: what its annotations say it yields or returns, else anything."""
    types = agent.signature.output_types
    if not types or any(each is Any for each in types):
        return Any
    union = types[0]
    for each in types[1:]:
        union = union | each
    return union
