"""Set tables: a set of members under each key, one stored entry per member: no set is written as a whole."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, MutableSet
from collections.abc import Set as AbstractSet
from typing import Any, Generic, TypeVar, cast, overload

from streamflow.errors import ProductionError, SchemaError
from streamflow.model.schema import type_name
from streamflow.model.serde import BoundCodec, Serializer
from streamflow.processing.remote import DEFAULT_READ_S, ReadOptions, reader_of_app
from streamflow.processing.table import Table, TableOwner
from streamflow.processing.topic import Topic
from streamflow.state.keys import SerializedOrder
from streamflow.state.stage import Stage
from streamflow.state.values import MISSING

K = TypeVar("K")
M = TypeVar("M")
T = TypeVar("T")

_HERE = b""


class Pairs(Table[tuple[K, M], bytes], Generic[K, M]):
    """What a set table is stored as: a table of (key, member), with nothing as values.

    A pair lies in the partition of its key, or of what `partition_by` makes of that.

    Args:
        app: See `Table`.
        name: See `Table`.
        key_type: Type of the keys.
        member_type: Type of the members.
        key_serializer: How the source has the key.
        options: Of `Table`.
    """

    def __init__(
        self,
        app: TableOwner,
        name: str,
        key_type: Any,
        member_type: Any,
        key_serializer: str | Serializer | None,
        **options: Any,
    ) -> None:
        pair: Any = tuple[key_type, member_type]
        super().__init__(app, name, key_type=pair, value_type=bytes, **options)
        alone: Topic[K, Any] = Topic(
            app, self.changelog.name, key_type=key_type, value_type=bytes, key_serializer=key_serializer, internal=True
        )
        self._of_key = alone.key_codec
        members: Topic[M, Any] = Topic(app, self.changelog.name, key_type=member_type, value_type=bytes, internal=True)
        # Reads members from text.
        self.member_codec: BoundCodec[M] = members.key_codec
        self.member_type = member_type
        if isinstance(self.keys_in_order, SerializedOrder):
            raise SchemaError(
                f"set table {name!r} ({self.place}): keys of type {type_name(key_type)} and members of type "
                f"{type_name(member_type)} have no order; take str, bytes, numbers, times, ids, enumerations, or "
                "tuples of them"
            )

    def difference(self, other: Table[Any, Any]) -> str | None:
        if isinstance(other, Pairs) and self._of_key.serializer != other._of_key.serializer:
            return f"another key_serializer= ({self.place} and {other.place})"
        return super().difference(other)

    @property
    def home_codec(self) -> BoundCodec[Any]:
        return self._of_key

    def home_part(self, key: tuple[K, Any]) -> Any:
        return key[0]


class Members(MutableSet[M]):
    """The members under one key of a set table; made by `tags[key]`.

    It holds nothing itself: what it reads and writes is in the table, under the rules of `Table`. Iteration is in the
    members' order, over the set as it was when the iteration began; `len` counts by iterating.

    Args:
        pairs: The table.
        key: The key.
        stage: The table in the turn that the set belongs to; None asks at each use.
    """

    __slots__ = ("_key", "_pairs", "_stage")

    def __init__(self, pairs: Pairs[Any, M], key: Any, stage: Stage | None = None) -> None:
        self._pairs = pairs
        self._key = key
        self._stage = stage

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> Any:
        """What `&`, `|`, `-` and `^` make: a set of its own."""
        return set(it)

    def __repr__(self) -> str:
        return f"<members of {self._key!r} in set table {self._pairs.name!r}>"

    def is_of(self, pairs: Pairs[Any, Any], key: Any) -> bool:
        """Whether it shows that key of that table."""
        return self._pairs is pairs and bool(self._key == key)

    def _reading(self) -> Stage | None:
        return self._stage or self._pairs.stage_in_turn()

    def _writing(self) -> Stage:
        return self._stage or self._pairs.writable_stage()

    def __contains__(self, member: object) -> bool:
        stage, pair = self._reading(), (self._key, member)
        return self._pairs.is_committed(cast(Any, pair)) if stage is None else stage.contains(pair)

    def __iter__(self) -> Iterator[M]:
        low, high = self._pairs.keys_in_order.prefix((self._key,))
        stage = self._reading()
        if stage is not None:
            return (pair[1] for pair, _ in stage.entries(low, high))
        return (pair[1] for pair in self._pairs.committed_keys(self._key, low, high))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return next(iter(self), MISSING) is not MISSING

    def add(self, value: M) -> None:
        """Add a member; one that is there is written again only where members expire.

        Raises:
            ProductionError: It is not of the table's type, or the key belongs to another partition.
            ClosedError: The caller stands in no record's turn.
        """
        stage, pair = self._writing(), (self._key, value)
        if self._pairs.ttl_s is not None or not stage.contains(pair):
            stage.set(pair, _HERE)

    def discard(self, value: M) -> None:
        """Take a member out, if it is there; raises as `add`."""
        stage, pair = self._writing(), (self._key, value)
        if stage.contains(pair):
            stage.delete(pair)

    def update(self, *others: Iterable[M]) -> None:
        """Add all members of other iterables; raises as `add`."""
        for other in others:
            for member in other:
                self.add(member)

    def clear(self) -> None:
        """Take all members out; raises as `add`."""
        for member in tuple(self):
            self.discard(member)


class SetTable(Mapping[K, Members[M]], Generic[K, M]):
    """A table of sets; made by `app.set_table(...)`.

    `tags[key]` is the set under a key, empty where there is none: `add`, `discard`, `remove`, `update`, `clear`, `in`,
    `len`, iteration in order. Each member is an entry of its own in store and changelog, so that a change costs the
    same in a set of ten and of ten million. A key is there as long as it has members.

    It is a mapping of those keys, in their order; iteration, `len`, `keys()`, `values()` and `items()` read every
    member to find them, and the sets that they give out read the table when they are looked at. It equals nothing but
    itself.

    Turns, commits, partitions and reads elsewhere are as those of `Table`. With `concurrency=`, two records in progress
    may change different members of one set.

    Attributes:
        app: The app that declared it.
        name: Its name.
        key_type: Type of its keys.
        member_type: Type of the members.
        pairs: The table behind it, of pairs (key, member).
    """

    def __init__(self, pairs: Pairs[K, M], key_type: Any) -> None:
        self.pairs = pairs
        self.app = pairs.app
        self.name = pairs.name
        self.key_type = key_type
        self.member_type = pairs.member_type

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"<set table {self.name!r}: {type_name(self.key_type)} to sets of {type_name(self.member_type)}>"

    @property
    def partitions(self) -> frozenset[int]:
        """The partitions that reads and iteration cover here."""
        return self.pairs.partitions

    def __getitem__(self, key: K) -> Members[M]:
        return Members(self.pairs, key)

    def __setitem__(self, key: K, members: AbstractSet[M]) -> None:
        """Make a set equal to another one; only what differs is written."""
        mine = self[key]
        if isinstance(members, Members) and members.is_of(self.pairs, key):
            return  # `tags[key] |= ...` has changed it already
        given: Any = members
        if isinstance(given, str | bytes) or not isinstance(given, Iterable):
            raise ProductionError(
                f"set table {self.name!r}: what stands under a key is a set of {type_name(self.member_type)}, not "
                f"{type_name(type(given))} {given!r}; its key is {key!r}. To add one member, write "
                f"`{self.name}[key].add(member)`"
            )
        wanted = set(members)
        for member in tuple(mine):
            if member not in wanted:
                mine.discard(member)
        mine.update(wanted)

    def __delitem__(self, key: K) -> None:
        mine = self[key]
        self.pairs.writable_stage()
        if not mine:
            raise KeyError(key)
        mine.clear()

    def __contains__(self, key: object) -> bool:
        return bool(self[cast("K", key)])

    @overload
    def get(self, key: K, /) -> Members[M] | None: ...
    @overload
    def get(self, key: K, default: Members[M], /) -> Members[M]: ...
    @overload
    def get(self, key: K, default: T, /) -> Members[M] | T: ...
    def get(self, key: K, default: Any = None, /) -> Any:
        """The set under a key.

        Args:
            key: The key.
            default: What to return where it has no members.
        """
        return self[key] or default

    def items(self) -> ItemsView[K, Members[M]]:
        """Keys that have members and their sets, in key order."""
        return _Items(self)

    def __iter__(self) -> Iterator[K]:
        """Keys that have members, in order."""
        last: Any = MISSING
        for (key, _), _ in self.pairs.scan():
            if last is MISSING or key != last:
                last = key
                yield key

    def __len__(self) -> int:
        """Number of keys that have members; it counts by iterating."""
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def clear(self) -> None:
        """Take all members out of all sets of this partition."""
        self.pairs.clear()

    def position(self, key: K) -> str:
        """See `Table.position`."""
        return self.pairs.position(cast(Any, (key, None)))

    async def get_remote(
        self,
        key: K,
        *,
        at: str = "",
        stale_ok: bool = False,
        timeout_s: float = DEFAULT_READ_S,
        headers: Mapping[str, str] | None = None,
    ) -> set[M]:
        """The committed members under a key, whichever worker holds it; an empty set where there are none.

        Arguments and errors are those of `Table.get_remote`.
        """
        asked = ReadOptions(at, stale_ok, timeout_s, headers)
        reader = reader_of_app(self.app, self.name)
        return {member async for member in reader.members(self.pairs, key, asked)}

    async def update_async(self, key: K, change: Callable[[Members[M]], object]) -> None:
        """Change a set from outside of a record's turn: in a timer, a task, an HTTP handler.

        It runs in a turn of the key's partition, between two records, and commits like a record's writes.

        Args:
            key: The key.
            change: Changes the set it is given: `lambda members: members.add("new")`. It is called once and must not
                wait.

        Raises:
            NotHeld: Another worker has the partition, or took it before the commit.
            ClosedError: The caller is an agent.
            ProductionError: Key or member do not fit; the function is async, or returned another set, which would be
                lost.

        Cancellation: the change may have been made.
        """

        def work(stage: Stage) -> None:
            returned = change(Members(self.pairs, key, stage))
            self.pairs.refuse_awaitable(returned)
            is_same = isinstance(returned, Members) and returned.is_of(self.pairs, key)
            if isinstance(returned, AbstractSet) and not is_same:
                raise ProductionError(
                    f"set table {self.name!r}: update_async of the key {key!r}: its function returned a set, which "
                    "would be lost: change the set that it is given, by `members.add(...)`, `members |= ...`"
                )

        await self.pairs.change_of(cast(Any, (key, None)), work)


class _Items(ItemsView[K, Members[M]]):
    _mapping: SetTable[K, M]

    def __contains__(self, item: object) -> bool:
        if not isinstance(item, tuple) or len(item) != 2:
            return False
        members = self._mapping.get(item[0])  # an empty set stands under no key
        return members is not None and bool(members == item[1])
