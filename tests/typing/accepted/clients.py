"""What a client sends and asks."""

from typing import assert_type

import msgspec

import streamflow as sf


class Order(msgspec.Struct):
    user: str


app = sf.App("orders")
orders = app.topic("orders", key_type=str, value_type=Order)
clearable = app.topic("clearable", key_type=str, value_type=Order | None)


@app.agent(orders)
async def count(order: Order) -> int:
    return len(order.user)


async def use() -> None:
    async with app.client() as client:
        sent = await client.send(orders, key="k", value=Order("ann"), partition=1, timestamp_ms=2, headers=[("h", b"")])
        assert_type(sent, sf.RecordMetadata)
        await client.send(orders, key="k")
        await client.send(clearable, key="k", value=Order("ann"))
        await client.send("orders", key="k", value=Order("ann"))
        await client.send(count, value=Order("ann"))
        assert_type(await client.ask(count, Order("ann"), key="k", timeout_s=5), int)
