"""The group protocol as rows: who is a member, which partition is whose, and who may commit.

Every member does the same `step` in one write transaction, as often as it has a heartbeat to write or a change to
answer; there is no leader. Invariants:

- A partition has at most one owner. It changes hands only through nobody: the owner gives it back (`revoked`), leaves
  or expires; then the member it is meant for takes it. `owners.generation` is the generation in which it was taken.
- `groups.generation` grows with every new target; `groups.version` with everything another member has to react to.
- A commit is stored only if, in the same transaction, its member exists and owns every partition since a generation not
  later than the commit's.
- Nobody reads another process's clock. A member is dead when its process has certainly ended, or when its heartbeat
  count stood still while the observer itself wrote heartbeats for a whole session: a log that was locked, a machine
  that slept or an observer that was stopped says nothing about the others. A static member's process may have ended.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from streamflow.errors import TaskMigratedError
from streamflow.log.api import (
    Assigned,
    Assignor,
    Given,
    GroupEvent,
    GroupSettings,
    Lost,
    Member,
    Membership,
    Revoked,
    Told,
    Unheard,
)
from streamflow.log.sqlite import process, static_members
from streamflow.model.record import TopicPartition

_Partitions = frozenset[TopicPartition]
_NONE: _Partitions = frozenset()


@dataclass(frozen=True, slots=True)
class Subscription:
    """What does not change while a member lives.

    Attributes:
        group_id: The group.
        topics: What it takes part in.
        assignor: Says who shall have what.
        settings: Time-outs.
        process: The identity of its process.
        new_id: Makes an id that nobody else has.
    """

    group_id: str
    topics: frozenset[str]
    assignor: Assignor
    settings: GroupSettings
    process: str
    new_id: Callable[[], str]


@dataclass(frozen=True, slots=True)
class MemberStanding:
    """Where a member stands after a step; replaced only when the step's transaction was stored.

    Attributes:
        member_id: "" while it is no member.
        generation: The group's generation.
        version: The group's version, to see whether a step is due.
        owned: What it owns.
        revoking: What it was asked to give back, with the seconds that it has had since.
        silent: Other members' heartbeat counts and how long they have stood still under this one's eyes.
        heard: Other members whose hearts this one has seen beat.
        unheard: Those that it has not, and that hold partitions while it holds none.
        settled: Whether it has everything it is meant to have and gives nothing back.
        says: What its row says of it.
        told: What it was told last; None: whatever that was is not valid any more.
        unread: Topics of its own that nobody has: who has set the last target does not know them.
    """

    member_id: str = ""
    generation: int = -1
    version: int = -1
    owned: _Partitions = _NONE
    revoking: Mapping[TopicPartition, float] = field(default_factory=dict)
    silent: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    heard: frozenset[str] = frozenset()
    unheard: tuple[Unheard, ...] = ()
    settled: bool = True
    says: bytes = b""
    told: bytes | None = b""
    unread: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Step:
    """What one step gave.

    Attributes:
        standing: The new standing.
        events: What to tell, in order.
        told_others: Whether other members have to react.
    """

    standing: MemberStanding
    events: list[GroupEvent]
    told_others: bool


class _Stepping:
    """One step: a value that is built up within one write transaction."""

    def __init__(
        self, sql: sqlite3.Connection, mine: Subscription, standing: MemberStanding, elapsed_s: float, says: bytes
    ) -> None:
        self.sql = sql
        self.mine = mine
        self.group = mine.group_id
        self.standing = standing
        self.instance_id = mine.settings.instance_id
        self.elapsed_s = elapsed_s
        self.says = says
        self.told = standing.told
        self.member_id = standing.member_id
        self.owned = set(standing.owned)
        self.revoking = {tp: had + elapsed_s for tp, had in standing.revoking.items()}
        self.silent: dict[str, tuple[int, float]] = {}
        self.heard: set[str] = set()
        self.events: list[GroupEvent] = []
        self.changed = False

    def be_member(self) -> None:
        """Write the heartbeat; notice that others let this member go; join."""
        if self.member_id:
            kept = self.sql.execute(
                "UPDATE members SET beat = beat + 1 WHERE group_id = ? AND member_id = ?", (self.group, self.member_id)
            ).rowcount
            if kept:
                self.speak()
                return
            if static_members.holder(self.sql, self.group, self.instance_id) is not None:
                raise static_members.fenced(self.group, self.instance_id)
            self.lose(
                self.owned,
                f"the session of member {self.member_id} of group {self.group!r} expired: the others saw no heartbeat "
                f"for {self.mine.settings.session_timeout_ms} ms (was the process stopped, or the machine asleep?)",
            )
            self.revoking.clear()
            self.forget()
        self.join()

    def join(self) -> None:
        """Add a row, in the place of who has this one's static name: of two the later one stays."""
        before = static_members.holder(self.sql, self.group, self.instance_id)
        if before is not None and self.standing.version >= 0:  # it was here before that one
            raise static_members.fenced(self.group, self.instance_id)
        self.member_id = self.mine.new_id()
        self.sql.execute(
            "INSERT INTO members (group_id, member_id, topics, process, session_timeout_ms, instance_id, says) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                self.group,
                self.member_id,
                json.dumps(sorted(self.mine.topics)),
                self.mine.process,
                self.mine.settings.session_timeout_ms,
                self.instance_id,
                self.says,
            ),
        )
        if before is not None:
            static_members.take_place(self.sql, self.group, before, self.member_id)
        self.changed = True

    def speak(self) -> None:
        """Write what this member says where it differs: heard with the next target, it asks for none."""
        if self.says != self.standing.says:
            self.sql.execute(
                "UPDATE members SET says = ? WHERE group_id = ? AND member_id = ?",
                (self.says, self.group, self.member_id),
            )

    def ask_for_target(self) -> None:
        """Have a new target set, whether or not anything else has changed."""
        self.sql.execute("UPDATE groups SET assigned_for = '' WHERE id = ?", (self.group,))

    def bury(self) -> None:
        """Remove members that are dead."""
        rows = self.sql.execute(
            "SELECT member_id, beat, session_timeout_ms, process, instance_id FROM members "
            "WHERE group_id = ? AND member_id <> ?",
            (self.group, self.member_id),
        ).fetchall()
        for member_id, beat, timeout_ms, other, instance_id in rows:
            seen, silence = self.standing.silent.get(member_id, (-1, 0.0))
            silence = silence + self.elapsed_s if seen == beat else 0.0
            gone = silence > 0.0 and instance_id is None and process.is_gone(other)
            if gone or silence * 1000 > timeout_ms:
                remove_member(self.sql, self.group, member_id)
                self.changed = True
            else:
                self.silent[member_id] = (beat, silence)
                if member_id in self.standing.heard or seen not in {-1, beat} or process.is_alive(other):
                    self.heard.add(member_id)

    def unheard(self) -> tuple[Unheard, ...]:
        """Members that may be dead and hold partitions; told to who holds none, and may wait for theirs."""
        doubtful = self.silent.keys() - self.heard
        if self.owned or not doubtful:
            return ()
        held = self.sql.execute(
            "SELECT member_id, count(*) FROM owners WHERE group_id = ? AND member_id IS NOT NULL GROUP BY member_id",
            (self.group,),
        ).fetchall()
        rows = {row.member_id: row for row in members(self.sql, self.group)}
        return tuple(
            Unheard(rows[each].told(), count, rows[each].session_timeout_ms / 1000)
            for each, count in held
            if each in doubtful
        )

    def give_back(self, answered: Collection[TopicPartition]) -> None:
        """Free what was asked for and answered, and take what was not answered in time."""
        self.free(tp for tp in answered if tp in self.revoking)
        limit_s = self.mine.settings.rebalance_timeout_ms / 1000
        overdue = {tp for tp, had_s in self.revoking.items() if had_s > limit_s}
        self.free(overdue)
        self.lose(
            overdue,
            f"not given back within rebalance_timeout_ms ({self.mine.settings.rebalance_timeout_ms} ms) of being "
            "asked: a record takes longer than that, or its agent hangs",
        )

    def free(self, partitions: Iterable[TopicPartition]) -> None:
        for tp in list(partitions):
            self.sql.execute(
                "UPDATE owners SET member_id = NULL "
                "WHERE group_id = ? AND topic = ? AND partition = ? AND member_id = ?",
                (self.group, tp.topic, tp.partition, self.member_id),
            )
            self.owned.discard(tp)
            self.revoking.pop(tp, None)
            self.changed = True

    def lose(self, partitions: Iterable[TopicPartition], reason: str) -> None:
        if gone := frozenset(partitions):
            self.events.append(Lost(gone, reason))
            self.owned -= gone

    def take(self) -> None:
        """Compare the table with what this member has: ask for what is to go, take what is free and meant for it."""
        rows = self.sql.execute(
            "SELECT topic, partition, member_id, target FROM owners "
            "WHERE group_id = ? AND (member_id = ? OR target = ?)",
            (self.group, self.member_id, self.member_id),
        ).fetchall()
        mine = {TopicPartition(t, p): target for t, p, owner, target in rows if owner == self.member_id}
        # What it has from a static member whose place it took, nobody works on.
        inherited = frozenset(mine.keys() - self.owned)
        self.free(tp for tp in inherited if mine[tp] != self.member_id)
        # While their topic does not exist they stay: its reader is the one who says so, which stops the worker.
        gone = {tp for tp in self.owned | self.revoking.keys() if tp not in mine and self.exists(tp.topic)}
        self.lose(self.owned & gone, "their topic was deleted and made anew")
        for tp in gone & self.revoking.keys():
            del self.revoking[tp]
        to_go = frozenset(
            tp for tp in mine.keys() & self.owned if mine[tp] != self.member_id and tp not in self.revoking
        )
        if to_go:
            self.events.append(Revoked(to_go))
            self.revoking.update(dict.fromkeys(to_go, 0.0))
        self.listen()
        free = frozenset(TopicPartition(t, p) for t, p, owner, _ in rows if owner is None)
        free |= {tp for tp in inherited if mine[tp] == self.member_id}
        self.sql.executemany(
            "UPDATE owners SET member_id = ?, generation = (SELECT generation FROM groups WHERE id = ?) "
            "WHERE group_id = ? AND topic = ? AND partition = ?",
            [(self.member_id, self.group, self.group, *tp) for tp in free],
        )
        if free:
            self.owned |= free
            self.events.append(Assigned(free, self.generation()))
        waits_for_others = any(owner not in {None, self.member_id} for _, _, owner, _ in rows)
        self.settled = not self.revoking and not waits_for_others

    def forget(self) -> None:
        """What was told is not valid any more; nothing was, if nothing was told."""
        if self.told:
            self.told = None

    def listen(self) -> None:
        """Pass on what the last target tells this member; one that a worker of before has set tells nothing."""
        (told,) = self.sql.execute(
            "SELECT CASE WHEN g.told_generation = g.generation THEN m.told ELSE x'' END "
            "FROM members m JOIN groups g ON g.id = m.group_id WHERE m.group_id = ? AND m.member_id = ?",
            (self.group, self.member_id),
        ).fetchone()
        if told != self.told:
            self.told = told
            self.events.append(Told(told, self.generation()))

    def exists(self, topic: str) -> bool:
        return self.sql.execute("SELECT 1 FROM topics WHERE name = ?", (topic,)).fetchone() is not None

    def unread(self) -> frozenset[str]:
        """Topics of its own that exist, and that nobody has or is to have; those that it has something of are read."""
        others = self.mine.topics.difference(tp.topic for tp in self.owned)
        return frozenset(topic for topic in others if self.exists(topic) and not self.is_read(topic))

    def is_read(self, topic: str) -> bool:
        row = self.sql.execute(
            "SELECT 1 FROM owners WHERE group_id = ? AND topic = ? AND (member_id IS NOT NULL OR target IS NOT NULL) "
            "LIMIT 1",
            (self.group, topic),
        )
        return row.fetchone() is not None

    def generation(self) -> int:
        (generation,) = self.sql.execute("SELECT generation FROM groups WHERE id = ?", (self.group,)).fetchone()
        return int(generation)

    def finish(self) -> Step:
        if self.changed:
            self.sql.execute("UPDATE groups SET version = version + 1 WHERE id = ?", (self.group,))
        generation, version = self.sql.execute(
            "SELECT generation, version FROM groups WHERE id = ?", (self.group,)
        ).fetchone()
        standing = MemberStanding(
            self.member_id,
            generation,
            version,
            frozenset(self.owned),
            self.revoking,
            self.silent,
            frozenset(self.heard),
            self.unheard(),
            self.settled if self.member_id else True,
            self.says,
            self.told,
            self.unread() if self.member_id else frozenset(),
        )
        return Step(standing, self.events, self.changed)

    settled = True


