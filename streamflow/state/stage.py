"""What one turn sees of a table: its own writes over the task's values.

A turn's writes join the task's only when the turn is done, in the order of its records; a turn that fails is dropped.
Values that can be changed in place are handed out as copies and compared when the turn is done: what user code did to
them counts as a write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from streamflow.errors import ProcessingError
from streamflow.state.overlay import Overlay
from streamflow.state.values import MISSING

_ABSENT: Any = object()


class Effects:
    """What a turn that is done has written, on its way into the task.

    Args:
        overlay: The table.
        writes: What is held by key; `MISSING` deletes.
    """

    __slots__ = ("overlay", "writes")

    def __init__(self, overlay: Overlay, writes: dict[Any, Any]) -> None:
        self.overlay = overlay
        self.writes = writes

    def merge(self) -> None:
        """Join the task's values."""
        self.overlay.merge(self.writes)


class Stage:
    """One table in the hands of turns that follow one another.

    Args:
        overlay: The table in this task.
        touched: Told at the first read or write of a turn that has to be looked at when the turn is done.

    Attributes:
        is_plain: Whether `join` may end a turn.
        writes: What the turn in hand has written, by key.
    """

    __slots__ = ("_copies", "_defaults", "_touched", "overlay", "writes")

    is_plain = False

    def __init__(self, overlay: Overlay, touched: Callable[[Stage], None]) -> None:
        self.overlay = overlay
        self.writes: dict[Any, Any] = {}
        self._touched = touched
        # Copies that user code may have changed, with the bytes they were made of; None: to be written in any case.
        self._copies: dict[Any, tuple[Any, bytes | None]] = {}
        # Defaults that were handed out where there is no value, with their bytes.
        self._defaults: dict[Any, tuple[Any, bytes]] = {}

    def get(self, key: Any) -> Any:
        """The value of a key, `MISSING` where there is none."""
        held = self.writes.get(key, _ABSENT) if self.writes else _ABSENT
        if held is _ABSENT:
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
        if default is None or self.overlay.values.encoded(default[0]) == default[1]:
            return MISSING
        self.set(key, default[0])
        return default[0]

    def _touch(self) -> None:
        if not self.writes and not self._copies and not self._defaults:
            self._touched(self)

    def contains(self, key: Any) -> bool:
        """Whether there is a value."""
        held = self.writes.get(key, _ABSENT)
        if held is not _ABSENT:
            return held is not MISSING
        return self._find(key) is not MISSING or self._changed_default(key) is not MISSING

    def _find(self, key: Any) -> Any:
        return self.overlay.find(key)

    def set(self, key: Any, value: Any) -> None:
        """Write a value.

        Raises:
            ProductionError: Key or value do not fit, or the key belongs to another partition.
        """
        overlay, writes = self.overlay, self.writes
        if key not in writes and overlay.live.get(key, MISSING) is MISSING:
            overlay.check_key(key)
        if overlay.values.are_objects:
            held = value if type(value) is overlay.values.sure_type else overlay.values.held(value)
        else:
            held = overlay.values.encoded(value)  # refuses what cannot be written, while the line is known
            self._copies[key] = value, None
            self._defaults.pop(key, None)
            self._touched(self)
        if not writes:
            self._touched(self)
        writes[key] = held

    def delete(self, key: Any) -> None:
        """Delete a key, whether there is one or not."""
        if not self.writes:
            self._touched(self)
        self._copies.pop(key, None)
        self._defaults.pop(key, None)
        self.writes[key] = MISSING

    def entries(self, start: bytes | None, stop: bytes | None, *, reverse: bool = False) -> Iterator[tuple[Any, Any]]:
        """Keys and values of a range in key order, as they are now; copies are compared like those of `get`."""
        overlay = self.overlay
        decode_key, values = overlay.keys.decode, overlay.values
        self._write_copies()
        for store_key, payload in overlay.entries(start, stop, reverse=reverse, writes=self._visible_writes()):
            key = decode_key(store_key)
            if values.are_objects:
                yield key, values.from_payload(payload, key)
            else:
                yield key, self._copy(key, payload)

    def _visible_writes(self) -> dict[Any, Any]:
        return self.writes

    def _write_copies(self) -> None:
        """Turn what user code did to its copies into writes."""
        for key in tuple(self._defaults):
            self._changed_default(key)
        if self._copies:
            encoded = self.overlay.values.encoded
            for key, (value, before) in self._copies.items():
                data = encoded(value)
                if data != before:
                    self.writes[key] = data

    def check(self) -> None:
        """Write down what user code did to its copies, while the turn may still fail.

        Raises:
            ProductionError: A value cannot be written.
        """
        self._write_copies()

    def close(self) -> Effects | None:
        """The turn is done: what it has written, None where it has written nothing.

        Raises:
            ProductionError: A value that was changed in place cannot be written.
        """
        self._write_copies()
        self._forget()
        if not self.writes:
            return None
        effects = Effects(self.overlay, self.writes)
        self.writes = {}
        return effects

    def join(self) -> None:
        """The turn is done: its writes join the task's values at once."""
        effects = self.close()
        if effects is not None:
            effects.merge()

    def drop(self) -> None:
        """The turn failed: it has written nothing."""
        self._forget()
        self.writes = {}

    def _forget(self) -> None:
        if self._copies or self._defaults:
            self._copies, self._defaults = {}, {}


