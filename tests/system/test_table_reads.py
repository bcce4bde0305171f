"""Tables read from any of three processes, while these are restarted, killed and stopped in their tracks.

The values of a key only grow: each record writes the number that it carries, and numbers are sent in order. So an
answer below what was answered before, or below what `at` covers, is wrong; 503 is not.
"""

import asyncio
import json
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.system.harness import STOPPED, System, Worker, until

pytestmark = [pytest.mark.system, pytest.mark.slow]

WORKERS = 3
KEYS = [f"k{number}" for number in range(30)]
ODD = ["", "a/b", "../x", "ü€", "per%20cent", "line\nend"]
APP = """
newest = app.table("newest", key_type=str, value_type=int)

@app.agent(numbers)
async def note(stream: sf.Stream[int, str]) -> None:
    async for key, number in stream.items():
        newest[key] = number
"""
GUARD = """
@app.authorize_reads
def allowed(read: sf.TableRead) -> bool:
    return read.headers.get("authorization") == "Bearer " + str(read.key)
"""


class Reader:
    """Reads every key from every worker, over and over, and checks each answer."""

    def __init__(self, system: System, http: httpx.AsyncClient) -> None:
        self._system = system
        self._http = http
        self._seen: dict[str, int] = {}
        self.answers = 0
        self.waits = 0
        self.wrong: list[str] = []

    async def run(self) -> None:
        chance = random.Random(5)
        while True:
            live = [worker for worker in self._system.workers if worker.runs and "web " in worker.said]
            await self._read(chance.choice(live), chance.choice(KEYS)) if live else await asyncio.sleep(0.01)

    async def _read(self, worker: Worker, key: str) -> None:
        before = self._seen.get(key, -1)
        try:
            answer = await self._http.get(f"{await worker.url()}/tables/newest/{key}?timeout_s=1", timeout=5)
        except (httpx.HTTPError, AssertionError):
            return  # it is stopped
        if answer.status_code == 200:
            self.answers += 1
            found = answer.json()["value"]
            if found < before:
                self.wrong.append(f"{key}: {found} after {before}")
            self._seen[key] = max(found, self._seen.get(key, -1))
        elif answer.status_code == 503:
            self.waits += 1
            assert answer.headers["retry-after"]
        else:
            self.wrong.append(f"{key}: {answer.status_code} {answer.text}")


@asynccontextmanager
async def reading(system: System) -> AsyncIterator[Reader]:
    async with httpx.AsyncClient() as http:
        reader = Reader(system, http)
        readers = [asyncio.create_task(reader.run()) for _ in range(3)]
        try:
            yield reader
        finally:
            for each in readers:
                each.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
    assert reader.wrong == []
    assert reader.answers > 0


async def started(system: System, body: str = APP) -> list[Worker]:
    system.write_app(body, partitions=6)
    workers = [system.start() for _ in range(WORKERS)]
    for worker in workers:
        await worker.ready()
    await shared(system, workers)
    return workers


async def shared(system: System, workers: list[Worker]) -> None:
    """Wait until all partitions are held, each by one."""

    async def held() -> bool:
        owned = [await worker.owned(system.topic("numbers")) for worker in workers]
        return all(owned) and sorted(number for each in owned for number in each) == list(range(6))

    await until(held, system.told)


async def rows(system: System, number: int, keys: list[str] = KEYS) -> None:
    await system.write("numbers", [(key.encode(), number) for key in keys])


async def everywhere(workers: list[Worker], expected: dict[str, int]) -> None:
    """Wait until every key has its value, read from every worker."""
    for worker in workers:
        for key, value in expected.items():
            path = f"/tables/newest/{quote(key, safe='')}?timeout_s=10"

            async def right(worker: Worker = worker, path: str = path, value: int = value) -> bool:
                status, text = await worker.get(path)
                return status == 200 and json.loads(text)["value"] == value

            await until(right, lambda path=path, worker=worker: f"{path} of {worker.said}")


async def paged(worker: Worker, limit: int) -> list[str]:
    found: list[str] = []
    cursor = ""
    while True:
        status, text = await worker.get(f"/tables/newest?limit={limit}&timeout_s=10{cursor and '&cursor=' + cursor}")
        assert status == 200, text
        page: Any = json.loads(text)
        found += [row["key"] for row in page["items"]]
        if page["cursor"] is None:
            return found
        cursor = page["cursor"]


async def test_every_key_is_read_from_every_worker(system: System) -> None:
    workers = await started(system)
    await rows(system, 1, KEYS + ODD)
    await everywhere(workers, dict.fromkeys(KEYS + ODD, 1))
    for worker, limit in zip(workers, (1000, 7, 1), strict=True):
        assert await paged(worker, limit) == sorted(KEYS + ODD, key=str.encode)
    status, text = await workers[0].get("/tables/newest/nobody")
    assert (status, "no key 'nobody'" in text) == (404, True)


