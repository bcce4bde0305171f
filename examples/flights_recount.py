"""The same totals, computed another way: the csv module and dictionaries, nothing of the agents, no StreamFlow.

It believes the delays that the rows carry, where the agents derive them from the times. So both agree only if every
row was taken once, and judged alike.
"""

import csv
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

AIRPORTS = {"EWR", "JFK", "LGA"}
# By airline: flights, cancelled, late, minutes of departure delay, minutes of arrival delay, the worst departure delay.
Totals = dict[str, tuple[int, int, int, int, int, int]]


class Recount(NamedTuple):
    """Totals per airline, flights per route, and the number of rows that are of no use."""

    totals: Totals
    routes: dict[str, int]
    useless: int


def recount(header: str, lines: Iterable[bytes]) -> Recount:
    """Count everything once more."""
    found: dict[str, list[int]] = {}
    routes: Counter[str] = Counter()
    useless = 0
    names = header.split(",")
    for line in lines:
        cells = next(csv.reader([line.decode("utf-8", "replace")]))
        row = dict(zip(names, cells, strict=False))
        if len(cells) != len(names) or not plausible(row):
            useless += 1
            continue
        routes[f"{row['origin']}-{row['dest']}"] += 1
        sums = found.setdefault(row["carrier"], [0, 0, 0, 0, 0, 0])
        sums[0] += 1
        if row["dep_time"] == "NA":
            sums[1] += 1
        else:
            sums[2] += int(row["dep_delay"]) > 14
            sums[3] += int(row["dep_delay"])
            sums[4] += int(row["arr_delay"])
            sums[5] = max(sums[5], int(row["dep_delay"]))
    return Recount({carrier: (a, b, c, d, e, f) for carrier, (a, b, c, d, e, f) in found.items()}, routes, useless)


def plausible(row: dict[str, str]) -> bool:
    """Whether the row says all that it has to say."""
    try:
        int(row["flight"])
        right = 1 <= int(row["month"]) <= 12 and len(row["carrier"]) == 2 and row["origin"] in AIRPORTS
        if row["dep_time"] == "NA":
            return right
        departed, planned = clock(row["dep_time"]), clock(row["sched_dep_time"])
        clock(row["arr_time"])
        float(row["arr_delay"])
        # A day has 1440 minutes: the times tell a delay but for whole days.
        return right and row["tailnum"] != "NA" and (departed - planned - int(row["dep_delay"])) % 1440 == 0
    except ValueError:
        return False


def clock(text: str) -> int:
    """Minutes since midnight of `hhmm`."""
    hours, minutes = divmod(int(text), 100)
    if hours > 24 or minutes > 59:
        raise ValueError(text)
    return hours * 60 + minutes