def step(
    sql: sqlite3.Connection,
    mine: Subscription,
    standing: MemberStanding,
    *,
    elapsed_s: float,
    answered: Collection[TopicPartition],
    stuck: str | None,
    says: bytes = b"",
    new_target: bool = False,
) -> Step:
    """Write a heartbeat, and do whatever the table asks of this member.

    Args:
        sql: The connection, inside a write transaction.
        mine: Who does it.
        standing: Where it stood after its last stored step.
        elapsed_s: Time since that step, during which this member would have noticed other members' heartbeats.
        answered: What its user has given back.
        stuck: Why it must give everything up and stay out, or None.
        says: What this member says.
        new_target: Whether its user asks for a new target.
    """
    sql.execute("INSERT OR IGNORE INTO groups (id) VALUES (?)", (mine.group_id,))
    doing = _Stepping(sql, mine, standing, elapsed_s, says)
    if stuck is not None:
        if doing.member_id:
            remove_member(sql, mine.group_id, doing.member_id)
            doing.lose(doing.owned, stuck)
            doing.revoking.clear()
            doing.member_id = ""
            doing.forget()
            doing.changed = True
        return doing.finish()
    doing.be_member()
    doing.bury()
    doing.give_back(answered)
    if new_target:
        doing.ask_for_target()
    doing.changed |= _aim(sql, mine)
    doing.take()
    return doing.finish()


