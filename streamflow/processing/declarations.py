"""What an app consists of, as it was declared: the registries behind `@app.agent`, `app.topic` and the hooks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from streamflow.errors import ConfigurationError, TopologyError
from streamflow.keywords import known_keywords
from streamflow.model.serde import Serializer
from streamflow.processing.agent import (
    Agent,
    AgentDecorator,
    AgentOptions,
    FreeDecorator,
    SinkDecorator,
    Source,
    make_agent,
)
from streamflow.processing.global_table import GlobalTable
from streamflow.processing.hooks import (
    A,
    Action,
    BackgroundTask,
    Crontab,
    P,
    PartitionsAction,
    Timer,
    check_action,
    check_crontab,
    checked_interval,
)
from streamflow.processing.places import place_of_call
from streamflow.processing.policy import ErrorPolicy, Stop
from streamflow.processing.reads_guard import ReadsGuard
from streamflow.processing.selector import Field
from streamflow.processing.set_table import SetTable
from streamflow.processing.signature import UNKNOWN, Signature
from streamflow.processing.stream import Stream
from streamflow.processing.table import Table
from streamflow.processing.table_declarations import TableDeclarations
from streamflow.processing.topic import Derived, Partitioner, Topic, TopicOptions, check_name
from streamflow.processing.topology import Job, Topology, build_topology, every_topic

if TYPE_CHECKING:
    from typing_extensions import TypeForm

K = TypeVar("K")
V = TypeVar("V")
R = TypeVar("R")
S = TypeVar("S")

_NAME_BYTES = 100


def leader_topic_name(app_id: str) -> str:
    """The topic whose owner leads an app without agents."""
    return f"{app_id}-leader"


class Declarations(TableDeclarations):
    """The declarations of one app; `App` adds settings and ways to run them.

    Args:
        id: The app's name: its consumer group and the prefix of its internal topics.

    Attributes:
        id: The app's name.
        options: The settings given to `App(...)`.
        topics: Declared topics by name.
        agents: Agents by name.
        derived: Steps made by `group_by` and `through`, by name.
        tables: Declared tables by name; those behind set tables, too.
        set_tables: Declared set tables by name.
        global_tables: Declared global tables by name.
        reads_guard: Decides who may read tables over HTTP; None lets everyone.
        timers: Timers, in order of declaration.
        crontabs: Crontabs.
        tasks: Tasks.
        start_hooks: Functions called before the agents run.
        stop_hooks: Functions called after the last commit.
        assigned_hooks: Functions called when partitions came.
        revoked_hooks: Functions called when partitions went.

    Raises:
        ConfigurationError: The name does not fit.
    """

    def __init__(self, id: str) -> None:
        self.id = check_name(id, "app")
        if len(id) > _NAME_BYTES:
            raise ConfigurationError(
                f"app {id!r}: its name is part of topic names; use at most {_NAME_BYTES} characters"
            )
        self.options: Mapping[str, object] = {}
        self.topics: dict[str, Topic[Any, Any]] = {}
        self.agents: dict[str, Agent[Any, Any, Any]] = {}
        self.derived: dict[str, Derived[Any, Any]] = {}
        self.tables: dict[str, Table[Any, Any]] = {}
        self.set_tables: dict[str, SetTable[Any, Any]] = {}
        self.global_tables: dict[str, GlobalTable[Any, Any]] = {}
        self.reads_guard: ReadsGuard | None = None
        self.timers: list[Timer] = []
        self.crontabs: list[Crontab] = []
        self.tasks: list[BackgroundTask] = []
        self.start_hooks: list[Action] = []
        self.stop_hooks: list[Action] = []
        self.assigned_hooks: list[PartitionsAction] = []
        self.revoked_hooks: list[PartitionsAction] = []
        self._leader_topic: Topic[Any, Any] | None = None

    def __repr__(self) -> str:
        return f"<app {self.id!r}: {len(self.agents)} agents, {len(self.topics)} topics>"

    # --- topics ------------------------------------------------------------------------------------------------

    # A type left out is bytes (a key: or null); with a serializer of its own it is whatever that reads.
    @overload
    def topic(
        self,
        name: str,
        *,
        key_type: TypeForm[K],
        value_type: TypeForm[V],
        key_serializer: str | Serializer | None = None,
        value_serializer: str | Serializer | None = None,
        **options: Unpack[TopicOptions],
    ) -> Topic[K, V]: ...
    @overload
    def topic(
        self,
        name: str,
        *,
        value_type: TypeForm[V],
        value_serializer: str | Serializer | None = None,
        **options: Unpack[TopicOptions],
    ) -> Topic[bytes | None, V]: ...
    @overload
    def topic(
        self,
        name: str,
        *,
        key_type: TypeForm[K],
        key_serializer: str | Serializer | None = None,
        **options: Unpack[TopicOptions],
    ) -> Topic[K, bytes]: ...
    @overload
    def topic(self, name: str, **options: Unpack[TopicOptions]) -> Topic[bytes | None, bytes]: ...
    @overload
    def topic(
        self,
        name: str,
        *,
        value_type: TypeForm[V],
        key_serializer: str | Serializer,
        value_serializer: str | Serializer | None = None,
        **options: Unpack[TopicOptions],
    ) -> Topic[Any, V]: ...
    @overload
    def topic(
        self,
        name: str,
        *,
        key_type: TypeForm[K],
        value_serializer: str | Serializer,
        key_serializer: str | Serializer | None = None,
        **options: Unpack[TopicOptions],
    ) -> Topic[K, Any]: ...
    @overload
    def topic(
        self,
        name: str,
        *,
        key_serializer: str | Serializer | None = None,
        value_serializer: str | Serializer | None = None,
        **options: Unpack[TopicOptions],
    ) -> Topic[Any, Any]: ...
    @known_keywords("app.topic(...)")
    def topic(
        self,
        name: str,
        *,
        key_type: Any = None,
        value_type: Any = None,
        key_serializer: str | Serializer | None = None,
        value_serializer: str | Serializer | None = None,
        partitions: int | None = None,
        replication: int | None = None,
        retention_s: float | None = None,
        compacting: bool = False,
        config: Mapping[str, str | int | float | bool] | None = None,
        create: bool = True,
        partitioner: Partitioner | None = None,
        timestamp: Field = None,
    ) -> Topic[Any, Any]:
        """Declare a topic.

        Args:
            name: Its name in the log.
            key_type: Type of its keys: anything msgspec knows. Left out: bytes, or null.
            value_type: Type of its values. Left out: bytes. Write `Order | None` to take tombstones.
            key_serializer: `"json"`, `"msgpack"`, `"str"`, `"int"`, `"float"`, `"raw"`, the name of an entry point, or
                an object with `bind`. Left out: by type.
            value_serializer: The same for values.
            partitions: Partition count, >= 1. Left out: what exists, or the app's `partitions` when it is created.
            replication: Copies of each partition, -1 for the broker's default. Left out: the app's `replication`.
            retention_s: Seconds records are kept, above 0; `float("inf")` for ever. Left out: the log's default.
            compacting: Keep only the newest record of each key.
            config: Further Kafka topic configuration.
            create: Whether a worker creates it at start when it does not exist.
            partitioner: Key bytes and partition count -> partition. Left out: Kafka's murmur2.
            timestamp: Where the time of a record stands in its value: a field's name, a struct's member or a function;
                milliseconds since the epoch or a datetime. Left out: the record's own timestamp.

        Returns:
            The topic; the same object for the same declaration.

        Raises:
            ConfigurationError: An option does not fit.
            SchemaError: A type cannot be serialized.
            TopologyError: The name was declared before with something else.
        """
        declared: Topic[Any, Any] = Topic(
            self,
            name,
            key_type=key_type,
            value_type=value_type,
            key_serializer=key_serializer,
            value_serializer=value_serializer,
            partitions=partitions,
            replication=replication,
            retention_s=retention_s,
            compacting=compacting,
            config=config,
            create=create,
            partitioner=partitioner,
            timestamp=timestamp,
        )
        return self.declared_topic(declared)

    # --- agents ------------------------------------------------------------------------------------------------

    @overload
    def agent(self, source: Callable[[Stream[V, K]], AsyncIterator[R]], /) -> Agent[K, V, R]: ...
    @overload
    def agent(self, source: Callable[[Stream[V, K]], Awaitable[None]], /) -> Agent[K, V, None]: ...
    @overload
    def agent(
        self,
        source: Source[K, V],
        /,
        *,
        sink: Topic[Any, S] | Agent[Any, S, Any],
        concurrency: int = 1,
        on_error: ErrorPolicy = ...,
        name: str | None = None,
        thread: bool = False,
        tables: Sequence[Table[Any, Any] | SetTable[Any, Any]] | None = None,
    ) -> SinkDecorator[K, V, S]: ...
    @overload
    def agent(
        self,
        source: Source[K, V],
        /,
        *,
        sink: Sequence[Topic[Any, Any] | Agent[Any, Any, Any]] | None = None,
        concurrency: int = 1,
        on_error: ErrorPolicy = ...,
        name: str | None = None,
        thread: bool = False,
        tables: Sequence[Table[Any, Any] | SetTable[Any, Any]] | None = None,
    ) -> AgentDecorator[K, V]: ...
    @overload
    def agent(
        self,
        source: Sequence[Source[Any, Any]] | None = None,
        /,
        *,
        sink: Topic[Any, Any] | Agent[Any, Any, Any] | Sequence[Topic[Any, Any] | Agent[Any, Any, Any]] | None = None,
        concurrency: int = 1,
        on_error: ErrorPolicy = ...,
        name: str | None = None,
        thread: bool = False,
        tables: Sequence[Table[Any, Any] | SetTable[Any, Any]] | None = None,
    ) -> FreeDecorator: ...
    @overload
    def agent(self, source: Callable[[V], Awaitable[R]], /) -> Agent[Any, V, R]: ...
    @overload
    def agent(self, source: Callable[[V], R], /) -> Agent[Any, V, R]: ...
    @known_keywords("@app.agent(...)")
    def agent(
        self,
        source: Any = None,
        /,
        *,
        sink: Any = None,
        concurrency: int = 1,
        on_error: ErrorPolicy = Stop(),  # noqa: B008 - frozen, without state
        name: str | None = None,
        thread: bool = False,
        tables: Sequence[Table[Any, Any] | SetTable[Any, Any]] | None = None,
    ) -> Any:
        """Declare an agent: `@app.agent(topic)`, or bare `@app.agent` for one with a topic of its own.

        An async generator, or a coroutine function whose parameter is annotated `sf.Stream`, works over the stream of
        one partition. Any other annotated function is called with each value; what it returns goes to the sink.

        Args:
            source: Topic, `group_by` or `through` step, or a sequence of them. Left out: the topic `<app>-<agent>`, its
                type from the annotation.
            sink: Where results go: topic or agent, or a sequence of them.
            concurrency: Records of one partition in progress at once, >= 1; those of one key keep their order. Not with
                `take`.
            on_error: `sf.Stop()` (default), `sf.Skip()`, `sf.Retry(times)` or `sf.DeadLetter(topic)`.
            name: Its name. Left out: the function's.
            thread: Run a `def` in a worker thread, a batch at a time.
            tables: The tables it may touch. Left out: those that its code names, followed through functions of its
                module; touching another one raises.

        Returns:
            The agent, in the function's place; `.fn` is the function.

        Raises:
            RefusedError: Something does not fit; the message says what to write.
        """
        fn = source if callable(source) and not isinstance(source, Agent) else None
        place = place_of_call()

        def declare(function: Callable[..., Any]) -> Agent[Any, Any, Any]:
            options = AgentOptions(
                None if fn is not None else source, sink, concurrency, on_error, name, thread, tables
            )
            agent = make_agent(self, function, options, self._own_topic)
            known = self.agents.get(agent.name)
            if known is not None:
                raise TopologyError(
                    f"two agents are called {agent.name!r}: one at {known.place}, one at {place}; rename a function, "
                    "or give name="
                )
            self.agents[agent.name] = agent
            return agent

        return FreeDecorator(declare) if fn is None else declare(fn)

    def _own_topic(self, agent: str, signature: Signature) -> Topic[Any, Any]:
        if signature.value_type is UNKNOWN:
            raise TopologyError(
                f"agent {agent!r} ({place_of_call()}): nothing says what it reads: give it a topic, "
                "`@app.agent(orders)`, or annotate its parameter, `stream: sf.Stream[Order]`"
            )
        key_type = None if signature.key_type is UNKNOWN else signature.key_type
        return self.declared_topic(
            Topic(self, f"{self.id}-{agent}", key_type=key_type, value_type=signature.value_type)
        )

    # --- timers, crontabs, tasks -------------------------------------------------------------------------------

    @known_keywords("@app.timer(...)")
    def timer(self, interval_s: float, *, on_leader: bool = False, name: str | None = None) -> Callable[[A], A]:
        """Run a function (sync or async, without arguments) every so often while the worker runs.

        Its sends leave at once and at least once; with `on_leader=True` they are in the leader task's commit.

        Args:
            interval_s: Seconds from one start to the next, above 0; a run that takes longer delays the next.
            on_leader: Run it in one worker only.
            name: Its name. Left out: the function's.

        Raises:
            ConfigurationError: The interval or the function does not fit.
        """
        seconds = checked_interval(interval_s)

        def declare(fn: A) -> A:
            check_action(fn, "@app.timer(...)")
            self.timers.append(Timer(self._job_name(fn, name), fn, seconds, on_leader))
            return fn

        return declare

    @known_keywords("@app.crontab(...)")
    def crontab(
        self, expression: str, *, timezone: str = "UTC", on_leader: bool = False, name: str | None = None
    ) -> Callable[[A], A]:
        """Run a function (sync or async, without arguments) at times of the calendar.

        Args:
            expression: Minute, hour, day of month, month, day of week: `"0 20 * * *"`.
            timezone: IANA name of the zone the expression is in, default UTC.
            on_leader: Run it in one worker only, its sends in the leader task's commit.
            name: Its name. Left out: the function's.

        Raises:
            ConfigurationError: The expression, the zone or the function does not fit.
        """
        check_crontab(expression, timezone)

        def declare(fn: A) -> A:
            check_action(fn, "@app.crontab(...)")
            self.crontabs.append(Crontab(self._job_name(fn, name), fn, expression, timezone, on_leader))
            return fn

        return declare

    @overload
    def task(self, fn: A, /) -> A: ...
    @overload
    def task(self, fn: None = None, /, *, on_leader: bool = False, name: str | None = None) -> Callable[[A], A]: ...
    @known_keywords("@app.task(...)")
    def task(self, fn: Any = None, /, *, on_leader: bool = False, name: str | None = None) -> Any:
        """Run a function (sync or async, without arguments) once, from the worker's start, beside the agents.

        Args:
            fn: The function, where the decorator stands without parentheses.
            on_leader: Run it in one worker only.
            name: Its name. Left out: the function's.

        Raises:
            ConfigurationError: The function does not fit.
        """

        def declare(action: A) -> A:
            check_action(action, "@app.task")
            self.tasks.append(BackgroundTask(self._job_name(action, name), action, on_leader))
            return action

        return declare if fn is None else declare(fn)

    def _job_name(self, fn: Callable[..., object], name: str | None) -> str:
        chosen = check_name(name or getattr(fn, "__name__", "") or "?", "the name of a timer, crontab or task")
        if any(job.name == chosen for job in self.jobs()):
            raise TopologyError(
                f"two timers, crontabs or tasks are called {chosen!r} ({place_of_call()}); give one a name="
            )
        return chosen

    def jobs(self) -> tuple[Job, ...]:
        """What runs besides the agents: timers, crontabs and tasks."""
        return (*self.timers, *self.crontabs, *self.tasks)

    # --- hooks -------------------------------------------------------------------------------------------------

    def on_start(self, fn: A) -> A:
        """Call a function (sync or async, without arguments) before the agents run; an error refuses the start."""
        check_action(fn, "@app.on_start")
        self.start_hooks.append(fn)
        return fn

    def on_stop(self, fn: A) -> A:
        """Call a function (sync or async, without arguments) after the last commit of a clean stop."""
        check_action(fn, "@app.on_stop")
        self.stop_hooks.append(fn)
        return fn

    def on_assigned(self, fn: P) -> P:
        """Call a function (sync or async) with the set of `sf.TopicPartition` that came to this worker."""
        check_action(fn, "@app.on_assigned", "partitions")
        self.assigned_hooks.append(fn)
        return fn

    def on_revoked(self, fn: P) -> P:
        """Call a function (sync or async) with the set of `sf.TopicPartition` that left this worker, whichever way.

        Each partition that came is told once: when it was given back, lost, or at the end.
        """
        check_action(fn, "@app.on_revoked", "partitions")
        self.revoked_hooks.append(fn)
        return fn

    # --- the whole ---------------------------------------------------------------------------------------------

    @property
    def leader_topic(self) -> Topic[Any, Any] | None:
        """The internal topic of one partition and without a record, the owner of which leads an app without agents.

        None where there are agents, whose first source topic does, or where nothing is declared with `on_leader=True`.
        """
        if self.agents or not any(job.on_leader for job in self.jobs()):
            return None
        if self._leader_topic is None:
            self._leader_topic = Topic(self, leader_topic_name(self.id), partitions=1, internal=True)
        return self._leader_topic

    def every_topic(self) -> dict[str, Topic[Any, Any]]:
        """All topics by name: those declared, in order, then the internal ones of its steps, leader and tables."""
        changelogs = {table.changelog.name: table.changelog for table in self.tables.values()}
        return {**every_topic(self.topics, self.derived, self.leader_topic), **changelogs}

    def topology(self) -> Topology:
        """What was declared, as frozen data: topics, agents, steps and how they are joined.

        Raises:
            TopologyError: The declarations do not fit together; the message names the places.
        """
        return build_topology(
            self.id,
            topics=self.topics,
            agents=self.agents,
            derived=self.derived,
            tables=self.tables,
            global_tables=self.global_tables,
            jobs=self.jobs(),
            leading=self.leader_topic,
        )
