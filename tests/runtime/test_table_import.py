"""What an import makes of a log in any state: fresh, interrupted, left behind by a worker that was killed."""

import asyncio
import uuid

import pytest

import streamflow as sf
from streamflow.clock import SystemClock
from streamflow.errors import GroupInUseError, ProductionError, TopologyError
from streamflow.log.api import NewTopic, OffsetMark
from streamflow.log.batch import BatchBuilder
from streamflow.log.codec import NONE
from streamflow.log.connect import connect
from streamflow.log.sqlite import membership
from streamflow.model.partitioner import partition_for
from streamflow.model.record import TopicPartition
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.group_hold import held_group
from streamflow.runtime.reset import plan_reset, reset, start_at
from streamflow.runtime.table_import import import_table
from streamflow.runtime.table_reader import TableLog

APP = sf.App("bank")
moves = APP.topic("moves", key_type=str, value_type=str, partitions=2)
names = APP.table("names", key_type=str, value_type=str)
other = APP.table("other", key_type=str, value_type=str)
DAY_MS = 86_400_000


@APP.agent(moves, tables=[names, other])
async def note(stream: sf.Stream[str]) -> None:
    async for event in stream.events():
        names[event.key] = event.value


SETTINGS = APP.settings({"session_timeout_ms": 6000, "heartbeat_interval_ms": 50})


@pytest.fixture
async def log():
    async with connect(f"memory://{uuid.uuid4().hex}", clock=SystemClock(), client_id="test") as log:
        yield log


async def imported(log, rows, *, table="names", app=APP, **options):
    encoded = {key.encode(): value.encode() for key, value in rows.items()}
    return await import_table(log, app, SETTINGS, table, encoded, **options)


async def committed(log):
    found = await TableLog.find(APP, "names", log.admin)
    marks = found.marks(await log.admin.group_offsets("bank"))
    folds = await found.fold(log, dict(enumerate(marks)))
    return {key.decode(): value.decode() for fold in folds for key, value in fold.live(None).items()}


async def write(log, topic, key, value, *, ago_ms=0):
    """A record as a worker that is killed before it commits leaves it."""
    builder = BatchBuilder(NONE, 1 << 16)
    builder.append(SystemClock().now_ms() - ago_ms, key.encode(), None if value is None else value.encode(), ())
    async with log.producer() as producer:
        await producer.enqueue(TopicPartition(topic, partition_for(key.encode(), 2)), builder.seal())


async def test_a_fresh_app_gets_its_start_with_positions_in_every_mark(log):
    await log.admin.create([NewTopic("moves", 2)])
    await write(log, "moves", "a", "before")
    done = await imported(log, {"a": "1", "b": "2", "c": "3"})
    assert (done.written, done.started) == (3, 2)
    offsets = await log.admin.group_offsets("bank")
    assert {tp: mark.offset for tp, mark in offsets.items()} == {TopicPartition("moves", n): 0 for n in range(2)}
    marks = [CommitMark.of(mark) for mark in offsets.values()]
    assert len({mark.id for mark in marks} - {""}) == 2
    assert sum(mark.changelogs["names"] for mark in marks) == 3
    assert [mark.changelogs["other"] for mark in marks] == [0, 0]
    assert await committed(log) == {"a": "1", "b": "2", "c": "3"}


async def test_with_auto_offset_reset_latest_a_fresh_app_starts_behind_what_is_there(log):
    await log.admin.create([NewTopic("moves", 2)])
    await write(log, "moves", "a", "before")
    settings = APP.settings({"auto_offset_reset": "latest", "heartbeat_interval_ms": 50})
    await import_table(log, APP, settings, "names", {b"a": b"1"})
    offsets = await log.admin.group_offsets("bank")
    assert sum(mark.offset for mark in offsets.values()) == 1


async def test_updates_that_are_in_no_commit_are_not_shown_and_are_set_back(log):
    await imported(log, {"a": "1", "b": "2"})
    await write(log, "bank-names-changelog", "a", "not committed")
    await write(log, "bank-names-changelog", "b", None)
    await write(log, "bank-names-changelog", "new", "not committed")
    assert await committed(log) == {"a": "1", "b": "2"}
    done = await imported(log, dict.fromkeys(("c", "d", "e", "f", "b"), "x"))
    assert (done.written, done.restored, done.cleared) == (5, 2, 0)
    assert await committed(log) == {"a": "1", **dict.fromkeys(("b", "c", "d", "e", "f"), "x")}


