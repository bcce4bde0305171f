"""What one turn sees of a table: its own writes over the task's values.

A turn's writes wait in its stage until the turn is done and join the task's values in the order of the records; those
of a `PlainStage` join them at once, and are undone. Either way a turn that fails has written nothing. Values that can
be changed in place are handed out as copies and compared when the turn is done: what user code did to them counts as a
write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from streamflow.errors import ClosedError, ProcessingError, ProductionError
from streamflow.state.overlay import ABSENT, Overlay
from streamflow.state.undo import Undo
from streamflow.state.values import MISSING, named

_LAST_MS = 253_402_300_799_999  # the end of the year 9999


class Effects:
    """What a turn that is done has written, on its way into the task.

    Args:
        overlay: The table.
        writes: What is held by key; `MISSING` deletes.
        time_ms: Its event time, where values expire; else -1.
    """

    __slots__ = ("overlay", "time_ms", "writes")

    def __init__(self, overlay: Overlay, writes: dict[Any, Any], time_ms: int) -> None:
        self.overlay = overlay
        self.writes = writes
        self.time_ms = time_ms

    def merge(self) -> None:
        """Join the task's values."""
        if self.time_ms >= 0:
            self.overlay.advance(self.time_ms)
        self.overlay.merge(self.writes)


class Stage:
    """One table in the hands of turns that follow one another.

    Args:
        overlay: The table in this task.
        touched: Told at the first read or write of a turn that has to be looked at when the turn is done.

    Attributes:
        writes: What the turn in hand has written, by key.
        time_ms: The turn's event time, where values expire; -1 while it is not known.
    """

    __slots__ = ("_copies", "_defaults", "_touched", "overlay", "time_ms", "writes")

    def __init__(self, overlay: Overlay, touched: Callable[[Stage], None]) -> None:
        self.overlay = overlay
        self.writes: dict[Any, Any] = {}
        self.time_ms = -1
        self._touched = touched
        # Copies that user code may have changed, with the bytes they were made of.
        self._copies: dict[Any, tuple[Any, bytes]] = {}
        # Defaults that were handed out where there is no value, with their bytes.
        self._defaults: dict[Any, tuple[Any, bytes]] = {}

    def advance(self, timestamp_ms: int) -> None:
        """Note the turn's event time: the task's stream time follows when the turn is done.

        Raises:
            ProcessingError: It is no time; with it every value of the table would have expired for good.
        """
        if timestamp_ms > self.time_ms:
            if timestamp_ms > _LAST_MS:
                raise ProcessingError(
                    f"table {self.overlay.name!r}: the record's time {timestamp_ms} is after the year 9999, so no "
                    "value could expire after it; times are milliseconds since the epoch"
                )
            self.time_ms = timestamp_ms
            self._touched(self)

    def get(self, key: Any) -> Any:
        """The value of a key, `MISSING` where there is none."""
        held = self.writes.get(key, ABSENT) if self.writes else ABSENT
        if held is ABSENT:
            held = self._find(key)
        return held if self.overlay.values.are_objects else self._copy(key, held)

    def default(self, key: Any, make: Callable[[], Any]) -> Any:
        """Hand out a table's default: not stored unless user code changes it in place."""
        if self.overlay.values.are_objects:
            return make()
        known = self._defaults.get(key)
        if known is None:
            value = make()
            self._touch()
            known = self._defaults[key] = value, self.overlay.values.encoded(value)
        return known[0]

    def is_changed_in_place(self, key: Any) -> bool:
        """Whether user code has changed the value of a key that it was given, default or not, and not yet written it.

        Raises:
            ProductionError: So that it cannot be written any more.
        """
        known = self._copies.get(key) or self._defaults.get(key)
        try:
            return known is not None and self.overlay.values.is_changed(*known, key)
        except ProductionError as exc:
            raise named(exc, key) from exc

    def _copy(self, key: Any, held: Any) -> Any:
        known = self._copies.get(key)
        if known is not None:
            return known[0]
        if held is MISSING:
            return self._changed_default(key)
        value = self.overlay.values.value(held, key)
        self._touch()
        self._copies[key] = value, held
        return value

    def _changed_default(self, key: Any) -> Any:
        """A default that was handed out, once user code has changed it; it is a value from then on."""
        default = self._defaults.get(key)
        try:
            if default is None or self.overlay.values.changed(*default) is None:
                return MISSING
        except ProductionError as exc:
            raise named(exc, key) from exc
        self.set(key, default[0])
        return default[0]

    def _touch(self) -> None:
        if not self.writes and not self._copies and not self._defaults:
            self._touched(self)

    def contains(self, key: Any) -> bool:
        """Whether there is a value."""
        held = self.writes.get(key, ABSENT)
        if held is not ABSENT:
            return held is not MISSING
        return self._find(key) is not MISSING or self._changed_default(key) is not MISSING

    def _find(self, key: Any) -> Any:
        return self.overlay.find(key, self.time_ms)

    def set(self, key: Any, value: Any) -> None:
        """Write a value.

        Raises:
            ProductionError: Key or value do not fit, or the key belongs to another partition.
        """
        overlay, writes = self.overlay, self.writes
        if key not in writes:
            if overlay.live.get(key, MISSING) is MISSING:
                overlay.check_key(key)
            elif type(key) is not overlay.sure_key_type:
                overlay.check_equal_key(key)
        try:
            if overlay.values.are_objects:
                held = value if type(value) is overlay.values.sure_type else overlay.values.held(value)
            else:
                held = overlay.values.encoded(value)  # refuses what cannot be written, while the line is known
                self._copies[key] = value, held
                self._defaults.pop(key, None)
                self._touched(self)
        except ProductionError as exc:
            raise named(exc, key) from exc
        if not writes:
            self._touched(self)
        writes[key] = held

    def delete(self, key: Any) -> None:
        """Delete a key, whether there is one or not."""
        if type(key) is not self.overlay.sure_key_type:
            self.overlay.check_equal_key(key)
        if not self.writes:
            self._touched(self)
        self._copies.pop(key, None)
        self._defaults.pop(key, None)
        self.writes[key] = MISSING

    def entries(self, start: bytes | None, stop: bytes | None, *, reverse: bool = False) -> Iterator[tuple[Any, Any]]:
        """Keys and values of a range in key order, as they are at the time of the call.

        Values that can be changed in place are compared like those of `get`, unless the turn has written or deleted
        the key since the call. An iteration over such values ends with its turn.

        Raises:
            ClosedError: It goes on in another turn.
        """
        self._write_copies()
        visible, writes = self._visible_writes(), self.writes
        entries = self.overlay.entries(start, stop, reverse=reverse, writes=visible, time_ms=self.time_ms)
        return self._values_of(entries, writes)

    def _values_of(
        self, entries: Iterator[tuple[bytes, bytes]], writes_of_turn: dict[Any, Any]
    ) -> Iterator[tuple[Any, Any]]:
        decode_key, values = self.overlay.keys.decode, self.overlay.values
        for store_key, payload in entries:
            if self.writes is not writes_of_turn and not values.are_objects:
                # What it gives out would stand for the key in this turn, and undo what other turns have written since.
                raise ClosedError(
                    f"table {self.overlay.name!r}: an iteration that began in an earlier record's turn goes on in a "
                    "later one; begin anew in each turn, or take a list"
                )
            key = decode_key(store_key)
            held = values.from_payload(payload, key)
            self._saw(key, held)
            if values.are_objects:
                yield key, held
            elif self.writes.get(key, payload) == payload:
                yield key, self._copy(key, payload)
            else:
                yield key, values.value(payload, key)

    def _saw(self, key: Any, held: Any) -> None:
        """Iteration gave out what is held of a key."""

    def _visible_writes(self) -> dict[Any, Any]:
        return self.writes

    def _write_copies(self) -> None:
        """Turn what user code did to its copies into writes."""
        for key in tuple(self._defaults):
            self._changed_default(key)
        if self._copies:
            changed = self.overlay.values.changed
            for key, (value, before) in self._copies.items():
                try:
                    data = changed(value, before)
                except ProductionError as exc:
                    raise named(exc, key) from exc
                if data is not None:
                    self._write(key, data)
                    self._copies[key] = value, data

    def _write(self, key: Any, held: Any) -> None:
        self.writes[key] = held

    def check(self) -> None:
        """Write down what user code did to its copies, while the turn may still fail.

        Raises:
            ProductionError: A value cannot be written.
        """
        self._write_copies()

    def written_and_deleted(self) -> tuple[int, int]:
        """How many keys the turn has written, and how many it has deleted, those changed in place after `check`."""
        deleted = sum(1 for held in self.writes.values() if held is MISSING)
        return len(self.writes) - deleted, deleted

    def close(self) -> Effects | None:
        """The turn is done: what it has written, None where it has written nothing.

        Raises:
            ProductionError: A value that was changed in place cannot be written.
        """
        self._write_copies()
        effects = self._effects() if self.writes or self.time_ms >= 0 else None
        self._forget()
        return effects

    def join(self) -> None:
        """The turn is done, and this was the only table that it touched: its writes join the task's values at once.

        Raises:
            ProductionError: As `close`; the turn is still open.
        """
        effects = self.close()
        if effects is not None:
            effects.merge()

    def _effects(self) -> Effects:
        return Effects(self.overlay, self.writes, self.time_ms)

    def drop(self) -> None:
        """The turn failed: it has written nothing."""
        self._forget()

    def _forget(self) -> None:
        self.writes = {}
        self.time_ms = -1
        if self._copies or self._defaults:
            self._copies, self._defaults = {}, {}


