"""Starting an app over: its group's offsets, its internal topics and its local state are deleted.

The offsets go first and the changelogs last, so that a worker that is started after an interruption refuses (state
without offsets): it never goes on from offsets whose tables are gone, nor counts twice what a repartition topic still
holds. Doing it again finishes it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import anyio.to_thread

from streamflow.config import Settings
from streamflow.errors import StateRefusedError
from streamflow.log.api import Log, OffsetMark
from streamflow.model.record import TopicPartition
from streamflow.processing.declarations import Declarations
from streamflow.runtime.group_hold import held_group, refuse_live_members
from streamflow.runtime.internal_topics import Kind, left_topics, repartition_topics, reply_topic_name
from streamflow.runtime.local_files import size_of
from streamflow.state.slots import Slot, claim_all


@dataclass(frozen=True, slots=True)
class DoomedTopic:
    """An internal topic.

    Attributes:
        name: Its name.
        kind: What it is for.
        records: Offsets in it, about as many as records.
        is_declared: Whether the app has it still; else an earlier version of the app made it.
    """

    name: str
    kind: Kind
    records: int
    is_declared: bool


@dataclass(frozen=True, slots=True)
class DoomedState:
    """A directory of local state.

    Attributes:
        path: Where it is.
        size_bytes: What its files take.
    """

    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ResetPlan:
    """What a reset deletes.

    Attributes:
        group: The app's group.
        offsets: Its committed offsets.
        topics: Internal topics that exist.
        state: Local state on this machine.
    """

    group: str
    offsets: Mapping[TopicPartition, int]
    topics: Sequence[DoomedTopic]
    state: Sequence[DoomedState]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to delete."""
        return not (self.offsets or self.topics or self.state)


@contextmanager
def locked_state(app: Declarations, settings: Settings) -> Generator[list[Slot]]:
    """Hold all local state of an app on this machine while the block runs.

    Args:
        app: The app.
        settings: Its settings.

    Raises:
        StateLockedError: A live worker has some of it.
    """
    with ExitStack() as stack:
        slots = claim_all(settings.data_dir, app.id)
        for slot in slots:
            stack.enter_context(slot)
        yield slots


async def plan_reset(log: Log, app: Declarations, settings: Settings, slots: Sequence[Slot]) -> ResetPlan:
    """See what a reset would delete.

    Args:
        log: The open log.
        app: The app.
        settings: Its settings.
        slots: From `locked_state`.

    Raises:
        GroupInUseError: A worker runs.
    """
    await refuse_live_members(log, app.id, settings, "reset")
    marks = await log.admin.group_offsets(app.id, stable=True)
    state = await anyio.to_thread.run_sync(_found_state, slots)
    return ResetPlan(app.id, {tp: mark.offset for tp, mark in sorted(marks.items())}, await _topics(log, app), state)


async def _topics(log: Log, app: Declarations) -> list[DoomedTopic]:
    kinds: dict[str, Kind] = {
        table.changelog.name: "changelog" for table in app.tables.values() if table.changelog.internal
    }
    kinds.update(dict.fromkeys(repartition_topics(app), "repartition"))
    kinds[reply_topic_name(app.id)] = "replies"
    if app.leader_topic is not None:
        kinds[app.leader_topic.name] = "leader"
    left = await left_topics(app, log.admin)
    kinds.update(left)
    described = await log.admin.describe(list(kinds))
    tps = [TopicPartition(name, number) for name, each in described.items() for number in range(each.partitions)]
    starts = await log.admin.start_offsets(tps) if tps else {}
    ends = await log.admin.high_watermarks(tps) if tps else {}
    return [
        DoomedTopic(name, kind, sum(ends[tp] - starts[tp] for tp in tps if tp.topic == name), name not in left)
        for name, kind in kinds.items()
        if name in described
    ]


def _found_state(slots: Sequence[Slot]) -> list[DoomedState]:
    return [DoomedState(path, size_of(path)) for slot in slots for path in slot.contents()]


async def reset(log: Log, plan: ResetPlan) -> None:
    """Delete what a plan says. The local state's locks are held by the caller all the while.

    Args:
        log: The open log.
        plan: From `plan_reset`.

    Raises:
        GroupInUseError: A worker was started meanwhile; nothing was deleted.
        StateRefusedError: A directory cannot be deleted; do it again when that is mended.
    """
    await log.admin.delete_group(plan.group)
    await log.admin.delete([topic.name for topic in plan.topics if topic.kind != "changelog"])
    await anyio.to_thread.run_sync(_delete_state, plan.state)
    await log.admin.delete([topic.name for topic in plan.topics if topic.kind == "changelog"])


def _delete_state(state: Sequence[DoomedState]) -> None:
    for each in state:
        try:
            if os.path.isdir(each.path) and not os.path.islink(each.path):
                shutil.rmtree(each.path)
            else:
                os.unlink(each.path)
        except FileNotFoundError:
            continue
        except OSError as exc:
            raise StateRefusedError(
                f"state {each.path} cannot be deleted ({exc.strerror}: {exc.filename}); make it writable for this "
                "user, and reset again"
            ) from exc


async def start_at(
    log: Log, app: Declarations, settings: Settings, where: Literal["earliest", "latest"]
) -> Mapping[TopicPartition, int]:
    """Commit where an app that was reset starts in the topics that others write, whatever `auto_offset_reset` says.

    Args:
        log: The open log.
        app: The app.
        settings: Its settings.
        where: The first record that is still there, or behind the last one.

    Returns:
        The offsets.

    Raises:
        GroupInUseError: A worker was started meanwhile.
    """
    topics, subs = app.every_topic(), {sub.name: sub.topics for sub in app.topology().sub_topologies}
    external = [name for sub in subs.values() for name in sub if not topics[name].internal]
    counts = {name: found.partitions for name, found in (await log.admin.describe(external)).items()}
    tps = [TopicPartition(name, number) for name, count in counts.items() for number in range(count)]
    if not tps:
        return {}
    async with held_group(log, app.id, settings, subs, counts) as held:
        offsets = await (log.admin.start_offsets(tps) if where == "earliest" else log.admin.end_offsets(tps))
        await held.commit({tp: OffsetMark(offset) for tp, offset in offsets.items()})
    return offsets