async def test_replace_leaves_only_what_was_given_whatever_was_there(log):
    await imported(log, {"a": "1", "b": "2", "c": "3"})
    await write(log, "bank-names-changelog", "a", "not committed")
    await write(log, "bank-names-changelog", "new", "not committed")
    done = await imported(log, {"b": "9"}, replace=True)
    assert (done.written, done.cleared, done.restored) == (1, 2, 1)
    assert await committed(log) == {"b": "9"}


async def test_an_old_update_without_anything_before_it_stands(log):
    """What it had before may have been compacted away; a restore decides the same."""
    await imported(log, {"a": "1"})
    await write(log, "bank-names-changelog", "old", "stands", ago_ms=2 * DAY_MS)
    await write(log, "bank-names-changelog", "a", "does not", ago_ms=2 * DAY_MS)
    assert await committed(log) == {"a": "1", "old": "stands"}


async def test_marks_of_exactly_once_stay_without_positions_and_offsets_stay(log):
    await imported(log, {"a": "1"})
    tp = TopicPartition("moves", partition_for(b"a", 2))
    before = CommitMark("c0ffee", None, {"other": 5})
    async with held_group(log, "bank", SETTINGS, {"moves": ("moves",)}, {"moves": 2}) as held:
        await held.commit({tp: OffsetMark(7, before.metadata())})
    untouched = (await log.admin.group_offsets("bank"))[TopicPartition("moves", 1 - tp.partition)]
    await imported(log, {"a": "2"})
    offsets = await log.admin.group_offsets("bank")
    after = CommitMark.of(offsets[tp])
    assert (offsets[tp].offset, after.changelogs, after.times) == (7, None, {"other": 5})
    assert after.id not in {"", before.id}
    assert offsets[TopicPartition("moves", 1 - tp.partition)] == untouched


async def test_state_without_offsets_is_refused_but_for_an_import_that_is_done_again(log):
    await imported(log, {"a": "1"})
    await log.admin.delete_group("bank")
    with pytest.raises(TopologyError, match="If an import was interrupted, do it again with --replace"):
        await imported(log, {"b": "2"})
    assert await log.admin.group_offsets("bank") == {}
    await imported(log, {"b": "2"}, replace=True)
    assert await committed(log) == {"b": "2"}


async def test_state_of_another_table_without_offsets_is_refused_in_any_case(log):
    await imported(log, {"a": "1"}, table="other")
    await log.admin.delete_group("bank")
    with pytest.raises(TopologyError, match="table 'other' has 1 changelog records"):
        await imported(log, {"b": "2"}, replace=True)
    assert await committed(log) == {}


async def test_too_large_a_row_is_named_and_nothing_is_written(log):
    for rows, says in (
        ({"big": "x" * 2_000_000}, r"row of bi: its value of 2,000,000 bytes is too large"),
        ({"k" * 70_000: "x"}, r"row of kk: its key of 70,000 bytes is too large"),
    ):
        with pytest.raises(ProductionError, match=says):
            await imported(log, {"a": "1", **rows}, place_of=lambda key: f"row of {key.decode()[:2]}")
    assert await log.admin.group_offsets("bank") == {}
    assert await committed(log) == {}


async def test_two_imports_at_a_time_are_refused(log):
    await imported(log, {"a": "1"})
    async with held_group(log, "bank", SETTINGS, {"moves": ("moves",)}, {"moves": 2}):
        with pytest.raises(GroupInUseError, match="import is refused while workers of app 'bank' are live"):
            await imported(log, {"a": "2"})
        with pytest.raises(GroupInUseError, match="reset is refused"):
            await plan_reset(log, APP, SETTINGS, [])
    assert await committed(log) == {"a": "1"}