class PlainStage(Stage):
    """A stage for values that nobody can change in place and that do not expire: the hot path.

    Its writes go straight into the task's values, and are undone when the turn fails.

    Args:
        overlay: The table in this task.
        undo: Notes what the turn has written, in all its tables.
    """

    __slots__ = ("_undo",)

    def __init__(self, overlay: Overlay, undo: Undo) -> None:
        super().__init__(overlay, _untold)
        self._undo = undo

    def get(self, key: Any) -> Any:
        overlay = self.overlay
        held = overlay.live.get(key, ABSENT)
        return overlay.load(key) if held is ABSENT else held

    def contains(self, key: Any) -> bool:
        return self.get(key) is not MISSING

    def set(self, key: Any, value: Any) -> None:
        overlay = self.overlay
        live, dirty = overlay.live, overlay.dirty
        before = live.get(key, ABSENT)
        if before is ABSENT or before is MISSING:
            overlay.check_key(key)
        elif type(key) is not overlay.sure_key_type:
            overlay.check_equal_key(key)
        try:
            held = value if type(value) is overlay.values.sure_type else overlay.values.held(value)
        except ProductionError as exc:
            raise named(exc, key) from exc
        self._undo.append((overlay, key, held, before, dirty.get(key, ABSENT)))  # `Undo.write`, in place
        live[key] = dirty[key] = held
        if overlay.memory.is_in_use:
            overlay.index((key,))

    def delete(self, key: Any) -> None:
        if type(key) is not self.overlay.sure_key_type:
            self.overlay.check_equal_key(key)
        self._undo.write(self.overlay, key, MISSING)


def _untold(_: Stage) -> None:
    """Undone by its notes, not as something that was touched."""
