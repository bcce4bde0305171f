"""Groups in time that the test moves: expiry, progress, and any order of coming and going."""

import asyncio
import os
import subprocess
import sys
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.clock import VirtualClock
from streamflow.errors import GroupInUseError, InternalError, TaskMigratedError
from streamflow.log.api import Assigned, Given, GroupSettings, Lost, Member, NewTopic, OffsetMark, Revoked, Told
from streamflow.log.sqlite import membership, process
from streamflow.log.sqlite.log import SqliteLog
from streamflow.model.record import TopicPartition
from tests.contracts.records import Watched, spread

SETTINGS = GroupSettings(session_timeout_ms=10_000, heartbeat_interval_ms=300, max_poll_interval_ms=60_000)


async def settle() -> None:
    for _ in range(60):
        await asyncio.sleep(0)


async def advance(clock, seconds, *groups, step=0.3) -> None:
    """Moves time in steps of a heartbeat, as a running program would see it."""
    for _ in range(round(seconds / step)):
        for group in groups:
            group.report_progress()
        clock.advance(step)
        await settle()


async def join(stack, log, settings=SETTINGS, topics=("t",)) -> Watched:
    group = await stack.enter_async_context(log.group("g", frozenset(topics), spread, settings))
    return await stack.enter_async_context(Watched(group))


async def test_a_jump_of_the_clock_costs_nobody_the_membership(memory, clock):
    await memory.admin.create([NewTopic("t", 2)])
    async with AsyncExitStack() as stack:
        members = [await join(stack, memory) for _ in range(2)]
        await settle()
        before = [member.group.membership for member in members]
        for _ in range(5):
            clock.advance(100_000)
            await settle()
        assert [member.group.membership for member in members] == before
        assert all(member.owned for member in members)


async def test_a_member_that_stops_beating_expires_after_its_session_and_not_before(memory, clock):
    await memory.admin.create([NewTopic("t", 2)])

    def come_and_fall_silent(sql):
        sql.execute(
            "INSERT INTO members (group_id, member_id, topics, process, session_timeout_ms) "
            "VALUES ('g', 'silent', '[\"t\"]', 'elsewhere 1 ?', 10000)"
        )
        sql.execute("UPDATE groups SET version = version + 1")

    async with AsyncExitStack() as stack:
        member = await join(stack, memory)
        await settle()
        await memory._database.writer.write(come_and_fall_silent)
        await advance(clock, 0.6, member.group)
        assert len(member.owned) == 1
        await advance(clock, 8.7, member.group)
        assert len(member.owned) == 1
        clock.advance(1000)  # a jump is no silence
        await advance(clock, 0.3, member.group)
        assert len(member.owned) == 1
        await advance(clock, 1.5, member.group)
        assert len(member.owned) == 2


def of_another_boot(sql, member_id="old") -> None:
    sql.execute("INSERT OR IGNORE INTO groups (id) VALUES ('g')")
    sql.execute(
        "INSERT INTO members (group_id, member_id, topics, process, session_timeout_ms) "
        "VALUES ('g', ?, '[\"t\"]', 'elsewhere 1 ?', 10000)",
        (member_id,),
    )


async def test_a_group_left_behind_by_another_boot_can_be_deleted_after_its_session(memory, clock):
    await memory._database.writer.write(of_another_boot)
    deleted = asyncio.create_task(memory.admin.delete_group("g"))
    await advance(clock, 9.9)
    assert not deleted.done()
    assert "g" in await memory.admin.groups()
    await advance(clock, 0.9)
    await deleted
    assert "g" not in await memory.admin.groups()


async def test_a_heart_that_beats_elsewhere_keeps_a_group_from_being_deleted(memory, clock):
    await memory._database.writer.write(of_another_boot)
    deleted = asyncio.create_task(memory.admin.delete_group("g"))
    await advance(clock, 9.0)
    await memory._database.writer.write(lambda sql: sql.execute("UPDATE members SET beat = beat + 1"))
    await advance(clock, 1.8)
    with pytest.raises(GroupInUseError, match="member old"):
        await deleted
    assert "g" in await memory.admin.groups()


