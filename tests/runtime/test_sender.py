"""Sends outside of turns against a producer that fails, has no room, or is closed."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

import streamflow as sf
from streamflow.clock import SystemClock
from streamflow.log.api import Producer, TopicDescription
from streamflow.log.batch import SealedBatch
from streamflow.log.codec import NONE
from streamflow.model.record import TopicPartition
from streamflow.runtime import sender as sender_module
from streamflow.runtime.sender import DirectSender
from streamflow.runtime.targets import KnownTargets
from streamflow.sensors import Sensors

app = sf.App("sends", broker="memory://")
topic = app.topic("t", key_type=str, value_type=int)


class FakeProducer:
    """Fails a partition after a failure until `reset`, as the contract says; takes nothing while `room` is not set."""

    def __init__(self) -> None:
        self.failing: sf.StreamFlowError | None = None
        self.failed: dict[TopicPartition, sf.StreamFlowError] = {}
        self.room = asyncio.Event()
        self.room.set()
        self.taken: list[int] = []

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
    return DirectSender(cast(Producer, producer), known, SystemClock(), Sensors())


async def send(sender: DirectSender, value: int) -> sf.RecordMetadata:
    return await sender.send(topic, "k", value, partition=None, timestamp_ms=None, headers=())


def send_nowait(sender: DirectSender, value: int) -> None:
    sender.send_nowait(topic, "k", value, partition=None, timestamp_ms=None, headers=())


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


async def set_soon(event: asyncio.Event) -> None:
    await asyncio.sleep(0.01)
    event.set()


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


async def test_send_nowait_of_a_topic_that_is_not_known_yet_would_block(sender):
    other = app.topic("other", value_type=int)
    async with sender.open():
        with pytest.raises(anyio.WouldBlock):
            sender.send_nowait(other, None, 1, partition=None, timestamp_ms=None, headers=())
