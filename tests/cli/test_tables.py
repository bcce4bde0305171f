"""`tables`, `table get|scan|export|import` and `reset` in real processes, on the embedded log."""

import json
import os
import pty
import re
import subprocess

import pytest

from tests.cli.commands import COMMAND, TIMEOUT_S

pytestmark = pytest.mark.system

BANK = """
import streamflow as sf

app = sf.App("bank")
moves = app.topic("moves", key_type=str, value_type=int)
balances = app.table("balances", key_type=str, value_type=int, default=int, help="what everybody has")

@app.agent(moves)
async def add(stream: sf.Stream[int]) -> None:
    async for event in stream.events():
        if event.value == 0:
            balances.pop(event.key, None)
        else:
            balances[event.key] += event.value
"""


@pytest.fixture
def bank(shell):
    shell.write("bank.py", BANK)
    return shell


def moved(shell, *moves, app="bank.py"):
    """Send moves, and let a worker process all of them."""
    for key, value in moves:
        assert shell("send", app, "moves", "--key", key, "--", str(value)).code == 0
    worked = shell("worker", app, "--until-end", "--no-web")
    assert worked.code == 0, worked.err


def scanned(shell, *options, app="bank.py", table="balances"):
    result = shell("table", "scan", app, table, *options)
    assert result.code == 0, result.err
    return result.out.splitlines()


# --- reading --------------------------------------------------------------------------------------------------------


def test_scan_is_in_key_order_over_all_partitions(bank):
    moved(bank, ("b", 2), ("a", 1), ("ab", 3), ("c", 4), ("gone", 5), ("gone", 0), ("d", 6))
    assert scanned(bank) == ["a 1", "ab 3", "b 2", "c 4", "d 6"]
    assert scanned(bank, "--reverse", "--limit", "2") == ["d 6", "c 4"]
    assert scanned(bank, "--prefix", "a") == ["a 1", "ab 3"]
    assert scanned(bank, "--start", "ab", "--stop", "c") == ["ab 3", "b 2"]
    rows = [json.loads(line) for line in scanned(bank, "--json")]
    assert {key: rows[0][key] for key in ("key", "value")} == {"key": "a", "value": 1}
    partition = rows[0]["partition"]
    inside = [f"{row['key']} {row['value']}" for row in rows if row["partition"] == partition]
    assert scanned(bank, "--partition", str(partition)) == inside
    assert scanned(bank, "--partition", str((partition + 1) % 4)) != inside


def test_get(bank):
    moved(bank, ("a", 1), ("gone", 5), ("gone", 0))
    assert bank("table", "get", "bank.py", "balances", "a").out == "1\n"
    (line,) = bank("table", "get", "bank.py", "balances", "a", "--json").lines
    assert (line["key"], line["value"]) == ("a", 1)
    for missing in ("gone", "never"):
        result = bank("table", "get", "bank.py", "balances", missing)
        assert (result.code, result.out) == (1, "")
        assert re.search(rf"table 'balances' has no key '{missing}' in partition \d", result.err)


def test_tables_are_listed_without_opening_them(bank):
    before = bank("tables", "bank.py", "--json")
    assert before.lines[0]["changelog"] == {
        "topic": "bank-balances-changelog",
        "exists": False,
        "records": 0,
        "end_offsets": [],
    }
    moved(bank, ("a", 1), ("b", 2))
    moved(bank, ("a", 1))
    worker = bank.start("worker", "bank.py", "--no-web")
    worker.wait_for("assigned: ")
    (balances,) = bank("tables", "bank.py", "--json").lines
    assert (balances["table"], balances["key_type"], balances["value_type"]) == ("balances", "str", "int")
    assert (balances["agents"], balances["partitions"], balances["help"]) == (["add"], 4, "what everybody has")
    assert balances["changelog"]["records"] == sum(balances["changelog"]["end_offsets"]) == 3
    assert (balances["entries"], balances["entries_are_exact"]) == (3, False)
    assert balances["local_bytes"] > 0
    assert "at most 3" in bank("tables", "bank.py").out
    (counted,) = bank("tables", "bank.py", "--count", "--json").lines
    assert (counted["entries"], counted["entries_are_exact"]) == (2, True)
    assert worker.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("scan", "bank.py", "balancs"), 2, "did you mean 'balances'"),
        (("scan", "bank.py", "balances"), 1, "no changelog 'bank-balances-changelog' in this log yet"),
        (("get", "bank.py", "balances", "a"), 1, "no changelog"),
        (("scan", "bank.py", "balances", "--prefix", "a", "--start", "b"), 2, "give --prefix, or --start and --stop"),
        (("import", "bank.py", "balances", "nowhere.jsonl"), 2, "nowhere.jsonl: No such file"),
    ],
)
def test_what_cannot_be_done_is_said(bank, arguments, code, says):
    result = bank("table", *arguments)
    assert (result.code, result.out) == (code, "")
    assert says in result.err


