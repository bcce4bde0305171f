"""Hosted in FastAPI: the worker lives in the application's lifespan, endpoints send to topics and ask agents.

    uvicorn --app-dir examples fastapi_app:api
    curl -X POST 'localhost:8000/orders/ann?amount=12.5'      sends; answers when the order is in the log
    curl -X POST 'localhost:8000/quotes/ann?amount=12.5'      asks; answers with what the agent says
    curl localhost:8000/health

Needs `pip install fastapi` (the extra `fastapi`).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from fastapi import FastAPI, HTTPException

import streamflow as sf

DISCOUNTS = {"ann": 0.1}


class Order(msgspec.Struct):
    user: str
    amount: float


class Quote(msgspec.Struct):
    user: str
    total: float


streams = sf.App("shop")
orders = streams.topic("orders", key_type=str, value_type=Order)
invoices = streams.topic("invoices", key_type=str, value_type=Quote)
requests = streams.topic("quote-requests", key_type=str, value_type=Order)


def price(order: Order) -> Quote:
    return Quote(order.user, round(order.amount * (1 - DISCOUNTS.get(order.user, 0)), 2))


@streams.agent(orders, sink=invoices)
async def invoice(order: Order) -> Quote:
    return price(order)


@streams.agent(requests, on_error=sf.Skip())
async def quote(stream: sf.Stream[Order]) -> AsyncIterator[Quote]:
    async for order in stream:
        if order.amount <= 0:
            raise ValueError(f"nothing costs {order.amount:g}")
        yield price(order)


@asynccontextmanager
async def lifespan(api: FastAPI) -> AsyncIterator[None]:
    async with streams.running():
        yield


api = FastAPI(title="Shop", lifespan=lifespan)


@api.post("/orders/{user}", status_code=202)
async def send_order(user: str, amount: float) -> dict[str, object]:
    stored = await orders.send(key=user, value=Order(user, amount))
    assert stored is not None  # it is None only within an agent, where the send waits for the commit
    return {"topic": stored.topic, "partition": stored.partition, "offset": stored.offset}


@api.post("/quotes/{user}")
async def ask_quote(user: str, amount: float) -> dict[str, object]:
    try:
        answer = await quote.ask(Order(user, amount), key=user, timeout_s=5)
    except TimeoutError:
        raise HTTPException(504, "no answer in time") from None
    except sf.AskError as error:
        raise HTTPException(422, str(error)) from None
    return {"user": answer.user, "total": answer.total}


@api.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}
