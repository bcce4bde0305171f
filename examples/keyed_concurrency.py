"""Concurrency by key: many slow HTTP calls at a time, and still one after the other for each customer.

With `concurrency=8` eight records of a partition are in hand at once. Two of the same customer never are, and the
commits stay in the order of the partition: after a crash no unfinished record is skipped.

The program starts a slow web service of its own on loopback, sends it orders of six customers through the agent, and
says how long that took, and whether each customer's orders arrived in their order.

    python examples/keyed_concurrency.py
"""

import asyncio
import os
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import streamflow as sf

CALL_S = 0.1
CUSTOMERS, ORDERS_EACH = 6, 5


class Order(msgspec.Struct):
    customer: str
    number: int


class Checked(msgspec.Struct):
    customer: str
    number: int
    risk: float


app = sf.App("risk", broker="memory://", partitions=1)
orders = app.topic("orders", key_type=str, value_type=Order)
checked = app.topic("checked", key_type=str, value_type=Checked)
http = httpx.AsyncClient(base_url=os.environ.get("RISK_URL", ""), timeout=10)


@app.agent(orders, sink=checked, concurrency=8, on_error=sf.Retry(3, backoff_s=0.5, then=sf.Stop()))
async def check(order: Order) -> Checked:
    response = await http.get(f"/{order.customer}/{order.number}")
    response.raise_for_status()
    return Checked(order.customer, order.number, response.json()["risk"])


class SlowService:
    """A web service that takes its time, and notes in which order it was called."""

    def __init__(self) -> None:
        self.calls: defaultdict[str, list[int]] = defaultdict(list)
        self.busy = self.busiest = 0

    async def risk(self, request: Request) -> JSONResponse:
        self.calls[request.path_params["customer"]].append(request.path_params["number"])
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        await asyncio.sleep(CALL_S)
        self.busy -= 1
        return JSONResponse({"risk": 0.5})

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Serve on a free port while the block runs; gives the address."""
        web = Starlette(routes=[Route("/{customer}/{number:int}", self.risk)])
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(web, log_level="warning"))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        host, port = listener.getsockname()
        try:
            yield f"http://{host}:{port}"
        finally:
            server.should_exit = True
            await task


async def main() -> None:
    service = SlowService()
    sent = [Order(f"customer-{customer}", number) for number in range(ORDERS_EACH) for customer in range(CUSTOMERS)]
    async with service.serving() as url:
        http.base_url = url
        async with http, app.running():
            started = time.perf_counter()
            answers = await asyncio.gather(*(check.ask(order, key=order.customer, timeout_s=30) for order in sent))
            took_s = time.perf_counter() - started
    in_order = all(numbers == sorted(numbers) for numbers in service.calls.values())
    print(f"{len(answers)} calls of {CALL_S:g} s each in {took_s:.1f} s; one by one: {len(answers) * CALL_S:.1f} s")
    print(f"at most {service.busiest} at a time; each customer's orders in order: {in_order}")


if __name__ == "__main__":
    asyncio.run(main())
