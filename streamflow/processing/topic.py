"""What agents read: topics, and what is derived from a topic by a new key or by a copy.

All of it is declaration: nothing here holds a connection. A send finds its way at call time, see `processing.context`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypedDict, TypeVar, cast, overload

from streamflow.errors import ConfigurationError, SchemaError, TopologyError
from streamflow.model.record import Headers, RecordMetadata
from streamflow.model.schema import allows_none, surely_differs, type_name, without_none
from streamflow.model.serde import BoundCodec, Serializer, bind_codec
from streamflow.model.topic_name import TOPIC_NAME_RULE, is_topic_name
from streamflow.processing.context import current_turn, sender_of
from streamflow.processing.places import place_of_call
from streamflow.processing.selector import Field, Member, Selector, selector, timestamp_reader

if TYPE_CHECKING:
    from typing_extensions import TypeForm

K = TypeVar("K")
V = TypeVar("V")
K2 = TypeVar("K2")
M = TypeVar("M", bound=Member)

Partitioner: TypeAlias = Callable[[bytes, int], int]
"""Key bytes and partition count -> partition."""

_NEVER_DELETE = "-1"


def check_name(name: object, what: str) -> str:
    """Check a name against Kafka's alphabet for topics.

    Args:
        name: The name.
        what: What it names, for the error.

    Raises:
        ConfigurationError: It is not a string of 1 to 249 ASCII letters, digits, `.`, `_` and `-`.
    """
    if not isinstance(name, str):
        raise ConfigurationError(f"{what}: a name is a string, not {name!r}")
    if not is_topic_name(name):
        raise ConfigurationError(f"{what} {name!r}: use {TOPIC_NAME_RULE}")
    return name


def is_whole(value: object, *, least: int) -> bool:
    """Whether an option is a whole number of at least `least` (a bool is none)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether an option is a number (a bool is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


class Owner(Protocol):
    """What topics need of their app."""

    id: str
    derived: dict[str, Any]


class TopicOptions(TypedDict, total=False):
    """Options of a topic besides its name, types and serializers; `Declarations.topic` explains them."""

    partitions: int | None
    replication: int | None
    retention_s: float | None
    compacting: bool
    config: Mapping[str, str | int | float | bool] | None
    create: bool
    partitioner: Partitioner | None
    timestamp: Field


class Topic(Generic[K, V]):
    """A declared topic; made by `app.topic(...)`.

    Attributes:
        app: The app that declared it.
        name: Its name in the log.
        key_type: Declared type of its keys.
        value_type: Declared type of its values.
        key_serializer: Name of the keys' serializer, or the user's own object.
        value_serializer: The same for values.
        key_codec: Reads and writes its keys.
        value_codec: Reads and writes its values.
        partitions: Declared partition count; None takes what exists, or the app's default when it is created.
        replication: Copies of each partition; None takes the app's default.
        retention_s: Seconds records are kept; None is the log's default.
        compacting: Whether the log keeps only the newest record of each key.
        config: Further Kafka topic configuration, as strings.
        create: Whether a worker creates it when it does not exist.
        partitioner: Chooses the partition of a key; None is Kafka's murmur2.
        timestamp: The field or function that gives a record's time, as declared.
        timestamp_ms_of: The same compiled: value -> milliseconds since the epoch; None takes the record's own time.
        internal: Whether it is StreamFlow's own: a repartition topic (sized after its source, purged after commits),
            a changelog, or the leader topic of an app without agents.
        place: Where it was declared, `file:line`.
    """

    def __init__(
        self,
        app: Owner,
        name: str,
        *,
        key_type: TypeForm[K] | None = None,
        value_type: TypeForm[V] | None = None,
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
        internal: bool = False,
    ) -> None:
        self.app = app
        self.name = check_name(name, "topic")
        self.key_codec: BoundCodec[K] = bind_codec(key_type, key_serializer, topic=name, part="key")
        self.value_codec: BoundCodec[V] = bind_codec(value_type, value_serializer, topic=name, part="value")
        self.key_type: Any = self.key_codec.type
        self.value_type: Any = self.value_codec.type
        self.key_serializer = _identity(key_serializer, self.key_codec)
        self.value_serializer = _identity(value_serializer, self.value_codec)
        self.partitions = partitions
        self.replication = replication
        self.retention_s = retention_s
        self.compacting = compacting
        self.config = {key: _config_text(value) for key, value in (config or {}).items()}
        self.create = create
        self.partitioner = partitioner
        self.timestamp = timestamp
        self.timestamp_ms_of: Callable[[Any], int] | None = None
        self.internal = internal
        self.place = place_of_call()
        _check_options(self)
        if timestamp is not None:
            where = f"topic {name!r}, timestamp="
            self.timestamp_ms_of = timestamp_reader(timestamp, self.value_type, where)

    def __repr__(self) -> str:
        return f"<topic {self.name!r}: {type_name(self.key_type)} -> {type_name(self.value_type)}>"

    def topic_config(self) -> dict[str, str]:
        """The Kafka topic configuration to create it with: `config` with `retention_s` and `compacting` in it."""
        config = dict(self.config)
        if self.retention_s is not None:
            config["retention.ms"] = (
                _NEVER_DELETE if math.isinf(self.retention_s) else str(round(self.retention_s * 1000))
            )
        if self.compacting:
            config["cleanup.policy"] = "compact" if self.retention_s is None else "compact,delete"
        return config

    def difference(self, other: Topic[Any, Any]) -> str | None:
        """How another declaration of the same topic differs, in words; None where it does not."""
        for attribute in _COMPARED:
            mine, theirs = getattr(self, attribute), getattr(other, attribute)
            if mine != theirs:
                shown = type_name if attribute.endswith("_type") else repr
                return f"{attribute}={shown(mine)} at {self.place} and {attribute}={shown(theirs)} at {other.place}"
        return None

    async def send(
        self,
        *,
        key: K | None = None,
        value: V | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
        headers: Headers = (),
    ) -> RecordMetadata | None:
        """Send a record.

        Inside a record's turn it joins the turn's outputs: it becomes visible with the record's commit, or not at all.
        Elsewhere (timers, tasks, `app.client()`, `app.running()`) it leaves at once and is waited for; while too much
        is on its way (an eighth of `memory_budget_bytes`), the call first waits for room. In a task with
        `on_leader=True` it joins the next commit of the leader's partition, and waits while that is too large.

        Args:
            key: Of the topic's key type; None is a null key.
            value: Of the topic's value type; None is a null value (a tombstone).
            partition: Where to; None lets the key decide.
            timestamp_ms: Milliseconds since the epoch, UTC; None is the source record's, or now.
            headers: Record headers.

        Returns:
            Where the log put it; None inside a turn.

        Raises:
            ProductionError: It cannot be encoded or is too large.
            ClosedError: The app does not run in this process, or the turn is over.
            LogUnavailableError: The log did not answer in time.

        Cancellation: the record may or may not have been written.
        """
        outgoing = (self, key, value, partition, timestamp_ms, headers)
        turn = current_turn.get()
        if turn is None:
            return await sender_of(cast(Any, self.app)).send(outgoing)
        wait = turn.send(outgoing)
        if wait is not None:
            await wait()
        return None

    def send_nowait(
        self,
        *,
        key: K | None = None,
        value: V | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
        headers: Headers = (),
    ) -> None:
        """Send a record without waiting; arguments as in `send`.

        Inside a record's turn the same as `send`. Elsewhere a failure to write it is logged and counted.

        Raises:
            ProductionError: It cannot be encoded or is too large.
            ClosedError: The app does not run in this process, or the turn is over.
            WouldBlock: (anyio's) Outside a turn: an eighth of `memory_budget_bytes` is on its way already, or the
                topic was not described yet. Nothing was sent; `await send(...)` waits instead.
        """
        turn = current_turn.get()
        send = sender_of(cast(Any, self.app)).send_nowait if turn is None else turn.send
        send((self, key, value, partition, timestamp_ms, headers))

    @overload
    def group_by(self, field: str, *, name: str | None = None, key_type: TypeForm[K2]) -> GroupBy[K2, V]: ...
    @overload
    def group_by(self, field: str, *, name: str | None = None) -> GroupBy[Any, V]: ...
    @overload
    def group_by(
        self, field: Callable[[V], K2], *, name: str | None = None, key_type: TypeForm[K2] | None = None
    ) -> GroupBy[K2, V]: ...
    @overload
    def group_by(self, field: Member, *, name: str | None = None, key_type: TypeForm[K2]) -> GroupBy[K2, V]: ...
    @overload
    def group_by(self, field: M, *, name: str | None = None) -> GroupBy[M, V]: ...
    def group_by(self, field: Field, *, name: str | None = None, key_type: Any = None) -> GroupBy[Any, V]:
        """Key the records anew, by way of an internal topic, so that equal keys meet in one partition.

        Give the result to `@app.agent`. Two agents that use the same one share its topic.

        Args:
            field: A field's name (`"country"`), a struct's member (`Order.country`) or a function of the value.
            name: Names the step and its topic, `<app>-<name>-repartition`; default `<topic>-by-<field>`. A lambda needs
                one.
            key_type: Type of the new key; default the field's annotation, or the function's return annotation. Records
                whose new key is None get null keys, which do not meet in one partition.

        Raises:
            ConfigurationError: A name or a type is missing.
            SchemaError: The values have no such field, or it does not go with `key_type`.
            TopologyError: The name stands for another step already.
        """
        return _group_by(self, field, name, key_type)

    def through(self, other: Topic[Any, V]) -> Through[Any, V]:
        """Copy the records to another topic and read them there; keys are kept.

        Args:
            other: A topic of the same app with the same types.

        Raises:
            TopologyError: It is of another app or has other types.
        """
        return _through(self, other)


class Derived(Generic[K, V]):
    """A topic's records by way of another topic; made by `group_by` and `through`, given to `@app.agent`.

    Attributes:
        source: The topic (or the step) whose records it takes.
        topic: Where it writes them, and what the agent then reads.
        name: The step's name.
        rekey: The new key of a value; None keeps key.
        place: Where it was declared, `file:line`.
    """

    def __init__(
        self, source: Topic[Any, V] | Derived[Any, V], topic: Topic[K, V], name: str, rekey: Callable[[Any], Any] | None
    ) -> None:
        self.source = source
        self.topic = topic
        self.name = name
        self.rekey = rekey
        self.place = place_of_call()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}: {self.source_topic.name!r} -> {self.topic.name!r}>"

    @property
    def app(self) -> Owner:
        """The app that declared it."""
        return self.topic.app

    @property
    def source_topic(self) -> Topic[Any, V]:
        """The topic that the step itself reads."""
        return self.source.topic if isinstance(self.source, Derived) else self.source

    @property
    def regroups(self) -> Callable[[V], K] | None:
        """What gives its records their key, itself or a step before it; None where they have the one they came with."""
        if self.rekey is None and isinstance(self.source, Derived):
            return self.source.regroups
        return self.rekey

    @overload
    def group_by(self, field: str, *, name: str | None = None, key_type: TypeForm[K2]) -> GroupBy[K2, V]: ...
    @overload
    def group_by(self, field: str, *, name: str | None = None) -> GroupBy[Any, V]: ...
    @overload
    def group_by(
        self, field: Callable[[V], K2], *, name: str | None = None, key_type: TypeForm[K2] | None = None
    ) -> GroupBy[K2, V]: ...
    @overload
    def group_by(self, field: Member, *, name: str | None = None, key_type: TypeForm[K2]) -> GroupBy[K2, V]: ...
    @overload
    def group_by(self, field: M, *, name: str | None = None) -> GroupBy[M, V]: ...
    def group_by(self, field: Field, *, name: str | None = None, key_type: Any = None) -> GroupBy[Any, V]:
        """Key the records once more; see `Topic.group_by`."""
        return _group_by(self, field, name, key_type)

    def through(self, other: Topic[Any, V]) -> Through[Any, V]:
        """Copy the records to another topic; see `Topic.through`."""
        return _through(self, other)


