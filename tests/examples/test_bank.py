"""The bank: no money is made or lost, however often its worker is killed; what a reader saw is never taken back."""

import json
import random
import shlex
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.examples.conftest import ROOT, Run, commands, imported

PEOPLE = [f"person-{number}" for number in range(30)]
DEPOSITS = 25
TRANSFERS = 20_000
APP = "examples/bank.py"

Entries = dict[str, list[dict[str, int]]]
"""By account, in order."""


def transfers() -> list[dict[str, Any]]:
    """First money from outside for some, then transfers, of which those without money cannot pay the first ones."""
    dice = random.Random(4)
    made = [("cash", person, 1_000_000) for person in PEOPLE[:DEPOSITS]]
    made += [(*dice.sample(PEOPLE, 2), dice.randint(1, 10_000)) for _ in range(TRANSFERS)]
    return [
        {"id": number, "payer": payer, "payee": payee, "cents": cents}
        for number, (payer, payee, cents) in enumerate(made)
    ]


def test_the_commands_of_the_docstring(run):
    told = [run(command) for command in commands("bank.py", "streamflow")]
    assert "ann" in told[-2]
    assert told[-2].count('"transfer"') == 4
    assert json.loads(told[-1].split(" ", 3)[-1]) == {"id": 3, "payer": "ann", "payee": "bob", "cents": 9000}


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_no_money_is_made_or_lost_when_the_worker_is_killed_again_and_again(environment, run, tmp_path):
    await money_stays_the_same(environment, run, tmp_path, kill_at=(1_000, 4_000, 8_000))


@pytest.mark.slow
@pytest.mark.kafka
@pytest.mark.timeout(180)
async def test_no_money_is_made_or_lost_on_kafka(kafka_broker, environment, run, tmp_path):
    environment |= {"STREAMFLOW_BROKER": f"kafka://{kafka_broker.bootstrap}", "STREAMFLOW_SESSION_TIMEOUT_MS": "6000"}
    await money_stays_the_same(environment, run, tmp_path, kill_at=(3_000,))


async def money_stays_the_same(environment: dict[str, str], run: Run, folder: Path, kill_at: tuple[int, ...]) -> None:
    asked = transfers()
    for name, part in (("deposits", asked[:DEPOSITS]), ("transfers", asked[DEPOSITS:])):
        (folder / name).write_text("\n".join(map(json.dumps, part)))
    run(f"streamflow send {APP} bank-transfers --file {folder / 'deposits'}")
    run(f"streamflow worker {APP} --until-end")
    run(f"streamflow send {APP} bank-transfers --file {folder / 'transfers'}")
    seen = killed_while_read(environment, kill_at)
    run(f"streamflow worker {APP} --until-end")
    entries = by_account(run(f"streamflow tail {APP} bank-entries --until-end --json").splitlines())
    refused = run(f"streamflow tail {APP} bank-refused --until-end --json").splitlines()
    for account, early in seen.items():
        assert entries[account][: len(early)] == early, f"what a reader saw of {account} was taken back"
    assert sum(map(len, entries.values())) > sum(map(len, seen.values())) + 1_000, "killed in the middle"
    check_books(entries)
    check_transfers(entries, [json.loads(line)["value"]["id"] for line in refused], asked)
    last = {account: changes[-1]["balance"] for account, changes in entries.items()}
    assert sum(last.values()) == 0
    bank = imported("bank")
    settings = {"data_dir": environment["STREAMFLOW_DATA_DIR"], "broker": environment.get("STREAMFLOW_BROKER")}
    assert await table(bank, settings) == last
    shutil.rmtree(Path(environment["STREAMFLOW_DATA_DIR"], "bank"))
    assert await table(bank, settings) == last, "restored from its changelog, the table is another one"


def killed_while_read(environment: dict[str, str], kill_at: tuple[int, ...]) -> Entries:
    """Start a worker and kill it, again and again, when so many entries were seen; gives what was seen."""
    seen: list[str] = []
    tail = subprocess.Popen(
        shlex.split(f"streamflow tail {APP} bank-entries --json"),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert tail.stdout is not None
    try:
        for count in kill_at:
            worker = subprocess.Popen(
                shlex.split(f"streamflow worker {APP}"), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
            )
            try:
                while len(seen) < count:
                    seen.append(tail.stdout.readline())
                assert worker.poll() is None, "the worker ended by itself"
            finally:
                worker.kill()
                worker.wait()
    finally:
        tail.kill()
        tail.wait()
        tail.stdout.close()
    return by_account(seen)


def by_account(lines: list[str]) -> Entries:
    found: Entries = defaultdict(list)
    for record in map(json.loads, lines):
        found[record["key"]].append(record["value"])
    return found


def check_books(entries: Entries) -> None:
    """Each balance follows from the one before, and nobody but the world outside owes."""
    for account, changes in entries.items():
        balance = 0
        for change in changes:
            balance += change["cents"]
            assert change["balance"] == balance, (account, change)
            assert balance >= 0 or account == "cash", (account, change)


def check_transfers(entries: Entries, refused: list[int], asked: list[dict[str, Any]]) -> None:
    """Each transfer was refused, or left one account once and reached the other once."""
    legs: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for account, changes in entries.items():
        for change in changes:
            legs[change["transfer"]].append((account, change["cents"]))
    assert len(refused) == len(set(refused))
    assert sorted([*legs, *refused]) == list(range(len(asked)))
    assert refused, "the test asks for transfers that cannot be paid"
    for number, both in legs.items():
        one = asked[number]
        assert sorted(both) == sorted([(one["payer"], -one["cents"]), (one["payee"], one["cents"])]), one


async def table(bank: ModuleType, settings: dict[str, Any]) -> dict[str, int]:
    async with bank.app.running(**{name: value for name, value in settings.items() if value}):
        return dict(bank.balances.items())
