"""Agents in all their forms."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, assert_type

import msgspec

import streamflow as sf


class Order(msgspec.Struct):
    order_id: int
    user: str
    amount: float
    country: str


class Total(msgspec.Struct):
    user: str
    total: float


class BigOrder(Order):
    approved_by: str = ""


app = sf.App("orders")
orders = app.topic("orders", key_type=str, value_type=Order)
big_orders = app.topic("big-orders", key_type=str, value_type=BigOrder)
totals = app.topic("totals", key_type=str, value_type=Total)
archive = app.topic("archive", key_type=str, value_type=Order)
clearable = app.topic("clearable", key_type=str, value_type=Order | None)
untyped = app.topic("untyped", key_serializer="json", value_serializer="json")


@app.agent(orders, sink=totals)
async def total(stream: sf.Stream[Order]) -> AsyncIterator[Total]:
    async for order in stream:
        assert_type(order, Order)
        yield Total(order.user, order.amount)


assert_type(total, sf.Agent[str, Order, Total])


@app.agent(orders, sink=totals)
async def total_of_keys(stream: sf.Stream[Order, str]) -> AsyncGenerator[Total | None, None]:
    async for key, order in stream.items():
        assert_type(key, str)
        assert_type(order, Order)
        yield Total(key, order.amount) if order.amount else None


@app.agent(orders, sink=totals)
async def moved(stream: sf.Stream[Order]) -> AsyncIterator[sf.Out[Total] | Total]:
    async for event in stream.events():
        assert_type(event.value, Order)
        if event.offset:
            yield sf.Out(Total("a", 1.0), key="a", timestamp_ms=event.timestamp_ms, headers=[("h", b"1")])
        else:
            yield Total("b", 2.0)


@app.agent(orders)
async def consume(stream: sf.Stream[Order]) -> None:
    async for batch in stream.take(100, within_s=1.0):
        assert_type(batch, list[Order])


@app.agent(orders, sink=totals)
async def per_record(order: Order) -> Total:
    return Total(order.user, order.amount)


@app.agent(orders, sink=totals)
def per_record_sync(order: Order) -> Total | None:
    return Total(order.user, order.amount) if order.amount else None


@app.agent(orders, sink=totals)
async def per_record_out(order: Order) -> sf.Out[Total]:
    return sf.Out(Total(order.user, order.amount), key=order.country)


@app.agent(orders, thread=True)
def slow(order: Order) -> None: ...


@app.agent(big_orders, sink=archive)
async def wider(stream: sf.Stream[Order]) -> AsyncIterator[BigOrder]:
    async for order in stream:
        yield BigOrder(order.order_id, order.user, order.amount, order.country)


@app.agent(orders, sink=clearable)
async def clearing(stream: sf.Stream[Order]) -> AsyncIterator[sf.Out[None] | Order]:
    async for order in stream:
        yield order if order.amount else sf.Out(None)


@app.agent(clearable)
async def with_tombstones(stream: sf.Stream[Order | None]) -> None:
    async for order in stream:
        assert_type(order, Order | None)


@app.agent(untyped)
async def any_json(stream: sf.Stream[dict[str, Any]]) -> None:
    async for document in stream:
        document["x"]


@app.agent(orders, sink=[totals])
async def out_to_several(stream: sf.Stream[Order]) -> AsyncIterator[sf.Out[Total]]:
    async for order in stream:
        yield sf.Out(Total(order.user, order.amount), key=order.user)


assert_type(out_to_several, sf.Agent[str, Order, Total])


@app.agent(orders, sink=(totals, archive))
async def some_to_several(stream: sf.Stream[Order]) -> AsyncIterator[sf.Out[Total] | None]:
    async for order in stream:
        yield sf.Out(Total(order.user, order.amount)) if order.amount else None


assert_type(some_to_several, sf.Agent[str, Order, Total])


@app.agent(orders, sink=[totals])
async def mixed_to_several(stream: sf.Stream[Order]) -> AsyncIterator[sf.Out[Total] | Total]:
    async for order in stream:
        yield Total(order.user, order.amount)


assert_type(mixed_to_several, sf.Agent[str, Order, Total])


@app.agent(orders, sink=[totals])
async def per_record_to_several(order: Order) -> sf.Out[Total]:
    return sf.Out(Total(order.user, order.amount))


assert_type(per_record_to_several, sf.Agent[str, Order, Total])


@app.agent(orders, sink=[totals])
def per_record_sync_to_several(order: Order) -> sf.Out[Total]:
    return sf.Out(Total(order.user, order.amount))


assert_type(per_record_sync_to_several, sf.Agent[str, Order, Total])


@app.agent
async def own_topic(stream: sf.Stream[Order, str]) -> AsyncIterator[float]:
    async for order in stream:
        yield order.amount


assert_type(own_topic, sf.Agent[str, Order, float])


@app.agent()
async def own_topic_with_parentheses(stream: sf.Stream[Order]) -> AsyncIterator[float]:
    async for order in stream:
        yield order.amount


@app.agent
async def double(number: int) -> int:
    return number * 2


assert_type(double, sf.Agent[Any, int, int])


@app.agent
def halve(number: int) -> float:
    return number / 2


@app.agent(concurrency=4, on_error=sf.Retry(3, backoff_s=0.5, then=sf.DeadLetter(archive)))
async def own_topic_with_options(order: Order) -> None: ...


@app.agent([orders, archive], sink=[totals, double], name="several", on_error=sf.Skip())
async def several(stream: sf.Stream[Order]) -> AsyncIterator[Any]:
    async for order in stream:
        yield order


@app.agent(orders, sink=double)
async def to_an_agent(order: Order) -> int:
    return order.order_id


by_country = orders.group_by(Order.country)
assert_type(orders.group_by(Order.order_id).topic, sf.Topic[int, Order])
assert_type(orders.group_by("order_id", key_type=int).topic, sf.Topic[int, Order])


@app.agent(orders.group_by("user", key_type=str), sink=totals)
async def by_user(stream: sf.Stream[Order, str]) -> AsyncIterator[Total]:
    async for order in stream:
        yield Total(order.user, 0.0)


@app.agent(by_country)
async def countries(stream: sf.Stream[Order]) -> None:
    async for _number, order in stream.filter(lambda order: order.amount > 1).map(lambda order: order.user).enumerate():
        assert_type(order, str)


def month_of(order: Order) -> int:
    return order.order_id % 12


@app.agent(orders.group_by(month_of).through(archive))
async def monthly(order: Order) -> None: ...


@app.agent(orders.group_by(lambda order: order.user.upper(), name="upper", key_type=str))
async def upper(order: Order) -> None: ...


async def use() -> None:
    assert_type(await total.ask(Order(1, "ann", 1.0, "KR"), key="ann", timeout_s=1.0), Total)
    assert_type(await double.ask(2), int)
    assert_type(await halve.ask(2), float)
    assert_type(await orders.send(key="ann", value=Order(1, "ann", 1.0, "KR")), sf.RecordMetadata | None)
    await orders.send(key="ann", value=None)
    orders.send_nowait(value=Order(1, "ann", 1.0, "KR"), partition=1, timestamp_ms=1, headers=[("trace", None)])
    await total.send(key="ann", value=Order(1, "ann", 1.0, "KR"))
    await double.cast(3)
