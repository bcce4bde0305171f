from typing import Any
from urllib.parse import quote

import pytest

import streamflow as sf
from tests.web.cluster import Cluster

ODD = ["tea", "", "a/b", "a//b/", "../up", "ü€𝄞", "per%20cent", "a+b&c=d?e#f", "line\nend\n", " ", "'\"", "\0"]


def shop() -> sf.App:
    app = sf.App("shop", partitions=4)
    moves = app.topic("moves", key_type=str, value_type=int)
    stock = app.table("stock", key_type=str, value_type=int)

    @app.agent(moves, tables=[stock])
    async def move(stream: sf.Stream[int, str]) -> None:
        async for item, count in stream.items():
            stock[item] = stock.get(item, 0) + count

    return app


async def filled(cluster: Cluster, counts: dict[Any, Any], topic: str = "moves") -> None:
    for key, value in counts.items():
        await cluster.machine.send(cluster.machine.app.topics[topic], value, key=key)
    await cluster.machine.settle()


async def test_every_key_is_read_from_every_worker() -> None:
    async with Cluster(shop) as cluster:
        await filled(cluster, {key: number for number, key in enumerate(ODD)})
        for worker in range(2):
            for number, key in enumerate(ODD):
                for path in (f"/tables/stock/{quote(key, safe='')}", f"/tables/stock?key={quote(key, safe='')}"):
                    assert await cluster.json(path, worker=worker) == {"key": key, "value": number}
                assert await cluster.table("stock", worker).get_remote(key) == number
        assert {cluster.owner("stock", key) for key in ODD} == {0, 1}


async def test_what_is_not_there_is_404_and_a_bad_key_400() -> None:
    async with Cluster(shop) as cluster:
        await filled(cluster, {"tea": 1})
        for worker in range(2):
            answer = await cluster.get("/tables/stock/coffee", worker=worker)
            assert (answer.status_code, answer.json()) == (404, {"error": "table 'stock' has no key 'coffee'"})
        assert (await cluster.get("/tables/stok/tea")).status_code == 404
        assert "no table 'stok'" in (await cluster.get("/tables/stok/tea")).text
        assert (await cluster.get("/tables/stock/%FF")).status_code == 400
        assert await cluster.table("stock").get_remote("coffee") is None
        assert await cluster.table("stock").get_remote("coffee", 7) == 7
        with pytest.raises(sf.ProductionError, match="str"):
            await cluster.table("stock").get_remote(3)