class GroupBy(Derived[K, V]):
    """Records under a new key, in an internal topic.

    Attributes:
        field: What it was declared with.
    """

    def __init__(
        self,
        source: Topic[Any, V] | Derived[Any, V],
        topic: Topic[K, V],
        name: str,
        key_of: Callable[[Any], Any],
        field: Field,
    ) -> None:
        super().__init__(source, topic, name, key_of)
        self.key_of = key_of
        self.field = field


class Through(Derived[K, V]):
    """Records copied to a declared topic, their keys kept."""


_COMPARED = (
    "key_type",
    "value_type",
    "key_serializer",
    "value_serializer",
    "partitions",
    "replication",
    "retention_s",
    "compacting",
    "config",
    "create",
    "partitioner",
    "timestamp",
    "internal",
)


def _group_by(
    source: Topic[Any, Any] | Derived[Any, Any], field: Field, name: str | None, key_type: Any
) -> GroupBy[Any, Any]:
    topic = source.topic if isinstance(source, Derived) else source
    origin = source.name
    where = f"{origin}.group_by({field!r})" if isinstance(field, str) else f"{origin}.group_by(...)"
    if not callable(field):
        _refuse_null_values(where, topic, field)
    chosen = selector(field, topic.value_type, where)
    if name is None and not chosen.name:
        raise ConfigurationError(f"{where}: a lambda has no name to call the step by; add name='...'")
    name = check_name(name or f"{origin}-by-{chosen.name}", "group_by")
    key_type = _new_key_type(where, chosen, key_type)
    owner = topic.app
    made: Topic[Any, Any] = Topic(
        owner,
        f"{owner.id}-{name}-repartition",
        key_type=key_type,
        value_type=topic.value_type,
        value_serializer=topic.value_serializer,
        partitions=topic.partitions,
        config={"cleanup.policy": "delete", "retention.ms": _NEVER_DELETE},
        timestamp=None,
        internal=True,
    )
    return _registered(owner, GroupBy(source, made, name, chosen.read, field))


