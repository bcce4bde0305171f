"""The application of docker/compose.yaml: orders come in without anybody sending them, and are added up by user.

One in 500 cannot be used and goes to the dead letters, so that a dashboard shows them, too.

    docker compose --file docker/compose.yaml up --build
"""

import os
import random

import msgspec

import streamflow as sf

PER_S = int(os.environ.get("ORDERS_PER_S", "200"))


class Order(msgspec.Struct):
    order_id: int
    user: str
    cents: int


class Total(msgspec.Struct):
    orders: int = 0
    cents: int = 0


app = sf.App("orders")
orders = app.topic("orders", key_type=str, value_type=Order)
refused = app.topic("orders-refused")
totals_by_user = app.topic("totals-by-user", key_type=str, value_type=Total)
totals = app.table("totals", key_type=str, value_type=Total, help="what each user has ordered so far")


@app.agent(orders, sink=totals_by_user, on_error=sf.DeadLetter(refused))
async def add_up(order: Order) -> Total:
    if order.cents <= 0:
        raise ValueError(f"order {order.order_id} costs {order.cents} cents")
    so_far = totals.get(order.user, Total())
    totals[order.user] = total = Total(so_far.orders + 1, so_far.cents + order.cents)
    return total


@app.timer(1.0, on_leader=True)
async def arrive() -> None:
    """Only one worker, the leader, makes orders, however many run."""
    for _ in range(PER_S):
        order = Order(
            order_id=random.getrandbits(48),
            user=f"user-{random.randrange(1000)}",
            cents=0 if random.randrange(500) == 0 else random.randrange(100, 10_000),
        )
        await orders.send(key=order.user, value=order)


if __name__ == "__main__":
    app.main()
