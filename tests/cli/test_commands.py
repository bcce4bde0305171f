"""Every command in a real process, on the embedded log."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streamflow.config import TABLE
from tests.cli.commands import order

pytestmark = pytest.mark.system
SEARCHED = f"{Path(sys.executable).parent}:/usr/bin:/bin"


# --- the whole way --------------------------------------------------------------------------------------------------


def test_send_work_and_tail(shell):
    sent = shell("send", "orders.py", "orders", order(1), "--key", "ann", "--json")
    assert (sent.code, set(sent.lines[0])) == (0, {"topic", "partition", "offset", "timestamp_ms"})
    worked = shell("worker", "orders.py", "--until-end", "--web-port", "0")
    assert worked.code == 0, worked.err
    assert worked.out == ""
    tailed = shell("tail", "orders.py", "invoices", "--limit", "1", "--json")
    (line,) = tailed.lines
    assert list(line) == ["topic", "partition", "offset", "timestamp_ms", "key", "value", "headers"]
    assert (line["topic"], line["offset"], line["key"], line["value"]) == (
        "invoices",
        0,
        "ann",
        {"order_id": 1, "total": 5.0},
    )
    broker = f"sqlite:///{shell.folder}/.streamflow/log.db"
    assert all(broker in result.err for result in (sent, worked, tailed))


def test_everything_works_beside_a_running_worker(shell):
    worker = shell.worker()
    shell("send", "orders.py", "orders", "-", "--key", "ann", stdin="".join(order(n) + "\n" for n in range(3)))
    tailed = shell("tail", "orders.py", "invoices", "--limit", "3", "--json")
    assert [line["value"]["order_id"] for line in tailed.lines] == [0, 1, 2]
    assert shell("topics", "orders.py").code == 0
    assert shell("agents", "orders.py").code == 0
    assert worker.stop() == 0
    (orders,) = [topic for topic in shell("topics", "orders.py", "--json").lines if topic["topic"] == "orders"]
    assert sum(partition["end_offset"] for partition in orders["partitions"]) == 3
    assert [(group["group"], group["lag"]) for group in orders["groups"]] == [("orders", 0)]


def test_from_another_folder_they_meet_in_one_log(shell, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert shell("send", "orders.py", "orders", order(1)).code == 0
    shell.folder = elsewhere
    assert '"order_id":1' in shell("tail", "../orders.py", "orders", "--until-end", "--json").out


def test_the_script_is_the_command_line(shell):
    shell.environment["PATH"] = str(Path(sys.executable).parent)
    sent = shell.start("orders.py", "send", "orders", order(1), program=sys.executable)
    assert sent.wait() == 0
    assert shell.start("orders.py", "worker", "--until-end", "--no-web", program=sys.executable).wait() == 0
    assert '"total":5.0' in shell("tail", "orders.py", "invoices", "--until-end").out


# --- the worker -----------------------------------------------------------------------------------------------------


def test_the_banner(shell):
    shell.worker("--commit-interval-ms", "50").wait_for(
        r"orders · StreamFlow \S+\n"
        rf"  broker     sqlite:///{shell.folder}/.streamflow/log.db\n"
        r"  guarantee  exactly once\n"
        rf"  data       {shell.folder}/.streamflow\n"
        r"  web        http://127\.0\.0\.1:\d+\n"
        r"  agents     invoice: orders -> invoices\n"
        r"  topics     orders, invoices\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_stops_cleanly(number, shell):
    worker = shell.worker()
    shell("send", "orders.py", "orders", order(1))
    shell("tail", "orders.py", "invoices", "--limit", "1")
    worker.signal(number)
    assert worker.wait() == 0
    assert "Traceback" not in worker.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_stops_at_once_though_user_code_blocks_the_loop(number, shell):
    worker = shell.worker()
    shell("send", "orders.py", "orders", order(1, "slow"))
    worker.wait_for("blocking")
    worker.signal(number)
    with pytest.raises(Exception, match="timed out"):
        worker.process.wait(0.2)
    worker.signal(number)
    assert worker.wait() == 128 + number


def test_a_bounded_run_says_how_it_went(shell):
    shell("send", "orders.py", "orders", "-", "--key", "ann", stdin="".join(order(n) + "\n" for n in range(3)))
    worked = shell("worker", "orders.py", "--until-end", "--no-web", "--json")
    assert re.search(r"^done: 3 records processed in \d+\.\d s$", worked.err, re.MULTILINE)
    (said,) = worked.lines
    assert said.pop("seconds") > 0
    assert said == {"finished": True, "topics": [{"topic": "orders", "processed": 3, "left": 0}]}


@pytest.mark.parametrize(
    ("number", "processes"), [(signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGTERM, ("--processes", "2"))]
)
def test_a_bounded_run_that_is_stopped_says_what_is_left(number, processes, shell):
    shell.write("held.py", HELD)
    shell("send", "held.py", "orders", "-", stdin="".join(f"{n}\n" for n in range(5)))
    worker = shell.start("worker", "held.py", "--until-end", "--no-web", "--json", *processes)
    worker.wait_for("holding 2")
    worker.signal(number)
    worker.wait_for("finishing the records in hand")
    (shell.folder / "go").touch()
    assert worker.wait() == 0
    said = worker.wait_for(r"stopped before the end: (\d) records? processed in \S+ s; not processed: orders (\d)\.")
    assert (said[1], said[2]) == ("3", "2")
    object_line = json.loads(worker.out.splitlines()[-1])
    assert object_line["finished"] is False
    assert object_line["topics"] == [{"topic": "orders", "processed": 3, "left": 2}]


HELD = """
import asyncio
from pathlib import Path
import streamflow as sf

