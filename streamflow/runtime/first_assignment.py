"""The wait for a worker's first assignment, which says why it takes long.

A member without partitions is one all the same, where there are more workers than tasks. But after a crash the
partitions may still belong to a member that is dead, until its session ends; whoever took that for the first assignment
would find tables that nobody holds. So those that hold partitions must have been heard of.
"""

from __future__ import annotations

import logging

import anyio

from streamflow.config import Settings
from streamflow.errors import StreamFlowError
from streamflow.log.api import Admin, Group
from streamflow.runtime.task_manager import TaskManager

logger = logging.getLogger("streamflow.worker")

_POLL_S = 0.05
_TOLD_AFTER_S = 1.0


async def first_assignment(manager: TaskManager, group: Group, admin: Admin, app: str, settings: Settings) -> None:
    """Wait until the first partitions are here, or it is certain that there are none for this worker.

    Args:
        manager: The worker's tasks.
        group: Its membership.
        admin: For the group's members, in a message.
        app: The app's id, which is its group.
        settings: For the session time-out, in a message.
    """
    since_s, told = anyio.current_time(), False
    while not manager.assigned_once.is_set() and not is_idle(group):
        with anyio.move_on_after(_POLL_S):
            await manager.assigned_once.wait()
        if not told and anyio.current_time() - since_s > _TOLD_AFTER_S and not manager.assigned_once.is_set():
            told = await _tell(group, admin, app, settings)


def is_idle(group: Group) -> bool:
    """Whether it is a member that has, at present, nothing to do: a group tells no empty assignments."""
    is_member = group.membership is not None and group.statistics().rebalances > 0
    return is_member and not group.assignment and not group.unheard()


async def _tell(group: Group, admin: Admin, app: str, settings: Settings) -> bool:
    """Say what is waited for; False where that is not known yet."""
    if unheard := group.unheard():
        for each in unheard:
            logger.info(
                "waiting for %d partitions held by %s until it is heard of, or its session ends, at most %g s",
                each.partitions,
                each.member,
                each.session_timeout_s,
            )
        return True
    if group.membership is not None:
        return False
    try:
        members = await admin.group_members(app)
    except StreamFlowError:
        return False
    if len(members) < 2:  # it may be this one
        return False
    logger.info(
        "waiting for group %s to let this worker in: it has the members %s, this one perhaps among them. One that was "
        "killed is waited for until its session ends, at most %g s",
        app,
        ", ".join(members),
        settings.session_timeout_ms / 1000,
    )
    return True
