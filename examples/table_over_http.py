"""A table served over HTTP: a stock of goods that records change, read and corrected by requests.

    uvicorn --app-dir examples table_over_http:api
    curl -X POST 'localhost:8000/movements/tea?count=12'    sends a record; the agent changes the table
    curl 'localhost:8000/stock/tea?at=stock-movements:1:1'  waits until that record is in (its answer has the position)
    curl localhost:8000/stock                               all that is committed
    curl -X PUT 'localhost:8000/stock/tea?count=10'         sets the value, in a turn of the key's partition
    curl localhost:8000/health

Start a second one (`--port 8001`): the two share the partitions, and each reads what the other one holds, by the web
server that its worker has for that (`web=True`). It would answer `/tables/stock/tea` itself; here the application does.
To change a value is for the one that has the key: the other one answers 421 (Misdirected Request), with a text that
says where the key belongs.

Needs `pip install fastapi` (the extra `fastapi`).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

import streamflow as sf

streams = sf.App("stock")
movements = streams.topic("stock-movements", key_type=str, value_type=int)
stock = streams.table("stock", key_type=str, value_type=int)  # no default: a missing key is a missing key


@streams.agent(movements)
async def move(stream: sf.Stream[int, str]) -> None:
    async for item, count in stream.items():
        stock[item] = stock.get(item, 0) + count


@asynccontextmanager
async def lifespan(api: FastAPI) -> AsyncIterator[None]:
    async with streams.running(web=True):  # entered when the tables are restored
        yield


api = FastAPI(title="Stock", lifespan=lifespan)


@api.exception_handler(sf.NotHeld)
async def not_now(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=503, headers={"retry-after": "1"})


@api.post("/movements/{item}", status_code=202)
async def send_movement(item: str, count: int) -> dict[str, object]:
    stored = await movements.send(key=item, value=count)
    assert stored is not None  # it is None only within an agent, where the send waits for the commit
    return {"position": stored.position}


@api.get("/stock/{item}")
async def read(item: str, at: str = "") -> dict[str, object]:
    count = await stock.get_remote(item, at=at)  # from whichever process has the key
    if count is None:
        raise HTTPException(404, f"there is no {item}")
    return {"item": item, "count": count}


@api.get("/stock")
async def read_all() -> dict[str, int]:
    return {item: count async for item, count in stock.scan_remote()}


@api.put("/stock/{item}")
async def correct(item: str, count: int) -> dict[str, object]:
    try:
        committed = await stock.update_async(item, lambda _: count)
    except sf.NotHeld as error:
        raise HTTPException(421, str(error)) from error
    return {"item": item, "count": committed, "position": stock.position(item)}


@api.get("/health")
async def health() -> dict[str, object]:
    return {"status": "ok", "partitions": sorted(stock.partitions)}