def test_a_partition_that_is_not_there(bank):
    moved(bank, ("a", 1))
    result = bank("table", "scan", "bank.py", "balances", "--partition", "4")
    assert (result.code, "has partitions 0 to 3" in result.err) == (2, True)


TYPED = """
from datetime import date
import msgspec
import streamflow as sf

class Seat(msgspec.Struct):
    row: int
    day: date
    raw: bytes = b""

app = sf.App("typed")
source = app.topic("source", key_type=bytes, value_type=float)
by_pair = app.table("by_pair", key_type=tuple[str, int], value_type=Seat)
by_bytes = app.table("by_bytes", key_type=bytes, value_type=bytes)
by_number = app.table("by_number", key_type=int, value_type=float)

@app.agent(source, tables=[by_pair, by_bytes, by_number])
async def use(stream: sf.Stream[float]) -> None:
    async for number in stream:
        by_number[1] = number
"""
PAIRS = [
    {"key": ["a", -5], "value": {"row": 1, "day": "2024-02-29", "raw": "AP8="}},
    {"key": ["a", 3], "value": {"row": 2, "day": "2024-03-01", "raw": ""}},
    {"key": ["b", 0], "value": {"row": 3, "day": "2024-03-02", "raw": ""}},
]
BYTES = [{"key": "plain", "value": "text"}, {"key": {"base64": "/wA="}, "value": {"base64": "gA=="}}]


def as_lines(rows):
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


@pytest.mark.parametrize(("table", "rows"), [("by_pair", PAIRS), ("by_bytes", BYTES)])
def test_every_type_comes_back_from_an_export(shell, table, rows):
    shell.write("typed.py", TYPED)
    imported = shell("table", "import", "typed.py", table, stdin=as_lines(reversed(rows)))
    assert imported.code == 0, imported.err
    exported = shell("table", "export", "typed.py", table)
    assert exported.lines == rows
    to_file = shell("table", "export", "typed.py", table, "out.jsonl")
    assert (to_file.code, to_file.out) == (0, "")
    assert (shell.folder / "out.jsonl").read_text() == exported.out
    assert not (shell.folder / "out.jsonl.part").exists()


def test_keys_of_tuples_and_numbers_on_the_command_line(shell):
    shell.write("typed.py", TYPED)
    assert shell("table", "import", "typed.py", "by_pair", stdin=as_lines(PAIRS)).code == 0
    numbers = as_lines({"key": number, "value": number / 2} for number in (-2, 1, 10))
    assert shell("table", "import", "typed.py", "by_number", stdin=numbers).code == 0
    assert shell("table", "get", "typed.py", "by_pair", '["b",0]', "--json").lines[0]["value"]["row"] == 3
    found = scanned(shell, "--prefix", '["a"]', "--json", app="typed.py", table="by_pair")
    assert [json.loads(line)["key"] for line in found] == [["a", -5], ["a", 3]]
    assert scanned(shell, app="typed.py", table="by_number") == ["-2 -1.0", "1 0.5", "10 5.0"]
    assert scanned(shell, "--stop", "10", "--start", "0", app="typed.py", table="by_number") == ["1 0.5"]
    refused = shell("table", "scan", "typed.py", "by_number", "--prefix", "1")
    assert (refused.code, "keys of type int have no prefixes" in refused.err) == (2, True)
    refused = shell("table", "scan", "typed.py", "by_pair", "--prefix", '["a",1,2]')
    assert (refused.code, "it has 3 elements, and a key has 2" in refused.err) == (2, True)


