"""What a client sends to the wrong place. `# error` marks the lines that both checkers must refuse."""

import msgspec

import streamflow as sf


class Order(msgspec.Struct):
    user: str


app = sf.App("orders")
orders = app.topic("orders", key_type=str, value_type=Order)


@app.agent(orders)
async def count(order: Order) -> int:
    return len(order.user)


async def use() -> None:
    async with app.client() as client:
        await client.send(orders, value="ann")  # error: values are orders
        await client.send(orders, key=1, value=Order("ann"))  # error: keys are str
        await client.send(count, value="ann")  # error: the agent takes orders
        await client.send(3, value="ann")  # error: neither a topic nor an agent nor a name
        await client.ask(count, "ann")  # error: the agent takes orders
        await client.ask(count, Order("ann"), key=1)  # error: keys are str
        wrong: str = await client.ask(count, Order("ann"))  # error: it answers with int
        print(wrong)
