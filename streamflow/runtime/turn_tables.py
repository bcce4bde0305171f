"""The tables that one unit of an agent's work has touched, and what becomes of their stages when it is over."""

from __future__ import annotations

from typing import Any

from streamflow.runtime.outputs import OutputPartition
from streamflow.state.stage import Effects, Stage


class Touched(OutputPartition):
    """Stands first in the stage of a unit that touched tables; writing the stage ends the unit for them.

    It comes first because a value that was changed in place may turn out not to be writable: nothing of the unit has
    joined the outputs by then.
    """

    __slots__ = ("stages",)

    def __init__(self) -> None:
        self.count = 0
        self.stages: list[Stage] = []

        def end(_: int, __: int, ___: bytes | None, ____: bytes | None, _____: Any) -> bool:
            stages = self.stages
            if len(stages) == 1:
                stages[0].join()
                stages.clear()
            else:
                for effects in self.close():
                    effects.merge()
            return True

        self.append = end

    def close(self) -> list[Effects]:
        """What the unit has written.

        Raises:
            ProductionError: A value that was changed in place cannot be written; the unit is still open.
        """
        stages = self.stages
        if len(stages) > 1:
            for stage in stages:
                stage.check()
        effects = [stage.close() for stage in stages]
        stages.clear()
        return [each for each in effects if each is not None]

    def drop(self) -> None:
        """The unit failed."""
        for stage in self.stages:
            stage.drop()
        self.stages.clear()


class Written(OutputPartition):
    """Stands first in the stage of a unit that is done and has written tables; writing the stage merges them.

    Args:
        effects: What it has written.
    """

    __slots__ = ()

    def __init__(self, effects: list[Effects]) -> None:
        self.count = 0

        def merge(_: int, __: int, ___: bytes | None, ____: bytes | None, _____: Any) -> bool:
            for each in effects:
                each.merge()
            return True

        self.append = merge
