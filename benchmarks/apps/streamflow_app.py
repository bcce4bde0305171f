"""StreamFlow: MODE map | table | table-eos, as the other programs here, and busy; on Kafka, or on the log of BROKER."""

import os
import time
from collections.abc import AsyncIterator

import msgspec

import streamflow as sf

MODE = os.environ["MODE"]
BUSY_S = 100e-6  # of CPU time per record


class Order(msgspec.Struct):
    order_id: int
    user: str
    amount: float
    country: str
    ts: int


class Out(msgspec.Struct):
    user: str
    total: float


app = sf.App(
    os.environ["APPID"],
    broker=os.environ.get("BROKER") or "kafka://" + os.environ["BOOTSTRAP"],
    data_dir=os.environ["DATADIR"],
    processing_guarantee="exactly_once" if MODE.endswith("eos") else "at_least_once",
)
orders = app.topic(os.environ["IN"], key_type=str, value_type=Order)
out = app.topic(os.environ["OUT"], key_type=str, value_type=Out)

if MODE == "map":

    @app.agent(orders, sink=out)
    async def double(stream: sf.Stream[Order]) -> AsyncIterator[Out]:
        async for order in stream:
            yield Out(order.user, order.amount * 2)

elif MODE == "busy":

    @app.agent(orders, sink=out)
    async def busy(stream: sf.Stream[Order]) -> AsyncIterator[Out]:
        async for order in stream:
            until_s = time.thread_time() + BUSY_S
            while time.thread_time() < until_s:
                pass
            yield Out(order.user, order.amount)

else:
    totals = app.table("totals", key_type=str, value_type=float, default=float)

    @app.agent(orders, sink=out)
    async def total(stream: sf.Stream[Order]) -> AsyncIterator[Out]:
        async for order in stream:
            totals[order.user] += order.amount
            yield Out(order.user, totals[order.user])
