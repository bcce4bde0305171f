"""`--processes N` with real processes."""

import asyncio
import math
import os
import re
import signal
import time

import anyio
import pytest

from streamflow.cli.load import load
from streamflow.cli.options import open_session
from streamflow.cli.supervisor import _Supervisor
from tests.cli.commands import COMMAND, TIMEOUT_S, Running, get, get_until, order

pytestmark = pytest.mark.system


def supervised(shell, *arguments: str, processes: int = 2) -> Running:
    started = shell.start("worker", "orders.py", "--processes", str(processes), "--web-port", "0", *arguments)
    started.wait_for(r"process \d+ started|\"process \d+ started", times=processes)
    return started


def pids(running: Running) -> dict[int, int]:
    """The newest process id of each child."""
    return {int(index): int(pid) for index, pid in re.findall(r"process (\d+) started \(pid (\d+)\)", running.err)}


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_they_share_the_work_and_are_served_as_one(shell):
    shell(
        "send",
        "orders.py",
        "orders",
        "-",
        "--key-field",
        "user",
        stdin="".join(order(n, f"u{n}") + "\n" for n in range(200)),
    )
    running = supervised(shell)
    url = running.url
    get_until(f"{url}/ready", '"ready":true')
    assert get(f"{url}/live") == (200, '{"live":true}')
    # Each is asked on its own: one may answer from before the other was given its share.
    both = "".join(rf'(?=.*streamflow_assigned_partitions\{{process="{number}"\}} 2\.0)' for number in (0, 1))
    metrics = get_until(f"{url}/metrics", f"(?s){both}")
    assert 'streamflow_process_up{process="1"} 1.0' in metrics
    page = get(url)[1]
    assert "Processes" in page
    shell("tail", "orders.py", "invoices", "--limit", "200")
    assert running.stop() == 0
    assert "[0] " in running.err
    assert "[1] " in running.err
    assert running.err.count("StreamFlow") == 1  # one banner
    topics = {topic["topic"]: topic for topic in shell("topics", "orders.py", "--json").lines}
    assert sum(partition["end_offset"] for partition in topics["invoices"]["partitions"]) == 200


def test_one_that_is_killed_is_started_again(shell):
    path = shell.folder / "orders.py"
    path.write_text("import os\nif os.path.exists('crash'):\n    os._exit(77)\n" + path.read_text())
    running = supervised(shell)
    url = running.url
    get_until(f"{url}/ready", '"ready":true')
    (shell.folder / "crash").touch()  # again and again, so that the pauses grow until somebody has looked meanwhile
    os.kill(pids(running)[1], signal.SIGKILL)
    running.wait_for("process 1 ended with SIGKILL; starting it again in 0.5 s")
    get_until(f"{url}/ready", "process 1: restarting after (SIGKILL|exit code 77)", status=503)
    (shell.folder / "crash").unlink()
    get_until(f"{url}/ready", '"ready":true')
    get_until(f"{url}/metrics", r'streamflow_process_restarts_total\{process="1"\} [1-9]')
    assert running.stop() == 0


def test_one_that_is_stopped_alone_is_started_again(shell):
    running = supervised(shell)
    get_until(f"{running.url}/ready", '"ready":true')
    os.kill(pids(running)[1], signal.SIGTERM)
    running.wait_for("process 1 ended with exit code 0; starting it again in 0.5 s")
    get_until(f"{running.url}/metrics", r'(?s)process_up\{process="1"\} 1\.0.*restarts_total\{process="1"\} 1')
    get_until(f"{running.url}/ready", '"ready":true')
    assert running.stop() == 0


def test_an_unknown_exit_code_is_a_crash_and_the_pause_grows(shell):
    running = supervised(shell, processes=1)
    shell("send", "orders.py", "orders", order(1, "crash"))
    running.wait_for(r"ended with exit code 77; starting it again in 0\.5 s")
    running.wait_for(r"ended with exit code 77; starting it again in 1\.0 s")
    assert running.stop() == 0