def _refuse_null_values(where: str, topic: Topic[Any, Any], field: Any) -> None:
    present = without_none(topic.value_type)
    if present is not None:
        name = type_name(present)
        raise SchemaError(
            f"{where}: values of {topic.name!r} may be None ({type_name(topic.value_type)}), which has no field "
            f"{getattr(field, '__name__', field)!r}: give a function that has a key for null values, too, or declare "
            f"value_type={name}, and they go to on_error="
        )


def _new_key_type(where: str, chosen: Selector, given: Any) -> Any:
    """The type of a step's keys: what was given, or what the field says.

    Raises:
        ConfigurationError: Neither says it.
        SchemaError: They do not go together, so that records would fail one by one.
    """
    if chosen.form is None:
        if given is None:
            raise ConfigurationError(
                f"{where}: nothing says the type of the new key; add key_type=, for example key_type=str"
            )
        return given
    if given is None:
        return chosen.form
    present, wanted = without_none(chosen.form), type_name(given)
    if surely_differs(chosen.form if present is None else present, given):
        raise SchemaError(
            f"{where}: the new key is {type_name(chosen.form)}, and key_type={wanted}: leave key_type out, or give a "
            f"function that makes {wanted} of it"
        )
    if present is not None and not allows_none(given):
        raise SchemaError(
            f"{where}: the new key may be None ({type_name(chosen.form)}), and key_type={wanted}: give a function that "
            f"has a key for these records, too, or key_type={wanted} | None, which gives them null keys: they do not "
            "meet in one partition"
        )
    return given


