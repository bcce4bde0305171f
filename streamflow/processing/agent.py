"""Agents: what a user's function becomes under `@app.agent`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Optional, TypeAlias, TypeVar, cast, overload

from streamflow.errors import ConfigurationError, ProductionError, TopologyError
from streamflow.model.record import Headers, RecordMetadata
from streamflow.model.schema import members, surely_differs, type_name
from streamflow.processing.context import current_turn, sender_of
from streamflow.processing.global_table import GlobalTable
from streamflow.processing.names import named_objects
from streamflow.processing.out import Out
from streamflow.processing.places import place_of_call
from streamflow.processing.policy import ErrorPolicy, check_policy, dead_letter_topic
from streamflow.processing.set_table import SetTable
from streamflow.processing.signature import UNKNOWN, Kind, Signature, code_names, signature_of
from streamflow.processing.stream import Stream
from streamflow.processing.table import Table
from streamflow.processing.topic import Derived, Owner, Topic, check_name, is_whole

K = TypeVar("K")
V = TypeVar("V")
R = TypeVar("R")
S = TypeVar("S")

Source: TypeAlias = Topic[K, V] | Derived[K, V]
"""What an agent reads: a topic, or what `group_by` or `through` made of one."""


class Agent(Generic[K, V, R]):
    """A declared agent; made by `@app.agent(...)`, which puts it in the function's place.

    Calling it calls the function (`agent(value)` in a unit test); `send`, `cast` and `ask` go through its topic.

    Attributes:
        app: The app that declared it.
        name: Its name.
        fn: The function.
        sources: What it reads, as declared.
        input_topics: The topics it reads in the end.
        sinks: Where its results go, as declared.
        sink_topics: The topics they go to in the end.
        concurrency: Records of one partition in progress at once, at most one per key.
        on_error: What happens to a record that fails.
        thread: Whether its batches run in a worker thread.
        declared_tables: The tables it was declared with; None takes those that its code names.
        kind: `generator` (async generator over the stream), `stream` (coroutine over it) or `record` (called with each
            value).
        is_async: Whether the function is asynchronous.
        is_async_generator: Whether it is an async generator.
        value_type: Type of the values it takes.
        place: Where it was declared, `file:line`.
    """

    def __init__(
        self,
        app: Owner,
        name: str,
        fn: Callable[..., Any],
        *,
        signature: Signature,
        sources: Sequence[Source[Any, Any]],
        sinks: Sequence[Topic[Any, Any] | Agent[Any, Any, Any]],
        concurrency: int,
        on_error: ErrorPolicy,
        thread: bool,
        tables: Sequence[Table[Any, Any]] | None = None,
    ) -> None:
        self.app = app
        self.name = name
        self.fn = fn
        self.sources: tuple[Source[Any, Any], ...] = tuple(sources)
        self.input_topics: tuple[Topic[Any, Any], ...] = tuple(input_topic(one) for one in sources)
        self.sinks: tuple[Topic[Any, Any] | Agent[Any, Any, Any], ...] = tuple(sinks)
        self.sink_topics: tuple[Topic[Any, Any], ...] = tuple(
            one.input_topics[0] if isinstance(one, Agent) else one for one in sinks
        )
        self.concurrency = concurrency
        self.on_error = on_error
        self.thread = thread
        self.declared_tables = None if tables is None else tuple(tables)
        self.signature = signature
        self.kind: Kind = signature.kind
        self.is_async = signature.is_async
        self.is_async_generator = signature.kind == "generator"
        known = signature.value_type is not UNKNOWN
        self.value_type: Any = signature.value_type if known else self.input_topics[0].value_type
        self.place = place_of_call()
        self.__doc__ = fn.__doc__ or type(self).__doc__

    def __repr__(self) -> str:
        return f"<agent {self.name!r} over {', '.join(topic.name for topic in self.input_topics)}>"

    def tables(self) -> tuple[Table[Any, Any], ...]:
        """The tables it may touch: those it was declared with, or those that its code names."""
        if self.declared_tables is not None:
            return self.declared_tables
        named = named_objects(self.fn, (Table, SetTable))
        return tuple(dict.fromkeys(one.pairs if isinstance(one, SetTable) else one for one in named))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself, for unit tests; nothing is sent anywhere."""
        return self.fn(*args, **kwargs)

    async def send(
        self,
        *,
        key: K | None = None,
        value: V | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
        headers: Headers = (),
    ) -> RecordMetadata | None:
        """Send a record to the (first) topic it reads; see `Topic.send`, and `key_of` for its key."""
        topic: Topic[K, V] = self.input_topics[0]
        key = self.key_of(value, key)
        return await topic.send(key=key, value=value, partition=partition, timestamp_ms=timestamp_ms, headers=headers)

    def send_nowait(
        self,
        *,
        key: K | None = None,
        value: V | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
        headers: Headers = (),
    ) -> None:
        """Send a record to the (first) topic it reads, without waiting; see `Topic.send_nowait` and `key_of`."""
        topic: Topic[K, V] = self.input_topics[0]
        key = self.key_of(value, key)
        topic.send_nowait(key=key, value=value, partition=partition, timestamp_ms=timestamp_ms, headers=headers)

    def key_of(self, value: V | None, key: K | None) -> K | None:
        """The key with which a value is sent to it.

        An agent over `topic.group_by(...)` reads records that are regrouped already, so the key is the one that it
        groups the value by. Another one would put the record, and what its tables keep of it, into the wrong partition.

        Args:
            value: The value; None is a tombstone, whose key is given.
            key: What was given; None leaves it to the `group_by`.

        Raises:
            ProductionError: It was given, and is another one.
        """
        source = self.sources[0]
        made_by: Callable[[V], K] | None = source.regroups if isinstance(source, Derived) else None
        if made_by is None or value is None:
            return key
        made = made_by(value)
        if key is not None and key != made:
            raise ProductionError(
                f"agent {self.name!r} reads {source!r}, which gives this value the key {made!r}, and key={key!r} was "
                "given: leave key= out"
            )
        return made

    async def cast(self, value: V | None, *, key: K | None = None) -> RecordMetadata | None:
        """Hand it a value and go on without its answer; see `Topic.send`.

        Args:
            value: Of the type it takes.
            key: Of its topic's key type; None is a null key, or the one it groups by (`key_of`).

        Returns:
            Where the log put the record; None inside a turn.
        """
        return await self.send(key=key, value=value)

    async def ask(self, value: V, *, key: K | None = None, timeout_s: float = 30.0) -> R:
        """Hand it a value and wait for its first answer.

        The question leaves at once, outside the commit of the record in hand, if there is one: after a crash it may be
        asked again.

        Args:
            value: Of the type it takes.
            key: Of its topic's key type; None is a null key, or the one it groups by (`key_of`).
            timeout_s: Seconds to wait, above 0, default 30.

        Returns:
            What it yields first (or returns) for the value, `None` included.

        Raises:
            TimeoutError: No answer came in time.
            AskError: It failed on the record, or finished it without an answer.
            TopologyError: It is of the asking agent's own sub-topology: the answer could never come.
            ClosedError: The app does not run in this process.
        """
        if not timeout_s > 0:
            raise ConfigurationError(f"{self.name}.ask(timeout_s={timeout_s!r}): seconds, above 0")
        turn = current_turn.get()
        if turn is not None:
            turn.refuse_ask(self)
        sender = sender_of(cast(Any, self.app))
        answer = await sender.ask(self, value, key=self.key_of(value, key), timeout_s=timeout_s)
        return cast(R, answer)


