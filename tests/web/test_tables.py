import asyncio
import base64
import dataclasses
import uuid
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
from starlette.applications import Starlette

import streamflow as sf
from streamflow.errors import StateCorruptedError
from streamflow.log.sqlite.database import MemoryDatabase
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.words import Route
from streamflow.runtime.http_client import HttpClient, Response
from streamflow.runtime.read_question import Question
from streamflow.runtime.readable import Owned
from streamflow.runtime.restore import Restorer
from streamflow.web.passed_on import PassedOn
from tests.runtime.cut_off import CutOff
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


async def test_odd_addresses_mean_one_key_or_none() -> None:
    async with Cluster(shop) as cluster:
        await filled(cluster, {"": 1, "tea": 2})
        for worker in range(2):
            assert await cluster.json("/t%61bles/st%6Fck/tea", worker=worker) == {"key": "tea", "value": 2}
            assert (await cluster.get("/tables%2Fstock/tea", worker=worker)).status_code == 404
            answer = await cluster.get("/tables/stock%2Ftea", worker=worker)
            assert (answer.status_code, "stock%2Ftea" in answer.text) == (404, True)
            assert await cluster.json("/tables/stock/", worker=worker) == {"key": "", "value": 1}


async def test_headers_of_any_bytes_are_passed_on() -> None:
    seen: list[tuple[str, str | None]] = []

    def guarded() -> sf.App:
        app = shop()

        @app.authorize_reads
        def allowed(read: sf.TableRead) -> bool:
            seen.append((read.key, read.headers.get("x-name")))
            return True

        return app

    async with Cluster(guarded) as cluster:
        await filled(cluster, {"tea": 1})
        other = 1 - cluster.owner("stock", "tea")
        url = f"{cluster.urls[other]}/tables/stock/tea"
        for name in ("José".encode(), b"Jos\xe9", b"\x01", b""):
            seen.clear()
            answer = await cluster.http.get(url, headers={b"x-name": name})
            assert (answer.status_code, answer.json()) == (200, {"key": "tea", "value": 1})
            assert seen == [("tea", name.decode("latin-1"))] * 2
        seen.clear()
        assert await cluster.table("stock", other).get_remote("tea", headers={"X-Name": "José"}) == 1
        assert seen == [("tea", "José")] * 2
        for bad in ({"x-name": "Łukasz"}, {"x-name": "a\r\nx-admin: yes"}, {"x name": "a"}, {"x-name": " a"}, {"": ""}):
            for worker in range(2):
                with pytest.raises(sf.ConfigurationError, match="header"):
                    await cluster.table("stock", worker).get_remote("tea", headers=bad)


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


async def test_nothing_is_written() -> None:
    async with Cluster(shop, workers=1) as cluster:
        for path in ("/tables", "/tables/stock", "/tables/stock/tea", "/-/table-reads"):
            for method in ("POST", "PUT", "PATCH", "DELETE"):
                answer = await cluster.http.request(method, cluster.urls[0] + path)
                assert answer.status_code == 405, (method, path)
                assert answer.headers["allow"] == "GET, HEAD"
                assert answer.headers["content-type"] == "application/json"
                assert answer.json() == {"error": f"{method} {path}: tables are only read here"}
        head = await cluster.http.request("HEAD", cluster.urls[0] + "/tables")
        assert (head.status_code, head.content) == (200, b"")


