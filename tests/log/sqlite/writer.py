"""A process that writes to a log until it is killed; a line on standard output for everything acknowledged.

    python -m tests.log.sqlite.writer MODE PATH NUMBER [SESSION_TIMEOUT_MS]

`batches`: plain batches. `commits`: atomic commits to two topics with the offset of a member. `member`: joins a group
and says what it has. `lock`: takes the write lock and keeps it.
"""

import asyncio
import os
import sqlite3
import sys
import time
from dataclasses import replace

from streamflow.clock import SystemClock
from streamflow.log.api import Assigned, AtomicCommit, GroupSettings, Lost, OffsetMark, Revoked
from streamflow.log.sqlite import execution
from streamflow.log.sqlite.log import SqliteLog
from streamflow.model.record import TopicPartition
from tests.contracts.records import Watched, batch, spread, until

SETTINGS = GroupSettings(session_timeout_ms=2000, heartbeat_interval_ms=100)


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # one system call: a killed process leaves no half line behind


async def write_batches(log: SqliteLog, number: str, _: GroupSettings) -> None:
    tp = TopicPartition("batches", 0)
    waiting: list[tuple[str, asyncio.Future[int]]] = []
    async with log.producer() as producer:
        for count in range(10**9):
            text = f"{number}-{count}"
            waiting.append((text, await producer.enqueue(tp, batch(text.encode(), bytes(count % 5000)))))
            if len(waiting) > 20:
                first, stored = waiting.pop(0)
                say(f"{first} {await stored}")


async def write_commits(log: SqliteLog, number: str, settings: GroupSettings) -> None:
    source = TopicPartition(f"source-{number}", 0)
    async with (
        log.transactional_producer(f"writer-{number}") as producer,
        log.group(f"group-{number}", frozenset({source.topic}), spread, settings) as group,
        Watched(group) as member,
    ):
        await until(lambda: member.owned)
        mark = (await group.committed([source]))[source]
        for count in range(0 if mark is None else mark.offset, 10**9):
            outputs = [(TopicPartition(topic, 0), batch(f"{number}-{count}".encode())) for topic in ("out0", "out1")]
            await producer.commit(AtomicCommit(outputs, {source: OffsetMark(count + 1)}, group.membership))
            group.report_progress()
            say(f"{number}-{count} 0")


async def be_member(log: SqliteLog, number: str, settings: GroupSettings) -> None:
    async with log.group("group", frozenset({"t"}), spread, settings) as group:
        while True:
            event = await group.next_event()
            numbers = sorted(tp.partition for tp in event.partitions)
            match event:
                case Assigned():
                    await group.commit(dict.fromkeys(event.partitions, OffsetMark(int(number))), group.membership)
                    say(f"assigned {numbers}")
                case Revoked():
                    group.revoked(event.partitions)
                    say(f"revoked {numbers}")
                case Lost():
                    say(f"lost {numbers}")


def keep_locked(path: str) -> None:
    sql = sqlite3.connect(path, isolation_level=None)
    sql.execute("BEGIN IMMEDIATE")
    say("locked")
    time.sleep(600)


async def main(mode: str, path: str, number: str, session_timeout_ms: str = "") -> None:
    settings = replace(SETTINGS, session_timeout_ms=int(session_timeout_ms or SETTINGS.session_timeout_ms))
    async with SqliteLog.at_path(path, clock=SystemClock()) as log:
        await {"batches": write_batches, "commits": write_commits, "member": be_member}[mode](log, number, settings)


if __name__ == "__main__":
    execution.CHECKPOINT_BYTES = 300_000  # so often that killing meets it
    if sys.argv[1] == "lock":
        keep_locked(sys.argv[2])
    asyncio.run(main(*sys.argv[1:]))