@dataclass(frozen=True)
class AgentOptions:
    """What was given to `@app.agent`, before there is a function.

    Attributes:
        source: Topic or step, several of them, or None.
        sink: Topic or agent, several of them, or None.
        concurrency: See `Declarations.agent`.
        on_error: See there.
        name: See there.
        thread: See there.
        tables: See there.
    """

    source: Any
    sink: Any
    concurrency: Any
    on_error: Any
    name: str | None
    thread: bool
    tables: Any = None


def input_topic(source: Source[Any, Any]) -> Topic[Any, Any]:
    """The topic an agent reads for a source: itself, or what the step writes."""
    return source.topic if isinstance(source, Derived) else source


def make_agent(
    app: Owner, fn: Callable[..., Any], options: AgentOptions, own_topic: Callable[[str, Signature], Topic[Any, Any]]
) -> Agent[Any, Any, Any]:
    """Make an agent of a function.

    Args:
        app: The app that declares it.
        fn: The function.
        options: What stood in the decorator.
        own_topic: Declares the topic of an agent that names none, by the agent's name.

    Raises:
        RefusedError: Something does not fit; the message says what to write.
    """
    function = getattr(fn, "__name__", "")
    name = options.name or ("" if function == "<lambda>" else function)
    if not name:
        raise ConfigurationError(f"@{app.id}.agent: {fn!r} has no name to call the agent by; add name='...'")
    where = f"agent {check_name(name, 'agent')!r} ({place_of_call()})"
    sources = _sources(app, options.source, where)
    sinks = _sinks(app, options.sink, where)
    signature = signature_of(fn, where)
    if not sources:
        sources = (own_topic(name, signature),)
    _check_options(options, fn, signature, where)
    _check_types(sources, sinks, signature, where)
    dead_letters = dead_letter_topic(options.on_error)
    if dead_letters is not None:
        _check_owner(app, dead_letters, where, "sends its dead letters to")
        if any(input_topic(source) is dead_letters for source in sources):
            raise TopologyError(
                f"{where}: on_error=sf.DeadLetter({dead_letters.name}) is the topic it reads: a record that fails "
                "would come back for ever. Give dead letters a topic of their own"
            )
    return Agent(
        app,
        name,
        fn,
        signature=signature,
        sources=sources,
        sinks=sinks,
        concurrency=options.concurrency,
        on_error=options.on_error,
        thread=options.thread,
        tables=_tables(app, options.tables, where),
    )


