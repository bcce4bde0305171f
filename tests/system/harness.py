"""Real `streamflow worker` processes on a real log: started, asked, killed; every wait has a deadline.

Nothing here sleeps for a fixed time to let something happen: a test waits for what it needs, as the log, the worker's
web server or its output tells it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from streamflow.clock import SystemClock
from streamflow.log.api import Log, NewTopic
from streamflow.log.batch import BatchBuilder, LogRecord, SealedBatch
from streamflow.log.codec import NONE
from streamflow.log.connect import connect
from streamflow.model.partitioner import partition_for
from streamflow.model.record import TopicPartition

COMMAND = Path(sys.executable).parent / "streamflow"
STOPPED = 0
DEADLINE_S = 25.0
"""No test waits longer for something that has to come."""

HEADER = """
import asyncio
import os
import pathlib
import time
from collections.abc import AsyncIterator
import streamflow as sf

ID = {app_id!r}
HERE = pathlib.Path(__file__).parent
app = sf.App(ID, broker={broker!r}, data_dir={data_dir!r}, **{options!r})
numbers = app.topic(ID + "-numbers", key_type=str, value_type=int)
results = app.topic(ID + "-results", key_type=str, value_type=int)
"""

DOUBLE = """
@app.agent(numbers, sink=results)
async def double(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        yield number * 2
"""

CHAIN = """
middle = app.topic(ID + "-middle", key_type=str, value_type=int)
grouped = app.topic(ID + "-grouped", key_type=str, value_type=int)

@app.agent(numbers, sink=middle)
async def first(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        yield number + 1

@app.agent(middle, sink=results)
async def second(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        yield number * 2

def last_digit(number: int) -> str:
    return "d" + str(number % 10)
"""
"""Two agents one after the other, and what a step by last digit needs."""

Key = bytes | None
Row = tuple[Key, int]
"""A record's key, and its value where that is a number."""


async def until(condition: Callable[[], Any], what: Callable[[], str] | str, within_s: float = DEADLINE_S) -> Any:
    """Wait until the condition, a function or a coroutine function, holds; returns what it returned."""
    deadline = time.monotonic() + within_s
    while True:
        found = condition()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:g} s: {what if isinstance(what, str) else what()}")
        await asyncio.sleep(0.02)


class Worker:
    """A worker process (or any other command); its two outputs go to files."""

    def __init__(
        self, program: Sequence[str | Path], *, folder: Path, name: str, environment: Mapping[str, str]
    ) -> None:
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                program,
                cwd=folder,
                env={**environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        """Its standard output so far."""
        return self._out.read_text(errors="replace")

    @property
    def said_as_errors(self) -> str:
        """Its standard error so far: log lines, in order."""
        return self._err.read_text(errors="replace")

    @property
    def said(self) -> str:
        """Everything so far."""
        return self.said_as_errors + self.out

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    @property
    def rss_mib(self) -> float:
        """Its resident memory; 0 when it is gone."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0
        return round(pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), 1)

    async def says(self, pattern: str, *, times: int = 1, within_s: float = DEADLINE_S) -> re.Match[str]:
        """Wait until it has said that so often."""

        def found() -> list[re.Match[str]]:
            matches = list(re.finditer(pattern, self.said))
            assert len(matches) >= times or self.runs, f"it ended and never said {pattern!r}:\n{self.said}"
            return matches if len(matches) >= times else []

        matches: list[re.Match[str]] = await until(found, lambda: f"{pattern!r} in:\n{self.said}", within_s)
        return matches[-1]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """`kill -9`, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    async def ends(self, within_s: float = DEADLINE_S) -> int:
        """Wait for its end; the exit code."""
        await until(lambda: not self.runs, lambda: f"the end of the worker, which said:\n{self.said}", within_s)
        code = self.process.returncode
        assert isinstance(code, int)
        return code

    async def stops(self, within_s: float = DEADLINE_S) -> int:
        """SIGTERM, and wait for its end."""
        self.signal(signal.SIGTERM)
        return await self.ends(within_s)

    # --- the web server ----------------------------------------------------------------------------------------

    async def url(self) -> str:
        return (await self.says(r"web +(http://[\d.:]+)"))[1]

    async def get(self, path: str) -> tuple[int, str]:
        return await asyncio.to_thread(_get, await self.url() + path)

    async def ready(self) -> Worker:
        """Wait until `/ready` says so."""

        async def is_ready() -> bool:
            assert self.runs, f"it ended instead of getting ready:\n{self.said}"
            return (await self.get("/ready"))[0] == 200

        await until(is_ready, lambda: f"/ready of a worker that said:\n{self.said}")
        return self

    async def status(self) -> Any:
        """The first process's status, once it has answered: one that is busy may take longer than one request waits."""

        async def told() -> str:
            assert self.runs, f"it ended and tells no status:\n{self.said}"
            code, text = await self.get("/status.json")
            return text if code == 200 else ""

        return json.loads(await until(told, lambda: f"the status of a worker that said:\n{self.said}"))[0]["status"]

    async def owned(self, topic: str) -> set[int]:
        """The partitions of a topic that it processes."""
        tasks = (await self.status())["tasks"]
        return {each["partition"] for task in tasks for each in task["partitions"] if each["topic"] == topic}

    async def owns(self, topic: str, count: int, *, within_s: float = DEADLINE_S) -> set[int]:
        """Wait until it processes so many of the topic's partitions."""
        await self.ready()

        async def enough() -> bool:
            return len(await self.owned(topic)) == count

        await until(enough, lambda: f"{count} partitions of {topic} at a worker that said:\n{self.said}", within_s)
        return await self.owned(topic)


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


class System:
    """One app on one log: its file, its workers, and a connection of the test's own to write, read and look."""

    def __init__(self, folder: Path, broker: str) -> None:
        self.folder = folder
        self.broker = broker
        self.app_id = f"app-{uuid4().hex[:8]}"
        self.is_kafka = broker.startswith("kafka://")
        self.workers: list[Worker] = []
        self._counted: dict[TopicPartition, tuple[int, int]] = {}
        self._stack = contextlib.AsyncExitStack()
        self._log: Log | None = None
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("STREAMFLOW_", "PYTHON"))
        } | {"COLUMNS": "200", "NO_COLOR": "1"}

    async def __aenter__(self) -> System:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for worker in self.workers:
            if worker.runs:
                worker.kill()
        await self._stack.aclose()

    def topic(self, name: str) -> str:
        """Full name of one of the app's topics; brokers are shared between tests."""
        return f"{self.app_id}-{name}"

    # --- the app -----------------------------------------------------------------------------------------------

    def write_app(self, body: str = DOUBLE, **options: object) -> None:
        """Write `app.py`: the header above, then this."""
        settings = {"session_timeout_ms": 2_000, "heartbeat_interval_ms": 100, **options}
        header = HEADER.format(
            app_id=self.app_id, broker=self.broker, data_dir=str(self.folder / "data"), options=settings
        )
        (self.folder / "app.py").write_text(header + body)

    def command(self, *arguments: str, **environment: str) -> Worker:
        """Start any command of `streamflow`."""
        return self._run([COMMAND, *arguments], arguments[0], environment)

    def program(self, *arguments: str) -> Worker:
        """Start a Python program."""
        return self._run([sys.executable, *arguments], "python", {})

    def _run(self, program: Sequence[str | Path], name: str, environment: Mapping[str, str]) -> Worker:
        worker = Worker(
            program,
            folder=self.folder,
            name=f"{len(self.workers)}-{name}",
            environment={**self._environment, **environment},
        )
        self.workers.append(worker)
        return worker

    def start(self, *arguments: str, **environment: str) -> Worker:
        """Start a worker."""
        return self.command("worker", "app.py", "--web-port", "0", *arguments, **environment)

    async def started(self, *arguments: str, **environment: str) -> Worker:
        """Start a worker and wait until it is ready."""
        return await self.start(*arguments, **environment).ready()

    # --- the log -----------------------------------------------------------------------------------------------

    async def log(self) -> Log:
        """A connection for this test."""
        if self._log is None:
            made = connect(self.broker, clock=SystemClock(), client_id="test")
            self._log = await self._stack.enter_async_context(made)
        return self._log

    async def create(self, *names: str, partitions: int = 4) -> None:
        """Make topics before any worker does."""
        await (await self.log()).admin.create([NewTopic(self.topic(name), partitions) for name in names])

    async def grow(self, name: str, partitions: int) -> None:
        """Give a topic on Kafka more partitions, and wait until they are there."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.broker.removeprefix("kafka://"))
        await admin.start()
        try:
            await admin.create_partitions({self.topic(name): NewPartitions(partitions)})
        finally:
            await admin.close()

        async def has_grown() -> bool:
            return len(await self.partitions(name)) == partitions

        await until(has_grown, "the new partitions")

    async def write(self, name: str, rows: Iterable[Row]) -> None:
        """Write numbers by key; returns when the log has them."""
        log = await self.log()
        topic = self.topic(name)
        count = (await log.admin.describe([topic]))[topic].partitions
        async with log.producer() as producer:
            for partition, sealed in batches(rows, count):
                await producer.enqueue(TopicPartition(topic, partition), sealed)
            await producer.flush()

    async def partitions(self, name: str) -> list[TopicPartition]:
        topic = self.topic(name)
        described = await (await self.log()).admin.describe([topic])
        return [TopicPartition(topic, number) for number in range(described[topic].partitions)] if described else []

    async def read(self, name: str) -> dict[int, list[Row]]:
        """Everything that is in a topic now, by partition."""
        log = await self.log()
        partitions = await self.partitions(name)
        starts, ends = await log.admin.start_offsets(partitions), await log.admin.end_offsets(partitions)
        found: dict[int, list[Row]] = {tp.partition: [] for tp in partitions}
        left = {tp for tp in partitions if starts[tp] < ends[tp]}
        async with log.reader("test") as reader, asyncio.timeout(DEADLINE_S):
            for tp in left:
                reader.add(tp, starts[tp])
                reader.ask(tp)
            while left:
                for fetched in await reader.receive():
                    assert fetched.error is None, fetched.error
                    rows = [_row(record) for batch in fetched.batches for record in batch.open()]
                    found[fetched.tp.partition] += rows
                    if fetched.next_offset >= ends[fetched.tp]:
                        left.discard(fetched.tp)
                    else:
                        reader.ask(fetched.tp)
        return found

    async def rows(self, name: str) -> list[Row]:
        """Everything that is in a topic now."""
        return [row for rows in (await self.read(name)).values() for row in rows]

    async def count(self, name: str) -> int:
        """How many records a topic has (of those that readers may see); markers of transactions are none."""
        log = await self.log()
        partitions = await self.partitions(name)
        ends = await log.admin.end_offsets(partitions)
        starts = await log.admin.start_offsets(partitions)
        async with log.reader("count") as reader:
            for tp in partitions:
                position, count = self._counted.get(tp, (starts[tp], 0))
                reader.add(tp, position)
                while position < ends[tp]:
                    reader.ask(tp)
                    (fetched,) = await reader.receive()
                    count += sum(1 for batch in fetched.batches for _ in batch.open())
                    position = fetched.next_offset
                reader.remove(tp)
                self._counted[tp] = position, count
        return sum(self._counted[tp][1] for tp in partitions)

    async def has(self, name: str, count: int, *, within_s: float = DEADLINE_S) -> None:
        """Wait until a topic has at least so many records."""

        async def enough() -> bool:
            return await self.count(name) >= count

        await until(enough, lambda: f"{count} records in {name}; {self.told()}", within_s)

    async def committed(self, name: str) -> dict[int, int]:
        """The group's offsets in a topic, by partition."""
        marks = await (await self.log()).admin.group_offsets(self.app_id)
        return {tp.partition: mark.offset for tp, mark in marks.items() if tp.topic == self.topic(name)}

    async def has_committed(self, name: str, total: int, *, within_s: float = DEADLINE_S) -> None:
        """Wait until the group's offsets in a topic add up to at least that."""

        async def enough() -> bool:
            return sum((await self.committed(name)).values()) >= total

        await until(enough, lambda: f"{total} committed in {name}; {self.told()}", within_s)

    def told(self) -> str:
        """What all workers have said, for a failure's message."""
        return "\n".join(f"--- worker {number}:\n{each.said[-6000:]}" for number, each in enumerate(self.workers))

    @contextlib.asynccontextmanager
    async def load(self, name: str, *, per_s: int, keys: int = 20) -> AsyncIterator[Counter[Key]]:
        """Write 0, 1, 2, ... for each key while the block runs; yields how many of each key the log has."""
        log = await self.log()
        topic = self.topic(name)
        count = len(await self.partitions(name))
        acknowledged: Counter[Key] = Counter()
        stop = asyncio.Event()

        async def run() -> None:
            async with log.producer() as producer:
                while not stop.is_set():
                    rows = [(b"k%d" % key, acknowledged[b"k%d" % key]) for key in range(keys)]
                    for partition, sealed in batches(rows, count):
                        await producer.enqueue(TopicPartition(topic, partition), sealed)
                    await producer.flush()
                    acknowledged.update(key for key, _ in rows)
                    await asyncio.sleep(keys / per_s)

        task = asyncio.create_task(run())
        try:
            yield acknowledged
        finally:
            stop.set()
            async with asyncio.timeout(DEADLINE_S):
                await task


def numbered(count: int, *, keys: int = 20, start: int = 0) -> list[Row]:
    """`count` numbers, spread over keys."""
    return [(b"k%d" % (number % keys), number) for number in range(start, start + count)]


def per_key(rows: Iterable[Row]) -> dict[Key, list[int]]:
    """Values by key, in order."""
    found: dict[Key, list[int]] = defaultdict(list)
    for key, value in rows:
        found[key].append(value)
    return dict(found)


def without_repeats(values: Sequence[int]) -> list[int]:
    """What a reader that remembers each value keeps, in order of first sight."""
    return list(dict.fromkeys(values))


def batches(rows: Iterable[Row], partitions: int) -> Iterable[tuple[int, SealedBatch]]:
    builders: dict[int, BatchBuilder] = {}
    at_ms = SystemClock().now_ms()
    for number, (key, value) in enumerate(rows):
        partition = number % partitions if key is None else partition_for(key, partitions)
        data = value.to_bytes(8, "big", signed=True)
        builder = builders.get(partition)
        if builder is None or not builder.append(at_ms, key, data, []):
            if builder is not None:
                yield partition, builder.seal()
            builder = builders[partition] = BatchBuilder(NONE, 256 * 1024)
            builder.append(at_ms, key, data, [])
    for partition, builder in builders.items():
        yield partition, builder.seal()


def _row(record: LogRecord) -> Row:
    value = record.value or b""
    return record.key, int.from_bytes(value, "big", signed=True) if len(value) == 8 else -1
