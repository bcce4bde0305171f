"""The steps behind `group_by` and `through`: agents of StreamFlow's own that copy records into another topic."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from streamflow.processing.agent import Agent
from streamflow.processing.policy import ErrorPolicy
from streamflow.processing.topic import Derived, Topic


class Copier:
    """Copies a source into a derived topic; to the runtime it is one more agent.

    Args:
        derived: The derivation.
        on_error: What to do with a record whose new key cannot be had: the policy of the first agent that reads it.
    """

    kind: Literal["copy"] = "copy"
    concurrency = 1
    thread = False
    is_async = True

    def __init__(self, derived: Derived[Any, Any], on_error: ErrorPolicy) -> None:
        self.name = derived.name
        self.derived = derived
        self.rekey = derived.rekey
        self.input_topics: tuple[Topic[Any, Any], ...] = (derived.source_topic,)
        self.sink_topics: tuple[Topic[Any, Any], ...] = (derived.topic,)
        self.on_error = on_error
        self.place = derived.place


Processor: TypeAlias = Agent[Any, Any, Any] | Copier
"""What processes the records of a task: the user's agents, and the copying steps."""