def same_key(source: Topic[Any, Any], sink: Topic[Any, Any]) -> bool:
    """Whether an encoded key may go from one topic to the other as it is: same type (or or-null of it), same bytes."""
    same_type = sink.key_type in (source.key_type, Optional[source.key_type])  # noqa: UP045 - of a value
    return same_type and source.key_serializer == sink.key_serializer


def _tables(app: Owner, given: Any, where: str) -> tuple[Table[Any, Any], ...] | None:
    if given is None:
        return None
    listed = (given,) if isinstance(given, Table | SetTable) else _listed(given)
    tables = tuple(one.pairs if isinstance(one, SetTable) else one for one in listed)
    for one in tables:
        if isinstance(one, GlobalTable):
            raise TopologyError(
                f"{where}: tables= names global table {one.name!r}, which every agent may read; leave it out"
            )
        if not isinstance(one, Table):
            raise TopologyError(
                f"{where}: tables={one!r}: give tables made by `app.table(...)` or `app.set_table(...)`"
            )
        if one.app is not app:
            raise TopologyError(f"{where}: tables= names {one.name!r}, which is of app {one.app.id!r}")
    return tables


def _sources(app: Owner, given: Any, where: str) -> tuple[Source[Any, Any], ...]:
    if given is None:
        return ()
    sources = _listed(given)
    if not sources:
        raise TopologyError(f"{where}: there is no topic in {given!r}")
    for one in sources:
        if isinstance(one, Agent):
            raise TopologyError(f"{where}: an agent reads topics, not agents; make this one the sink= of {one.name!r}")
        if not isinstance(one, Topic | Derived):
            raise TopologyError(
                f"{where}: it reads {one!r}, which is not a topic: declare `orders = app.topic('orders', key_type=str, "
                "value_type=Order)` and write `@app.agent(orders)`"
            )
        _check_owner(app, input_topic(one), where, "reads")
    names = [input_topic(one).name for one in sources]
    if len(set(names)) < len(names):
        raise TopologyError(f"{where}: it reads a topic twice: {', '.join(names)}")
    return sources