def test_a_key_of_a_tuple_is_asked_for_as_a_list(shell):
    shell.write("typed.py", TYPED)
    for key in ("a", '"a"', '["a"]', '{"a": 1}'):
        result = shell("table", "get", "typed.py", "by_pair", key)
        assert (result.code, result.out) == (2, "")
        assert "the key for table 'by_pair' does not fit" in result.err
        assert "tuple[str, int] is read as a JSON list of 2, such as '[\"like this\", 1]'" in result.err


def test_a_value_of_an_older_type_is_shown_with_its_error_and_not_exported(shell):
    shell.write("typed.py", TYPED)
    assert shell("table", "import", "typed.py", "by_pair", stdin=as_lines(PAIRS[:1])).code == 0
    shell.write("typed.py", TYPED.replace("row: int", "row: int\n    must: str"))
    (line,) = scanned(shell, "--json", app="typed.py", table="by_pair")
    row = json.loads(line)
    assert row["key"] == ["a", -5]
    assert json.loads(row["value"])["row"] == 1
    assert "missing required field `must`" in row["error"]
    assert " !! " in shell("table", "scan", "typed.py", "by_pair").out
    for option in ((), ("--json",)):
        got = shell("table", "get", "typed.py", "by_pair", '["a",-5]', *option)
        assert (got.code, got.out) == (1, "")
        assert "missing required field `must`" in got.err
    exported = shell("table", "export", "typed.py", "by_pair", "out.jsonl")
    assert (exported.code, "not exported" in exported.err, "must" in exported.err) == (1, True, True)
    assert not list(shell.folder.glob("out.jsonl*"))


def test_what_json_cannot_hold_is_not_exported(shell):
    shell.write("typed.py", TYPED)
    assert shell("send", "typed.py", "source", "nan", "--key", "k").code == 0
    assert shell("worker", "typed.py", "--until-end", "--no-web").code == 0
    exported = shell("table", "export", "typed.py", "by_number")
    assert (exported.code, exported.out) == (1, "")
    assert "nan cannot be written as JSON" in exported.err


def test_equal_keys_are_one_key(shell):
    shell.write("zones.py", ZONES)
    rows = as_lines([{"key": "2024-01-01T12:00:00+02:00", "value": 1}])
    assert shell("table", "import", "zones.py", "by_moment", stdin=rows).code == 0
    for asked in ("2024-01-01T10:00:00Z", "2024-01-01T12:00:00+02:00"):
        assert shell("table", "get", "zones.py", "by_moment", f'"{asked}"').out == "1\n"
    twice = rows + as_lines([{"key": "2024-01-01T10:00:00Z", "value": 2}])
    assert "its key is on line 1 as well" in shell("table", "import", "zones.py", "by_moment", stdin=twice).err


ZONES = """
from datetime import datetime
import streamflow as sf

app = sf.App("zones")
source = app.topic("source", key_type=datetime, value_type=int, partitions=1)
by_moment = app.table("by_moment", key_type=datetime, value_type=int)

@app.agent(source)
async def use(stream: sf.Stream[int]) -> None:
    async for event in stream.events():
        by_moment[event.key] = event.value
"""
EXPIRING = """
import streamflow as sf

app = sf.App("expiring")
visits = app.topic("moves", key_type=str, value_type=int, timestamp=lambda value: value, partitions=1)
seen = app.table("seen", key_type=str, value_type=int, ttl_s=10)

@app.agent(visits)
async def note(stream: sf.Stream[int]) -> None:
    async for event in stream.events():
        if event.key != "clock":
            seen[event.key] = event.value
        else:
            seen.get("nobody")
"""


