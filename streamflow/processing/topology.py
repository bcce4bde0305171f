"""An app as frozen data: topics, agents, steps, jobs, the edges between them, and the sub-topologies they form.

It is the one source for the checks at start, for tests, for `streamflow topology` and for whatever draws or exports it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from streamflow.errors import TopologyError
from streamflow.model.schema import type_name
from streamflow.processing.agent import Agent
from streamflow.processing.global_table import GlobalTable
from streamflow.processing.hooks import BackgroundTask, Crontab, Timer
from streamflow.processing.names import named_objects
from streamflow.processing.policy import dead_letter_topic, policy_text
from streamflow.processing.table import Table
from streamflow.processing.topic import Derived, Through, Topic

EdgeKind: TypeAlias = Literal["reads", "sinks", "sends", "repartitions", "copies", "dead_letters", "uses", "fills"]
Job: TypeAlias = Timer | Crontab | BackgroundTask


@dataclass(frozen=True, slots=True)
class TopicNode:
    """A topic.

    Attributes:
        name: Its name.
        key_type: Type of its keys, as text.
        value_type: Type of its values, as text.
        key_serializer: How keys are written.
        value_serializer: How values are written.
        partitions: Declared partition count, or None.
        internal: Whether it is StreamFlow's own.
    """

    name: str
    key_type: str
    value_type: str
    key_serializer: str
    value_serializer: str
    partitions: int | None
    internal: bool

    @property
    def id(self) -> str:
        """How edges call it."""
        return f"topic:{self.name}"


@dataclass(frozen=True, slots=True)
class AgentNode:
    """An agent.

    Attributes:
        name: Its name.
        kind: `generator`, `stream` or `record`.
        concurrency: Records of one partition in progress at once.
        on_error: Its error policy, as text.
        thread: Whether it runs in a worker thread.
        place: Where it was declared, `file:line`.
    """

    name: str
    kind: str
    concurrency: int
    on_error: str
    thread: bool
    place: str

    @property
    def id(self) -> str:
        """How edges call it."""
        return f"agent:{self.name}"


@dataclass(frozen=True, slots=True)
class StepNode:
    """A step made by `group_by` or `through`: it takes records from one topic to another.

    Attributes:
        name: Its name.
        kind: `group_by` or `through`.
        place: Where it was declared, `file:line`.
    """

    name: str
    kind: Literal["group_by", "through"]
    place: str

    @property
    def id(self) -> str:
        """How edges call it."""
        return f"step:{self.name}"


@dataclass(frozen=True, slots=True)
class TableNode:
    """A table.

    Attributes:
        name: Its name.
        key_type: Type of its keys, as text.
        value_type: Type of its values, as text.
        changelog: Name of the topic that it is restored from.
        ttl_s: Seconds a value lives after its last write, or None.
        help: What it holds, for people.
        place: Where it was declared, `file:line`.
        kind: `changelog`: agents write it, and its changes go to the changelog; `source`: that topic fills it;
            `global`: that topic fills it, and every worker holds all of it.
    """

    name: str
    key_type: str
    value_type: str
    changelog: str
    ttl_s: float | None
    help: str
    place: str
    kind: Literal["changelog", "source", "global"] = "changelog"

    @property
    def id(self) -> str:
        """How edges call it."""
        return f"table:{self.name}"


@dataclass(frozen=True, slots=True)
class JobNode:
    """A timer, crontab or task.

    Attributes:
        name: Its name.
        kind: `timer`, `crontab` or `task`.
        schedule: When it runs, as text.
        on_leader: Whether it runs in one worker only.
    """

    name: str
    kind: Literal["timer", "crontab", "task"]
    schedule: str
    on_leader: bool

    @property
    def id(self) -> str:
        """How edges call it."""
        return f"{self.kind}:{self.name}"


Node: TypeAlias = TopicNode | AgentNode | StepNode | TableNode | JobNode


@dataclass(frozen=True, slots=True)
class Edge:
    """Records go this way.

    Attributes:
        source: Id of the node they come from.
        target: Id of the node they go to.
        kind: `reads` (a topic into an agent or step), `sinks` (an agent's results), `sends` (what code sends, as far as
            it can be read there), `repartitions`, `copies` (a step's output), `dead_letters`,
            `uses` (an agent, timer or task a table), `fills` (a topic the table of which it is the source).
    """

    source: str
    target: str
    kind: EdgeKind


@dataclass(frozen=True, slots=True)
class SubTopology:
    """What is processed together: agents and steps that share a source topic or a table. A task is one partition of it.

    That of the leader topic, in an app without agents, has neither: who owns its task leads.

    Attributes:
        name: Made of user names: its first source topic.
        topics: Names of its source topics, sorted.
        agents: Names of its agents, sorted.
        steps: Names of its steps, sorted.
        tables: Names of its tables, sorted.
    """

    name: str
    topics: tuple[str, ...]
    agents: tuple[str, ...]
    steps: tuple[str, ...]
    tables: tuple[str, ...] = ()

    def has_agent(self, name: str) -> bool:
        """Whether an agent belongs to it."""
        return name in self.agents


@dataclass(frozen=True, slots=True)
class Topology:
    """An app as frozen data.

    Attributes:
        app: The app's name.
        nodes: Topics, agents, steps, tables and jobs, each kind in order of name.
        edges: How records go between them.
        sub_topologies: What is processed together, in order of name.
    """

    app: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    sub_topologies: tuple[SubTopology, ...]

    @property
    def topics(self) -> tuple[TopicNode, ...]:
        """The topics, internal ones too, in order of name."""
        return tuple(node for node in self.nodes if isinstance(node, TopicNode))

    @property
    def agents(self) -> tuple[AgentNode, ...]:
        """The agents, in order of name."""
        return tuple(node for node in self.nodes if isinstance(node, AgentNode))

    @property
    def steps(self) -> tuple[StepNode, ...]:
        """The steps made by `group_by` and `through`, in order of name."""
        return tuple(node for node in self.nodes if isinstance(node, StepNode))

    @property
    def tables(self) -> tuple[TableNode, ...]:
        """The tables, in order of name."""
        return tuple(node for node in self.nodes if isinstance(node, TableNode))

    @property
    def jobs(self) -> tuple[JobNode, ...]:
        """Timers, crontabs and tasks."""
        return tuple(node for node in self.nodes if isinstance(node, JobNode))

    def node(self, id: str) -> Node:
        """The node of an id.

        Raises:
            KeyError: There is none.
        """
        for one in self.nodes:
            if one.id == id:
                return one
        raise KeyError(id)

    def to_text(self) -> str:
        """The topology for a terminal: each sub-topology with what it reads and where it writes."""
        lines = [f"app {self.app}"]
        for sub in self.sub_topologies:
            lines += ["", f"sub-topology {sub.name}"]
            lines += [f"  reads   {self._label(f'topic:{name}')}" for name in sub.topics]
            for name in sub.tables:
                table = self.node(f"table:{name}")
                if isinstance(table, TableNode) and table.kind == "source":
                    lines.append(f"  {self._label(table.id)}, filled from {self._label(f'topic:{table.changelog}')}")
            for id in (*(f"step:{name}" for name in sub.steps), *(f"agent:{name}" for name in sub.agents)):
                lines += [f"  {self._label(id)}", *self._outputs(id)]
        for each in self.tables:
            if each.kind == "global":
                lines += ["", self._label(each.id), f"  filled from {self._label(f'topic:{each.changelog}')}"]
        for job in self.jobs:
            lines += ["", self._label(job.id), *self._outputs(job.id)]
        joined = {end for edge in self.edges for end in (edge.source, edge.target)}
        joined.update(f"topic:{name}" for sub in self.sub_topologies for name in sub.topics)
        alone = [one for one in self.topics if one.id not in joined]
        if alone:
            lines += ["", "topics no agent names", *(f"  {self._label(one.id)}" for one in alone)]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The topology as a JSON object (a dict of strings, numbers and lists)."""
        kinds: dict[str, tuple[Node, ...]] = {
            "topics": self.topics,
            "agents": self.agents,
            "steps": self.steps,
            "tables": self.tables,
            "jobs": self.jobs,
        }
        listed: dict[str, Any] = {"app": self.app}
        for name, nodes in kinds.items():
            listed[name] = [{"id": one.id} | asdict(one) for one in nodes]
        listed["edges"] = [asdict(edge) for edge in self.edges]
        listed["sub_topologies"] = [
            {name: list(part) if isinstance(part, tuple) else part for name, part in asdict(sub).items()}
            for sub in self.sub_topologies
        ]
        return listed

    def to_mermaid(self) -> str:
        """The topology as a Mermaid flowchart."""
        ids = {node.id: f"n{number}" for number, node in enumerate(self.nodes)}
        shapes = {
            TopicNode: ("[(", ")]"),
            AgentNode: ("(", ")"),
            StepNode: ("{{", "}}"),
            TableNode: ("[[", "]]"),
            JobNode: ("([", "])"),
        }
        lines = ["flowchart LR"]
        for node in self.nodes:
            left, right = shapes[type(node)]
            lines.append(f'    {ids[node.id]}{left}"{self._caption(node)}"{right}')
        for edge in self.edges:
            arrow = "-->" if edge.kind in ("reads", "sinks", "repartitions", "copies", "fills") else "-.->"
            label = "" if edge.kind in ("reads", "sinks") else f"|{edge.kind.replace('_', ' ')}|"
            lines.append(f"    {ids[edge.source]} {arrow}{label} {ids[edge.target]}")
        return "\n".join(lines) + "\n"

    def _caption(self, node: Node) -> str:
        if isinstance(node, TopicNode | TableNode):
            return f"{node.name}<br/>{_escaped(f'{node.key_type}: {node.value_type}')}"
        return (
            f"{node.name}<br/>{_escaped(node.schedule)}" if isinstance(node, JobNode) and node.schedule else node.name
        )

    def _label(self, id: str) -> str:
        node = self.node(id)
        if isinstance(node, TopicNode):
            partitions = "" if node.partitions is None else f", {node.partitions} partitions"
            internal = ", internal" if node.internal else ""
            return f"topic {node.name} ({node.key_type}: {node.value_type}{partitions}{internal})"
        if isinstance(node, AgentNode):
            thread = ", thread" if node.thread else ""
            return (
                f"agent   {node.name} ({node.kind}, concurrency {node.concurrency}, on_error {node.on_error}{thread})"
            )
        if isinstance(node, StepNode):
            return f"step    {node.name} ({node.kind})"
        if isinstance(node, TableNode):
            kind = "global table" if node.kind == "global" else "table"
            return f"{kind} {node.name} ({node.key_type}: {node.value_type})"
        leader = ", on the leader" if node.on_leader else ""
        return f"{node.kind} {node.name}" + (
            f" ({node.schedule}{leader})" if node.schedule else leader.replace(",", " ", 1)
        )

    def _outputs(self, id: str) -> list[str]:
        return [
            f"    {edge.kind.replace('_', ' ')} -> {self._label(edge.target)}"
            for edge in self.edges
            if edge.source == id
        ]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")


def every_topic(
    topics: Mapping[str, Topic[Any, Any]], derived: Mapping[str, Derived[Any, Any]], leading: Topic[Any, Any] | None
) -> dict[str, Topic[Any, Any]]:
    """Topics by name: those declared, in order, then those that steps write, then the leader topic."""
    internal = [*(step.topic for step in derived.values()), *([] if leading is None else [leading])]
    return {**topics, **{topic.name: topic for topic in internal}}


def build_topology(
    app: str,
    *,
    topics: Mapping[str, Topic[Any, Any]],
    agents: Mapping[str, Agent[Any, Any, Any]],
    derived: Mapping[str, Derived[Any, Any]],
    tables: Mapping[str, Table[Any, Any]],
    global_tables: Mapping[str, GlobalTable[Any, Any]],
    jobs: Collection[Job],
    leading: Topic[Any, Any] | None = None,
) -> Topology:
    """Put declarations together and check them.

    Args:
        app: The app's name.
        topics: Declared topics by name.
        agents: Agents by name.
        derived: Steps by name.
        tables: Tables by name.
        global_tables: Global tables by name.
        jobs: Timers, crontabs and tasks.
        leading: The topic that chooses the leader of an app without agents; None where none is needed.

    Raises:
        TopologyError: They do not fit together.
    """
    _check_steps(topics, agents, derived)
    _check_leading(leading, topics)
    used = {name: sorted(agent.tables(), key=lambda table: table.name) for name, agent in agents.items()}
    _check_tables(tables, used)
    every = every_topic(topics, derived, leading)
    nodes: list[Node] = [_topic_node(every[name]) for name in sorted(every)]
    nodes += [_agent_node(agents[name]) for name in sorted(agents)]
    nodes += [StepNode(name, _step_kind(derived[name]), derived[name].place) for name in sorted(derived)]
    every_table: dict[str, Table[Any, Any] | GlobalTable[Any, Any]] = {**tables, **global_tables}
    nodes += [_table_node(every_table[name]) for name in sorted(every_table)]
    nodes += sorted((_job_node(job) for job in jobs), key=lambda node: node.id)
    edges = [
        *(edge for name in sorted(derived) for edge in _step_edges(derived[name])),
        *(edge for name in sorted(agents) for edge in _agent_edges(agents[name], every)),
        *(Edge(f"agent:{name}", f"table:{table.name}", "uses") for name in sorted(agents) for table in used[name]),
        *(edge for job in jobs for edge in _sends(f"{_job_kind(job)}:{job.name}", job.fn, every)),
        *(
            Edge(f"topic:{one.source.name}", f"table:{name}", "fills")
            for name, one in sorted(every_table.items())
            if one.source
        ),
        *(edge for name in sorted(agents) for edge in _global_reads(f"agent:{name}", agents[name].fn)),
        *(edge for job in jobs for edge in _global_reads(f"{_job_kind(job)}:{job.name}", job.fn)),
    ]
    subs = _sub_topologies(agents.values(), derived.values(), used)
    if leading is not None:
        subs += (SubTopology(leading.name, (leading.name,), (), ()),)
    return Topology(app, tuple(nodes), tuple(dict.fromkeys(edges)), subs)


def _check_steps(
    topics: Mapping[str, Topic[Any, Any]],
    agents: Mapping[str, Agent[Any, Any, Any]],
    derived: Mapping[str, Derived[Any, Any]],
) -> None:
    used: set[str] = set()
    for agent in agents.values():
        for source in agent.sources:
            one: Any = source
            while isinstance(one, Derived):
                used.add(one.name)
                one = one.source
    for step in derived.values():
        if step.name not in used:
            raise TopologyError(
                f"step {step.name!r} ({step.place}) is read by no agent, so it would do nothing: give it to one, "
                "`@app.agent(step)`, or take it out"
            )
        declared = topics.get(step.topic.name)
        if declared is not None and declared is not step.topic:
            raise TopologyError(
                f"topic {declared.name!r} ({declared.place}) has the name of the internal topic of step {step.name!r} "
                f"({step.place}): rename one"
            )
    _check_cycles(derived.values())


def _check_leading(leading: Topic[Any, Any] | None, topics: Mapping[str, Topic[Any, Any]]) -> None:
    if leading is not None and leading.name in topics:
        raise TopologyError(
            f"topic {leading.name!r} ({topics[leading.name].place}) has the name of the internal topic that chooses "
            "the leader of an app without agents: give it another name"
        )


def _check_tables(tables: Mapping[str, Table[Any, Any]], used: Mapping[str, Collection[Table[Any, Any]]]) -> None:
    """A table's partitions are those of what its agents read, so a table without an agent has none."""
    for agent, each in used.items():
        for table in each:
            if tables.get(table.name) is not table:
                raise TopologyError(
                    f"agent {agent!r} names table {table.name!r} of app {table.app.id!r} ({table.place}): declare one "
                    "in its own app, or let it read what the other app writes to a topic"
                )
    named = {table.name for each in used.values() for table in each}
    for table in tables.values():
        if table.name not in named:
            raise TopologyError(
                f"table {table.name!r} ({table.place}) is named by no agent, so nothing says how it is partitioned: "
                "use it in an agent's code, give it by `@app.agent(..., tables=[...])`, or take it out"
                + ("" if table.source is None else "; one that is only read elsewhere is an `app.global_table`")
            )


def _check_cycles(steps: Iterable[Derived[Any, Any]]) -> None:
    following: dict[str, list[Derived[Any, Any]]] = {}
    for step in steps:
        following.setdefault(step.source_topic.name, []).append(step)
    for start in following:
        waiting, seen = [start], set[str]()
        while waiting:
            for step in following.get(waiting.pop(), ()):
                if step.topic.name == start:
                    raise TopologyError(
                        f"step {step.name!r} ({step.place}) leads topic {start!r} back into itself: every record "
                        "would go round for ever"
                    )
                if step.topic.name not in seen:
                    seen.add(step.topic.name)
                    waiting.append(step.topic.name)


def _topic_node(topic: Topic[Any, Any]) -> TopicNode:
    return TopicNode(
        topic.name,
        type_name(topic.key_type),
        type_name(topic.value_type),
        topic.key_codec.serializer,
        topic.value_codec.serializer,
        topic.partitions,
        topic.internal,
    )


def _table_node(table: Table[Any, Any] | GlobalTable[Any, Any]) -> TableNode:
    types = type_name(table.key_type), type_name(table.value_type)
    if isinstance(table, GlobalTable):
        return TableNode(table.name, *types, table.source.name, None, table.help, table.place, "global")
    kind: Literal["changelog", "source"] = "changelog" if table.source is None else "source"
    return TableNode(table.name, *types, table.changelog.name, table.ttl_s, table.help, table.place, kind)


def _agent_node(agent: Agent[Any, Any, Any]) -> AgentNode:
    return AgentNode(agent.name, agent.kind, agent.concurrency, policy_text(agent.on_error), agent.thread, agent.place)


def _step_kind(step: Derived[Any, Any]) -> Literal["group_by", "through"]:
    return "through" if isinstance(step, Through) else "group_by"


def _job_kind(job: Job) -> Literal["timer", "crontab", "task"]:
    return "timer" if isinstance(job, Timer) else "crontab" if isinstance(job, Crontab) else "task"


def _job_node(job: Job) -> JobNode:
    schedule = ""
    if isinstance(job, Timer):
        schedule = f"every {job.interval_s:g} s"
    elif isinstance(job, Crontab):
        schedule = f"{job.expression} {job.timezone}"
    return JobNode(job.name, _job_kind(job), schedule, job.on_leader)


def _step_edges(step: Derived[Any, Any]) -> list[Edge]:
    kind: EdgeKind = "copies" if isinstance(step, Through) else "repartitions"
    id = f"step:{step.name}"
    return [Edge(f"topic:{step.source_topic.name}", id, "reads"), Edge(id, f"topic:{step.topic.name}", kind)]


def _agent_edges(agent: Agent[Any, Any, Any], topics: Mapping[str, Topic[Any, Any]]) -> list[Edge]:
    id = f"agent:{agent.name}"
    edges = [Edge(f"topic:{topic.name}", id, "reads") for topic in agent.input_topics]
    edges += [Edge(id, f"topic:{topic.name}", "sinks") for topic in agent.sink_topics]
    sinks = {edge.target for edge in edges if edge.kind == "sinks"}
    edges += [edge for edge in _sends(id, agent.fn, topics) if edge.target not in sinks]
    dead_letters = dead_letter_topic(agent.on_error)
    if dead_letters is not None:
        edges.append(Edge(id, f"topic:{dead_letters.name}", "dead_letters"))
    return edges


def _sends(id: str, fn: Any, topics: Mapping[str, Topic[Any, Any]]) -> list[Edge]:
    named = [one.input_topics[0] if isinstance(one, Agent) else one for one in named_objects(fn, (Topic, Agent))]
    return [Edge(id, f"topic:{topic.name}", "sends") for topic in named if topic in topics.values()]


def _global_reads(id: str, fn: Any) -> list[Edge]:
    return [Edge(id, f"table:{table.name}", "uses") for table in named_objects(fn, (GlobalTable,))]


def _sub_topologies(
    agents: Collection[Agent[Any, Any, Any]],
    steps: Collection[Derived[Any, Any]],
    used: Mapping[str, Collection[Table[Any, Any]]],
) -> tuple[SubTopology, ...]:
    """Agents and steps that share a source topic or a table, directly or by way of others (union-find over topics).

    The topic that fills a table is a source of whoever uses the table.
    """
    parents: dict[str, str] = {}

    users: dict[str, str] = {}  # a table to a topic of an agent that uses it

    def root(topic: str) -> str:
        while parents.setdefault(topic, topic) != topic:
            topic = parents[topic]
        return topic

    for agent in agents:
        first, *others = (topic.name for topic in agent.input_topics)
        root(first)
        for other in others:
            parents[root(other)] = root(first)
        for table in used[agent.name]:
            parents[root(users.setdefault(table.name, first))] = root(first)
            if table.source is not None:
                parents[root(table.source.name)] = root(first)
    for step in steps:
        root(step.source_topic.name)
    groups: dict[str, list[str]] = {}
    for topic in sorted(parents):
        groups.setdefault(root(topic), []).append(topic)
    return tuple(
        SubTopology(
            names[0],
            tuple(names),
            tuple(sorted(agent.name for agent in agents if root(agent.input_topics[0].name) == top)),
            tuple(sorted(step.name for step in steps if root(step.source_topic.name) == top)),
            tuple(sorted(name for name, topic in users.items() if root(topic) == top)),
        )
        for top, names in sorted(groups.items(), key=lambda item: item[1][0])
    )
