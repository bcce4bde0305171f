"""The steps behind `group_by` and `through`: agents of StreamFlow's own that copy records into another topic."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from streamflow.errors import RefusedError
from streamflow.processing.agent import Agent
from streamflow.processing.declarations import Declarations
from streamflow.processing.policy import ErrorPolicy
from streamflow.processing.topic import Derived, Topic
from streamflow.processing.topology import SubTopology


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


def processors_of(app: Declarations, sub: SubTopology) -> list[Processor]:
    """The agents, then the copying steps of a sub-topology, each in order of name."""
    steps = [app.derived[name] for name in sub.steps]
    return [
        *(app.agents[name] for name in sub.agents),
        *(Copier(step, _first_reader(app, step.topic).on_error) for step in steps),
    ]


def _first_reader(app: Declarations, topic: Topic[Any, Any]) -> Agent[Any, Any, Any]:
    """The first agent that reads a derived topic, be it by way of further steps."""
    for agent in app.agents.values():
        if topic in agent.input_topics:
            return agent
    for step in app.derived.values():
        if step.source_topic is topic:
            return _first_reader(app, step.topic)
    raise RefusedError(f"topic {topic.name!r} is read by no agent")
