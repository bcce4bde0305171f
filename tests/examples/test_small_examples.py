"""The small examples do what their docstrings say."""

import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.examples.conftest import EXAMPLES, ROOT, commands
from tests.ports import free_port

pytestmark = [pytest.mark.slow]


def test_hello_world(run):
    send, worker, tail = commands("hello_world.py", "streamflow")
    run(send)
    run(worker)
    assert "Hello, Ann!" in run(tail)


def test_chained_agents(run):
    send, worker, tail, topology = commands("chained_agents.py", "streamflow")
    run(send)
    for sensor, degrees in [("roof", 105.8), ("moon", 260.6), ("roof", 68.0), ("cellar", 50.0)]:
        value = json.dumps({"sensor": sensor, "degrees": degrees})
        run(f"streamflow send examples/chained_agents.py fahrenheit '{value}' --key {sensor}")
    run(worker)
    assert '"roof"' in run(tail)
    told = run(tail.replace("--limit 1", "--limit 2 --json"))
    assert [json.loads(line)["value"] for line in told.splitlines()] == [
        {"sensor": "roof", "degrees": 40.3, "hot": True},
        {"sensor": "roof", "degrees": 20.0, "hot": False},
    ]
    shown = run(topology)
    assert all(name in shown for name in ("fahrenheit", "convert", "celsius", "watch", "alarms"))


def test_word_count(run):
    send, worker, tail, scan, topology = commands("word_count.py", "streamflow")
    expected = Counter(re.findall(r"[a-z']+", (ROOT / "LICENSE").read_text().lower()))
    for times in (1, 2):  # the second worker goes on where the first one ended
        run(send)
        run(worker)
        records = [json.loads(line) for line in run(f"{tail} --json").splitlines()]
        last = {record["key"]: record["value"] for record in records}
        assert last == {word: times * count for word, count in expected.items()}
        assert len(records) == times * expected.total()
    told = [line.rsplit(maxsplit=1) for line in run(scan).splitlines()]
    assert {word: int(count) for word, count in told} == last
    assert "word-count-by-word-repartition" in run(topology)


def test_ask_reply(run):
    (command,) = commands("ask_reply.py", "python")
    answer, other, refused = run(command).splitlines()
    assert (answer, other) == ("2 x tea: 7.00", "1 x cake: 4.00")
    assert refused.startswith("1 x wine: refused (")
    assert "KeyError: 'wine'" in refused


def test_state_migration(run):
    (command,) = commands("state_migration.py", "python")
    assert [line.split(maxsplit=1) for line in run(command).splitlines() if line.startswith("  ")] == [
        ["ann", "Visitor1(name='Ann Lee', visits=2)"],
        ["bob", "Visitor1(name='Bob van Dyk', visits=1)"],
        ["visited", "2 keys, changed 2"],
        ["ann", "Visitor2(name='Ann Lee', visits=3, first='Ann', last='Lee')"],
        ["bob", "Visitor2(name='Bob van Dyk', visits=1, first='Bob', last='van Dyk')"],
        ["ann", "Visitor3(first='Ann', last='Lee', visits=4)"],
        ["bob", "Visitor3(first='Bob', last='van Dyk', visits=1)"],
    ]


def test_keyed_concurrency(run):
    (command,) = commands("keyed_concurrency.py", "python")
    told = run(command)
    busiest = re.search(r"at most (\d) at a time; each customer's orders in order: True", told)
    assert busiest, told
    assert 1 < int(busiest[1]) <= 6  # never two of one customer, and there are six


def test_fastapi_app(environment, tmp_path):
    with served("fastapi_app.py", environment, tmp_path / "log") as http:
        stored = [http.post("/orders/ann", params={"amount": 12.5}) for _ in range(2)]
        quoted = http.post("/quotes/ann", params={"amount": 10})
        refused = http.post("/quotes/ann", params={"amount": -1})
    assert [answer.status_code for answer in stored] == [202, 202]
    assert [answer.json()["offset"] for answer in stored] == [0, 1]
    assert quoted.json() == {"user": "ann", "total": 9.0}
    assert refused.status_code == 422
    assert "nothing costs -1" in refused.json()["detail"]


ITEMS = [f"item-{number}" for number in range(20)]


def test_table_over_http(environment, tmp_path):
    with served("table_over_http.py", environment, tmp_path / "log") as http:
        for item in ITEMS:
            for count in (5, -2):
                sent = http.post(f"/movements/{item}", params={"count": count})
                assert sent.status_code == 202
            # What was sent is there, without a wait of ours.
            assert http.get(f"/stock/{item}", params={"at": sent.json()["position"]}).json()["count"] == 3
        assert http.get("/stock").json() == dict.fromkeys(ITEMS, 3)
        assert http.put("/stock/item-0", params={"count": 10}).json()["count"] == 10
        assert http.get("/stock/item-0").json() == {"item": "item-0", "count": 10}
        nothing = http.get("/stock/coffee")
        assert (nothing.status_code, nothing.json()["detail"]) == (404, "there is no coffee")
        with served("table_over_http.py", environment, tmp_path / "other-log") as other:
            until(lambda: shared_out(http, other))
            check_all_is_read_and_each_item_changed_in_one_process(http, other)


def shared_out(one: httpx.Client, other: httpx.Client) -> bool:
    partitions = [http.get("/health").json()["partitions"] for http in (one, other)]
    return all(partitions) and sorted(partitions[0] + partitions[1]) == [0, 1, 2, 3]


def check_all_is_read_and_each_item_changed_in_one_process(one: httpx.Client, other: httpx.Client) -> None:
    stock = dict.fromkeys(ITEMS, 3) | {"item-0": 10}
    for http in (one, other):
        assert http.get("/stock").json() == stock
        assert {item: http.get(f"/stock/{item}").json()["count"] for item in ITEMS} == stock
    for item in ITEMS:
        answers = [http.put(f"/stock/{item}", params={"count": 4}) for http in (one, other)]
        there, elsewhere = sorted(answers, key=lambda answer: answer.status_code)
        assert (there.status_code, elsewhere.status_code) == (200, 421)
        assert f"the key '{item}' is in partition" in elsewhere.json()["detail"]
        for http in (one, other):
            assert http.get(f"/stock/{item}", params={"at": there.json()["position"]}).json()["count"] == 4


@contextmanager
def served(example: str, environment: dict[str, str], log: Path) -> Iterator[httpx.Client]:
    """Run an example's `uvicorn` command on a free port, and end it as a supervisor would."""
    (command,) = commands(example, "uvicorn")
    port = free_port()
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command.split(), "--port", str(port)], cwd=ROOT, env=environment, stderr=output, stdout=output
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            wait_until_served(http, server)
            yield http
        server.terminate()
        assert server.wait(20) in {0, -15}, log.read_text()
    finally:
        server.kill()
        server.wait()


def wait_until_served(http: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    def is_served() -> bool:
        if server.poll() is not None:
            pytest.fail("the application did not start")
        try:
            return http.get("/health").json()["status"] == "ok"
        except httpx.TransportError:
            return False

    until(is_served)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "not within 20 s"
        time.sleep(0.05)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_says_what_it_shows(path):
    assert path.read_text().startswith('"""')
    if not path.name.startswith("flights_"):  # those are parts of one example
        assert f"`{path.name}`" in (ROOT / "docs" / "examples.md").read_text()