def test_expired_values_are_not_shown(shell):
    shell.write("expiring.py", EXPIRING)
    moved(shell, ("a", 1_000), ("b", 9_000), app="expiring.py")
    assert scanned(shell, app="expiring.py", table="seen") == ["a 1000", "b 9000"]
    moved(shell, ("clock", 11_000), app="expiring.py")  # moves stream time, and writes nothing
    assert scanned(shell, app="expiring.py", table="seen") == ["b 9000"]
    gone = shell("table", "get", "expiring.py", "seen", "a")
    # A worker that ran for longer has swept it away; then nobody knows that there was one.
    said = re.search(r"has no key 'a' in partition \d+( \(its last value has expired\))?$", gone.err, re.MULTILINE)
    assert (gone.code, said is not None) == (1, True), gone.err
    assert shell("tables", "expiring.py", "--count", "--json").lines[0]["entries"] == 1


GLOBAL = """
import streamflow as sf

app = sf.App("shared")
rates = app.topic("rates", key_type=str, value_type=float, compacting=True)
by_currency = app.global_table("by_currency", source=rates, help="what money costs")
moves = app.topic("moves", key_type=str, value_type=int)

@app.agent(moves)
async def add(stream: sf.Stream[int]) -> None:
    async for event in stream.events():
        by_currency.get(event.key)
"""


def test_a_global_table_is_listed_with_its_topic_which_shows_its_values(shell):
    shell.write("shared.py", GLOBAL)
    assert shell("send", "shared.py", "rates", "1.5", "--key", "EUR").code == 0
    (line,) = shell("tables", "shared.py", "--count", "--json").lines
    assert (line["table"], line["kind"], line["changelog"]["topic"]) == ("by_currency", "global", "rates")
    assert (line["agents"], line["entries"], line["entries_are_exact"]) == (["add"], 1, False)
    assert "by_currency (global)" in shell("tables", "shared.py").out
    refused = shell("table", "get", "shared.py", "by_currency", "EUR")
    assert (refused.code, "the records of topic 'rates'" in refused.err) == (2, True)


# --- import ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"key":"x","value":"no number"}', "its value does not fit: Expected `int`, got `str`"),
        ('{"key":5,"value":1}', "its key does not fit: Expected `str`, got `int`"),
        ('{"key":"x"}', "Object missing required field `value`"),
        ('{"key":"x","value":null}', "its value does not fit: Expected `int`, got `null`"),
        ('{"key":"x","value":1,"more":2}', "unknown field `more`"),
        ('{"key":"a","value":1}', "its key is on line 1 as well"),
        ("nonsense", "JSON is malformed"),
    ],
)
def test_one_bad_line_and_nothing_is_imported(bank, line, says):
    text = f'{{"key":"a","value":1}}\n\n{line}\n{{"key":"c","value":1}}\n'
    result = bank("table", "import", "bank.py", "balances", stdin=text)
    assert (result.code, result.out) == (2, "")
    assert "standard input, line 3: " in result.err
    assert says in result.err
    assert "no changelog" in bank("table", "scan", "bank.py", "balances").err


def test_an_import_begins_a_fresh_app_and_adds_to_one_that_ran(bank):
    text = as_lines([{"key": "a", "value": 10}, {"key": "b", "value": 20}])
    first = bank("table", "import", "bank.py", "balances", "-", "--json", stdin=text)
    assert first.lines == [{"table": "balances", "written": 2, "cleared": 0, "restored": 0, "offsets_set": 4}]
    moved(bank, ("a", 1), ("c", 3))
    assert scanned(bank) == ["a 11", "b 20", "c 3"]
    second = bank("table", "import", "bank.py", "balances", "--json", stdin=as_lines([{"key": "b", "value": 5}]))
    assert second.lines == [{"table": "balances", "written": 1, "cleared": 0, "restored": 0, "offsets_set": 0}]
    moved(bank, ("b", 1))
    assert scanned(bank) == ["a 11", "b 6", "c 3"]


def test_an_import_beside_a_live_worker_is_refused_and_changes_nothing(bank):
    moved(bank, ("a", 1))
    worker = bank.start("worker", "bank.py", "--no-web")
    worker.wait_for("assigned: ")
    result = bank("table", "import", "bank.py", "balances", stdin='{"key":"a","value":100}\n')
    assert result.code == 2
    assert f"process {worker.process.pid}" in result.err
    assert worker.stop() == 0
    assert scanned(bank) == ["a 1"]