app = sf.App("held")
orders = app.topic("orders", value_type=int, partitions=1)

@app.agent(orders)
async def hold(number: int) -> None:
    if number == 2:
        print("holding 2", flush=True)
        while not Path("go").exists():
            await asyncio.sleep(0.01)
"""


def test_a_failing_record_is_exit_code_1(shell):
    shell("send", "orders.py", "orders", order(1, "bad"))
    failed = shell("worker", "orders.py", "--until-end", "--no-web")
    assert failed.code == 1
    assert "a bad user" in failed.err
    assert "on_error=sf.Skip()" in failed.err
    assert "error: " in failed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["worker", "ordres.py"], "there is no such file; did you mean 'orders.py'?"),
        (["worker", "orders.py", "--partitions", "0"], "--partitions is to be a whole number from 1"),
        (["worker", "orders.py", "--partitons", "3"], "No such option: --partitons (Possible options: --partitions)"),
        (["worker", "orders.py", "--broker", "redis://x"], "redis://x"),
        (["worker", "orders.py", "--broker", "memory://", "--processes", "2"], "memory:// lives inside one process"),
        (["worker", "orders.py", "--processes", "2", "--advertised-url", "http://h:1"], "write {port} in it"),
        (["worker", "orders.py", "--processes", "0"], "--processes"),
        (["worker", "orders.py", "--json"], "it goes with --until-end"),
        (["send", "orders.py", "order", "{}"], "has no topic 'order'; did you mean 'orders'?"),
        (["send", "orders.py", "orders", '{"order_id":1,"user":"a","amount":"x"}'], "`$.amount`"),
        (["send", "orders.py", "orders"], "give one of VALUE"),
        (["send", "orders.py", "orders", order(1), "--tombstone"], "give one of VALUE"),
        (
            ["send", "orders.py", "orders", order(1), "--key", "a", "--key-field", "user"],
            "one of --key and --key-field",
        ),
        (["send", "orders.py", "orders", order(1), "--key-field", "usr"], "has no field 'usr'"),
        (["send", "orders.py", "orders", "--file", "none.jsonl"], "none.jsonl"),
        (["send", "orders.py", "orders", "-5"], "a value that begins with a dash goes last, behind --: `-- -5`"),
        (["send", "orders.py", "orders", "--kye", "a"], "No such option: --kye (Possible options: --broker, --key)"),
        (["tail", "orders.py", "invoicse"], "there is no topic 'invoicse'; did you mean 'invoices'?"),
        (["tial", "orders.py", "orders"], "No such command 'tial'"),
    ],
)
def test_what_is_refused_is_said_without_a_traceback(arguments, message, shell):
    refused = shell(*arguments)
    assert message in " ".join(refused.err.split())
    assert (refused.code, refused.out) == (2, "")
    assert "Traceback" not in refused.err


def test_other_commands_do_not_wait_for_what_only_a_worker_needs():
    heavy = ("streamflow.runtime.worker", "streamflow.web.server", "uvicorn", "starlette", "rocksdict")
    program = f"import sys, streamflow.cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_an_explicit_web_port_that_is_taken_is_refused(shell):
    url = shell.worker().url
    refused = shell("worker", "orders.py", "--web-port", url.rpartition(":")[2])
    assert refused.code == 2
    assert "is taken" in refused.err


def test_what_nobody_expected_has_its_traceback(shell):
    shell.write(
        "odd.py",
        "import streamflow as sf\napp = sf.App('odd')\n\n@app.on_start\nasync def start():\n    raise OSError('odd')\n",
    )
    failed = shell("worker", "odd.py", "--no-web")
    assert failed.code == 1
    assert "Traceback" in failed.err
    assert "OSError: odd" in failed.err


def test_an_unknown_variable_is_a_warning(shell):
    result = shell("worker", "orders.py", "--until-end", "--no-web", STREAMFLOW_PARTITONS="3")
    assert result.code == 0
    assert "did you mean STREAMFLOW_PARTITIONS?" in result.err


def test_settings_from_every_source(shell):
    shell.write("pyproject.toml", "[tool.streamflow]\npartitions = 2\nlog_format = 'json'\n")
    worker = shell("worker", "orders.py", "--until-end", STREAMFLOW_WEB="0", STREAMFLOW_LOG_LEVEL="debug")
    lines = [json.loads(line) for line in worker.err.splitlines()]
    assert all({"time", "level", "logger", "message", "app"} <= set(line) for line in lines)
    assert {line["app"] for line in lines} == {"orders"}
    (orders, _) = shell("topics", "orders.py", "--json").lines
    assert len(orders["partitions"]) == 2


# --- send -----------------------------------------------------------------------------------------------------------


def test_a_file_is_sent_in_order_and_whole(shell):
    shell.write("orders.jsonl", "".join(order(n, f"user{n % 7}") + "\n" for n in range(2500)) + "\n")
    sent = shell("send", "orders.py", "orders", "--file", "orders.jsonl", "--key-field", "user")
    assert sent.code == 0
    assert "sent 2,500 records to orders" in sent.err
    by_key: dict[str, list[int]] = {}
    for line in shell("tail", "orders.py", "orders", "--until-end", "--json").lines:
        by_key.setdefault(line["key"], []).append(line["value"]["order_id"])
    assert sorted(by_key) == [f"user{n}" for n in range(7)]
    assert sorted(number for numbers in by_key.values() for number in numbers) == list(range(2500))
    assert all(numbers == sorted(numbers) for numbers in by_key.values())


def test_a_bad_line_stops_the_sending_and_is_named(shell):
    stdin = order(1) + "\n\n" + '{"order_id":"x"}\n' + order(2) + "\n"
    failed = shell("send", "orders.py", "orders", "-", stdin=stdin)
    assert failed.code == 1
    assert "standard input, line 3:" in failed.err
    assert "`$.order_id`" in failed.err
    assert "(1 sent before it)" in failed.err
    assert len(shell("tail", "orders.py", "orders", "--until-end").out.splitlines()) == 1


def test_a_tombstone_a_partition_and_no_key(shell):
    assert shell("send", "orders.py", "orders", "--tombstone", "--partition", "3").code == 0
    (line,) = shell("tail", "orders.py", "orders", "--until-end", "--json").lines
    assert (line["partition"], line["key"], line["value"]) == (3, None, None)


def test_a_value_that_begins_with_a_dash_goes_behind_two(shell):
    shell.write(
        "numbers.py",
        "import streamflow as sf\napp = sf.App('numbers')\nn = app.topic('n', key_type=int, value_type=int)\n",
    )
    assert shell("send", "numbers.py", "n", "--key", "-7", "--", "-5").code == 0
    (line,) = shell("tail", "numbers.py", "n", "--until-end", "--json").lines
    assert (line["key"], line["value"]) == (-7, -5)


# --- tail -----------------------------------------------------------------------------------------------------------


def test_an_unknown_topic_is_told_the_known_ones_once(shell):
    shell("worker", "orders.py", "--until-end", "--no-web")
    assert "'none'; known: orders, invoices, orders-replies\n" in shell("tail", "orders.py", "none").err


SCHEMAS = """
import streamflow as sf