async def test_a_member_that_comes_while_a_dead_one_is_watched_keeps_the_group(memory, clock):
    await memory._database.writer.write(of_another_boot)
    deleted = asyncio.create_task(memory.admin.delete_group("g"))
    await advance(clock, 9.0)
    await memory._database.writer.write(lambda sql: of_another_boot(sql, "new"))
    await advance(clock, 1.8)
    with pytest.raises(GroupInUseError, match="member new"):
        await deleted


async def test_a_member_that_others_let_go_says_so_and_joins_again(memory, clock):
    await memory.admin.create([NewTopic("t", 2)])
    async with AsyncExitStack() as stack:
        member = await join(stack, memory)
        await settle()
        stale = member.group.membership
        await memory._database.writer.write(lambda sql: membership.leave(sql, "g", stale.member_id))
        with pytest.raises(TaskMigratedError):
            await member.group.commit({TopicPartition("t", 0): OffsetMark(1)}, stale)
        await advance(clock, 0.6, member.group)
        lost, assigned = member.events[-2:]
        assert isinstance(lost, Lost)
        assert "expired" in lost.reason
        assert isinstance(assigned, Assigned)
        assert len(member.owned) == 2
        assert member.group.membership.member_id != stale.member_id


async def test_an_assignor_that_fails_is_told_to_who_waits_for_events(memory, clock):
    await memory.admin.create([NewTopic("t", 2)])

    def fails(members, counts):
        if len(members) == 1:
            return spread(members, counts)
        raise ValueError("cannot")

    async with memory.group("g", frozenset({"t"}), fails, SETTINGS) as group:
        assert isinstance(await group.next_event(), Assigned)
        await memory._database.writer.write(
            lambda sql: sql.execute(
                "INSERT INTO members (group_id, member_id, topics, process, session_timeout_ms) "
                "VALUES ('g', 'other', '[]', 'elsewhere 1 ?', 10000)"
            )
        )
        await settle()
        clock.advance(0.3)
        with pytest.raises(InternalError, match="cannot"):
            await group.next_event()
        assert group.membership is None


async def test_a_member_asked_to_give_back_has_its_time_and_loses_only_that(memory, clock):
    await memory.admin.create([NewTopic("t", 2)])
    settings = GroupSettings(rebalance_timeout_ms=5000)
    async with AsyncExitStack() as stack:
        slow = await join(stack, memory, settings)
        slow.revoke = False
        await settle()
        quick = await join(stack, memory, settings)
        await settle()
        asked = slow.events[-1]
        assert isinstance(asked, Revoked)
        await advance(clock, 4.5, slow.group, quick.group)
        assert not quick.owned
        await advance(clock, 1.5, slow.group, quick.group)
        assert quick.owned == asked.partitions
        lost = slow.events[-1]
        assert isinstance(lost, Lost)
        assert lost.partitions == asked.partitions
        assert "rebalance_timeout_ms" in lost.reason
        assert len(slow.owned) == 1


async def test_members_with_different_topics_and_a_topic_that_grows_away(memory, clock):
    await memory.admin.create([NewTopic("t", 2), NewTopic("u", 2)])
    async with AsyncExitStack() as stack:
        one = await join(stack, memory, topics=("t", "u"))
        await settle()
        assert len(one.owned) == 4
        await memory.admin.delete(["u"])
        await advance(clock, 0.6, one.group)
        assert len(one.owned) == 4  # the reader says that it is gone
        assert isinstance(one.events[-1], Assigned)
        await memory.admin.create([NewTopic("u", 3)])
        await advance(clock, 0.6, one.group)
        assert len(one.owned) == 5
        lost, assigned = one.events[-2:]
        assert isinstance(lost, Lost)
        assert lost.partitions == {TopicPartition("u", 0), TopicPartition("u", 1)}
        assert "made anew" in lost.reason
        assert isinstance(assigned, Assigned)
        assert assigned.partitions == {TopicPartition("u", number) for number in range(3)}


