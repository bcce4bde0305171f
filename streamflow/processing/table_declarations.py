"""The tables of an app, as they were declared: those that agents write, sets, and those that every worker holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

from streamflow.errors import ConfigurationError, TopologyError
from streamflow.keywords import known_keywords
from streamflow.model.serde import Serializer
from streamflow.processing.global_table import GlobalTable
from streamflow.processing.hooks import check_action
from streamflow.processing.places import place_of_call
from streamflow.processing.reads_guard import ReadsGuard
from streamflow.processing.remote import Authorize
from streamflow.processing.set_table import Pairs, SetTable
from streamflow.processing.table import Table
from streamflow.processing.topic import Topic, check_name
from streamflow.processing.visit import Visited, visit

if TYPE_CHECKING:
    from typing_extensions import TypeForm

K = TypeVar("K")
V = TypeVar("V")
G = TypeVar("G", bound=Authorize)
D = TypeVar("D", Table[Any, Any], GlobalTable[Any, Any])

_OF_THE_TOPIC = ("key_type", "value_type", "key_serializer", "value_serializer")


class TableDeclarations:
    """What `Declarations` has of tables.

    Attributes:
        id: The app's name.
        topics: Declared topics by name.
        tables: Declared tables by name; those behind set tables, too.
        set_tables: Declared set tables by name.
        global_tables: Declared global tables by name.
        reads_guard: Decides who may read over HTTP; None lets everyone.
    """

    id: str
    topics: dict[str, Topic[Any, Any]]
    derived: dict[str, Any]
    tables: dict[str, Table[Any, Any]]
    set_tables: dict[str, SetTable[Any, Any]]
    global_tables: dict[str, GlobalTable[Any, Any]]
    reads_guard: ReadsGuard | None

    def authorize_reads(self, fn: G) -> G:
        """Have a function (sync or async) decide who may read tables over HTTP.

        It is given an `sf.TableRead` and returns True to allow the read; anything else, or raising `PermissionError`,
        whose text is the answer, refuses it. Where it raises anything else, nothing is read, and the log says so. Both
        the worker that is asked and the one that has the key call it, with the headers of the request. Without one,
        whoever reaches the web server reads. `get_remote` and `scan_remote` with `headers=` are decided on, too;
        without, they are the app's own, and what this process holds is not asked about.

        Raises:
            TopologyError: The app has such a function already.
        """
        check_action(fn, "@app.authorize_reads", "read")
        if self.reads_guard is not None:
            raise TopologyError("@app.authorize_reads: the app has such a function already, and one decides")
        self.reads_guard = ReadsGuard(fn)
        return fn

    def declared_topic(self, topic: Topic[Any, Any]) -> Topic[Any, Any]:
        """Register a topic; the one of the same name and kind where there is one."""
        known = self.topics.setdefault(topic.name, topic)
        difference = known.difference(topic)
        if difference is not None:
            raise TopologyError(f"topic {topic.name!r} is declared twice, with {difference}")
        return known

    # --- tables ------------------------------------------------------------------------------------------------

    @overload
    def table(
        self,
        name: str,
        *,
        key_type: TypeForm[K],
        value_type: TypeForm[V],
        key_serializer: str | Serializer | None = None,
        value_serializer: str | Serializer | None = None,
        default: Callable[[], V] | None = None,
        ttl_s: float | None = None,
        partition_by: Callable[[K], Any] | None = None,
        on_recover: Callable[..., Any] | None = None,
        help: str = "",
    ) -> Table[K, V]: ...
    @overload
    def table(
        self,
        name: str,
        *,
        source: Topic[K, V],
        default: Callable[[], V] | None = None,
        on_recover: Callable[..., Any] | None = None,
        help: str = "",
    ) -> Table[K, V]: ...
    @known_keywords("app.table(...)", Table)
    def table(self, name: str, **options: Any) -> Table[Any, Any]:  # noqa: D417 (they are described one by one)
        """Declare a table: a mapping that agents share and that survives crashes.

        Each partition of the sources of the agents that use it has a part of its own, in a local store and in a
        compacted topic, `<app>-<name>-changelog`. What a record writes is committed with the record's offset and
        outputs, and not at all when the record fails.

        Args:
            name: Its name.
            key_type: Type of its keys; iteration is in their order. Left out: bytes, or what `key_serializer` says.
            value_type: Type of its values. `None` is no value: it is how a deletion is written. Left out: bytes, or
                what `value_serializer` says.
            key_serializer: How the changelog has its keys; see `topic`.
            value_serializer: How changelog and store have its values. Schemas that it needs are loaded while a
                partition is opened, which reads all its values; `key_serializer` may need none.
            default: Makes the value that `table[key]` reads where there is none; it is not stored by reading. Left out:
                `KeyError`.
            ttl_s: Seconds that a value lives after its last write, above 0, in stream time: the greatest timestamp of
                the records that touched the table in its partition. Left out: for ever. Not with `source=`.
            source: A topic of the app that keeps the newest record of each key, `app.topic(..., compacting=True)`: the
                table is what the topic says, without a changelog of its own. Agents read it and do not write it; its
                records take effect in order of timestamp with the other records of the task. Types and serializers
                are the topic's. Left out: agents write the table.
            partition_by: Where a record's key is a part of the table's: a function that takes a key of the table and
                returns the key of the record it belongs to, `lambda key: key[0]`. That decides the partition of the
                key, and it is of the source's key type, or the write is a `ProductionError`. It is called for keys that
                are new to a task and for reads outside of turns; it must always say the same, and must not wait. Left
                out: records are keyed like the table. Not with `source=`.
            on_recover: Called (sync or async) with the partition's number when a partition of it was restored.
            help: What it holds, for people.

        Returns:
            The table; the same object for the same declaration.

        Raises:
            ConfigurationError: An option does not fit.
            SchemaError: A type cannot be serialized, or keys of that type cannot be put in order.
            TopologyError: The name was declared before with something else.
        """
        source = options.get("source")
        if source is not None:
            self._check_filled(name, source, options)
        declared: Table[Any, Any] = Table(self, name, **options)
        self._check_table_name(name, self.global_tables)
        return _first_of(self.tables, declared)

    @known_keywords("app.set_table(...)")
    def set_table(
        self,
        name: str,
        *,
        key_type: TypeForm[K],
        member_type: TypeForm[V],
        key_serializer: str | Serializer | None = None,
        ttl_s: float | None = None,
        partition_by: Callable[[K], Any] | None = None,
        on_recover: Callable[..., Any] | None = None,
        help: str = "",
    ) -> SetTable[K, V]:
        """Declare a table of sets: `tags[key].add(member)`.

        Each member is an entry of its own, so that no set is ever read or written as a whole. All else is as with
        `table`.

        Args:
            name: Its name, which no other table has.
            key_type: Type of its keys, one that has an order: str, bytes, numbers, times, ids, enumerations, tuples.
            member_type: Type of the members, of the same kinds.
            key_serializer: How the source has the key; it decides the partition. See `topic`.
            ttl_s: Seconds that a member lives after it was added last; see `table`.
            partition_by: Takes a key of the set table (not the pair); see `table`.
            on_recover: See `table`.
            help: What it holds, for people.

        Returns:
            The set table; the same object for the same declaration.

        Raises:
            ConfigurationError: An option does not fit.
            SchemaError: A type cannot be serialized, or has no order.
            TopologyError: The name was declared before with something else.
        """
        keeping = {"ttl_s": ttl_s, "partition_by": partition_by, "on_recover": on_recover, "help": help}
        pairs: Pairs[K, V] = Pairs(self, name, key_type, member_type, key_serializer, **keeping)
        self._check_table_name(name, self.global_tables)
        if _first_of(self.tables, pairs) is pairs:
            self.set_tables[name] = SetTable(pairs, key_type)
        return self.set_tables[name]

    @overload
    def global_table(
        self,
        name: str,
        *,
        key_type: TypeForm[K],
        value_type: TypeForm[V],
        key_serializer: str | Serializer | None = None,
        value_serializer: str | Serializer | None = None,
        on_recover: Callable[[], Any] | None = None,
        help: str = "",
    ) -> GlobalTable[K, V]: ...
    @overload
    def global_table(
        self, name: str, *, source: Topic[K, V], on_recover: Callable[[], Any] | None = None, help: str = ""
    ) -> GlobalTable[K, V]: ...
    @known_keywords("app.global_table(...)")
    def global_table(
        self,
        name: str,
        *,
        key_type: Any = None,
        value_type: Any = None,
        source: Topic[Any, Any] | None = None,
        key_serializer: str | Serializer | None = None,
        value_serializer: str | Serializer | None = None,
        on_recover: Callable[[], Any] | None = None,
        help: str = "",
    ) -> GlobalTable[Any, Any]:
        """Declare a global table: a mapping that every worker holds all of, filled from a topic.

        It may be read anywhere and is written by sending to its source. It belongs to no commit: see `GlobalTable`.

        Args:
            name: Its name.
            key_type: Type of its keys; iteration is in their order. With `source=` it is the topic's.
            value_type: Type of its values. With `source=` it is the topic's.
            source: A topic of the app that keeps the newest record of each key, `app.topic(..., compacting=True)`. Left
                out: the topic of the table's name, created so at start.
            key_serializer: How the source has its keys; see `topic`. With `source=` it is the topic's.
            value_serializer: How the source has its values.
            on_recover: Called (sync or async), without arguments, when a worker has all that was there at its start.
            help: What it holds, for people.

        Returns:
            The table; the same object for the same declaration.

        Raises:
            ConfigurationError: An option does not fit.
            SchemaError: A type cannot be serialized, or keys of that type cannot be put in order.
            TopologyError: The name, or the source, was declared before with something else.
        """
        typed: dict[str, Any] = {
            "key_type": key_type,
            "value_type": value_type,
            "key_serializer": key_serializer,
            "value_serializer": value_serializer,
        }
        self._check_table_name(check_name(name, "global table"), self.tables)
        if source is None:
            source = self.declared_topic(Topic(self, name, **typed, compacting=True))
        else:
            self._check_source(f"global table {name!r} ({place_of_call()})", source, typed)
        declared = GlobalTable(self, name, source, on_recover=on_recover, help=help)
        for other in self.global_tables.values():
            if other.source is source and other.name != name:
                raise TopologyError(
                    f"global tables {other.name!r} ({other.place}) and {name!r} ({declared.place}) have the same "
                    f"source {source.name!r}, so they would hold the same: use one of them"
                )
        return _first_of(self.global_tables, declared)

    def _check_filled(self, name: str, source: Any, options: Mapping[str, Any]) -> None:
        where = f"table {name!r} ({place_of_call()})"
        self._check_source(where, source, options)
        if options.get("ttl_s") is not None:
            raise ConfigurationError(
                f"{where}: ttl_s= is for tables that agents write; this one has what its source has. Leave it out"
            )
        if options.get("partition_by") is not None:
            raise ConfigurationError(
                f"{where}: partition_by= is for tables that agents write; the keys of this one lie where the records "
                f"of its source {source.name!r} do. Leave it out"
            )

    def _check_source(self, where: str, source: Any, given: Mapping[str, Any]) -> None:
        if not isinstance(source, Topic) or source.internal:
            raise ConfigurationError(
                f"{where}: source={source!r}: give a topic, `app.topic('users', key_type=str, value_type=User, "
                "compacting=True)`; what group_by writes is deleted once it is processed"
            )
        if source.app is not self:
            raise TopologyError(
                f"{where}: source= is topic {source.name!r} of app {source.app.id!r}; declare the topic in {self.id!r} "
                "too, by the same name"
            )
        if any(given.get(each) is not None for each in _OF_THE_TOPIC):
            raise ConfigurationError(
                f"{where}: types and serializers are those of its source {source.name!r}; leave them out"
            )

    def _check_table_name(self, name: str, others: Mapping[str, Any]) -> None:
        if name in others:
            raise TopologyError(
                f"two tables are called {name!r}: one at {others[name].place}, one at {place_of_call()}; rename one"
            )

    async def visit(self, table: Table[K, V], fn: Callable[[K, V], V | None]) -> Visited:
        """Call a function with every key and value of a table that this process holds: to migrate it, or to repair it.

        It goes through each partition in key order, in slices of a few milliseconds between records, and each slice is
        committed like a record. Start it from a task (`@app.task`, which every worker runs, so that all partitions are
        visited) or within `app.running()`. It waits for partitions that are being restored, and ends when all that are
        held here were visited.

        A key that is written while the visit goes on is visited if its place was not reached yet. A partition that
        moves is visited anew by the worker it moves to, if that one visits; so let the function leave alone what it has
        done before. One that comes back goes on where it was left.

        Args:
            table: The table; for a set table its `pairs`.
            fn: Takes key and value and returns the new value, or None to leave it. Values may be changed in place;
                `table.pop(key)` deletes. It must not wait.

        Returns:
            Which partitions were visited, which left before their end, and how many keys were visited, written,
            deleted.

        Raises:
            NotHeld: The app does not run in this process.
            ProcessingError: The function raised; its slice is dropped, what was visited before it is committed.
            ProductionError: A new value cannot be written; likewise.
            StateError: A stored value does not decode as the table's type; likewise.

        Cancellation: slices that were begun may be committed.
        """
        return await visit(table, fn)


def _first_of(known: dict[str, D], declared: D) -> D:
    """The first declaration of a name, which another one must not differ from."""
    first = known.setdefault(declared.name, declared)
    difference = first.difference(declared) if first is not declared else None
    if difference is not None:
        raise TopologyError(f"{declared.kind} {declared.name!r} is declared twice, with {difference}")
    return first
