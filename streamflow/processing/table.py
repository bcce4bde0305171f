"""Tables: mappings that agents share, one part per partition, written through a changelog.

All of it is declaration. Inside a record's turn a table finds the turn's stage and works on the task's own partition;
elsewhere it reads what is committed, of the partitions that this process holds.
"""

from __future__ import annotations

import inspect
from asyncio import current_task
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast, overload

from streamflow.errors import ClosedError, ConfigurationError, NotHeld, ProductionError, SchemaError, TopologyError
from streamflow.model.schema import type_name, without_none
from streamflow.model.serde import BoundCodec, Serializer
from streamflow.processing.context import current_turn
from streamflow.processing.holding import Holder, holders_of
from streamflow.processing.partition_by import checked_partition_by, record_key
from streamflow.processing.places import place_of_call
from streamflow.processing.remote_table import RemoteTable
from streamflow.processing.topic import Topic, check_name
from streamflow.state.keys import key_order
from streamflow.state.overlay import Overlay
from streamflow.state.stage import Stage
from streamflow.state.values import MISSING, Values

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")

_UNSET: Any = object()
_turn_of_caller = current_turn.get
_LONGEST_TTL_S = 100 * 366 * 24 * 3600


class TableOwner(Protocol):
    """What tables need of their app."""

    id: str
    derived: dict[str, Any]


