"""What feeds, turns and commits need of a task: the seam that keeps the runtime's modules free of import cycles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from streamflow.clock import Clock
from streamflow.errors import RecordError
from streamflow.log.api import OffsetMark
from streamflow.model.record import TopicPartition
from streamflow.processing.topic import Topic
from streamflow.processing.topology import SubTopology
from streamflow.runtime.derived import Processor
from streamflow.runtime.inputs import Inputs
from streamflow.runtime.outputs import Outputs, OutputTopic, Staged
from streamflow.sensors import Sensors


class Delivery(Protocol):
    """How outputs and offsets reach the log: a processing guarantee, as tasks see it."""

    async def idle(self, task: TaskView) -> None:
        """The task's input ran empty: send now what need not wait for a commit."""

    async def make_room(self, task: TaskView) -> None:
        """The task holds as much unsent output as it may: wait until some of it is with the log."""

    def hurry(self) -> None:
        """Somebody waits for what is done: do not let it wait for the commit interval."""


class TaskView(Protocol):
    """A task as its feeds and the commit see it; `task.Task` is the one implementation."""

    name: str
    clock: Clock
    sensors: Sensors
    delivery: Delivery
    inputs: Inputs
    outputs: Outputs
    sub_topology: SubTopology
    max_unsent_bytes: int
    committed: dict[TopicPartition, int]
    lost: bool
    is_closing: bool
    failed: Callable[[Processor, RecordError, list[Staged]], None]

    def start_positions(self) -> dict[TopicPartition, int]:
        """Where the task started."""
        ...

    def topic_of(self, tp: TopicPartition) -> Topic[Any, Any]:
        """The declared topic of a source partition."""
        ...

    def owner_of(self, feed: Any) -> asyncio.Task[Any] | None:
        """The asyncio task in which the agent of a feed runs."""
        ...

    def reply_output(self, topic: str) -> OutputTopic | None:
        """Where answers go; None when the asking app's reply topic is unknown here."""
        ...

    def input_ended(self) -> bool:
        """Whether a bounded run has taken everything there is to take."""
        ...

    def uncommitted(self) -> dict[TopicPartition, OffsetMark]:
        """Positions that moved since the last commit."""
        ...

    def set_committed(self, offsets: Mapping[TopicPartition, OffsetMark]) -> None:
        """The log has these offsets of ours."""