def _through(source: Topic[Any, Any] | Derived[Any, Any], other: Topic[Any, Any]) -> Through[Any, Any]:
    where = f"{source.name}.through(...)"
    if not isinstance(other, Topic):
        raise ConfigurationError(
            f"{where}: give a topic of the app, not {other!r}: app.topic(name, key_type=, value_type=)"
        )
    topic = source.topic if isinstance(source, Derived) else source
    if other.app is not topic.app:
        raise TopologyError(f"{where}: topic {other.name!r} belongs to app {other.app.id!r}, not to {topic.app.id!r}")
    if other is topic:
        raise TopologyError(f"{where}: a topic cannot go through itself")
    for part in ("key_type", "value_type"):
        mine, theirs = getattr(topic, part), getattr(other, part)
        if surely_differs(mine, theirs):
            raise TopologyError(
                f"{where}: {topic.name!r} has {part}={type_name(mine)} and {other.name!r} has "
                f"{part}={type_name(theirs)}"
            )
    return _registered(topic.app, Through(source, other, f"{source.name}-through-{other.name}", None))


D = TypeVar("D", bound=Derived[Any, Any])


def _registered(owner: Owner, step: D) -> D:
    """Keep a step under its name: the same declaration twice is one step, another one of that name an error."""
    known = owner.derived.get(step.name)
    if known is None:
        owner.derived[step.name] = step
        return step
    same = (
        type(known) is type(step)
        and known.source is step.source
        and getattr(known, "field", None) == getattr(step, "field", None)
        and known.topic.difference(step.topic) is None
    )
    if not same:
        raise TopologyError(
            f"two steps are called {step.name!r}: one at {known.place}, one at {step.place}; give one of them a name="
        )
    return cast(D, known)


def _identity(serializer: str | Serializer | None, codec: BoundCodec[Any]) -> str | Serializer:
    return codec.serializer if serializer is None or isinstance(serializer, str) else serializer


def _config_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_options(topic: Topic[Any, Any]) -> None:
    where = f"topic {topic.name!r}"

    def refuse(option: str, what: str) -> None:
        raise ConfigurationError(f"{where}: {option}={getattr(topic, option)!r}: {what}")

    if topic.partitions is not None and not is_whole(topic.partitions, least=1):
        refuse("partitions", "a topic has at least 1 partition; leave it out to take what exists, or the app's default")
    if topic.replication is not None and topic.replication != -1 and not is_whole(topic.replication, least=1):
        refuse("replication", "at least 1 copy, or -1 for the broker's default")
    if topic.retention_s is not None and not (is_number(topic.retention_s) and topic.retention_s > 0):
        refuse("retention_s", "seconds above 0, or float('inf') to keep records for ever")
    partitioner: Any = topic.partitioner
    if partitioner is not None and not callable(partitioner):
        refuse("partitioner", "a function of key bytes and partition count that returns the partition")
    for option, key in (("retention_s", "retention.ms"), ("compacting", "cleanup.policy")):
        if getattr(topic, option) and key in topic.config:
            raise ConfigurationError(
                f"{where}: {option}= and config={{{key!r}: ...}} say the same thing; leave one out"
            )
