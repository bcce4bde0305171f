"""Static members (KIP-345) as rows: a name that outlives its process, and who takes its place.

The row stays when its process ends, until the session is over. Who joins under the name meanwhile has the row's
partitions at once, without a new target: nothing changes for the others.
"""

from __future__ import annotations

import json
import sqlite3

from streamflow.errors import InstanceTakenError


def holder(sql: sqlite3.Connection, group: str, instance_id: str | None) -> str | None:
    """The member that has a name, or None."""
    row = sql.execute(
        "SELECT member_id FROM members WHERE group_id = ? AND instance_id = ?", (group, instance_id)
    ).fetchone()
    return None if row is None else str(row[0])


def fenced(group: str, instance_id: str | None) -> InstanceTakenError:
    """The error of a member whose place was taken."""
    return InstanceTakenError(
        f"group {group!r}: another worker was started with instance_id {instance_id!r} and has taken this one's place. "
        "Give every worker an instance_id of its own"
    )


def take_place(sql: sqlite3.Connection, group: str, before: str, after: str) -> None:
    """Give all that a member has to the one that joined under its name, and remove it.

    The newcomer finds itself the owner of what it does not work on: that is assigned to it, or free for others where it
    was to be given back.

    Args:
        sql: The connection, inside a write transaction.
        group: The group.
        before: Member id of who had the name.
        after: Member id of who has it now; its row is there.
    """
    for column in ("member_id", "target"):
        sql.execute(f"UPDATE owners SET {column} = ? WHERE group_id = ? AND {column} = ?", (after, group, before))
    sql.execute(
        "UPDATE members SET told = (SELECT told FROM members WHERE group_id = ? AND member_id = ?) "
        "WHERE group_id = ? AND member_id = ?",
        (group, before, group, after),
    )
    sql.execute("DELETE FROM members WHERE group_id = ? AND member_id = ?", (group, before))
    (assigned_for,) = sql.execute("SELECT assigned_for FROM groups WHERE id = ?", (group,)).fetchone()
    if assigned_for:  # the target was made for the one and is good for the other, unless its topics differ
        rows, counts = json.loads(assigned_for)
        rows = sorted([after if member_id == before else member_id, topics] for member_id, topics in rows)
        sql.execute("UPDATE groups SET assigned_for = ? WHERE id = ?", (json.dumps([rows, counts]), group))