def version(sql: sqlite3.Connection, group_id: str) -> int:
    """The group's version; a change means that a step is due."""
    row = sql.execute("SELECT version FROM groups WHERE id = ?", (group_id,)).fetchone()
    return -1 if row is None else int(row[0])


@dataclass(frozen=True, slots=True)
class MemberRow:
    """A member as others see it.

    Attributes:
        member_id: Its id.
        process: The identity of its process.
        session_timeout_ms: Silence after which it is taken for dead.
        beat: How often its heart has beaten.
        instance_id: Its static name, if it has one.
    """

    member_id: str
    process: str
    session_timeout_ms: int
    beat: int
    instance_id: str | None

    def told(self) -> str:
        """The member in words."""
        name = "" if self.instance_id is None else f", instance_id {self.instance_id!r}"
        return f"member {self.member_id[:8]} (process {self.process.split(' ')[1]}{name})"


def members(sql: sqlite3.Connection, group_id: str) -> list[MemberRow]:
    """All members of a group, dead ones that nobody has removed yet included."""
    rows = sql.execute(
        "SELECT member_id, process, session_timeout_ms, beat, instance_id FROM members WHERE group_id = ? "
        "ORDER BY member_id",
        (group_id,),
    )
    return [MemberRow(*row) for row in rows]


