"""The changes of one task's tables from outside: asked for, made between two units, told when they are committed."""

from __future__ import annotations

from collections import deque

from streamflow.errors import StreamFlowError
from streamflow.runtime.table_change import TableChange
from streamflow.runtime.task_tables import TaskTables


class TaskChanges:
    """What was asked for and is not committed yet; true while something waits to be made."""

    def __init__(self) -> None:
        self._asked: deque[TableChange] = deque()
        # Made since the last commit was sealed.
        self._made: list[TableChange] = []
        # All that were made and whose callers wait for a commit.
        self._owed: set[TableChange] = set()

    def __bool__(self) -> bool:
        return bool(self._asked)

    def ask(self, change: TableChange) -> None:
        """Have a change made at the next opportunity."""
        self._asked.append(change)

    def make(self, tables: TaskTables, now_ms: int) -> bool:
        """Make all that were asked for; only between units.

        Args:
            tables: The task's.
            now_ms: The clock's time.

        Returns:
            Whether something was written, which somebody waits to be committed.
        """
        has_written = False
        while self._asked:
            change = self._asked.popleft()
            if change.make(tables.tables[change.table].full_name, tables.overlays[change.table], now_ms):
                self._made.append(change)
                self._owed.add(change)
                has_written = True
        return has_written

    def seal(self) -> list[TableChange]:
        """Those that are in the commit that is being sealed, which tells them when it is made."""
        made, self._made = self._made, []
        self._owed = {change for change in self._owed if not change.is_over}
        return made

    def fail(self, error: StreamFlowError) -> None:
        """The task is closed: tell all that wait."""
        for change in (*self._asked, *self._owed):
            change.fail(error)
        self._asked.clear()
        self._owed.clear()
