"""Agents that do not fit their topics. `# error` marks the lines that both checkers must refuse, and no others."""

from collections.abc import AsyncIterator, Iterator

import msgspec

import streamflow as sf


class Order(msgspec.Struct):
    user: str
    amount: float


class Total(msgspec.Struct):
    user: str
    total: float


app = sf.App("orders")
orders = app.topic("orders", key_type=str, value_type=Order)
totals = app.topic("totals", key_type=str, value_type=Total)
clearable = app.topic("clearable", key_type=str, value_type=Order | None)


@app.agent(orders, sink=totals)  # error: the stream is of totals, the topic of orders
async def wrong_stream(stream: sf.Stream[Total]) -> AsyncIterator[Total]:
    async for total in stream:
        yield total


@app.agent(orders)  # error: keys are str
async def wrong_key(stream: sf.Stream[Order, int]) -> None: ...


@app.agent(clearable)  # error: a tombstone is None
async def without_none(stream: sf.Stream[Order]) -> None: ...


@app.agent(orders, sink=totals)  # error: the sink takes totals
async def wrong_sink(stream: sf.Stream[Order]) -> AsyncIterator[Order]:
    async for order in stream:
        yield order


@app.agent(orders, sink=totals)  # error: the sink takes totals, in an Out too
async def wrong_out(stream: sf.Stream[Order]) -> AsyncIterator[sf.Out[Order]]:
    async for order in stream:
        yield sf.Out(order)


@app.agent(orders, sink=totals)  # error: the sink takes totals
async def wrong_return(order: Order) -> Order:
    return order


@app.agent(orders)  # error: values are orders
async def wrong_value(total: Total) -> None: ...


@app.agent(orders)  # error: values are orders
def wrong_value_sync(number: int) -> int:
    return number


@app.agent(orders)  # error: a generator over a stream is asynchronous
def sync_generator(stream: sf.Stream[Order]) -> Iterator[Order]:
    yield Order("ann", 1.0)


@app.agent(orders)  # error: one parameter
async def two_parameters(stream: sf.Stream[Order], table: dict[str, float]) -> None: ...


@app.agent(orders)  # error: one parameter
async def no_parameter() -> None: ...


@app.agent("orders")  # error: a topic, not its name
async def by_name(stream: sf.Stream[Order]) -> None: ...


@app.agent(orders, sink="totals")  # error: a topic, not its name
async def sink_by_name(stream: sf.Stream[Order]) -> AsyncIterator[Total]:
    yield Total("ann", 1.0)


@app.agent(orders, on_error=sf.Skip)  # error: an instance, not the class
async def policy_class(stream: sf.Stream[Order]) -> None: ...


@app.agent(orders, on_error="skip")  # error: a policy, not its name
async def policy_name(stream: sf.Stream[Order]) -> None: ...


@app.agent(orders, concurrency="2")  # error: a number
async def concurrency_text(stream: sf.Stream[Order]) -> None: ...


@app.agent(orders, concurency=2)  # error: no such option
async def misspelt(stream: sf.Stream[Order]) -> None: ...


@app.agent(orders.group_by(Order.amount))  # error: the new key is a float
async def group_by_member(stream: sf.Stream[Order, str]) -> None: ...


@app.agent(orders.group_by(lambda total: total.total, name="total", key_type=float))  # error: an order has no total
async def group_by_no_field(stream: sf.Stream[Order]) -> None: ...


@app.agent(orders.group_by("user", key_type=str))  # error: keys are str
async def grouped_wrong_key(stream: sf.Stream[Order, int]) -> None: ...


@app.agent(orders.through(totals))  # error: the other topic has other values
async def through_other(stream: sf.Stream[Order]) -> None: ...


@app.agent(orders)
async def body(stream: sf.Stream[Order]) -> AsyncIterator[str]:
    async for order in stream:
        order.total  # error: no such field
        yield order.amount  # error: not what is declared


@app.agent
async def double(number: int) -> int:
    return number * 2


async def use() -> None:
    await orders.send(key="ann", value=Total("ann", 1.0))  # error: values are orders
    await orders.send(key=1, value=Order("ann", 1.0))  # error: keys are str
    await orders.send(Order("ann", 1.0))  # error: by keyword
    orders.send_nowait(value={"user": "ann"})  # error: values are orders
    await double.ask("two")  # error: it takes a number
    await double.cast("two")  # error: it takes a number
    answer: str = await double.ask(2)  # error: it answers with a number
    print(answer, sf.Retry(), sf.DeadLetter("dead"))  # error: how often, and a topic