def delete_group(sql: sqlite3.Connection, group_id: str) -> None:
    """Remove everything of a group."""
    for table, column in (("offsets", "group_id"), ("owners", "group_id"), ("members", "group_id"), ("groups", "id")):
        sql.execute(f"DELETE FROM {table} WHERE {column} = ?", (group_id,))


def remove_member(sql: sqlite3.Connection, group_id: str, member_id: str) -> bool:
    """Take a member out and free what it owned; returns whether it was there."""
    sql.execute("UPDATE owners SET member_id = NULL WHERE group_id = ? AND member_id = ?", (group_id, member_id))
    return bool(sql.execute("DELETE FROM members WHERE group_id = ? AND member_id = ?", (group_id, member_id)).rowcount)


def leave(sql: sqlite3.Connection, group_id: str, member_id: str) -> None:
    """Leave at once: the others see it with their next look."""
    if remove_member(sql, group_id, member_id):
        sql.execute("UPDATE groups SET version = version + 1 WHERE id = ?", (group_id,))


def _aim(sql: sqlite3.Connection, mine: Subscription) -> bool:
    """Set a new target when members, subscriptions or partition counts differ from those of the last; or do nothing."""
    group = mine.group_id
    rows = sql.execute(
        "SELECT member_id, topics FROM members WHERE group_id = ? ORDER BY member_id", (group,)
    ).fetchall()
    wanted = sorted({topic for _, topics in rows for topic in json.loads(topics)})
    counts: dict[str, int] = {}
    for topic in wanted:
        found = sql.execute("SELECT partitions FROM topics WHERE name = ?", (topic,)).fetchone()
        if found is not None:
            counts[topic] = found[0]
    fingerprint = json.dumps([rows, counts])
    (assigned_for,) = sql.execute("SELECT assigned_for FROM groups WHERE id = ?", (group,)).fetchone()
    if fingerprint == assigned_for:
        return False
    owned: dict[str, set[TopicPartition]] = {member_id: set() for member_id, _ in rows}
    for topic, number, owner in sql.execute(
        "SELECT topic, partition, member_id FROM owners WHERE group_id = ? AND member_id IS NOT NULL", (group,)
    ):
        owned.setdefault(owner, set()).add(TopicPartition(topic, number))
    words = sql.execute("SELECT member_id, says, instance_id FROM members WHERE group_id = ?", (group,))
    spoken = {member_id: (says, instance_id) for member_id, says, instance_id in words}
    members = [
        Member(member_id, frozenset(json.loads(topics)), frozenset(owned[member_id]), *spoken[member_id])
        for member_id, topics in rows
    ]
    _write_target(sql, group, counts, mine.assignor(members, counts))
    sql.execute(
        "UPDATE groups SET generation = generation + 1, told_generation = generation + 1, assigned_for = ? "
        "WHERE id = ?",
        (fingerprint, group),
    )
    return True