# --- reset ----------------------------------------------------------------------------------------------------------


def test_without_a_terminal_a_reset_lists_and_refuses(bank):
    moved(bank, ("a", 1))
    result = bank("reset", "bank.py")
    assert result.code == 2
    for listed in (
        "offsets of group bank",
        "changelog topic bank-balances-changelog",
        "replies topic bank-replies",
        f"local state {bank.folder}/.streamflow/bank/0/moves-0",
        "add --yes",
    ):
        assert listed in result.err
    assert scanned(bank) == ["a 1"]
    moved(bank, ("a", 1))
    assert scanned(bank) == ["a 2"]


@pytest.mark.parametrize(("answer", "code", "left"), [("no\n", 1, True), ("\n", 1, True), ("yes\n", 0, False)])
def test_on_a_terminal_a_reset_asks(bank, answer, code, left):
    moved(bank, ("a", 1))
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [COMMAND, "reset", "bank.py"],
        cwd=bank.folder,
        env=bank.environment,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(theirs)
        os.write(ours, answer.encode())
        _, said = process.communicate(timeout=TIMEOUT_S)
    os.close(ours)
    assert process.returncode == code, said
    assert "Delete all of this of app 'bank'?" in said
    assert (bank("table", "scan", "bank.py", "balances").code == 0) is left


CLOCK = """
import streamflow as sf

app = sf.App("clock")
ticks = app.topic("ticks", key_type=str, value_type=int)

@app.task(on_leader=True)
async def tick() -> None:
    await ticks.send(key="tick", value=1)
"""
LATER_CLOCK = (
    CLOCK
    + """
@app.agent(ticks)
def seen(tick: int) -> None: ...
"""
)


@pytest.mark.parametrize("declared", [True, False])
def test_a_reset_deletes_the_leader_topic_too(shell, declared):
    shell.write("clock.py", CLOCK)
    assert shell("worker", "clock.py", "--until-end", "--no-web").code == 0
    listed = {topic["topic"]: topic for topic in shell("topics", "clock.py", "--json").lines}
    assert listed["clock-leader"]["internal"]
    assert len(listed["clock-leader"]["partitions"]) == 1
    if not declared:
        alike = """
app.topic("clock-group-leader", key_type=str, value_type=int, partitions=1, config={
    "cleanup.policy": "delete", "retention.ms": "3600000"
})
"""
        shell.write("clock.py", LATER_CLOCK + alike)
        assert shell("worker", "clock.py", "--until-end", "--no-web").code == 0
        shell.write("clock.py", LATER_CLOCK)
    lines = shell("reset", "clock.py", "--yes", "--json").lines
    leaders = [(line["topic"], line["declared"]) for line in lines if line["deleted"] == "leader"]
    assert leaders == [("clock-leader", declared)]
    assert "nothing to delete" in shell("reset", "clock.py", "--yes").err


def test_a_reset_says_what_it_deleted_and_spares_the_rest(bank):
    moved(bank, ("a", 1), ("b", 2))
    slot = bank.folder / ".streamflow" / "bank" / "0"
    name = (slot / ".id").read_text()
    lines = bank("reset", "bank.py", "--yes", "--json").lines
    assert {line["deleted"] for line in lines} == {"offset", "changelog", "replies", "state"}
    assert [path.name for path in slot.iterdir() if path.name not in {".id", ".lock"}] == []
    assert (slot / ".id").read_text() == name  # whose transactions these were stays known
    moves = [topic for topic in bank("topics", "bank.py", "--json").lines if topic["topic"] == "moves"]
    assert sum(partition["end_offset"] for partition in moves[0]["partitions"]) == 2
    again = bank("reset", "bank.py", "--yes")
    assert (again.code, "nothing to delete" in again.err) == (0, True)
    moved(bank)
    assert scanned(bank) == ["a 1", "b 2"]