async def test_a_rolling_restart_answers_nothing_that_is_older(system: System) -> None:
    workers = await started(system)
    await rows(system, 0)
    await everywhere(workers, dict.fromkeys(KEYS, 0))
    async with reading(system) as reader:
        for number, worker in enumerate(list(workers), 1):
            before = reader.answers
            await rows(system, 2 * number - 1)
            assert await worker.stops(15) == STOPPED
            workers.remove(worker)
            await rows(system, 2 * number)
            workers.append(await system.start().ready())
            await shared(system, workers)
            await until(lambda before=before: reader.answers > before + 50, system.told)
    await everywhere(workers, dict.fromkeys(KEYS, 2 * WORKERS))


async def test_a_killed_owner_is_followed_by_another(system: System) -> None:
    workers = await started(system)
    await rows(system, 1)
    await everywhere(workers, dict.fromkeys(KEYS, 1))
    async with reading(system) as reader:
        workers.pop(0).kill()
        await rows(system, 2)
        await shared(system, workers)
        before = reader.answers
        await until(lambda: reader.answers > before + 50, system.told)
    await everywhere(workers, dict.fromkeys(KEYS, 2))


async def test_a_zombie_does_not_answer_with_what_it_had(system: System) -> None:
    workers = await started(system)
    await rows(system, 1)
    await everywhere(workers, dict.fromkeys(KEYS, 1))
    zombie, *others = workers
    zombie.signal(signal.SIGSTOP)
    try:
        await shared(system, others)
        await rows(system, 2)
        await everywhere(others, dict.fromkeys(KEYS, 2))
        url = await zombie.url()
        async with httpx.AsyncClient(timeout=30) as http:
            # On their way before it wakes up: these are what it answers first.
            reads = [asyncio.create_task(http.get(f"{url}/tables/newest/{key}?timeout_s=5")) for key in KEYS]
            await asyncio.sleep(0.3)
            zombie.signal(signal.SIGCONT)
            for read in reads:
                answer = await read
                assert answer.status_code == 503 or answer.json()["value"] == 2, answer.text
    finally:
        zombie.signal(signal.SIGCONT)
    await everywhere(workers, dict.fromkeys(KEYS, 2))


async def test_a_standby_answers_with_its_lag(system: System) -> None:
    system.write_app(APP, partitions=6, standby_replicas=1)
    workers = [system.start() for _ in range(2)]
    for worker in workers:
        await worker.ready()
    await shared(system, workers)
    await rows(system, 1)
    await everywhere(workers, dict.fromkeys(KEYS, 1))

    async def all_here() -> bool:
        """Every key is read from the second worker's own stores."""
        async with httpx.AsyncClient() as http:
            url = await workers[1].url()
            answers = [await http.get(f"{url}/tables/newest/{key}?stale=ok", timeout=10) for key in KEYS]
        lags = [answer.headers.get("streamflow-lag") for answer in answers]
        return all(answer.status_code == 200 for answer in answers) and set(lags) == {None, "0"}

    await until(all_here, system.told)
    owned = await workers[1].owned(system.topic("numbers"))
    assert 0 < len(owned) < 6
    workers[0].signal(signal.SIGSTOP)
    try:
        status, text = await workers[1].get(f"/tables/newest/{KEYS[0]}?stale=ok")
        assert (status, json.loads(text)["value"]) == (200, 1)
    finally:
        workers[0].signal(signal.SIGCONT)


async def test_who_may_read_is_decided_by_the_app(sqlite: System) -> None:
    workers = await started(sqlite, APP + GUARD)
    await rows(sqlite, 1)
    async with httpx.AsyncClient() as http:
        for worker in workers:
            url = f"{await worker.url()}/tables/newest"
            for key in KEYS[:6]:
                answer = await http.get(f"{url}/{key}", headers={"authorization": f"Bearer {key}"})
                assert answer.status_code in (200, 404)  # the record may be on its way
                assert (await http.get(f"{url}/{key}", headers={"authorization": "Bearer x"})).status_code == 403
            assert (await http.get(url)).status_code == 403


async def test_several_processes_are_read_at_one_address(sqlite: System) -> None:
    sqlite.write_app(APP, partitions=6)
    worker = await sqlite.start("--processes", "3").ready()
    await rows(sqlite, 1)
    for _ in range(3):  # each is asked in turn
        await everywhere([worker], dict.fromkeys(KEYS, 1))
    assert await paged(worker, 7) == sorted(KEYS)
    assert await worker.stops(15) == STOPPED


@pytest.mark.parametrize("arguments", [[], ["--processes", "2"]], ids=["worker", "supervisor"])
async def test_a_read_that_waits_while_the_worker_stops_gets_503(sqlite: System, arguments: list[str]) -> None:
    sqlite.write_app(APP, partitions=6)
    worker = await sqlite.start(*arguments).ready()
    host, port = (await worker.url()).removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        path = f"/tables/newest?timeout_s=60&at={sqlite.topic('numbers')}:0:99"
        writer.write(f"GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
        await writer.drain()
        assert (await worker.get("/live"))[0] == 200  # so the read has come, too
        assert await worker.stops(25) == STOPPED
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    finally:
        writer.close()
    assert head.startswith("HTTP/1.1 503 "), head + body
    assert "retry-after: 1" in head
    assert json.loads(body)["error"]
    assert "Traceback" not in worker.said
