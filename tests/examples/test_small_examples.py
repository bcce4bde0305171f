"""The small examples do what their docstrings say."""

import json
import re
import socket
import subprocess
import time

import httpx
import pytest

from tests.examples.conftest import EXAMPLES, ROOT, commands

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


def test_ask_reply(run):
    (command,) = commands("ask_reply.py", "python")
    answer, other, refused = run(command).splitlines()
    assert (answer, other) == ("2 x tea: 7.00", "1 x cake: 4.00")
    assert refused.startswith("1 x wine: refused (")
    assert "KeyError: 'wine'" in refused


def test_keyed_concurrency(run):
    (command,) = commands("keyed_concurrency.py", "python")
    told = run(command)
    busiest = re.search(r"at most (\d) at a time; each customer's orders in order: True", told)
    assert busiest, told
    assert 1 < int(busiest[1]) <= 6  # never two of one customer, and there are six


def test_fastapi_app(environment, tmp_path):
    (command,) = commands("fastapi_app.py", "uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command.split(), "--port", str(port)], cwd=ROOT, env=environment, stderr=log, stdout=log
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            wait_until_served(http, server)
            stored = [http.post("/orders/ann", params={"amount": 12.5}) for _ in range(2)]
            quoted = http.post("/quotes/ann", params={"amount": 10})
            refused = http.post("/quotes/ann", params={"amount": -1})
        server.terminate()
        assert server.wait(20) in {0, -15}, (tmp_path / "log").read_text()
    finally:
        server.kill()
        server.wait()
    assert [answer.status_code for answer in stored] == [202, 202]
    assert [answer.json()["offset"] for answer in stored] == [0, 1]
    assert quoted.json() == {"user": "ann", "total": 9.0}
    assert refused.status_code == 422
    assert "nothing costs -1" in refused.json()["detail"]


def wait_until_served(http: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and server.poll() is None:
        try:
            assert http.get("/health").json() == {"status": "ok"}
            return
        except httpx.TransportError:
            time.sleep(0.05)
    pytest.fail("the application did not start")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_says_what_it_shows(path):
    assert path.read_text().startswith('"""')
    if not path.name.startswith("flights_"):  # those are parts of one example
        assert f"`{path.name}`" in (ROOT / "docs" / "examples.md").read_text()