def test_a_reset_looks_in_one_data_dir_and_says_where_it_found_no_local_state(bank):
    moved(bank, ("a", 1))
    kept = bank.folder / ".streamflow" / "bank" / "0"
    elsewhere = bank("reset", "bank.py", "--yes", "--data-dir", "elsewhere", STREAMFLOW_BROKER=_broker(bank))
    assert elsewhere.code == 0
    assert f"  no local state in {bank.folder}/elsewhere\n" in elsewhere.err
    assert "changelog topic" in elsewhere.err  # the log is the same
    assert [path for path in kept.iterdir() if path.name not in {".id", ".lock"}]
    here = bank("reset", "bank.py", "--yes")
    assert (here.code, "no local state" in here.err, f"  local state {kept}/" in here.err) == (0, False, True)
    again = bank("reset", "bank.py", "--yes")
    assert f"no local state in {bank.folder}/.streamflow: nothing to delete" in again.err


def test_a_reset_beside_a_live_worker_is_refused(bank):
    moved(bank, ("a", 1))
    worker = bank.start("worker", "bank.py", "--no-web")
    worker.wait_for("assigned: ")
    result = bank("reset", "bank.py", "--yes")
    assert (result.code, f"a live process works in it (process {worker.process.pid})" in result.err) == (2, True)
    # One that keeps its state elsewhere is in the group all the same.
    result = bank("reset", "bank.py", "--yes", "--data-dir", "elsewhere", STREAMFLOW_BROKER=_broker(bank))
    assert (result.code, f"process {worker.process.pid}" in result.err) == (2, True)
    assert worker.stop() == 0
    assert scanned(bank) == ["a 1"]


def _broker(shell) -> str:
    return f"sqlite:///{shell.folder}/.streamflow/log.db"


def test_a_reset_starts_where_it_is_told(bank):
    moved(bank, ("a", 1))
    assert bank("reset", "bank.py", "--yes", "--to", "latest").code == 0
    moved(bank, ("a", 5))
    assert scanned(bank) == ["a 5"]
    assert bank("reset", "bank.py", "--yes", "--to", "earliest").code == 0
    worked = bank("worker", "bank.py", "--until-end", "--no-web", "--auto-offset-reset", "latest")
    assert worked.code == 0, worked.err
    assert scanned(bank) == ["a 6"]


GROUPED = """
import streamflow as sf

app = sf.App("grouped")
moves = app.topic("moves", key_type=str, value_type=int)
by_sign = app.table("by_sign", key_type=str, value_type=int, default=int)

def sign(value: int) -> str:
    return "minus" if value < 0 else "plus"

@app.agent(moves.group_by(sign, name="sign"))
async def add(stream: sf.Stream[int]) -> None:
    async for event in stream.events():
        by_sign[event.key] += event.value
"""


def test_a_reset_deletes_repartition_topics_too(shell):
    shell.write("grouped.py", GROUPED)
    moved(shell, ("a", 1), ("b", -2), ("c", 4), app="grouped.py")
    before = scanned(shell, app="grouped.py", table="by_sign")
    assert before == ["minus -2", "plus 5"]
    lines = shell("reset", "grouped.py", "--yes", "--json").lines
    (repartition,) = [line["topic"] for line in lines if line["deleted"] == "repartition"]
    listed = shell("topics", "grouped.py", "--json").lines
    assert [topic["exists"] for topic in listed if topic["topic"] == repartition] == [False]
    moved(shell, app="grouped.py")
    assert scanned(shell, app="grouped.py", table="by_sign") == before


OTHER = BANK.replace('sf.App("bank")', 'sf.App("bank-eu")')
EARLIER = (
    BANK.replace("balances", "sums")
    .replace("key_type=str, value_type=int, default", "key_type=int, value_type=int, default")
    .replace("moves)", "moves.group_by(abs, name='size', key_type=int))")
)