def _sinks(app: Owner, given: Any, where: str) -> tuple[Topic[Any, Any] | Agent[Any, Any, Any], ...]:
    if given is None:
        return ()
    sinks = _listed(given)
    for one in sinks:
        if not isinstance(one, Topic | Agent):
            raise TopologyError(
                f"{where}: sink={one!r}: a sink is a topic or an agent, or a sequence of them: "
                "`sink=app.topic('totals', key_type=str, value_type=Total)`"
            )
        _check_owner(app, one, where, "has the sink")
        if isinstance(one, Agent) and isinstance(first := one.sources[0], Derived) and first.regroups is not None:
            raise TopologyError(
                f"{where}: its sink {one.name!r} reads {first!r}: results would pass by the grouping, each with the "
                "key of its record, and lie in the wrong partitions. Give sink= the topic before it, "
                f"{_first_topic(first)!r}"
            )
    return sinks


def _first_topic(step: Derived[Any, Any]) -> str:
    while isinstance(step.source, Derived):
        step = step.source
    return step.source.name


def _listed(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)


def _check_owner(app: Owner, one: Topic[Any, Any] | Agent[Any, Any, Any], where: str, verb: str) -> None:
    if one.app is not app:
        raise TopologyError(
            f"{where}: it {verb} {one.name!r} of app {one.app.id!r}; declare the topic in {app.id!r} too, by the same "
            "name"
        )


def _check_options(options: AgentOptions, fn: Any, signature: Signature, where: str) -> None:
    concurrency = options.concurrency
    if not is_whole(concurrency, least=1):
        raise ConfigurationError(f"{where}: concurrency={concurrency!r}: at least 1 record at a time")
    code = getattr(fn, "__code__", None)
    if concurrency > 1 and signature.kind != "record" and code is not None and "take" in code_names(code):
        raise TopologyError(
            f"{where}: take() makes many records one unit, concurrency={concurrency} keeps each its own: leave one out"
        )
    check_policy(options.on_error, f"{where}: on_error=")
    if options.thread and signature.is_async:
        raise TopologyError(f"{where}: thread=True is for `def`; an `async def` runs on the event loop: leave it out")
    if options.sink is not None and signature.kind == "stream":
        raise TopologyError(
            f"{where}: it has a sink and never yields: `yield` what goes there and annotate `-> "
            "AsyncIterator[Total]`, or leave sink= out"
        )
    if options.sink is not None and signature.output_types == ():
        raise TopologyError(
            f"{where}: it has a sink, and its annotation says that nothing comes out of it: return what goes there, or "
            "leave sink= out"
        )


def _check_types(
    sources: Sequence[Source[Any, Any]],
    sinks: Sequence[Topic[Any, Any] | Agent[Any, Any, Any]],
    signature: Signature,
    where: str,
) -> None:
    """What the type checker would say too, where it is certain."""
    for one in sources:
        topic = input_topic(one)
        for part, wanted in (("value_type", signature.value_type), ("key_type", signature.key_type)):
            declared = getattr(topic, part)
            if wanted is not UNKNOWN and surely_differs(declared, wanted):
                raise TopologyError(
                    f"{where}: topic {topic.name!r} has {part}={type_name(declared)}, and the function takes "
                    f"{type_name(wanted)}; declare both the same"
                )
    for sink in sinks:
        target = sink.input_topics[0] if isinstance(sink, Agent) else sink
        for output in signature.output_types or ():
            if all(surely_differs(output, part) for part in members(target.value_type)):
                raise TopologyError(
                    f"{where}: its sink {target.name!r} takes {type_name(target.value_type)}, and the function gives "
                    f"{type_name(output)}; declare both the same"
                )
        if signature.gives_no_key:
            _check_key(where, [input_topic(one) for one in sources], target, signature)