def _write_target(sql: sqlite3.Connection, group: str, counts: Mapping[str, int], target: Mapping[str, Given]) -> None:
    sql.execute("UPDATE owners SET target = NULL WHERE group_id = ?", (group,))
    sql.executemany(
        "INSERT OR IGNORE INTO owners (group_id, topic, partition) VALUES (?, ?, ?)",
        [(group, topic, number) for topic, count in counts.items() for number in range(count)],
    )
    sql.executemany(
        "UPDATE owners SET target = ? WHERE group_id = ? AND topic = ? AND partition = ?",
        [(member_id, group, *tp) for member_id, given in target.items() for tp in given.partitions],
    )
    sql.execute("UPDATE members SET told = x'' WHERE group_id = ?", (group,))
    sql.executemany(
        "UPDATE members SET told = ? WHERE group_id = ? AND member_id = ?",
        [(given.told, group, member_id) for member_id, given in target.items()],
    )
    # What nobody takes part in any more is forgotten once it is free.
    sql.execute("DELETE FROM owners WHERE group_id = ? AND target IS NULL AND member_id IS NULL", (group,))


def check_membership(sql: sqlite3.Connection, membership: Membership, partitions: Iterable[TopicPartition]) -> None:
    """Refuse a commit of who is no member, or does not own (all of) the partitions.

    Args:
        sql: The connection, inside the commit's transaction.
        membership: Under which the commit was made.
        partitions: What it commits.

    Raises:
        TaskMigratedError: The commit must not be stored.
    """
    group, member_id, generation = membership.group_id, membership.member_id, membership.generation
    who = f"member {member_id!r} of group {group!r}, generation {generation}"
    if not member_id or generation < 0:
        raise TaskMigratedError(f"{who}: this is no membership; nothing was stored")
    row = sql.execute(
        "SELECT g.generation FROM members m JOIN groups g ON g.id = m.group_id "
        "WHERE m.group_id = ? AND m.member_id = ?",
        (group, member_id),
    ).fetchone()
    if row is None:
        raise TaskMigratedError(
            f"{who} is not in the group any more (it left, its session expired, or it exceeded max_poll_interval_ms): "
            "its partitions went to others and nothing was stored"
        )
    if generation > row[0]:
        raise TaskMigratedError(f"{who}: the group is in generation {row[0]} only; nothing was stored")
    for tp in partitions:
        owner = sql.execute(
            "SELECT member_id, generation FROM owners WHERE group_id = ? AND topic = ? AND partition = ?", (group, *tp)
        ).fetchone()
        if owner is None or owner[0] != member_id:
            raise TaskMigratedError(
                f"{who} does not own {tp} any more (owner: {owner[0] if owner else None}); nothing was stored"
            )
        if owner[1] > generation:
            raise TaskMigratedError(
                f"{who} had {tp} given back and got it again in generation {owner[1]}; nothing was stored"
            )