async def test_a_topic_that_is_made_anew_before_anybody_looks_is_assigned_anew(memory, clock):
    await memory.admin.create([NewTopic("t", 2), NewTopic("other", 1)])
    async with AsyncExitStack() as stack:
        members = [await join(stack, memory, topics=("t", "other")) for _ in range(2)]
        await advance(clock, 0.6, *(member.group for member in members))
        first = asyncio.ensure_future(memory.admin.delete(["t"]))  # both are done before a heart beats
        await asyncio.gather(first, memory.admin.create([NewTopic("t", 2)]))
        await advance(clock, 0.9, *(member.group for member in members))
        owned = [tp for member in members for tp in member.owned]
        assert sorted(owned) == [TopicPartition("other", 0), TopicPartition("t", 0), TopicPartition("t", 1)]
        lost = [event for member in members for event in member.events if isinstance(event, Lost)]
        assert all("made anew" in event.reason for event in lost)
        assert {tp for event in lost for tp in event.partitions} == {TopicPartition("t", 0), TopicPartition("t", 1)}


async def test_a_topic_that_another_version_does_not_know_is_told_by_who_reads_it(memory, clock, caplog):
    caplog.set_level("INFO")
    await memory.admin.create([NewTopic("t", 1), NewTopic("u", 1)])

    def knows_only_t(members, counts):
        return spread([Member(each.member_id, frozenset({"t"}), each.owned) for each in members], {"t": counts["t"]})

    def said(what):
        return [record for record in caplog.records if what in record.getMessage()]

    async with AsyncExitStack() as stack:
        newer = await join(stack, memory, topics=("t", "u"))
        await settle()
        assert len(newer.owned) == 2
        assert not said("nobody processes")
        async with memory.group("g", frozenset({"t"}), knows_only_t, SETTINGS) as group, Watched(group) as older:
            await advance(clock, 1.2, newer.group, older.group)
            assert TopicPartition("u", 0) not in newer.owned | older.owned
            (warning,) = said("nobody processes u: the worker that leads the group runs another version")
            assert warning.levelname == "WARNING"
        await advance(clock, 0.6, newer.group)
        assert len(newer.owned) == 2
        assert len(said("u is processed now")) == 1
        assert len(said("nobody processes")) == 1


async def test_a_commit_from_before_the_partition_went_away_and_came_back_is_refused(memory, clock):
    await memory.admin.create([NewTopic("t", 1)])
    tp = TopicPartition("t", 0)

    founder = None

    def to_the_others(members, counts):
        owner = max((m.member_id for m in members), key=lambda member_id: member_id != founder)
        return {m.member_id: Given(frozenset({tp} if m.member_id == owner else ())) for m in members}

    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(memory.group("g", frozenset({"t"}), to_the_others, SETTINGS))
        member = await stack.enter_async_context(Watched(group))
        await settle()
        before = group.membership
        founder = before.member_id
        async with memory.group("g", frozenset({"t"}), to_the_others, SETTINGS) as other, Watched(other) as watched:
            await settle()
            assert watched.owned == {tp}
        await settle()
        assert member.owned == {tp}
        with pytest.raises(TaskMigratedError, match="given back"):
            await group.commit({tp: OffsetMark(1)}, before)
        await group.commit({tp: OffsetMark(1)}, group.membership)


STEPS = st.lists(
    st.one_of(
        st.just("join"), st.tuples(st.sampled_from(["leave", "hang", "go on"]), st.integers(0, 9)), st.just("wait")
    ),
    max_size=20,
)


@given(STEPS, st.integers(1, 6))
def test_whatever_members_do_a_partition_has_one_owner_and_all_are_owned_in_the_end(steps, partitions):
    asyncio.run(check_group(steps, partitions))