class PlainStage(Stage):
    """A stage for values that nobody can change in place and that do not expire: the hot path."""

    __slots__ = ()

    is_plain = True

    def get(self, key: Any) -> Any:
        held = self.writes.get(key, _ABSENT) if self.writes else _ABSENT
        if held is _ABSENT:
            overlay = self.overlay
            held = overlay.live.get(key, _ABSENT)
            return overlay.load(key) if held is _ABSENT else held
        return held

    def set(self, key: Any, value: Any) -> None:
        overlay, writes = self.overlay, self.writes
        if not writes:
            if overlay.live.get(key, MISSING) is MISSING:
                overlay.check_key(key)
            self._touched(self)
        elif key not in writes and overlay.live.get(key, MISSING) is MISSING:
            overlay.check_key(key)
        writes[key] = value if type(value) is overlay.values.sure_type else overlay.values.held(value)

    def join(self) -> None:
        overlay, writes = self.overlay, self.writes
        overlay.live.update(writes)
        overlay.dirty.update(writes)
        writes.clear()


class Waiting:
    """The writes of one table by turns that are in progress, or done while an earlier record is not.

    Args:
        overlay: The table.
    """

    __slots__ = ("done", "overlay", "writers")

    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay
        self.done: dict[Any, tuple[Any, Effects]] = {}
        self.writers: dict[Any, Stage] = {}


class SharedEffects(Effects):
    """Effects that later turns see before they are merged.

    Args:
        waiting: Where they see them.
        writes: See `Effects`.
    """

    __slots__ = ("_waiting",)

    def __init__(self, waiting: Waiting, writes: dict[Any, Any]) -> None:
        super().__init__(waiting.overlay, writes)
        self._waiting = waiting
        for key, held in writes.items():
            waiting.done[key] = (held, self)

    def merge(self) -> None:
        super().merge()
        done = self._waiting.done
        for key in self.writes:
            if done[key][1] is self:
                del done[key]


class SharedStage(Stage):
    """A table in the hands of one of several turns in progress at once.

    A turn sees what turns that are done have written, merged or not. What another one in progress writes it does not
    see; two that write one key would lose an update, so the second one fails.

    Args:
        waiting: What the task's turns share of the table.
        touched: See `Stage`.
    """

    __slots__ = ("_claimed", "_seen", "_waiting")

    def __init__(self, waiting: Waiting, touched: Callable[[Stage], None]) -> None:
        super().__init__(waiting.overlay, touched)
        self._waiting = waiting
        # What the turn found when it first looked at a key.
        self._seen: dict[Any, Any] = {}
        self._claimed: set[Any] = set()

    def _find(self, key: Any) -> Any:
        held = self._newest(key)
        if key not in self._seen:
            self._seen[key] = held
            self._touched(self)
        return held

    def _newest(self, key: Any) -> Any:
        found = self._waiting.done.get(key)
        return self.overlay.find(key) if found is None else found[0]

    def set(self, key: Any, value: Any) -> None:
        self._claim(key)
        super().set(key, value)

    def delete(self, key: Any) -> None:
        self._claim(key)
        super().delete(key)

    def _claim(self, key: Any) -> None:
        """Be the only turn in progress that writes a key, on what it found there.

        Raises:
            ProcessingError: Another one has written it meanwhile.
        """
        writer = self._waiting.writers.setdefault(key, self)
        if writer is self:
            self._claimed.add(key)
        if writer is not self or (key not in self.writes and self._has_changed(key)):
            raise ProcessingError(
                f"table {self.overlay.name!r}: two records in progress at once write the key {key!r}, and one would "
                "undo the other: key the table by the record's key (records of one key are processed in order), or "
                "leave concurrency= out; on_error=sf.Retry(...) tries the later one again"
            )

    def _has_changed(self, key: Any) -> bool:
        """Whether another turn has written a key since this one looked at it."""
        before = self._seen.get(key, _ABSENT)
        now = before if before is _ABSENT else self._newest(key)
        return now is not before and bool(now != before)

    def _visible_writes(self) -> dict[Any, Any]:
        return {**{key: held for key, (held, _) in self._waiting.done.items()}, **self.writes}

    def _write_copies(self) -> None:
        if self._copies:
            encoded = self.overlay.values.encoded
            for key, (value, before) in self._copies.items():
                if before is not None and encoded(value) != before:
                    self._claim(key)
        super()._write_copies()

    def close(self) -> Effects | None:
        self._write_copies()
        writes = self.writes
        self._let_go()
        return SharedEffects(self._waiting, writes) if writes else None

    def drop(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        for key in self._claimed:
            del self._waiting.writers[key]
        self._claimed, self._seen = set(), {}
        super().drop()
