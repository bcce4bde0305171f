"""The system's clock is set by an hour while the log is in use: groups do not notice it, retention goes by it."""

import asyncio

import pytest

from streamflow.clock import SystemClock
from streamflow.log.api import GroupSettings, NewTopic, OffsetMark
from streamflow.log.sqlite.log import SqliteLog
from streamflow.model.record import TopicPartition
from tests.contracts.records import Watched, batch, read_to, spread, until, values

HOUR_MS = 3_600_000
TP = TopicPartition("t", 0)
SETTINGS = GroupSettings(session_timeout_ms=1500, heartbeat_interval_ms=50)


class SetClock(SystemClock):
    """The system's clock, set by somebody."""

    def __init__(self) -> None:
        self.off_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.off_ms


@pytest.mark.parametrize("jump_ms", [HOUR_MS, -HOUR_MS])
async def test_a_group_goes_on(path, jump_ms):
    clock = SetClock()
    async with SqliteLog.at_path(path, clock=clock) as log:
        await log.admin.create([NewTopic("t", 4)])
        async with (
            log.group("g", frozenset({"t"}), spread, SETTINGS) as first,
            log.group("g", frozenset({"t"}), spread, SETTINGS) as second,
            Watched(first) as one,
            Watched(second) as other,
        ):
            await until(lambda: len(one.owned) == len(other.owned) == 2)
            told = len(one.events), len(other.events)
            clock.off_ms = jump_ms
            await asyncio.sleep(2)  # longer than a session
            assert (len(one.events), len(other.events)) == told
            for group, member in ((first, one), (second, other)):
                await group.commit({tp: OffsetMark(0) for tp in member.owned}, group.membership)


async def test_retention_after_the_clock_was_set_back_keeps_what_it_should(path):
    clock = SetClock()
    async with SqliteLog.at_path(path, clock=clock) as log:
        await log.admin.create([NewTopic("t", 1, config={"retention.ms": str(HOUR_MS // 2)})])
        async with log.producer() as producer, log.reader("r") as reader:
            await (await producer.enqueue(TP, batch(b"before", timestamp_ms=clock.now_ms())))
            clock.off_ms = -HOUR_MS
            await log.maintain()
            await (await producer.enqueue(TP, batch(b"after", timestamp_ms=clock.now_ms())))
            await log.maintain()
            reader.add(TP, 0)
            assert values(await read_to(reader, TP, 2)) == [b"before", b"after"]
            clock.off_ms = HOUR_MS  # and forward: both are older than half an hour now
            await log.maintain()
            assert await log.admin.start_offsets([TP]) == {TP: 2}
