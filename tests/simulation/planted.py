"""Bugs that are put into the runtime on purpose: a simulation that does not find them proves nothing."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

from streamflow.model.record import TopicPartition
from streamflow.runtime import exactly_once, standby
from streamflow.runtime.assignment.active import ActivePlacement
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.spread import Counts, Spread
from streamflow.runtime.commit import Commits
from streamflow.runtime.conversation import Conversation
from streamflow.runtime.exactly_once import ExactlyOnce
from streamflow.runtime.ledger import Ledger
from streamflow.runtime.local_state import LocalState
from streamflow.runtime.standby import Standby
from streamflow.runtime.task import Task
from streamflow.runtime.task_manager import TaskManager
from streamflow.runtime.task_view import Sealed
from streamflow.state.overlay import Overlay
from streamflow.state.undo import Undo


async def _send_again(self: ExactlyOnce) -> None:
    await self._until_answered(self._replace_producer)
    self._is_outcome_unknown = False


async def _forget(self: ExactlyOnce) -> None:
    await self._until_answered(self._replace_producer)
    self._is_outcome_unknown = False
    self._taken.popleft()


async def _look_at_nothing(*_: Any) -> None:
    pass


def _behind_all(self: Ledger) -> dict[TopicPartition, int]:
    return {**self._positions, **{entry.tp: entry.record.offset + 1 for entry in self._entries}}


async def _start_anew_in_every_generation(self: Commits, sealed: Sequence[Sealed], generation: int) -> None:
    for each in sealed:
        if each.task.checked_generation != generation:
            self._is_committed_elsewhere(each.task)


async def _keep_what_goes(self: TaskManager, tasks: Sequence[Task], *_: Any) -> None:
    """Who is told that a task has to go answers so, and goes on with it."""


def _give_all_to_one(self: Spread, held: Counts, owned: Counts) -> Counts:
    first = next(iter(self._capacity))
    return {kind: {one: total * (one == first) for one in self._capacity} for kind, total in self._totals.items()}


def _up_to_the_end(*_: Any) -> None:
    """A standby takes whatever stands in the changelog."""


async def _hand_over_what_is_followed(self: Standby) -> LocalState | None:
    return self.state


async def _hear_nothing(*_: Any) -> None:
    pass


def _move_at_once(_: ActivePlacement, __: TaskId, target: str) -> str:
    return target


def _in_sight(_: Undo) -> AbstractContextManager[None]:
    return nullcontext()


BUGS: dict[str, tuple[object, str, Any]] = {
    "a commit of unknown outcome is sent again unseen": (ExactlyOnce, "_settle_unknown", _send_again),
    "a commit of unknown outcome is taken for stored": (ExactlyOnce, "_settle_unknown", _forget),
    "a task is kept that another worker has had": (Commits, "_keep_owned", _look_at_nothing),
    "a commit passes records in flight": (Ledger, "positions", _behind_all),
    "what a full store refused is forgotten": (Overlay, "not_stored", Overlay.stored),
    "a commit holds what the turn in progress has written": (Undo, "aside", _in_sight),
    "a failed turn leaves its writes": (Undo, "take_out", Undo.clear),
    "who was taken for dead ends as if it had a double": (exactly_once, "_MAX_FENCES", 1),
    "a task that stays is opened anew in every generation": (Commits, "_keep_owned", _start_anew_in_every_generation),
    "a task that has to go goes on": (TaskManager, "_close", _keep_what_goes),
    "a standby runs ahead of the commit": (standby, "limit_of", _up_to_the_end),
    "a task comes, and its standby goes on": (Standby, "hand_over", _hand_over_what_is_followed),
    "what a member is told is lost": (Conversation, "heard", _hear_nothing),
    "a task moves to where its state is not": (ActivePlacement, "_now", _move_at_once),
    "one member is given everything": (Spread, "counts", _give_all_to_one),
}

FOUND_BY: dict[str, int] = {
    "a task is kept that another worker has had": 341,
    "what a full store refused is forgotten": 19,
    "a commit holds what the turn in progress has written": 14,
    "a failed turn leaves its writes": 12,
}
"""A seed that has found each of those that few do. It is tried first; when the code has changed, others may have to."""


def likely_first(name: str, seeds: Sequence[int]) -> list[int]:
    """The seeds, with the one in front that has found this bug before."""
    return sorted(seeds, key=lambda seed: seed != FOUND_BY.get(name))


def planted(name: str) -> AbstractContextManager[object]:
    """The bug is there while the block runs."""
    owner, attribute, wrong = BUGS[name]
    return mock.patch.object(owner, attribute, wrong)
