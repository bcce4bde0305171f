"""Deletes expired values for good, a few at a time.

What has expired is not seen any more from that moment on. It leaves store and changelog later, here: between records,
by deletions that are committed like any others.
"""

from __future__ import annotations

from streamflow.state.overlay import Overlay
from streamflow.state.stage import Stage

_LOOKED_AT = 2_000
_PASSES_PER_TTL = 10


class Sweep:
    """The search of one table of one task for expired values.

    Args:
        overlay: The table; its values expire.
    """

    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay
        self._next: bytes | None = None
        # Stream time at which the pass began, or the last one did.
        self._began_ms = -1
        self._every_ms = max(1, (overlay.ttl_ms or 0) // _PASSES_PER_TTL)

    @property
    def is_due(self) -> bool:
        """Whether there may be something to delete: a pass begins when stream time has moved by a tenth of the ttl."""
        now_ms = self.overlay.stream_time_ms
        return self._next is not None or (now_ms >= 0 and now_ms >= self._began_ms + self._every_ms)

    def delete_some(self, stage: Stage) -> int:
        """Look at the next stored values and delete those that have expired.

        Args:
            stage: The table, in a turn of the task's own.

        Returns:
            How many it deleted.
        """
        if self._next is None:
            self._began_ms, self._next = self.overlay.stream_time_ms, b""
        keys, self._next = self.overlay.expired(self._next, _LOOKED_AT)
        for key in keys:
            stage.delete(key)
        return len(keys)