def test_a_stop_ends_the_pause_before_a_crashed_one_is_started_again(shell, monkeypatch):
    monkeypatch.setattr("streamflow.cli.supervisor.FIRST_PAUSE_S", math.inf)
    session = open_session(load(str(shell.folder / "orders.py")), {"web": False}, {})
    supervisor = _Supervisor(session, 1)

    async def crash(member):
        # Nothing is waited for between this and the pause: it has begun by then.
        asyncio.get_running_loop().call_later(0.001, supervisor._stop)
        return 77

    async def run():
        with anyio.fail_after(TIMEOUT_S):
            await supervisor.run(until_end=False)
        assert supervisor._fleet.members[0].restarts == 1

    monkeypatch.setattr(supervisor, "_run_once", crash)
    anyio.run(run)
    assert supervisor._fleet.members[0].state == "stopped"
    assert supervisor.code == 0


def test_a_failure_of_one_stops_all_with_its_code(shell):
    running = supervised(shell)
    shell("send", "orders.py", "orders", order(1, "bad"))
    assert running.wait() == 1
    assert "exited with 1; stopping all" in running.err
    assert not any(alive(pid) for pid in pids(running).values())


def test_what_each_would_refuse_is_refused_by_all(shell):
    shell.write(
        "wrong.py", "import streamflow as sf\napp = sf.App('wrong')\napp.topic('a').group_by(len, key_type=int)\n"
    )
    refused = shell("worker", "wrong.py", "--processes", "2", "--no-web")
    assert refused.code == 2
    assert "Traceback" not in refused.err


def test_until_end(shell):
    shell(
        "send",
        "orders.py",
        "orders",
        "-",
        "--key-field",
        "user",
        stdin="".join(order(n, f"u{n}") + "\n" for n in range(50)),
    )
    done = shell("worker", "orders.py", "--processes", "2", "--until-end", "--no-web")
    assert done.code == 0, done.err
    assert re.findall(r"^done: (\d+) records processed", done.err, re.MULTILINE) == ["50"]
    again = shell("worker", "orders.py", "--processes", "2", "--until-end", "--no-web", "--json")
    (went,) = again.lines
    assert (went["finished"], went["topics"]) == (True, [{"topic": "orders", "processed": 0, "left": 0}]), again.err
    assert len(shell("tail", "orders.py", "invoices", "--until-end").out.splitlines()) == 50


def test_no_child_outlives_a_killed_parent(shell):
    running = supervised(shell)
    running.wait_for("assigned: ", times=2)
    children = pids(running)
    running.signal(signal.SIGKILL)
    running.wait()
    for pid in children.values():
        wait_until_gone(pid)
    assert "the supervisor is gone; stopping" in running.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_kills(number, shell):
    running = supervised(shell, processes=1)
    shell("send", "orders.py", "orders", order(1, "slow"))
    running.wait_for("blocking")
    running.signal(number)
    running.wait_for("stopping 1 processes")
    with pytest.raises(Exception, match="timed out"):
        running.process.wait(0.2)  # at once, the second one would be the first one's echo
    running.signal(number)
    assert running.wait() == 128 + number
    for pid in pids(running).values():
        wait_until_gone(pid)


def test_structured_logs_name_the_process(shell):
    running = supervised(shell, "--log-format", "json")
    running.wait_for('"process":0')
    running.wait_for('"process":1')
    assert running.stop() == 0


@pytest.mark.needs("timeout")
def test_timeout_signals_twice_and_still_stops_cleanly(shell):
    limited = shell.start("60", str(COMMAND), "worker", "orders.py", "--processes", "1", "--no-web", program="timeout")
    limited.wait_for("assigned: ")
    limited.stop()  # it does for a signal what it does at its time: the process first, and then the group
    assert "supervisor: stopping" in limited.err
    assert "stopping: finishing the records in hand" in limited.err