async def test_the_same_app_on_another_log_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clusters on one network, and an address that has changed hands."""
    # Logs in memory count their topics, and so have the same ids; those on disk and Kafka do not.
    monkeypatch.setattr(MemoryDatabase, "new_id", lambda _: uuid.uuid4().hex)
    async with Cluster(shop) as mine, Cluster(shop, workers=1) as other:
        await filled(mine, {"tea": 1})
        await filled(other, {"tea": 2})
        asker = 1 - mine.owner("stock", "tea")
        order = mine.table("stock").keys_in_order
        partition = mine.home_of("moves", "tea")
        question = Question("stock", (partition,), order.name, key=order.encode("tea"), app="shop")
        running = mine.workers[1 - asker].worker
        assert running._layout is not None
        topic_id = running._layout.ids["shop-stock-changelog"]
        path = f"/-/table-reads?{msgspec.structs.replace(question, topic_id=topic_id).query()}"
        assert (await mine.get(path, worker=1 - asker)).status_code == 200
        refused = await other.get(path)
        assert refused.status_code == 421
        assert "this is a worker of app 'shop' on another log" in refused.json()["error"]
        before = f"/-/table-reads?{question.query()}"  # by a version that does not say it
        assert (await other.get(before)).status_code == 200

        routes = mine.workers[asker].worker.routes
        monkeypatch.setattr(routes, "owner", lambda _: other.urls[0])
        monkeypatch.setattr(routes, "formers", lambda _: [])
        monkeypatch.setattr(routes, "knows", lambda _: True)
        with pytest.raises(sf.NotHeld, match="on another log"):
            await mine.table("stock", asker).get_remote("tea", timeout_s=0.3)


def priced() -> sf.App:
    app = sf.App("priced", partitions=4)
    orders = app.topic("orders", key_type=str, value_type=int)
    names = app.topic("names", key_type=str, value_type=str, compacting=True)
    table = app.table("names", source=names)

    @app.agent(orders, tables=[table])
    async def look_up(order: int) -> None:
        pass

    return app


async def test_the_log_of_a_table_that_a_topic_fills_is_told_by_a_topic_that_is_never_made_anew() -> None:
    async with Cluster(priced, workers=1) as cluster:
        worker = cluster.workers[0].worker
        assert worker.table_reads is not None
        assert worker._layout is not None
        told = worker.table_reads.committed.topic_id("names")
        assert told == worker._layout.ids["priced-replies"] != worker._layout.ids["names"]


async def test_the_supervisor_of_several_processes_refuses_to_write_likewise() -> None:
    async with HttpClient() as client:
        site = Starlette(routes=PassedOn(list, client).routes())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(site), base_url="http://worker") as http:
            refused = await http.post("/tables/stock/tea")
            assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
            assert refused.json() == {"error": "POST /tables/stock/tea: tables are only read here"}
            assert (await http.get("/tables/stock/tea")).status_code == 503  # there is no process to ask


# --- types ---------------------------------------------------------------------------------------------------------


class Place(msgspec.Struct, frozen=True):
    city: str
    floor: int


def kinds() -> sf.App:
    """Tables with keys and values of several types, filled by one agent: its records say which table, key and value."""
    app = sf.App("kinds", partitions=3)
    source = app.topic("source", key_type=str, value_type=int)
    raw = app.topic("raw", key_type=bytes, value_type=bytes)
    numbers = app.topic("numbers", key_type=int, value_type=Place)
    blobs = app.table("blobs", key_type=bytes, value_type=bytes)
    places = app.table("places", key_type=int, value_type=Place)
    pairs = app.table("pairs", key_type=tuple[str, int], value_type=float, partition_by=lambda key: key[0])
    brief = app.table("brief", key_type=str, value_type=int, ttl_s=1)
    tags = app.set_table("tags", key_type=str, member_type=str)
    rates = app.topic("rates", key_type=str, value_type=float, partitions=2, compacting=True)
    app.global_table("all-rates", source=rates)

    @app.agent(source, tables=[pairs, brief, tags])
    async def fill(stream: sf.Stream[int, str]) -> None:
        async for event in stream.events():
            pairs[event.key, event.value] = event.value / 2
            brief[event.key] = event.value
            tags[event.key].add(f"t{event.value:03}")

    @app.agent(raw, tables=[blobs])
    async def fill_raw(stream: sf.Stream[bytes, bytes]) -> None:
        async for key, value in stream.items():
            blobs[key] = value

    @app.agent(numbers, tables=[places])
    async def fill_numbers(stream: sf.Stream[Place, int]) -> None:
        async for key, value in stream.items():
            places[key] = value

    return app


async def test_keys_are_read_by_their_type() -> None:
    async with Cluster(kinds) as cluster:
        odd = [b"", b"\xff\x00/", b"a", "ü".encode()]
        await filled(cluster, {key: key + b"\xfe" for key in odd}, "raw")
        await filled(cluster, {-5: Place("Rome", 2), 7: Place("Bern", 1)}, "numbers")
        await filled(cluster, {"a/b": 4}, "source")
        for worker in range(2):
            for key in odd:
                answer = await cluster.json(f"/tables/blobs/{quote(key, safe='')}", worker=worker)
                assert answer["value"] == {"base64": base64.b64encode(key + b"\xfe").decode()}
                assert await cluster.table("blobs", worker).get_remote(key) == key + b"\xfe"
            assert await cluster.json("/tables/places/-5", worker=worker) == {
                "key": -5,
                "value": {"city": "Rome", "floor": 2},
            }
            assert await cluster.table("places", worker).get_remote(7) == Place("Bern", 1)
            path = "/tables/pairs/" + quote('["a/b", 4]', safe="")
            assert await cluster.json(path, worker=worker) == {"key": ["a/b", 4], "value": 2.0}
            assert await cluster.table("pairs", worker).get_remote(("a/b", 4)) == 2.0
        for path, what in (
            ("/tables/places/seven", "key for table 'places'"),
            ("/tables/pairs/a", "tuple[str, int]"),
            ("/tables/pairs?prefix=5&from=6", "prefix="),
            ("/tables/pairs?prefix=" + "[" * 5_000, "does not fit keys of table 'pairs'"),
        ):
            answer = await cluster.get(path)
            assert answer.status_code == 400
            assert what in answer.json()["error"]


async def test_set_tables_are_read_by_their_members() -> None:
    async with Cluster(kinds) as cluster:
        for number in range(7):
            await cluster.machine.send(cluster.machine.app.topics["source"], number, key="tea")
        await cluster.machine.send(cluster.machine.app.topics["source"], 1, key="cake")
        await cluster.machine.settle()
        expected = [f"t{number:03}" for number in range(7)]
        for worker in range(2):
            assert await cluster.json("/tables/tags/tea", worker=worker) == {
                "key": "tea",
                "members": expected,
                "cursor": None,
            }
            first = await cluster.json("/tables/tags/tea?limit=5", worker=worker)
            rest = await cluster.json(f"/tables/tags/tea?limit=5&cursor={first['cursor']}", worker=worker)
            assert first["members"] + rest["members"] == expected
            assert rest["cursor"] is None
            assert (await cluster.json("/tables/tags/tea?in=t003", worker=worker))["in"] is True
            assert (await cluster.json("/tables/tags/tea?in=t007", worker=worker))["in"] is False
            assert (await cluster.get("/tables/tags/milk", worker=worker)).status_code == 404
            every = await cluster.json("/tables/tags", worker=worker)
            assert every["items"] == [{"key": "cake", "member": "t001"}] + [
                {"key": "tea", "member": member} for member in expected
            ]
            assert await cluster.json("/tables/tags?from=cake&to=tea", worker=worker) == {
                "items": every["items"][:1],
                "cursor": None,
            }
            assert await cluster.table("tags", worker).get_remote("tea") == set(expected)
            assert await cluster.table("tags", worker).get_remote("milk") == set()
        assert "no set table" in (await cluster.get("/tables/brief/tea?in=x")).text


async def test_expired_values_are_absent() -> None:
    async with Cluster(kinds) as cluster:
        source = cluster.machine.app.topics["source"]
        await cluster.machine.client.send(source, key="tea", value=1, timestamp_ms=1_000)
        await cluster.machine.settle()
        path = "/tables/brief/tea"
        assert [(await cluster.get(path, worker=worker)).status_code for worker in (0, 1)] == [200, 200]
        # The same partition's stream time goes on by another key of it.
        homes = {key: cluster.home_of("source", key) for key in ("tea", *"abcdefgh")}
        other = next(key for key in "abcdefgh" if homes[key] == homes["tea"])
        await cluster.machine.client.send(source, key=other, value=1, timestamp_ms=5_000)
        await cluster.machine.settle()
        assert [(await cluster.get(path, worker=worker)).status_code for worker in (0, 1)] == [404, 404]
        assert [row["key"] for row in (await cluster.json("/tables/brief"))["items"]] == [other]


async def test_global_tables_are_answered_by_all() -> None:
    async with Cluster(kinds) as cluster:
        await filled(cluster, {f"r{number}": number / 2 for number in range(8)}, "rates")
        for worker in range(2):
            await cluster.apps[worker].global_tables["all-rates"].caught_up()
            assert await cluster.json("/tables/all-rates/r3", worker=worker) == {"key": "r3", "value": 1.5}
            assert (await cluster.get("/tables/all-rates/none", worker=worker)).status_code == 404
            found, cursor = [], ""
            while cursor is not None:
                page = await cluster.json(f"/tables/all-rates?prefix=r&limit=3{cursor and '&cursor=' + cursor}")
                found += [row["key"] for row in page["items"]]
                cursor = page["cursor"]
            assert found == [f"r{number}" for number in range(8)]
        late = await cluster.get("/tables/all-rates/r3?at=rates:0:999&timeout_s=0.05")
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        assert (await cluster.get("/tables/all-rates/r3?at=source:0:1")).status_code == 400


# --- ranges --------------------------------------------------------------------------------------------------------


async def test_pages_are_complete_and_in_order_over_all_workers() -> None:
    async with Cluster(shop, workers=3) as cluster:
        keys = [f"k{number:03}" for number in range(150)]
        await filled(cluster, dict.fromkeys(keys, 1))
        for worker, limit in ((0, 1000), (1, 7), (2, 64)):
            found: list[str] = []
            cursor = ""
            while cursor is not None:
                page = await cluster.json(f"/tables/stock?limit={limit}{cursor and '&cursor=' + cursor}", worker=worker)
                assert len(page["items"]) <= limit
                found += [row["key"] for row in page["items"]]
                cursor = page["cursor"]
            assert found == keys
            table = cluster.table("stock", worker)
            assert [key async for key, _ in table.scan_remote()] == keys
            assert [key async for key, _ in table.scan_remote("k010", "k020")] == keys[10:20]
        answer = await cluster.json("/tables/stock?from=k010&to=k013")
        assert [row["key"] for row in answer["items"]] == ["k010", "k011", "k012"]
        assert [row["key"] for row in (await cluster.json("/tables/stock?prefix=k14"))["items"]] == keys[140:150]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "cursor=nonsense", "stale=yes", "timeout_s=61", "pefix=a", "at=x"]
)
async def test_what_cannot_be_read_is_400(query: str) -> None:
    async with Cluster(shop, workers=1) as cluster:
        answer = await cluster.get(f"/tables/stock?{query}")
        assert answer.status_code == 400, answer.text
        assert query.split("=")[0] in answer.json()["error"] or "position" in answer.text


async def test_a_position_of_a_partition_that_there_is_not_is_400() -> None:
    async with Cluster(kinds) as cluster:
        await filled(cluster, {"tea": 1}, "source")
        changelog = cluster.table("brief").changelog.name
        for worker in range(2):
            for topic in ("source", changelog):
                every = ",".join(f"{topic}:{number}:0" for number in range(3))
                assert (await cluster.get(f"/tables/brief/tea?at={every}", worker=worker)).status_code == 200
                for path in ("brief/tea", "brief", "tags/tea"):
                    if path == "tags/tea" and topic == changelog:
                        continue
                    answer = await cluster.get(f"/tables/{path}?at={topic}:3:1", worker=worker)
                    assert (answer.status_code, f"{topic} has 0 to 2" in answer.text) == (400, True), answer.text
            with pytest.raises(sf.ConfigurationError, match="source:9 is of no partition"):
                await cluster.table("brief", worker).get_remote("tea", at="source:9:1")
        answer = await cluster.get("/tables/all-rates/r?at=rates:2:1")
        assert (answer.status_code, "rates has 0 to 1" in answer.text) == (400, True), answer.text


async def test_a_cursor_is_for_its_own_read() -> None:
    async with Cluster(shop, workers=1) as cluster:
        await filled(cluster, {"a": 1, "b": 1, "c": 1})
        cursor = (await cluster.json("/tables/stock?prefix=&limit=1"))["cursor"]
        assert [row["key"] for row in (await cluster.json(f"/tables/stock?cursor={cursor}"))["items"]] == ["b", "c"]
        assert (await cluster.get(f"/tables/stock?from=b&cursor={cursor}")).status_code == 400


# --- who may read --------------------------------------------------------------------------------------------------

asked: list[sf.TableRead] = []


def guarded() -> sf.App:
    app = shop()

    @app.authorize_reads
    async def allowed(read: sf.TableRead) -> bool:
        asked.append(read)
        if read.headers.get("authorization") == "Bearer ann":
            return read.key == "ann"
        if read.headers.get("authorization") == "Bearer root":
            return True
        raise PermissionError("who are you?")

    return app


async def test_who_may_read_is_asked_for_on_both_workers() -> None:
    async with Cluster(guarded) as cluster:
        await filled(cluster, {"ann": 1, "bob": 2})
        asked.clear()
        for worker in range(2):
            for key, who, status in (
                ("ann", "Bearer ann", 200),
                ("bob", "Bearer ann", 403),
                ("bob", "Bearer root", 200),
                ("bob", "Basic x", 403),
            ):
                answer = await cluster.get(f"/tables/stock/{key}", worker=worker, Authorization=who)
                assert answer.status_code == status
            assert (await cluster.get("/tables/stock", worker=worker, Authorization="Bearer ann")).status_code == 403
            assert (await cluster.get("/tables/stock", worker=worker, Authorization="Bearer root")).status_code == 200
        assert "who are you?" in (await cluster.get("/tables/stock/ann")).text
        # Each read that was passed on was asked for twice.
        assert [read.key for read in asked].count("ann") >= 3
        elsewhere = cluster.table("stock", 1 - cluster.owner("stock", "bob"))
        with pytest.raises(PermissionError, match=r"^who are you\?$"):
            await elsewhere.get_remote("bob")
        assert await elsewhere.get_remote("bob", headers={"authorization": "Bearer root"}) == 2


def careless(calls: list[Any]) -> sf.App:
    app = kinds()

    @app.authorize_reads
    def allowed(read: sf.TableRead) -> bool:
        calls.append(read.key)
        if "x-broken" in read.headers:
            raise sf.DeserializationError("a secret")
        return read.headers["x-user"] == "root"

    return app


async def test_a_guard_that_raises_refuses_the_read_once_for_all(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Any] = []
    async with Cluster(lambda: careless(calls)) as cluster:
        await filled(cluster, {"tea": 1}, "source")
        owner = cluster.owner("brief", "tea")
        for path in ("brief/tea", "brief", "brief?key=tea", "tags/tea", "all-rates/tea"):
            answer = await cluster.get(f"/tables/{path}", worker=owner)
            assert (answer.status_code, answer.headers["content-type"]) == (500, "application/json"), path
            assert "the app's @app.authorize_reads function raised KeyError" in answer.json()["error"]
            assert "x-user" not in answer.text
        broken = await cluster.get("/tables/brief/tea", worker=owner, x_broken="1")
        assert (broken.status_code, "raised DeserializationError" in broken.text) == (500, True)
        assert "secret" not in broken.text
        told = [record for record in caplog.records if "authorize_reads raised" in record.message]
        assert [type(record.exc_info[1]).__name__ for record in told if record.exc_info] == [
            "KeyError",
            "DeserializationError",
        ]
        assert cluster.sensors[owner].table_reads == {
            ("brief", "failed"): 4,
            ("tags", "failed"): 1,
            ("all-rates", "failed"): 1,
        }
        assert (await cluster.get("/tables/brief/tea", worker=owner, x_user="root")).status_code == 200


async def test_what_a_guard_raises_at_another_worker_is_final(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Any] = []
    async with Cluster(lambda: careless(calls)) as cluster:
        await filled(cluster, {"tea": 1}, "source")
        other = 1 - cluster.owner("brief", "tea")
        table = cluster.table("brief", other)
        calls.clear()
        with pytest.raises(sf.ReadFailed, match=r"authorize_reads function raised KeyError"):
            await table.get_remote("tea")
        assert calls == ["tea"]
        assert cluster.sensors[other].table_reads == {("brief", "failed"): 1}
        assert caplog.text.count("authorize_reads raised") == 1
        for worker in range(2):  # asked about before anyone is
            with pytest.raises(sf.ReadFailed) as raised:
                await cluster.table("brief", worker).get_remote("tea", headers={"X-Name": "ann"})
            assert isinstance(raised.value.__cause__, KeyError)
        with pytest.raises(sf.ReadFailed):
            [row async for row in table.scan_remote()]


async def test_an_error_of_a_web_server_before_a_worker_is_not_final() -> None:
    async with Cluster(shop) as cluster:
        await filled(cluster, {"tea": 1})
        other = 1 - cluster.owner("stock", "tea")
        client = cluster.workers[other].worker.table_reads._client  # type: ignore[union-attr]
        real, failed = client.get, list[str]()

        async def get(url: str, *args: Any, **options: Any) -> Response:
            if failed:
                return await real(url, *args, **options)
            failed.append(url)
            return Response(500, {}, b"Internal Server Error")

        client.get = get  # type: ignore[method-assign]
        assert await cluster.table("stock", other).get_remote("tea") == 1
        assert failed


async def test_headers_in_python_are_decided_on_wherever_the_key_is() -> None:
    async with Cluster(guarded) as cluster:
        await filled(cluster, {"ann": 1, "bob": 2})
        ann, root = {"Authorization": "Bearer ann"}, {"Authorization": "Bearer root"}
        for worker in range(2):
            table = cluster.table("stock", worker)
            assert await table.get_remote("ann", headers=ann) == 1
            assert await table.get_remote("bob", headers=root) == 2
            assert [row async for row in table.scan_remote(headers=root)] == [("ann", 1), ("bob", 2)]
            with pytest.raises(PermissionError, match="does not allow"):
                await table.get_remote("bob", headers=ann)
            with pytest.raises(PermissionError, match="does not allow"):
                [row async for row in table.scan_remote(headers=ann)]
            for key in ("ann", "bob"):
                with pytest.raises(PermissionError, match="who are you"):
                    await table.get_remote(key, headers={})
        # The app's own code, which asks for nobody.
        assert await cluster.table("stock", cluster.owner("stock", "bob")).get_remote("bob") == 2


async def test_a_header_that_is_there_twice_is_one_and_the_same_on_both_workers() -> None:
    async with Cluster(guarded) as cluster:
        await filled(cluster, {"ann": 1, "bob": 2})
        twice = [("Authorization", "Bearer root"), ("X-Some", "1"), ("Authorization", "Bearer ann"), ("X-Some", "2")]
        cookies = [("Authorization", "Bearer root"), ("Cookie", "a=1"), ("Cookie", "b=2"), ("X-Some", "1")]
        for worker in range(2):
            asked.clear()
            answer = await cluster.http.get(f"{cluster.urls[worker]}/tables/stock/bob", headers=twice)
            assert answer.status_code == 403
            assert {read.headers["authorization"] for read in asked} == {"Bearer root, Bearer ann"}
            asked.clear()
            answer = await cluster.http.get(f"{cluster.urls[worker]}/tables/stock/bob", headers=cookies)
            assert answer.status_code == 200
            assert {(read.headers["cookie"], read.headers["x-some"]) for read in asked} == {("a=1; b=2", "1")}
            assert len(asked) == (1 if worker == cluster.owner("stock", "bob") else 2)


async def test_the_way_between_workers_is_guarded_like_the_others() -> None:
    async with Cluster(guarded) as cluster:
        await filled(cluster, {"ann": 1, "bob": 2})
        owner = cluster.owner("stock", "bob")
        order = cluster.table("stock").keys_in_order
        partition = cluster.home_of("moves", "bob")
        for question in (
            Question("stock", (partition,), order.name, key=order.encode("bob")),
            Question("stock", (partition,), order.name, limit=10),
        ):
            path = f"/-/table-reads?{question.query()}"
            assert (await cluster.get(path, worker=owner, Authorization="Bearer ann")).status_code == 403
            assert (await cluster.get(path, worker=owner, Authorization="Bearer root")).status_code == 200
            assert (await cluster.get(path, worker=1 - owner, Authorization="Bearer root")).status_code == 421
        assert (await cluster.get("/-/table-reads?q=x", worker=owner)).status_code == 400
        # What two workers ask one another is one thing: a guard that is told of `ann` must not let `bob` be read.
        bob, ann = order.encode("bob"), b"ann"
        asked = {"table": "stock", "partitions": [partition], "order": order.name}
        for more in (
            {"key": bob, "under": ann},
            {"key": bob, "low": bob},
            {"key": bob, "partitions": [partition, partition]},
            {"low": b"", "limit": 0},
            {"key": bob, "timeout_s": 1e12},
            {"key": bob, "timeout_s": float("nan")},
        ):
            q = base64.urlsafe_b64encode(msgspec.msgpack.encode(asked | more)).decode()
            told = await cluster.get(f"/-/table-reads?q={q}", worker=owner, Authorization="Bearer ann")
            assert told.status_code == 400, more


def test_one_function_decides() -> None:
    app = guarded()
    with pytest.raises(sf.TopologyError, match="already"):
        app.authorize_reads(lambda read: True)


# --- moves, waits --------------------------------------------------------------------------------------------------


async def test_a_read_waits_for_its_position() -> None:
    async with Cluster(shop) as cluster:
        await filled(cluster, {"tea": 1})
        machine = cluster.machine
        sent = await machine.client.send(machine.app.topics["moves"], key="tea", value=5)
        for worker in range(2):
            late = await cluster.get(f"/tables/stock/tea?at={sent.position}&timeout_s=0.05", worker=worker)
            assert late.status_code == 503
            assert "has not come to offset" in late.text
        reads = [
            asyncio.create_task(cluster.get(f"/tables/stock/tea?at={sent.position}", worker=worker))
            for worker in range(2)
        ]
        await machine.settle()
        for read in reads:
            answer = await read
            assert answer.json()["value"] == 6
            assert f"moves:{sent.partition}:{sent.offset + 1}" in answer.headers["streamflow-position"]
        assert (await cluster.get("/tables/stock/tea?at=other:0:1")).status_code == 400


async def test_the_first_record_of_a_partition_is_waited_for() -> None:
    async with Cluster(shop) as cluster:
        machine = cluster.machine
        sent = await machine.client.send(machine.app.topics["moves"], key="tea", value=5)
        late = await cluster.get(f"/tables/stock/tea?at={sent.position}&timeout_s=0.05")
        assert late.status_code == 503
        await machine.settle()
        assert (await cluster.json(f"/tables/stock/tea?at={sent.position}"))["value"] == 5


async def test_a_change_is_read_by_the_position_behind_it() -> None:
    async with Cluster(shop) as cluster:
        await filled(cluster, {"tea": 1})
        owner = cluster.owner("stock", "tea")
        table = cluster.table("stock", owner)
        change = asyncio.create_task(table.update_async("tea", lambda count: 40))
        await cluster.machine.settle()
        await change
        position = table.position("tea")
        assert "stock-changelog" in position
        assert await cluster.table("stock", 1 - owner).get_remote("tea", at=position) == 40
        with pytest.raises(sf.NotHeld):
            cluster.table("stock", 1 - owner).position("tea")


async def test_what_moves_is_found_again() -> None:
    async with Cluster(shop) as cluster:
        counts = {f"k{number}": number for number in range(20)}
        await filled(cluster, counts)
        await cluster.start()
        for worker in range(3):
            assert {key: await cluster.table("stock", worker).get_remote(key) for key in counts} == counts
        stopped = cluster.workers[0]
        reads = [
            asyncio.create_task(cluster.table("stock", 1 + number % 2).get_remote(key))
            for number, key in enumerate(counts)
        ]
        await cluster.machine.stop(stopped)
        await cluster.shared()
        assert [await read for read in reads] == list(counts.values())
        for worker in (1, 2):
            assert (await cluster.json("/tables/stock?limit=1000", worker=worker))["cursor"] is None
            assert {key: await cluster.table("stock", worker).get_remote(key) for key in counts} == counts
        assert (await cluster.get("/tables/stock/k1", worker=0)).status_code == 503  # it has stopped


async def test_a_copy_that_has_heard_nothing_for_long_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamflow.runtime.standbys._ENDS_EVERY_S", 0.01)
    async with Cluster(shop, standby_replicas=1) as cluster:
        await filled(cluster, {"tea": 1})
        other = 1 - cluster.owner("stock", "tea")

        async def stale() -> tuple[object, str | None]:
            answer = await cluster.get("/tables/stock/tea?stale=ok", worker=other)
            return answer.json().get("value"), answer.headers.get("streamflow-lag")

        async def is_copied() -> bool:
            return await stale() == (1, "0")

        await cluster.machine.until(is_copied, within_s=20)
        cut_off = CutOff(cluster.workers[other])
        await filled(cluster, {"tea": 10})
        assert await stale() == (1, "0")  # so it was a moment ago
        cluster.machine.clock.advance(16)
        assert await stale() == (11, None)
        cut_off.over()

        async def is_copied_again() -> bool:
            return await stale() == (11, "0")

        await cluster.machine.until(is_copied_again, within_s=20)


async def test_an_owner_that_restores_asks_the_copy_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamflow.runtime.standbys._ENDS_EVERY_S", 0.01)
    monkeypatch.setattr("streamflow.runtime.table_reads._OTHERS_S", 0.05)
    async with Cluster(shop, standby_replicas=1) as cluster:
        await filled(cluster, {"tea": 1})
        owner = cluster.owner("stock", "tea")

        async def told(worker: int, query: str) -> tuple[object, str | None]:
            answer = await cluster.get(f"/tables/stock/tea?{query}", worker=worker)
            return answer.json().get("value"), answer.headers.get("streamflow-lag")

        async def is_copied() -> bool:
            return await told(1 - owner, "stale=ok") == (1, "0")

        await cluster.machine.until(is_copied, within_s=20)
        monkeypatch.setattr(Restorer, "restore", _for_ever)
        for task in cluster.workers[owner].tasks.values():
            task.tables.is_damaged(StateCorruptedError("a file is damaged"))
        assert await told(owner, "stale=ok") == (1, "0")
        assert await told(owner, "timeout_s=0.1") == (None, None)  # who asks for the owner's waits for it


async def _for_ever(*_: object, **__: object) -> None:
    await asyncio.Event().wait()


async def test_a_position_that_the_copy_here_cannot_tell_is_asked_of_the_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamflow.runtime.standbys._ENDS_EVERY_S", 0.01)
    async with Cluster(shop, standby_replicas=1) as cluster:
        machine = cluster.machine
        moves = machine.app.topics["moves"]
        await filled(cluster, {"tea": 1})
        other = 1 - cluster.owner("stock", "tea")

        async def told(path: str) -> tuple[int, str | None]:
            answer = await cluster.get(path, worker=other)
            return answer.status_code, answer.headers.get("streamflow-lag")

        async def is_copied() -> bool:
            return await told("/tables/stock/tea?stale=ok") == (200, "0")

        await machine.until(is_copied, within_s=20)
        sent = await machine.client.send(moves, key="tea", value=10)
        await machine.settle()
        # Copies follow the changelog: how far the source is in it they do not know.
        assert await told(f"/tables/stock/tea?stale=ok&at={sent.position}") == (200, None)
        rows = await cluster.get(f"/tables/stock?stale=ok&at={sent.position}", worker=other)
        assert rows.json()["items"] == [{"key": "tea", "value": 11}]
        order = cluster.table("stock").keys_in_order
        asked = Question(
            "stock", (sent.partition,), order.name, key=order.encode("tea"), at=sent.position, stale_ok=True
        )
        copy = await cluster.get(f"/-/table-reads?{msgspec.structs.replace(asked, timeout_s=60).query()}", worker=other)
        assert (copy.status_code, "does not know whether it has come" in copy.text) == (
            503,
            True,
        )  # and waits for nothing
        # A position of the changelog that the copy has not come to yet.
        cut_off = CutOff(cluster.workers[other])
        await filled(cluster, {"tea": 100})
        position = cluster.table("stock", 1 - other).position("tea")
        changelog = next(each for each in position.split(",") if "changelog" in each)
        assert (await told("/tables/stock/tea?stale=ok"))[1] is not None  # without a position the copy will do
        for at in (position, changelog):
            assert await told(f"/tables/stock/tea?stale=ok&at={at}") == (200, None)
        cut_off.over()
        # The owner has not come to it either: it is waited for, and what is lacking is said.
        sent = await machine.client.send(moves, key="tea", value=1000)
        late = await cluster.get(f"/tables/stock/tea?stale=ok&at={sent.position}&timeout_s=0.1", worker=other)
        assert late.status_code == 503
        assert f"has not come to offset {sent.offset + 1} of moves" in late.json()["error"]
        read = asyncio.create_task(cluster.get(f"/tables/stock/tea?stale=ok&at={sent.position}", worker=other))
        await machine.settle()
        assert (await read).json()["value"] == 1111


async def test_who_was_not_heard_of_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(shop) as cluster:
        await filled(cluster, {"tea": 1})
        owner = cluster.owner("stock", "tea")
        group = cluster.workers[owner].worker.group
        assert group is not None
        silent = dataclasses.replace(group.statistics(), last_heartbeat_age_s=90_000.0)
        monkeypatch.setattr(group, "statistics", lambda: silent)
        for worker in range(2):
            answer = await cluster.get("/tables/stock/tea?timeout_s=0.1", worker=worker)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert "was not heard of" in answer.text
        with pytest.raises(sf.NotHeld, match=r"[0-9]: 503 this worker was not heard of"):
            await cluster.table("stock", 1 - owner).get_remote("tea", timeout_s=0.1)
        monkeypatch.undo()
        assert await cluster.table("stock", 1 - owner).get_remote("tea", timeout_s=0.1) == 1


async def test_what_a_read_lost_meanwhile_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Cluster(shop, workers=1) as cluster:
        await filled(cluster, {"tea": 1})
        group = cluster.workers[0].worker.group
        assert group is not None
        silent = dataclasses.replace(group.statistics(), last_heartbeat_age_s=90_000.0)
        value = Owned.value

        def stopped_in_between(self: Owned, key: Any, store_key: bytes) -> bytes | None:
            monkeypatch.setattr(group, "statistics", lambda: silent)
            return value(self, key, store_key)

        monkeypatch.setattr(Owned, "value", stopped_in_between)
        assert (await cluster.get("/tables/stock/tea?timeout_s=0.1")).status_code == 503


async def test_a_worker_without_a_web_server_is_named() -> None:
    async with Cluster(shop) as cluster:
        await filled(cluster, {"tea": 1})
        asker = 1 - cluster.owner("stock", "tea")
        routes = cluster.workers[asker].worker.routes
        tasks = frozenset(TaskId(sub, number) for sub, number in routes._owners)
        routes.told([Route("http://127.0.0.1:9", tasks)])
        routes.told([Route("", tasks)])
        answer = await cluster.get("/tables/stock/tea?timeout_s=0", worker=asker)
        assert answer.status_code == 503
        assert "serves no HTTP" in answer.text
        routes.told([])
        assert "nobody is known to hold" in (await cluster.get("/tables/stock/tea?timeout_s=0", worker=asker)).text


def another_shop() -> sf.App:
    app = shop()
    app.id = "another"
    return app


async def test_a_worker_of_another_app_at_a_known_address_is_not_taken_for_the_owner() -> None:
    async with Cluster(shop) as cluster, Cluster(another_shop, workers=1) as other:
        await filled(cluster, {"tea": 1})
        await filled(other, {"tea": 666})
        owner = cluster.owner("stock", "tea")
        routes = cluster.workers[1 - owner].worker.routes
        told = routes._owners
        urls = {url: frozenset(task for task, at in told.items() if at == url) for url in told.values()}
        own = cluster.urls[1 - owner]
        routes.told([])  # else where the task was before is asked in turn, and the last one's answer is what is said
        routes.told([Route(own, urls[own]), Route(other.urls[0], urls[cluster.urls[owner]])])
        answer = await cluster.get("/tables/stock/tea?timeout_s=0.1", worker=1 - owner)
        assert answer.status_code == 503, answer.text
        assert "a worker of app 'another'" in answer.text


async def test_reads_are_counted() -> None:
    async with Cluster(shop) as cluster:
        await filled(cluster, {"tea": 1})
        await cluster.json("/tables/stock/tea")
        await cluster.get("/tables/stock/coffee")
        await cluster.get("/tables/stock/tea?timeout_s=0.01&at=moves:0:99,moves:1:99,moves:2:99,moves:3:99")
        assert cluster.sensors[0].table_reads == {
            ("stock", "found"): 1,
            ("stock", "absent"): 1,
            ("stock", "unavailable"): 1,
        }
        assert (
            'streamflow_table_reads_total{outcome="absent",table="stock"} 1.0' in (await cluster.get("/metrics")).text
        )


async def test_tables_are_listed_and_may_be_kept_to_oneself() -> None:
    async with Cluster(kinds, workers=1) as cluster:
        listed = {each["table"]: each for each in await cluster.json("/tables")}
        assert sorted(listed) == ["all-rates", "blobs", "brief", "pairs", "places", "tags"]
        assert listed["tags"]["value_type"] == "set of str"
    async with Cluster(shop, workers=1, serve_tables=False) as cluster:
        assert cluster.urls == [""]
