"""Sends outside of turns against a producer that fails, has no room, or is closed; how much may be on its way."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

import streamflow as sf
from streamflow.clock import SystemClock
from streamflow.log import codec
from streamflow.log.api import Producer, TopicDescription
from streamflow.log.batch import SealedBatch
from streamflow.log.codec import NONE
from streamflow.model.record import TopicPartition
from streamflow.processing.context import Outgoing
from streamflow.runtime import sender as sender_module
from streamflow.runtime.sender import DirectSender
from streamflow.runtime.targets import KnownTargets
from streamflow.sensors import Sensors

app = sf.App("sends", broker="memory://")
topic = app.topic("t", key_type=str, value_type=int)
blobs = app.topic("blobs", value_type=bytes)

MAX_BYTES = 10_000


class FakeProducer:
    """Fails a partition after a failure until `reset`, as the contract says; takes nothing while `room` is not set."""

    def __init__(self) -> None:
        self.failing: sf.StreamFlowError | None = None
        self.failed: dict[TopicPartition, sf.StreamFlowError] = {}
        self.room = asyncio.Event()
        self.room.set()
        self.taken: list[int] = []
        self.values: list[bytes | None] = []

    async def enqueue(self, tp: TopicPartition, batch: SealedBatch) -> asyncio.Future[int]:
        await self.room.wait()
        stored: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if self.failing is not None:
            self.failed.setdefault(tp, self.failing)
        if tp in self.failed:
            stored.set_exception(self.failed[tp])
            stored.exception()
        else:
            stored.set_result(len(self.taken))
            self.taken.append(batch.num_records)
            self.values += [record.value for record in codec.Batch(batch.unstamped())]
        return stored

    async def flush(self) -> None:
        for error in self.failed.values():
            raise error

    def reset(self, tp: TopicPartition) -> None:
        self.failed.pop(tp, None)


@pytest.fixture
def producer() -> FakeProducer:
    return FakeProducer()


@pytest.fixture
def sender(producer: FakeProducer) -> DirectSender:
    known = KnownTargets(cast(Any, SimpleNamespace()), NONE)
    known.add(topic, TopicDescription("t", 1, {}))
    known.add(blobs, TopicDescription("blobs", 1, {}))
    return DirectSender(cast(Producer, producer), known, SystemClock(), Sensors(), max_bytes=MAX_BYTES)


def outgoing(topic: sf.Topic[Any, Any], key: Any, value: Any) -> Outgoing:
    return topic, key, value, None, None, ()


async def send(sender: DirectSender, value: int) -> sf.RecordMetadata:
    return await sender.send(outgoing(topic, "k", value))


def send_nowait(sender: DirectSender, value: int) -> None:
    sender.send_nowait(outgoing(topic, "k", value))


async def test_a_failed_send_does_not_fail_those_after_it(producer, sender):
    async with sender.open():
        producer.failing = sf.LogUnavailableError("away")
        with pytest.raises(sf.LogUnavailableError, match="away"):
            await send(sender, 1)
        producer.failing = None
        assert (await send(sender, 2)).offset == 0


async def test_a_failure_that_was_told_does_not_come_again_at_the_end(producer, sender):
    async with sender.open():
        producer.failing = sf.LogUnavailableError("away")
        send_nowait(sender, 1)
    assert not producer.taken
    assert sender.waiting == 0


async def test_what_waits_for_room_is_sent_in_order_at_the_end(producer, sender):
    producer.room.clear()
    async with sender.open(), anyio.create_task_group() as tasks:
        send_nowait(sender, 1)
        await asyncio.sleep(0.01)  # the first one waits for room
        send_nowait(sender, 2)
        send_nowait(sender, 3)
        tasks.start_soon(set_soon, producer.room)
    assert producer.taken == [1, 2]
    assert sender.waiting == 0


def flood(sender: DirectSender) -> None:
    for number in range(MAX_BYTES):
        send_nowait(sender, number)


async def set_soon(event: asyncio.Event) -> None:
    await asyncio.sleep(0.01)
    event.set()


async def test_what_was_about_to_leave_when_the_block_was_cancelled_leaves_as_it_is(producer):
    known = KnownTargets(cast(Any, SimpleNamespace()), codec.GZIP)
    known.add(blobs, TopicDescription("blobs", 1, {}))
    sender = DirectSender(cast(Producer, producer), known, SystemClock(), Sensors(), max_bytes=MAX_BYTES)
    producer.room.clear()
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            async with sender.open():
                sender.send_nowait(outgoing(blobs, None, b"x" * 2_000))
                await asyncio.sleep(0.01)  # it waits for room in the producer
                tasks.start_soon(set_soon, producer.room)
                scope.cancel()
                await asyncio.sleep(1)
    assert producer.values == [b"x" * 2_000]


async def test_nobody_waits_for_a_record_that_found_no_room_in_time(producer, sender, monkeypatch):
    monkeypatch.setattr(sender_module, "_CLOSE_S", 0.05)
    producer.room.clear()
    results: list[BaseException] = []

    async def sends() -> None:
        with pytest.raises(sf.ClosedError) as caught:
            await send(sender, 1)
        results.append(caught.value)

    async with anyio.create_task_group() as tasks, sender.open():
        tasks.start_soon(sends)
        await asyncio.sleep(0.01)
    assert len(results) == 1
    assert sender.abandoned
    assert sender.waiting == 0


async def test_what_waits_is_given_up_when_the_time_to_stop_is_over(producer, sender, monkeypatch):
    monkeypatch.setattr(sender_module, "_LEAST_CLOSE_S", 0.05)
    producer.room.clear()
    with anyio.fail_after(sender_module._CLOSE_S / 2):
        async with sender.open():
            sender.send_nowait(outgoing(topic, None, 1))
            sender.end_by_s = anyio.current_time() - 1
    assert sender.abandoned


async def test_send_nowait_of_a_topic_that_is_not_known_yet_would_block(sender):
    other = app.topic("other", value_type=int)
    async with sender.open():
        with pytest.raises(anyio.WouldBlock):
            sender.send_nowait(outgoing(other, None, 1))


# --- how much may be on its way ------------------------------------------------------------------------------------


async def test_sends_beyond_the_bound_wait_for_room_and_leave_in_order(producer, sender):
    producer.room.clear()
    offsets: list[int] = []

    async def sends(number: int) -> None:
        offsets.append((await sender.send(outgoing(blobs, None, bytes([number]) * 2_000))).offset)

    async with sender.open(), anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(sends, number)
        await asyncio.sleep(0.01)
        assert sender.waiting == 20
        assert sender._held_records == 4  # of 2,000 bytes and what each takes besides
        assert sender._held_bytes <= MAX_BYTES
        producer.room.set()
    assert len(offsets) == 20
    assert sum(producer.taken) == 20
    assert producer.values == [bytes([number]) * 2_000 for number in range(20)]
    assert (sender.waiting, sender._held_bytes) == (0, 0)


async def test_send_nowait_beyond_the_bound_would_block_and_sends_nothing(producer, sender):
    producer.room.clear()
    async with sender.open():
        for _ in range(4):
            sender.send_nowait(outgoing(blobs, None, b"x" * 2_000))
        with pytest.raises(anyio.WouldBlock, match=r"memory_budget_bytes\); `await topic.send\(...\)` waits for room"):
            sender.send_nowait(outgoing(blobs, None, b"x" * 2_000))
        producer.room.set()
    assert sum(producer.taken) == 4


async def test_many_small_records_are_bound_too(producer, sender):
    producer.room.clear()
    async with sender.open():
        for number in range(MAX_BYTES // 250):
            send_nowait(sender, number)
        with pytest.raises(anyio.WouldBlock):
            flood(sender)
        producer.room.set()


async def test_send_nowait_does_not_overtake_what_waits_for_room(producer, sender):
    producer.room.clear()
    async with sender.open(), anyio.create_task_group() as tasks:
        sender.send_nowait(outgoing(blobs, None, b"x" * 5_000))
        tasks.start_soon(sender.send, outgoing(blobs, None, b"y" * 6_000))
        await asyncio.sleep(0.01)
        with pytest.raises(anyio.WouldBlock):
            send_nowait(sender, 1)
        producer.room.set()


async def test_a_record_that_is_larger_than_the_bound_goes_alone(producer, sender):
    async with sender.open():
        metadata = await asyncio.gather(
            send(sender, 1), sender.send(outgoing(blobs, None, b"x" * 3 * MAX_BYTES)), send(sender, 2)
        )
    assert len(metadata) == 3
    assert producer.taken == [1, 1, 1]


async def test_a_send_that_is_cancelled_before_it_had_room_is_not_sent(producer, sender):
    producer.room.clear()
    async with sender.open():
        sender.send_nowait(outgoing(blobs, None, b"x" * 9_000))
        with anyio.move_on_after(0.01):
            await sender.send(outgoing(blobs, None, b"y" * 9_000))
        assert sender.waiting == 1
        producer.room.set()
        await send(sender, 1)
    assert sum(producer.taken) == 2


async def test_what_waits_for_room_at_the_end_is_sent(producer, sender):
    producer.room.clear()
    async with anyio.create_task_group() as tasks, sender.open():
        for _ in range(20):
            tasks.start_soon(sender.send, outgoing(blobs, None, b"x" * 2_000))
        await asyncio.sleep(0.01)
        tasks.start_soon(set_soon, producer.room)
    assert sum(producer.taken) == 20
    assert sender.waiting == 0


async def test_what_waits_for_room_and_finds_none_is_told(producer, sender, monkeypatch):
    monkeypatch.setattr(sender_module, "_CLOSE_S", 0.05)
    producer.room.clear()
    async with sender.open():
        sends = [
            asyncio.ensure_future(sender.send(outgoing(blobs, None, b"x" * size))) for size in (9_000, 9_001, 9_002)
        ]
        await asyncio.sleep(0.01)
    results = await asyncio.gather(*sends, return_exceptions=True)
    assert [type(result) for result in results] == [sf.ClosedError] * 3


async def test_a_send_after_the_end_is_refused(sender):
    async with sender.open():
        pass
    with pytest.raises(sf.ClosedError, match="topic 't'"):
        await send(sender, 1)


async def test_the_bound_is_an_eighth_of_the_memory_budget():
    small = sf.App("small", broker="memory://small-budget", memory_budget_bytes=1 << 20)
    things = small.topic("things", value_type=bytes)
    async with small.client() as client:
        for _ in range(12):
            things.send_nowait(value=b"x" * 10_000)
        with pytest.raises(anyio.WouldBlock, match="of 131,072"):
            things.send_nowait(value=b"x" * 10_000)
        metadata = await asyncio.gather(*(client.send(things, value=b"x" * 50_000) for _ in range(100)))
    assert len({(each.partition, each.offset) for each in metadata}) == 100


async def test_a_client_that_is_closed_says_so():
    small = sf.App("closed", broker="memory://closed-client")
    things = small.topic("things", value_type=bytes)
    async with small.client() as client:
        await client.send(things, value=b"x")
    with pytest.raises(sf.ConfigurationError, match="open the client"):
        await client.send(things, value=b"x")