def test_a_reset_names_what_an_earlier_version_of_the_app_has_left_and_spares_other_apps(shell):
    shell.write("bank.py", EARLIER)
    moved(shell, ("a", 1), ("b", 2))
    shell.write("other.py", OTHER)  # its topics begin like those of the other one
    moved(shell, ("a", 1), app="other.py")
    shell.write("bank.py", BANK + 'app.topic("bank-kept-changelog", compacting=True)\n')
    moved(shell)
    result = shell("reset", "bank.py")
    assert (result.code, "bank-eu-balances" in result.err) == (2, False)
    assert "changelog topic bank-sums-changelog, which the app does not declare, about 2 records" in result.err
    assert "repartition topic bank-size-repartition, which the app does not declare" in result.err
    lines = shell("reset", "bank.py", "--yes", "--json").lines
    assert {line["topic"]: line["declared"] for line in lines if line["deleted"] in {"changelog", "repartition"}} == {
        "bank-balances-changelog": True,
        "bank-sums-changelog": False,
        "bank-size-repartition": False,
    }
    assert scanned(shell, app="other.py") == ["a 2", "b 2"]
    assert "nothing to delete" in shell("reset", "bank.py", "--yes").err
    kept = [topic["exists"] for topic in shell("topics", "bank.py", "--json").lines if "kept" in topic["topic"]]
    assert kept == [True]


FILLED = """
import streamflow as sf

app = sf.App("filled")
moves = app.topic("moves", key_type=str, value_type=int, compacting=True)
newest = app.table("newest", source=moves)
counts = app.table("counts", key_type=str, value_type=int, default=int)

@app.agent(moves)
async def look(stream: sf.Stream[int]) -> None:
    async for event in stream.events():
        newest.get(event.key)
        counts[event.key] += 1
"""


def test_a_table_that_its_source_fills_shows_what_was_processed_and_is_spared(shell):
    shell.write("filled.py", FILLED)
    moved(shell, ("a", 1), ("b", 2), ("a", 3), app="filled.py")
    assert shell("send", "filled.py", "moves", "9", "--key", "a").code == 0  # nobody has processed it yet
    assert scanned(shell, app="filled.py", table="newest") == ["a 3", "b 2"]
    refused = shell("table", "import", "filled.py", "newest", stdin=as_lines([{"key": "a", "value": 1}]))
    assert (refused.code, "send to topic 'moves' instead" in refused.err) == (2, True)
    assert shell("reset", "filled.py", "--yes").code == 0
    imported = shell("table", "import", "filled.py", "counts", stdin=as_lines([{"key": "a", "value": 10}]))
    assert imported.code == 0, imported.err
    moved(shell, app="filled.py")
    assert scanned(shell, app="filled.py", table="newest") == ["a 9", "b 2"]
    assert scanned(shell, app="filled.py", table="counts") == ["a 13", "b 1"]


def test_a_table_that_another_type_wrote_is_not_read_as_other_values(bank):
    moved(bank, ("a", 1), ("b", 2))
    exported = bank("table", "export", "bank.py", "balances")
    bank.write("bank.py", BANK.replace('"balances", key_type=str, value_type=int, default=int', FLOATS))
    for arguments in (("get", "bank.py", "balances", "a"), ("scan", "bank.py", "balances"), EXPORT):
        result = bank("table", *arguments)
        assert (result.code, result.out) == (2, "")
        assert "its values were written by int, and its type of today is written by float" in result.err
        assert "`streamflow table export` under the old type" in result.err
    assert not (bank.folder / "wrong.jsonl").exists()
    lines = exported.out.replace('"value":1', '"value":1.5')
    refused = bank("table", "import", "bank.py", "balances", stdin=lines)
    assert (refused.code, "written by int" in refused.err, "--replace" in refused.err) == (2, True, True)
    assert bank("table", "import", "bank.py", "balances", "--replace", stdin=lines).code == 0
    assert scanned(bank) == ["a 1.5", "b 2.0"]
    bank.write("bank.py", BANK)
    assert bank("table", "scan", "bank.py", "balances").code == 2


def test_what_was_imported_into_a_fresh_app_is_not_read_by_another_type(bank):
    assert bank("table", "import", "bank.py", "balances", stdin=as_lines([{"key": "a", "value": 1}])).code == 0
    bank.write("bank.py", BANK.replace('"balances", key_type=str, value_type=int, default=int', FLOATS))
    result = bank("table", "get", "bank.py", "balances", "a")
    assert (result.code, result.out, "written by int" in result.err) == (2, "", True)


FLOATS = '"balances", key_type=str, value_type=float, default=float'
EXPORT = ("export", "bank.py", "balances", "wrong.jsonl")