async def test_what_was_let_go_meanwhile_commits_nothing_though_it_came_back(log):
    await imported(log, {"a": "1"})
    before = await log.admin.group_offsets("bank")
    async with held_group(log, "bank", SETTINGS, {"moves": ("moves",)}, {"moves": 2}) as held:
        mine = held._group.membership.member_id
        await log._database.writer.write(lambda sql: membership.leave(sql, "bank", mine))
        async with asyncio.timeout(20):
            while held._group.membership is None or held._group.membership.member_id == mine:
                await log.changed()
        with pytest.raises(GroupInUseError, match="No offsets were changed"):
            await held.commit({TopicPartition("moves", 0): OffsetMark(5)})
    assert await log.admin.group_offsets("bank") == before


async def test_a_worker_that_came_before_the_deletion_keeps_everything(log):
    await imported(log, {"a": "1"})
    plan = await plan_reset(log, APP, SETTINGS, [])
    assert [(topic.name, topic.kind, topic.records) for topic in plan.topics] == [
        ("bank-names-changelog", "changelog", 1),
        ("bank-other-changelog", "changelog", 0),
        ("bank-replies", "replies", 0),
    ]
    async with held_group(log, "bank", SETTINGS, {"moves": ("moves",)}, {"moves": 2}):
        with pytest.raises(GroupInUseError, match="nothing was deleted"):
            await reset(log, plan)
    assert await committed(log) == {"a": "1"}
    await reset(log, plan)
    assert await log.admin.topics() == ["moves"]
    assert await log.admin.groups() == []
    assert await start_at(log, APP, SETTINGS, "earliest") == {TopicPartition("moves", n): 0 for n in range(2)}
    assert sorted(await log.admin.group_offsets("bank")) == [TopicPartition("moves", n) for n in range(2)]


async def test_pairs_of_a_set_table_lie_where_their_key_does(log):
    app = sf.App("tagged")
    things = app.topic("things", key_type=str, value_type=str, partitions=4)
    tags = app.set_table("tags", key_type=str, member_type=str)

    @app.agent(things, tables=[tags])
    async def tag(stream: sf.Stream[str]) -> None:
        async for event in stream.events():
            tags[event.key].add(event.value)

    keys = [f"thing {number}" for number in range(20)]
    rows = {tags.pairs.key_codec.encode((key, "new")): b"" for key in keys}
    await import_table(log, app, app.settings({}), "tags", rows)
    found = await TableLog.find(app, "tags", log.admin)
    folds = await found.fold(log, {number: CommitMark() for number in range(4)})
    placed = {tags.pairs.key_codec.decode(key)[0]: fold.partition for fold in folds for key in fold.values}
    assert placed == {key: partition_for(key.encode(), 4) for key in keys}


async def test_a_key_that_partition_by_cannot_place_is_named_and_nothing_is_written(log):
    app = sf.App("visited")
    clicks = app.topic("clicks", key_type=str, value_type=str, partitions=4)
    by_user = {"ann": "ann", "bob": 7}
    visits = app.table("visits", key_type=tuple[str, int], value_type=int, partition_by=lambda key: by_user[key[0]])

    @app.agent(clicks, tables=[visits])
    async def visit(stream: sf.Stream[str]) -> None:
        async for _ in stream:
            pass

    for user, says in (("bob", "partition_by= gives int 7"), ("cid", "partition_by= raised KeyError")):
        rows = {visits.key_codec.encode((one, 1)): b"1" for one in ("ann", user)}
        place_of = {visits.key_codec.encode((user, 1)): "visits.jsonl, line 2"}.__getitem__
        with pytest.raises(
            sf.ProductionError, match=rf"^visits.jsonl, line 2: table 'visits': {says}.*nothing was imp"
        ):
            await import_table(log, app, app.settings({}), "visits", rows, place_of=place_of)
    found = await TableLog.find(app, "visits", log.admin)
    assert not any(fold.records for fold in await found.fold(log, {number: CommitMark() for number in range(4)}))
    await import_table(log, app, app.settings({}), "visits", {visits.key_codec.encode(("ann", 1)): b"1"})
    (placed,) = [fold.partition for fold in await found.fold(log, dict.fromkeys(range(4), CommitMark())) if fold.values]
    assert placed == partition_for(b"ann", 4) == found.home_of(("ann", 1))
