"""Faust: MODE map | table | table-eos."""

import os
from collections.abc import AsyncIterator

import faust

MODE = os.environ["MODE"]
PARTITIONS = int(os.environ["PARTITIONS"])
app = faust.App(
    os.environ["APPID"],
    broker="kafka://" + os.environ["BOOTSTRAP"],
    store="memory://" if MODE == "map" else "rocksdb://",
    topic_partitions=PARTITIONS,
    datadir=os.environ["DATADIR"],
    value_serializer="json",
    web_enabled=False,
    consumer_auto_offset_reset="earliest",
    processing_guarantee="exactly_once" if MODE.endswith("eos") else "at_least_once",
    topic_disable_leader=True,
    producer_linger_ms=50,
    broker_session_timeout=float(os.environ.get("SESSION_MS", "60000")) / 1000,
    broker_heartbeat_interval=float(os.environ.get("HEARTBEAT_MS", "3000")) / 1000,
)


class Order(faust.Record, serializer="json"):
    order_id: int
    user: str
    amount: float
    country: str
    ts: int


class Out(faust.Record, serializer="json"):
    user: str
    total: float


orders = app.topic(os.environ["IN"], key_type=str, value_type=Order, key_serializer="raw")
out = app.topic(os.environ["OUT"], key_type=str, value_type=Out, key_serializer="raw")

if MODE == "map":

    @app.agent(orders)
    async def double(stream: AsyncIterator[Order]) -> None:
        async for order in stream:
            await out.send(key=order.user, value=Out(user=order.user, total=order.amount * 2))

else:
    totals = app.Table("totals", default=float, partitions=PARTITIONS)

    @app.agent(orders)
    async def total(stream: AsyncIterator[Order]) -> None:
        async for order in stream:
            totals[order.user] += order.amount
            await out.send(key=order.user, value=Out(user=order.user, total=totals[order.user]))
