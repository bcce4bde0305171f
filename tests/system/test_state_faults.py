"""Faults of workers with tables, one by one, in real processes on real logs: what is promised, and what is said."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from streamflow.model.record import TopicPartition
from tests.kafka.broker import HOST, Broker
from tests.kafka.proxy import Proxy, Verdict, api_key
from tests.oracle.reading import number_in, records
from tests.oracle.stores import stores_of
from tests.ports import free_port
from tests.system.harness import STOPPED, System, numbered, until

pytestmark = [pytest.mark.system, pytest.mark.slow]

PRODUCE = 0
REFUSED = 2
FAILED = 1
LONG_MS = 600_000
"""A transaction time-out that no test outlives."""
SUMS = """
sums = app.table("sums", key_type=str, value_type=int, default=int)

@app.agent(numbers, sink=results)
async def add(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for key, number in stream.items():
        sums[key] += number
        yield sums[key]
"""
DYING = """
import signal
from streamflow.log.kafka.transaction_coordinator import TransactionCoordinator
from streamflow.runtime.exactly_once import ExactlyOnce

def die_in(owner, name, after) -> None:
    whole = getattr(owner, name)
    calls = 0

    async def dying(self, *args):
        nonlocal calls
        calls += 1
        if calls == 5 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = await whole(self, *args)
        if calls == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    setattr(owner, name, dying)

if "DIE" in os.environ:
    owner, name, after = {
        "before the commit": (ExactlyOnce, "_store", False),
        "after the commit": (ExactlyOnce, "_store", True),
        "before its end": (TransactionCoordinator, "commit", False),
        "after its end": (TransactionCoordinator, "commit", True),
    }[os.environ["DIE"]]
    die_in(owner, name, after)
"""
"""Kills the process in its fifth commit."""


def write_app(system: System, body: str, *, transaction_timeout_ms: int = LONG_MS, **options: object) -> None:
    system.write_app(body, **options)
    if system.is_kafka:
        path = system.folder / "app.py"
        server = system.broker.removeprefix("kafka://")
        text = path.read_text()
        made = f"broker=sf.Kafka(servers={server!r}, transaction_timeout_ms={transaction_timeout_ms})"
        path.write_text(text.replace(f"broker={system.broker!r}", made))
        assert path.read_text() != text


async def check_sums(system: System) -> None:
    """Results and changelog are the fold of all the input, and no transaction is open."""
    log = await system.log()
    taken, made = await system.read("numbers"), await system.read("results")
    for partition, rows in taken.items():
        sums: dict[bytes | None, int] = {}
        expected = []
        for key, value in rows:
            sums[key] = sums.get(key, 0) + value
            expected.append((key, sums[key]))
        assert made[partition] == expected
        assert await changelog(system, partition) == sums
    tps = [TopicPartition(system.topic("results"), partition) for partition in taken]
    tps += [TopicPartition(f"{system.app_id}-sums-changelog", partition) for partition in taken]
    assert await log.admin.end_offsets(tps) == await log.admin.high_watermarks(tps)


async def changelog(system: System, partition: int, stop: int | None = None) -> dict[bytes | None, int]:
    tp = TopicPartition(f"{system.app_id}-sums-changelog", partition)
    return {record.key: number_in(record.value) async for record in records(await system.log(), tp, stop=stop)}


async def check_stores(system: System) -> None:
    """No store is ahead of the log: each is the fold of what is committed up to its checkpoint."""
    for store in stores_of(system.folder / "data", system.app_id):
        position = store.checkpoint.changelogs.get("sums", 0)
        found = {key: number_in(value) for key, value in store.tables["sums"].items()}
        assert found == await changelog(system, store.identity.partition, position), store.path


async def finished(system: System, total: int) -> None:
    """A worker that lives processes the rest, and it is right."""
    worker = await system.started()
    await system.has_committed("numbers", total)
    assert await worker.stops() == STOPPED, worker.said
    assert "Traceback" not in worker.said, worker.said
    await check_sums(system)
    await check_stores(system)


async def dies(system: System, when: str) -> None:
    write_app(system, DYING + SUMS)
    await system.create("numbers")
    async with system.load("numbers", per_s=1000) as sent:
        worker = system.start(DIE=when)
        assert await worker.ends() == -signal.SIGKILL, worker.said
    await check_stores(system)
    await finished(system, sent.total())


@pytest.mark.parametrize("when", ["before the commit", "after the commit"])
async def test_kill_9_in_mid_commit_on_sqlite(when: str, sqlite: System) -> None:
    await dies(sqlite, when)


@pytest.mark.kafka
@pytest.mark.parametrize("when", ["before its end", "after its end", "after the commit"])
async def test_kill_9_in_mid_commit_on_kafka(when: str, kafka: System) -> None:
    """The slot's next process has the same transactional id: it ends what is open at once, whatever the time-out."""
    await dies(kafka, when)


async def test_two_workers_with_a_copied_data_dir(system: System) -> None:
    """The later one fences the one before, which says why and exits."""
    write_app(system, SUMS)
    await system.create("numbers")
    async with system.load("numbers", per_s=500) as sent:
        first = await system.started()
        await system.has_committed("numbers", 200)
        data = system.folder / "data"
        copy = system.folder / "copy"
        shutil.copytree(data, copy, ignore=lambda folder, names: [name for name in names if name.startswith("log.db")])
        second = system.start("--data-dir", str(copy))
        assert await first.ends() == REFUSED, first.said
        assert "the data directory was copied" in first.said
        assert "Traceback" not in first.said
        await second.ready()
    await system.has_committed("numbers", sent.total())
    assert await second.stops() == STOPPED, second.said
    await check_sums(system)


async def test_state_whose_offsets_have_expired_is_refused(system: System) -> None:
    write_app(system, SUMS)
    await system.create("numbers")
    await system.write("numbers", numbered(100))
    worker = await system.started()
    await system.has_committed("numbers", 100)
    assert await worker.stops() == STOPPED
    log = await system.log()

    async def is_empty() -> bool:
        return not await log.admin.group_members(system.app_id)

    await until(is_empty, "the end of the group")
    await log.admin.delete_group(system.app_id)
    for _ in range(2):  # nothing about it is forgotten by a refusal
        again = system.start()
        assert await again.ends() == REFUSED, again.said
        assert "no committed offset" in again.said
        assert "streamflow reset" in again.said
    assert await system.count("results") == 100


@pytest.mark.kafka
async def test_a_source_with_tables_that_grows(kafka: System) -> None:
    write_app(kafka, SUMS, partitions=2)
    await kafka.create("numbers", partitions=2)
    await kafka.write("numbers", numbered(100))
    worker = await kafka.started(STREAMFLOW_KAFKA_METADATA_MAX_AGE_MS="1000")
    await kafka.has_committed("numbers", 100)
    await kafka.grow("numbers", 4)
    again = kafka.start()
    assert await again.ends() == REFUSED, again.said
    assert "4" in again.said
    assert "keys" in again.said
    worker.signal(signal.SIGTERM)
    await worker.ends()


@pytest.mark.kafka
async def test_an_output_that_the_topic_takes_no_more(make_broker: Callable[..., Broker], tmp_path: Path) -> None:
    """Poison: the limit is lowered after the worker has read it, so it is noticed at commit time only."""
    broker = make_broker()
    body = """
texts = app.topic(ID + "-texts", key_type=str, value_type=str, partitions=1)
sums = app.table("sums", key_type=str, value_type=int, default=int)

@app.agent(numbers, sink=texts)
async def write(stream: sf.Stream[int]) -> AsyncIterator[str]:
    async for key, number in stream.items():
        sums[key] += 1
        yield "x" * number
"""
    async with System(tmp_path, f"kafka://{broker.bootstrap}") as system:
        write_app(system, body, compression="none")
        await system.create("numbers", partitions=1)
        worker = await system.started()
        await system.write("numbers", [(b"a", 10)])
        await system.has("texts", 1)
        set_limit(broker, system.topic("texts"), 1000)
        await system.write("numbers", [(b"a", 5000)])
        assert await worker.ends() == FAILED, worker.said
        assert system.topic("texts") in worker.said
        assert "Traceback" not in worker.said, worker.said
        assert await system.committed("numbers") == {0: 1}

        # The next one knows the limit, so that `on_error` decides, with the record's place.
        again = system.start()
        assert await again.ends() == FAILED, again.said
        assert f"{system.topic('numbers')}-0-1" in again.said
        assert await system.committed("numbers") == {0: 1}
        assert await changelog(system, 0) == {b"a": 1}

        set_limit(broker, system.topic("texts"), 1_000_000)
        last = await system.started()
        await system.has_committed("numbers", 2)
        assert await last.stops() == STOPPED
        assert await changelog(system, 0) == {b"a": 2}


def set_limit(broker: Broker, topic: str, limit_bytes: int) -> None:
    broker.configure_topic(topic, {"max.message.bytes": str(limit_bytes)})


@pytest.mark.kafka
@pytest.mark.parametrize("committed", [True, False])
async def test_an_open_transaction_while_restoring_is_waited_out(committed: bool, kafka: System) -> None:
    """What it holds may be committed yet: the offsets' marker may come before the changelog's (KAFKA-10167)."""

    write_app(kafka, SUMS, partitions=1)
    await kafka.create("numbers", partitions=1)
    await kafka.write("numbers", [(b"a", 1)])
    worker = await kafka.started()
    await kafka.has_committed("numbers", 1)
    assert await worker.stops() == STOPPED
    shutil.rmtree(kafka.folder / "data")

    open_one = AIOKafkaProducer(
        bootstrap_servers=kafka.broker.removeprefix("kafka://"),
        transactional_id=kafka.topic("open"),
        transaction_timeout_ms=60_000,
    )
    async with open_one:
        await open_one.begin_transaction()
        value = (100).to_bytes(8, "big")
        await open_one.send_and_wait(f"{kafka.app_id}-sums-changelog", value, key=b"a", partition=0)
        again = kafka.start()
        await again.says("assigned: ")
        await kafka.write("numbers", [(b"a", 10)])
        await asyncio.sleep(1.5)
        assert await kafka.count("results") == 1  # it processes nothing on half of its state
        await (open_one.commit_transaction() if committed else open_one.abort_transaction())
    await kafka.has("results", 2)
    assert await again.stops() == STOPPED
    assert (await kafka.rows("results"))[-1] == (b"a", 110 if committed else 11)


@pytest.mark.kafka
async def test_a_first_commit_that_was_aborted_is_no_state(kafka: System) -> None:
    """It leaves a changelog that is longer and holds nothing, and no offsets: that is no reason to refuse."""
    write_app(kafka, DYING.replace("calls == 5", "calls == 1") + SUMS, commit_interval_ms=1_500)
    await kafka.create("numbers")
    await kafka.write("numbers", numbered(100))
    worker = kafka.start(DIE="before its end")
    assert await worker.ends() == -signal.SIGKILL, worker.said
    changelogs = [TopicPartition(f"{kafka.app_id}-sums-changelog", partition) for partition in range(4)]
    written = await (await kafka.log()).admin.high_watermarks(changelogs)
    assert any(written.values()), "the first commit had nothing of the table"
    assert await kafka.committed("numbers") == {}
    await finished(kafka, 100)


@pytest.mark.kafka
async def test_a_zombie_that_wakes_up_in_the_middle_of_its_commit(kafka: System) -> None:
    """Stopped with its transaction open, beyond session and transaction time-outs: nothing of it is ever seen."""
    stopping = DYING.replace("signal.SIGKILL", "signal.SIGSTOP")
    write_app(kafka, stopping + SUMS, transaction_timeout_ms=2_000)
    await kafka.create("numbers")
    async with kafka.load("numbers", per_s=500) as sent:
        zombie = kafka.start(DIE="before its end")
        await until(lambda: _is_stopped(zombie.pid), "the zombie's stop")
        other = await kafka.started()
        await other.owns(kafka.topic("numbers"), 4)
        await kafka.has("results", await kafka.count("results") + 500)
        zombie.signal(signal.SIGCONT)
        await zombie.owns(kafka.topic("numbers"), 2)
        await kafka.has("results", await kafka.count("results") + 500)
    await kafka.has_committed("numbers", sent.total())
    for worker in (zombie, other):
        assert await worker.stops() == STOPPED, worker.said
        assert "Traceback" not in worker.said, worker.said
    await check_sums(kafka)
    await check_stores(kafka)


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


@pytest.mark.kafka
async def test_a_changelog_record_of_a_stopped_worker_that_arrives_late_at_least_once(
    make_broker: Callable[..., Broker], tmp_path: Path
) -> None:
    """No broker refuses it. Its successor notices, and whoever restores the table finds what was committed."""
    port = free_port()
    broker = make_broker(proxied_ports=[port])
    arrives, held = asyncio.Event(), asyncio.Event()

    def hold_changelog(request: bytes) -> Verdict:
        if api_key(request) != PRODUCE or b"-sums-changelog" not in request:
            return "pass"
        held.set()
        return arrives

    target = broker.proxied()
    async with Proxy(port, target) as proxy, System(tmp_path, f"kafka://{broker.bootstrap}") as system:
        system.write_app(SUMS, processing_guarantee="at_least_once")
        path = tmp_path / "app.py"
        own = f"broker=sf.Kafka(servers=os.environ.get('SERVERS', {broker.bootstrap!r}))"
        path.write_text(path.read_text().replace(f"broker={system.broker!r}", own))
        await system.create("numbers", partitions=1)
        zombie = await system.started(SERVERS=f"{HOST}:{port}")
        await system.write("numbers", [(b"a", 1), (b"b", 1)])
        await system.has_committed("numbers", 2)
        proxy.on_request = hold_changelog
        await system.write("numbers", [(b"a", 10)])
        await held.wait()
        zombie.signal(signal.SIGSTOP)
        successor = await system.started()
        await successor.owns(system.topic("numbers"), 1)
        await system.write("numbers", [(b"a", 100)])
        await system.has_committed("numbers", 4)
        arrives.set()
        changelog = TopicPartition(f"{system.app_id}-sums-changelog", 0)
        log = await system.log()

        async def has_arrived() -> bool:
            return [number_in(record.value) async for record in records(log, changelog)][-1] == 11

        await until(has_arrived, "the zombie's record")
        await system.write("numbers", [(b"b", 1)])
        await system.has_committed("numbers", 5)
        await successor.says("another process has written there")
        zombie.kill()
        successor.kill()
        shutil.rmtree(tmp_path / "data")
        last = await system.started()
        await system.write("numbers", [(b"a", 1000), (b"b", 1)])
        await system.has_committed("numbers", 7)
        results = await system.rows("results")
        assert results[-2:] == [(b"a", 1111), (b"b", 3)]
        assert await last.stops() == STOPPED