async def check_group(steps, partitions):
    clock = VirtualClock()
    async with AsyncExitStack() as stack:
        log = await stack.enter_async_context(SqliteLog.in_memory("groups", clock=clock))
        await log.admin.create([NewTopic("t", partitions)])
        members: list[tuple[AsyncExitStack, Watched]] = []
        hanging: set[Watched] = set()

        async def pass_time(seconds):
            for _ in range(seconds * 2):
                await advance(clock, 0.6, *(m.group for _, m in members if m not in hanging))
                taken = [tp for _, member in members for tp in member.group.assignment]
                assert len(taken) == len(set(taken)), "two owners"

        for step in steps:
            if step == "join":
                own = await stack.enter_async_context(AsyncExitStack())
                members.append((own, await join(own, log)))
            elif step == "wait":
                await pass_time(3)
            elif members:
                what, number = step
                own, member = members[number % len(members)]
                if what == "leave":
                    members.remove((own, member))
                    await own.aclose()
                elif what == "hang":
                    hanging.add(member)
                else:
                    hanging.discard(member)
            await settle()
        hanging.clear()
        await pass_time(3)
        if members:
            assert {tp for _, m in members for tp in m.owned} == {TopicPartition("t", n) for n in range(partitions)}
            sizes = [len(member.owned) for _, member in members]
            assert max(sizes) <= -(-partitions // len(members))
            for _, member in members:
                assert member.owned == member.group.assignment
                if member.owned:
                    await member.group.commit(dict.fromkeys(member.owned, OffsetMark(1)), member.group.membership)


async def test_generations_of_one_member_never_fall(memory, clock):
    await memory.admin.create([NewTopic("t", 4)])
    async with AsyncExitStack() as stack:
        first = await join(stack, memory)
        seen = []
        for _ in range(5):
            async with AsyncExitStack() as passing:
                await join(passing, memory)
                await settle()
                seen.append(first.group.membership.generation)
            await settle()
            seen.append(first.group.membership.generation)
        assert seen == sorted(seen)
        assigned = [event.generation for event in first.events if isinstance(event, Assigned)]
        assert assigned == sorted(assigned)
        assert first.group.statistics().rebalances >= 5


# --- who is gone -----------------------------------------------------------------------------------------------------


def test_this_process_is_alive_and_an_ended_one_is_gone():
    assert not process.is_gone(process.identity())
    code = "from streamflow.log.sqlite import process; print(process.identity())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    if sys.platform.startswith("linux"):
        assert process.is_gone(told)
        namespace, pid, started = process.identity().split(" ")
        assert process.is_gone(f"{namespace} {pid} {int(started) + 1}")  # the number was given to another process
    else:
        assert not process.is_gone(told)
    assert not process.is_gone(f"elsewhere {os.getpid()} 1")
    assert not process.is_gone("elsewhere 1 ?")
    assert process.is_alive(process.identity())
    assert not any(map(process.is_alive, ["", told, f"{namespace} {pid} {int(started) + 1}", "elsewhere 1 ?"]))


async def test_a_target_that_a_worker_of_before_has_set_tells_nothing(memory, clock):
    """It writes no words, and knows nothing of those that stand in the rows."""
    await memory.admin.create([NewTopic("t", 1)])

    def tell(members, counts):
        return {one: Given(given.partitions, b"follow") for one, given in spread(members, counts).items()}

    def as_before(sql):
        sql.execute("UPDATE groups SET generation = generation + 1, version = version + 1")

    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(memory.group("g", frozenset({"t"}), tell, SETTINGS))
        member = await stack.enter_async_context(Watched(group))
        await settle()
        assert [type(event) for event in member.events] == [Told, Assigned]
        await memory._database.writer.write(as_before)
        await advance(clock, 0.6, group)
        assert member.events[2:] == [Told(b"", 2)]
        group.rejoin("the test wants it")
        await advance(clock, 0.6, group)
        assert member.events[3:] == [Told(b"follow", 3)]