class Table(RemoteTable[K, V], MutableMapping[K, V], Generic[K, V]):
    """A table; made by `app.table(...)`.

    In a record's turn it is the part of the table that belongs to the record's partition, with what the turn has
    written itself. Elsewhere (timers, tasks, HTTP handlers) it is what is committed of all partitions that this process
    holds (`partitions` says which); a key of another one raises `NotHeld`. Writes elsewhere go through
    `update_async`.

    Iteration is in key order, over the table as it was when the iteration began. `len` counts by iterating.

    Attributes:
        app: The app that declared it.
        name: Its name.
        full_name: The same among those of several apps in a process.
        key_type: Type of its keys.
        value_type: Type of its values.
        default: Makes the value that is read where there is none; None raises `KeyError` there.
        ttl_s: Seconds of stream time a value lives after its last write; None for ever.
        on_recover: Called when a partition was restored.
        help: What it holds, for people.
        source: The topic that fills it, so that it is only read; None for a table that agents write.
        partition_by: Gives the key of the source's record that a key belongs to; None where that is the key itself.
        changelog: The topic it is restored from: an internal one, or the source.
        place: Where it was declared, `file:line`.
    """

    kind: ClassVar[str] = "table"

    def __init__(
        self,
        app: TableOwner,
        name: str,
        *,
        key_type: Any = None,
        value_type: Any = None,
        key_serializer: str | Serializer | None = None,
        value_serializer: str | Serializer | None = None,
        default: Callable[[], V] | None = None,
        ttl_s: float | None = None,
        source: Topic[K, V] | None = None,
        partition_by: Callable[[Any], Any] | None = None,
        on_recover: Callable[..., Any] | None = None,
        help: str = "",
    ) -> None:
        self.app = app
        self.name = check_name(name, "table")
        self.full_name = f"{app.id}/{name}"
        self.place = place_of_call()
        self.source = source
        if key_type is None and key_serializer is None:
            key_type = bytes  # a topic's null keys have no place here
        self.changelog: Topic[K, V] = source or Topic(
            app,
            f"{app.id}-{name}-changelog",
            key_type=key_type,
            value_type=value_type,
            key_serializer=key_serializer,
            value_serializer=value_serializer,
            compacting=True,
            internal=True,
        )
        self.key_type = self.changelog.key_type
        self.value_type = self.changelog.value_type
        if source is None:
            self._check_value_type()
            self._check_key_serializer()
        self.held_values = Values(name, self.changelog.value_codec)
        self.default = self._checked_default(default)
        self.ttl_s = self._checked_ttl(ttl_s)
        self.partition_by = checked_partition_by(partition_by, f"table {name!r} ({self.place})")
        self.on_recover = on_recover
        self.help = help
        self.keys_in_order = key_order(self.changelog.key_codec, table=name)

    def _check_value_type(self) -> None:
        present = without_none(self.value_type)
        if present is not None or self.value_type is type(None):
            instead = "the type that values have" if present is None else f"value_type={type_name(present)}"
            raise SchemaError(
                f"table {self.name!r} ({self.place}): value_type={type_name(self.value_type)}: None is how a log says "
                f"that a key was deleted, so it cannot be a value. Declare {instead}, write `del table[key]`, and read "
                "what may be missing by `table.get(key)`"
            )

    def _check_key_serializer(self) -> None:
        if self.key_codec.load_schema is not None:
            raise SchemaError(
                f"table {self.name!r} ({self.place}): key_serializer={self.key_codec.serializer} loads schemas, so one "
                "key could be written in several ways, and would be several keys. Leave it out, and give the key of "
                "the source's records by `partition_by=` where they are written so"
            )

    def _checked_default(self, default: Any) -> Any:
        if default is None:
            return None
        if not callable(default):
            raise ConfigurationError(
                f"table {self.name!r} ({self.place}): default= is a function that makes the value, such as "
                f"`default={type(default).__name__}` or `default=lambda: {default!r}`"
            )
        where = f"table {self.name!r} ({self.place}): default="
        if inspect.iscoroutinefunction(default):
            raise ConfigurationError(f"{where} is called where a key is read, and cannot be async")
        try:
            made: Any = default()
        except Exception as exc:
            raise ConfigurationError(
                f"{where} is called without arguments to make a value, and raised {type(exc).__name__}: {exc}"
            ) from exc
        if made is None:
            raise ConfigurationError(f"{where} makes None; leave it out and use `table.get(key)`")
        try:
            self.held_values.encoded(made)
        except ProductionError as exc:
            raise ConfigurationError(
                f"{where} makes {type_name(type(made))} {made!r}, and value_type={type_name(self.value_type)}: "
                f"{exc.message.removeprefix(f'table {self.name!r}: ')}"
            ) from exc
        return default

    def _checked_ttl(self, ttl_s: Any) -> float | None:
        is_number = isinstance(ttl_s, int | float) and not isinstance(ttl_s, bool)
        if ttl_s is None or (is_number and 0.001 <= ttl_s <= _LONGEST_TTL_S):
            return cast("float | None", ttl_s)
        raise ConfigurationError(
            f"table {self.name!r} ({self.place}): ttl_s={ttl_s!r}: seconds that a value lives, a number from 0.001 to "
            f"{_LONGEST_TTL_S:,}; left out, values live for ever"
        )

    @property
    def key_codec(self) -> BoundCodec[K]:
        """Writes keys as the changelog has them."""
        return self.changelog.key_codec

    @property
    def home_codec(self) -> BoundCodec[Any]:
        """Writes the part of a key that decides its partition, where `partition_by` does not say otherwise."""
        return self.key_codec

    def home_part(self, key: K) -> Any:
        """That part."""
        return key

    def home_bytes(self, key: K, sent_as: BoundCodec[Any]) -> bytes:
        """The record key that decides the partition of a key, as records of the source have it.

        Args:
            key: The key.
            sent_as: The source's keys.

        Raises:
            ProductionError: It is not of the table's key type, or `partition_by` gives no key of the source.
        """
        part = self.home_part(key)
        try:
            own = self.home_codec.encode(part)
        except ProductionError as exc:
            what = exc.message.replace(f"the key of topic {self.changelog.name!r}", "its key")
            raise ProductionError(f"table {self.name!r}: {what}") from exc
        if own is None:
            raise ProductionError(f"table {self.name!r}: a key cannot be None")
        return own if self.partition_by is None else record_key(self.partition_by, part, sent_as, table=self.name)

    def difference(self, other: Table[Any, Any]) -> str | None:
        """What differs from another declaration of the same name, in words; None when nothing does."""
        if type(self) is not type(other):
            return f"another kind of table ({self.place} and {other.place})"
        for field in ("default", "ttl_s", "source", "partition_by", "on_recover"):
            if getattr(self, field) != getattr(other, field):
                return f"another {field}= ({self.place} and {other.place})"
        return self.changelog.difference(other.changelog)

    # --- where it is -------------------------------------------------------------------------------------------

    def stage_in_turn(self) -> Stage | None:
        """The stage of the record's turn that the caller stands in; None elsewhere."""
        turn = current_turn.get()
        if turn is None:
            return None
        stage: Stage | None = turn.stages.get(self.full_name)
        if stage is None:
            turn.refuse_table(self)
            return None
        # The loop is given since to look it up costs a system call per access (Python 3.11 asks for the process id).
        if (current_task(turn.loop) is not turn.owner or turn.record is None) and not turn.may_touch():
            return None
        if stage.overlay.ttl_ms is not None:
            stage.advance(turn.timestamp_ms())
        return stage

    def refuse_if_filled(self) -> None:
        """Refuse to write a table that a topic fills.

        Raises:
            TopologyError: It is one.
        """
        if self.source is not None:
            raise TopologyError(
                f"table {self.name!r} is what its source says, and is not written: send to the topic, "
                f"`await {self.source.name}.send(key=..., value=...)`, or value=None to delete"
            )

    def writable_stage(self) -> Stage:
        """The same, for a write.

        Raises:
            ClosedError: The caller stands in no record's turn.
            TopologyError: A topic fills the table.
        """
        self.refuse_if_filled()
        stage = self.stage_in_turn()
        if stage is None:
            turn = current_turn.get()
            if turn is not None:
                turn.check_alive()
            raise ClosedError(
                f"table {self.name!r}: written outside of a record's turn; there, write "
                f"`await {self.name}.update_async(key, change)`, which runs in the turn of the key's partition"
            )
        return stage

    @property
    def partitions(self) -> frozenset[int]:
        """The partitions that reads and iteration cover here."""
        stage = self.stage_in_turn()
        if stage is not None:
            return frozenset({stage.overlay.partition})
        return frozenset(number for holder in holders_of(self.app) for number in holder.overlays(self.name))

    def _held_of(self, key: K) -> tuple[Holder, int, Overlay]:
        """Where the partition of a key is held.

        Raises:
            NotHeld: Not in this process.
        """
        holders = holders_of(self.app)
        if not holders:
            raise NotHeld(
                f"table {self.name!r}: app {self.app.id!r} is not running in this process: read it from an agent, a "
                "timer, or within `async with app.running():`"
            )
        partition = -1
        for holder in holders:
            partition = holder.partition_of(self, key)
            overlay = holder.overlays(self.name).get(partition)
            if overlay is not None:
                return holder, partition, overlay
        raise NotHeld(
            f"table {self.name!r}: the key {key!r} is in partition {partition}, which this process does not hold (it "
            f"has {sorted(self.partitions)})"
        )

    # --- reading -----------------------------------------------------------------------------------------------

    def __getitem__(self, key: K) -> V:
        turn = _turn_of_caller()
        if turn is not None and turn.record is not None:  # the hot path, as short as it can be
            plain = turn.at_hand.get(self.full_name)
            if plain is not None:
                known: V = plain.overlay.live.get(key, MISSING)
                if known is not MISSING:
                    return known
        stage = self.stage_in_turn()
        value = self._committed(key) if stage is None else stage.get(key)
        if value is MISSING:
            if self.default is None:
                raise KeyError(key)
            return self.default() if stage is None else cast("V", stage.default(key, self.default))
        return cast("V", value)

    def _committed(self, key: K) -> Any:
        _, _, overlay = self._held_of(key)
        held = overlay.committed(key)
        return held if held is MISSING else overlay.values.value(held, key)

    def found(self, key: K) -> V | Any:
        """The value there is of a key, `MISSING` where there is none."""
        stage = self.stage_in_turn()
        return self._committed(key) if stage is None else stage.get(key)

    def __contains__(self, key: object) -> bool:
        stage = self.stage_in_turn()
        return self._committed(cast("K", key)) is not MISSING if stage is None else stage.contains(key)

    def between(self, low: bytes | None, high: bytes | None, *, reverse: bool) -> Iterator[tuple[K, V]]:
        """Keys and values of a range of stored keys; elsewhere than in a turn partition after partition."""
        stage = self.stage_in_turn()
        if stage is not None:
            return stage.entries(low, high, reverse=reverse)
        return self._committed_entries(low, high, reverse=reverse)

    def _committed_entries(self, low: bytes | None, high: bytes | None, *, reverse: bool) -> Iterator[tuple[K, V]]:
        held = {number: one for holder in holders_of(self.app) for number, one in holder.overlays(self.name).items()}
        if not holders_of(self.app):
            raise NotHeld(f"table {self.name!r}: app {self.app.id!r} is not running in this process")
        scans = [
            held[number].entries(low, high, reverse=reverse, committed=True) for number in sorted(held, reverse=reverse)
        ]
        decode_key, decoded = self.keys_in_order.decode, self.held_values.decoded
        found = ((decode_key(key), payload) for scan in scans for key, payload in scan)
        return ((key, decoded(payload, key)) for key, payload in found)

    def position(self, key: K) -> str:
        """How far the partition of a key is committed in this process: for `at=` of a read that must see it.

        Right after `await table.update_async(key, ...)` it covers that change.

        Args:
            key: The key.

        Raises:
            NotHeld: Another worker has the partition.
            ProductionError: It is no key of the table.
        """
        holder, partition, _ = self._held_of(key)
        return holder.position(self.name, partition)

    # --- writing -----------------------------------------------------------------------------------------------

    def __setitem__(self, key: K, value: V) -> None:
        turn = _turn_of_caller()
        if turn is not None and turn.record is not None:
            plain = turn.at_hand.get(self.full_name)
            if plain is not None:
                plain.set(key, value)
                return
        self.writable_stage().set(key, value)

    def __delitem__(self, key: K) -> None:
        stage = self.writable_stage()
        if not stage.contains(key):
            raise KeyError(key)
        stage.delete(key)

    @overload
    def pop(self, key: K, /) -> V: ...
    @overload
    def pop(self, key: K, /, default: V) -> V: ...
    @overload
    def pop(self, key: K, /, default: T) -> V | T: ...
    def pop(self, key: K, /, default: Any = _UNSET) -> Any:
        """Delete a key and return its value.

        Args:
            key: The key.
            default: What to return where there is none; left out, that is a `KeyError`.
        """
        stage = self.writable_stage()
        value = stage.get(key)
        if value is MISSING:
            if default is _UNSET:
                raise KeyError(key)
            return default
        stage.delete(key)
        return value

    def setdefault(self, key: K, default: V, /) -> V:  # None is no value
        """The value of a key, written first where there is none.

        Args:
            key: The key.
            default: What is written; the table's own default is not used.
        """
        stage = self.writable_stage()
        if not stage.contains(key):
            stage.set(key, default)
        return cast("V", stage.get(key))

    def clear(self) -> None:
        """Delete every key of this partition."""
        stage = self.writable_stage()
        for key in [key for key, _ in stage.entries(None, None)]:
            stage.delete(key)

    def _refuse_in_turn(self) -> None:
        """Between records, too, an agent would wait for a turn that it keeps from coming."""
        turn = current_turn.get()
        if turn is not None and (
            self.stage_in_turn() is not None or (turn.owner is not None and current_task() is turn.owner)
        ):
            raise ClosedError(
                f"table {self.name!r}: update_async is for code outside of agents; write in a record's turn"
            )

    def is_committed(self, key: K) -> bool:
        """Whether a key has a committed value in this process.

        Raises:
            NotHeld: Its partition is not held here.
        """
        return self._committed(key) is not MISSING

    def committed_keys(self, key: Any, low: bytes | None, high: bytes | None) -> Iterator[K]:
        """Committed keys of a range in the partition that one of them lies in.

        Raises:
            NotHeld: It is not held here.
        """
        _, _, overlay = self._held_of((key, None))  # type: ignore[arg-type]
        return (self.keys_in_order.decode(store_key) for store_key, _ in overlay.entries(low, high, committed=True))

    async def change_of(self, key: K, work: Callable[[Stage], T]) -> T:
        """Run a function over the stage of a key's partition, in a turn of its own; see `update_async`."""
        self.refuse_if_filled()
        self._refuse_in_turn()
        holder, partition, _ = self._held_of(key)
        return cast("T", await holder.change(self.name, partition, work))

    async def update_async(self, key: K, change: Callable[[V | None], V | None]) -> V | None:
        """Change a value from outside of a record's turn: in a timer, a task, an HTTP handler.

        It runs in a turn of the key's partition, between two records, and commits like a record's writes.

        Args:
            key: The key.
            change: Takes the value there is (the table's default, or None, where there is none) and returns the new
                one, None to delete. It is called once, must not wait, and may change the value in place, which it
                then returns.

        Returns:
            The new value, once it is committed.

        Raises:
            NotHeld: Another worker has the partition, or took it before the commit.
            ProductionError: Key or value do not fit; the function is async, or has changed the value in place and
                returned None.

        Cancellation: the change may have been made.
        """

        def work(stage: Stage) -> V | None:
            value = stage.get(key)
            is_there = value is not MISSING
            old = value if is_there else None if self.default is None else stage.default(key, self.default)
            new = change(old)
            self.refuse_awaitable(new)
            if new is not None:
                stage.set(key, new)
                return new
            if stage.is_changed_in_place(key):
                raise ProductionError(
                    f"table {self.name!r}: update_async of the key {key!r}: its function has changed the value in "
                    "place and returned None, which deletes the key: return the value. To delete it, return None and "
                    "leave the value as it was"
                )
            if is_there:
                stage.delete(key)
            return None

        return await self.change_of(key, work)

    def refuse_awaitable(self, returned: Any) -> None:
        """Refuse what the function of `update_async` returned, where it was async: nothing of it has run.

        Raises:
            ProductionError: It was.
        """
        if not inspect.isawaitable(returned):
            return
        if inspect.iscoroutine(returned):
            returned.close()
        raise ProductionError(
            f"table {self.name!r}: the function of update_async is async: give a plain function. It is called between "
            "two records and cannot wait; wait for what it needs before"
        )