def _check_key(where: str, topics: Sequence[Topic[Any, Any]], target: Topic[Any, Any], signature: Signature) -> None:
    """Refuse a sink to which no result could go: the keys cannot be inherited, and none is given."""
    if any(same_key(topic, target) for topic in topics):
        return
    source = topics[0]
    given = f"sf.Out[{' | '.join(type_name(one) for one in signature.output_types or ())}]"
    result = f"AsyncIterator[{given}]" if signature.kind == "generator" else given
    raise TopologyError(
        f"{where}: its results inherit the keys of {source.name!r} ({_key_name(source)}), and its sink {target.name!r} "
        f"has others ({_key_name(target)}): {'yield' if signature.kind == 'generator' else 'return'} sf.Out(value, "
        f"key=...) and annotate `-> {result}`, or declare both key types the same"
    )


def _key_name(topic: Topic[Any, Any]) -> str:
    return f"{type_name(topic.key_type)} as {topic.key_codec.serializer}"


class AgentDecorator(Generic[K, V]):
    """What `app.agent(topic, ...)` gives: call it with the function."""

    def __init__(self, declare: Callable[[Callable[..., Any]], Agent[Any, Any, Any]]) -> None:
        self._declare = declare

    # `Out` alone comes first: for it mypy would take the R of `Out[R] | R` to be nothing.
    @overload
    def __call__(self, fn: Callable[[Stream[V, K]], AsyncIterator[Out[R] | None]], /) -> Agent[K, V, R]: ...
    @overload
    def __call__(self, fn: Callable[[Stream[V, K]], AsyncIterator[Out[R] | R | None]], /) -> Agent[K, V, R]: ...
    @overload
    def __call__(self, fn: Callable[[Stream[V, K]], Awaitable[None]], /) -> Agent[K, V, None]: ...
    @overload
    def __call__(self, fn: Callable[[V], Awaitable[Out[R]]], /) -> Agent[K, V, R]: ...
    @overload
    def __call__(self, fn: Callable[[V], Awaitable[R]], /) -> Agent[K, V, R]: ...
    @overload
    def __call__(self, fn: Callable[[V], Out[R]], /) -> Agent[K, V, R]: ...
    @overload
    def __call__(self, fn: Callable[[V], R], /) -> Agent[K, V, R]: ...
    def __call__(self, fn: Callable[..., Any], /) -> Agent[K, V, Any]:
        """Make the function an agent."""
        return self._declare(fn)


class SinkDecorator(Generic[K, V, S]):
    """What `app.agent(topic, sink=one)` gives: the function's results have to fit the sink."""

    def __init__(self, declare: Callable[[Callable[..., Any]], Agent[Any, Any, Any]]) -> None:
        self._declare = declare

    @overload
    def __call__(self, fn: Callable[[Stream[V, K]], AsyncIterator[S | Out[S] | None]], /) -> Agent[K, V, S]: ...
    @overload
    def __call__(self, fn: Callable[[V], Awaitable[S | Out[S] | None]], /) -> Agent[K, V, S]: ...
    @overload
    def __call__(self, fn: Callable[[V], S | Out[S] | None], /) -> Agent[K, V, S]: ...
    def __call__(self, fn: Callable[..., Any], /) -> Agent[K, V, S]:
        """Make the function an agent."""
        return self._declare(fn)


class FreeDecorator:
    """What `app.agent(...)` without a topic gives: the types are the function's own."""

    def __init__(self, declare: Callable[[Callable[..., Any]], Agent[Any, Any, Any]]) -> None:
        self._declare = declare

    @overload
    def __call__(self, fn: Callable[[Stream[V, K]], AsyncIterator[R]], /) -> Agent[K, V, R]: ...
    @overload
    def __call__(self, fn: Callable[[Stream[V, K]], Awaitable[None]], /) -> Agent[K, V, None]: ...
    @overload
    def __call__(self, fn: Callable[[V], Awaitable[R]], /) -> Agent[Any, V, R]: ...
    @overload
    def __call__(self, fn: Callable[[V], R], /) -> Agent[Any, V, R]: ...
    def __call__(self, fn: Callable[..., Any], /) -> Agent[Any, Any, Any]:
        """Make the function an agent."""
        return self._declare(fn)