class Numbered:
    known = set()
    def bind(self, type, *, topic, part): return self
    def encode(self, value, headers): return b"\\x01" + value.encode()
    def decode(self, data, headers):
        if data[0] not in self.known:
            raise sf.NeedSchema(data[0])
        return data[1:].decode()
    async def load_schema(self, id): self.known.add(id)

app = sf.App("schemas")
names = app.topic("names", value_type=str, value_serializer=Numbered())
"""


def test_tail_loads_schemas(shell):
    shell.write(
        "writes.py", "import streamflow as sf\napp = sf.App('w')\nnames = app.topic('names', value_type=bytes)\n"
    )
    shell.write("schemas.py", SCHEMAS)
    assert shell("send", "writes.py", "names", "\x01ann").code == 0
    (line,) = shell("tail", "schemas.py", "names", "--until-end", "--json").lines
    assert "error" not in line
    assert line["value"] == "ann"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_tail_follows_until_ctrl_c(number, shell):
    shell("send", "orders.py", "orders", order(1))
    tail = shell.start("tail", "orders.py", "orders")
    tail.wait_for('"order_id":1')
    shell("send", "orders.py", "orders", order(2))
    tail.wait_for('"order_id":2')
    tail.signal(number)
    assert tail.wait() == 0
    assert "Traceback" not in tail.err


def test_tail_from_the_end(shell):
    shell("send", "orders.py", "orders", order(1))
    tail = shell.start("tail", "orders.py", "orders", "--from", "end", "--limit", "1")
    tail.wait_for("broker:")
    # The end is looked up after the broker is told; what is sent before that is not seen, so send until something is.
    for number in range(2, 50):
        shell("send", "orders.py", "orders", order(number))
        if tail.process.poll() is not None:
            break
    assert tail.wait() == 0
    assert '"order_id":1,' not in tail.out
    assert len(tail.out.splitlines()) == 1


def test_tail_waits_for_a_declared_topic(shell):
    tail = shell.start("tail", "orders.py", "orders", "--limit", "1")
    tail.wait_for("does not exist yet; waiting for it")
    shell("send", "orders.py", "orders", order(1))
    assert tail.wait() == 0
    assert '"order_id":1' in tail.out


def test_tail_shows_what_does_not_decode(shell):
    shell.write(
        "raw.py",
        "import streamflow as sf\napp = sf.App('orders')\norders = app.topic('orders', value_type=bytes)\n",
    )
    shell("send", "raw.py", "orders", "not an order")
    (line,) = shell("tail", "orders.py", "orders", "--until-end", "--json").lines
    assert line["value"] == "not an order"
    assert "does not decode as Order" in line["error"]


def test_a_reader_that_goes_away_is_no_error(shell):
    shell("send", "orders.py", "orders", "-", stdin="".join(order(n) + "\n" for n in range(500)))
    pipe = shell.start(
        "-c",
        "streamflow tail orders.py orders --until-end | head -n 1; exit ${PIPESTATUS[0]}",
        program="bash",
        PATH=SEARCHED,
    )
    assert pipe.wait() == 0
    assert "Traceback" not in pipe.err
    assert "Exception" not in pipe.err


def test_a_reader_that_goes_away_from_a_tail_that_follows_is_no_error(shell):
    shell("send", "orders.py", "orders", "-", stdin="".join(order(n) + "\n" for n in range(500)))
    tail = shell.start(
        "-c",
        "streamflow tail orders.py orders | head -n 1; exit ${PIPESTATUS[0]}",
        program="bash",
        PATH=SEARCHED,
    )
    tail.wait_for("ann")
    shell("send", "orders.py", "orders", order(500))
    assert tail.wait() == 0
    assert "Traceback" not in tail.err


@pytest.mark.parametrize(
    ("redirected", "code"),
    [("<&-", 0), (">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 1), ("2>/dev/full", 0)],
)
def test_standard_streams_that_are_closed_or_full(redirected, code, shell):
    topics = shell.start("-c", f"exec streamflow topics orders.py {redirected}", program="bash", PATH=SEARCHED)
    assert topics.wait() == code
    assert "Traceback" not in topics.err


def test_a_failure_that_nobody_reads_is_still_one(shell):
    worker = shell.start(
        "-c",
        "streamflow worker orders.py --broker kafka://127.0.0.1:1 --start-timeout-s 1 2>&1 | head -n 1; "
        "exit ${PIPESTATUS[0]}",
        program="bash",
        PATH=SEARCHED,
    )
    assert worker.wait() == 1


# --- what there is --------------------------------------------------------------------------------------------------


def test_topics_before_anything_ran(shell):
    found = shell("topics", "orders.py", "--json").lines
    assert [(topic["topic"], topic["exists"]) for topic in found] == [("orders", False), ("invoices", False)]
    assert "does not exist yet" in shell("topics", "orders.py").out


def test_agents(shell):
    (agent,) = shell("agents", "orders.py", "--json").lines
    assert (agent["name"], agent["sources"], agent["sinks"]) == ("invoice", ["orders"], ["invoices"])
    assert "orders.py:" in shell("agents", "orders.py").out


def test_topology(shell):
    assert "sub-topology orders" in shell("topology", "orders.py").out
    assert shell("topology", "orders.py", "--format", "mermaid").out.startswith("flowchart LR")
    (graph,) = shell("topology", "orders.py", "--json").lines
    assert graph["app"] == "orders"


def test_version(shell):
    (versions,) = shell("version", "--json").lines
    assert versions["streamflow"]
    assert shell("version").out.startswith(f"streamflow {versions['streamflow']}\n")
    asked = shell("--version")
    assert (asked.code, asked.out, asked.err) == (0, f"streamflow {versions['streamflow']}\n", "")


def test_help(shell):
    text = shell("worker", "--help").out
    assert "--commit-interval-ms" in text
    assert "default: 100" in text
    assert shell().code == 2


def test_help_has_room_for_every_name_at_80_columns(shell):
    text = shell("worker", "--help", COLUMNS="80").out
    assert "…" not in text
    assert all(f" {setting.flag} " in text for setting in TABLE.values())


def test_completion(shell):
    completed = shell(_STREAMFLOW_COMPLETE="complete_bash", COMP_WORDS="streamflow tail orders.py in", COMP_CWORD="3")
    assert completed.out.split() == ["invoices"]
    assert "--install-completion" in shell("--help").out
