"""What a turn has written straight into the task's values, so that it can be taken out again.

Where one turn follows the other, its writes go where all others look at once, and are noted here until it is done: a
turn that succeeds costs one cleared list, and one that fails is undone from the last write to the first. What is sealed
while a turn is in progress must not hold its writes: they are taken out, and made again after it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from streamflow.state.overlay import ABSENT, Overlay


class Undo(list[tuple[Overlay, Any, Any, Any, Any]]):
    """The writes of the turn in progress, in order: table, key, what is held, what `live` and `dirty` had before."""

    __slots__ = ()

    @property
    def new_keys(self) -> int:
        """How many keys are dirty because of this turn only."""
        return sum(1 for *_, dirty_before in self if dirty_before is ABSENT)

    def write(self, overlay: Overlay, key: Any, held: Any) -> None:
        """Write what is held of a key."""
        live, dirty = overlay.live, overlay.dirty
        self.append((overlay, key, held, live.get(key, ABSENT), dirty.get(key, ABSENT)))
        live[key] = dirty[key] = held
        if overlay.memory.is_in_use:
            overlay.index((key,))

    def take_out(self) -> None:
        """The turn failed: it has written nothing."""
        while self:
            overlay, key, _, live_before, dirty_before = self.pop()
            overlay.take_out(key, live_before, dirty_before)

    @contextmanager
    def aside(self) -> Generator[None]:
        """A block that sees the tables without the turn's writes."""
        writes = [write[:3] for write in self]
        self.take_out()
        try:
            yield
        finally:
            for overlay, key, held in writes:
                self.write(overlay, key, held)
