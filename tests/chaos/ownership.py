"""Every partition is owned once: as the workers say now, and by their log lines, at any time of the run."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tests.system.harness import Worker

DAY_S = 86_400
_LINE = re.compile(
    r"^(\d\d):(\d\d):(\d\d)\.(\d{3}) \S+ +"
    r"(?:tasks: (?P<what>assigned|revoked|lost): (?P<partitions>.*)|worker: (?P<stopping>stopping: finishing))",
    re.MULTILINE,
)

Ended: TypeAlias = Literal["given back", "lost", "killed", "stopped", "not yet"]


@dataclass(frozen=True)
class Holding:
    """One worker's time with one partition: within what it says itself, so never longer than it was.

    Attributes:
        worker: Which.
        partition: As it is written.
        begin_s: When it said that it was assigned.
        end_s: When it said that it gives it back, with all done, was killed, or was told that it is lost.
        ended: How it ended.
    """

    worker: str
    partition: str
    begin_s: float
    end_s: float
    ended: Ended


def holdings(worker: str, said: str, *, since_s: float, killed_s: float | None = None) -> Iterator[Holding]:
    """What one worker held, as its log lines say.

    Args:
        worker: Its name.
        said: Its lines.
        since_s: The time of day, in seconds, when the run began: lines have no date.
        killed_s: When it was killed, likewise.
    """
    held: dict[str, float] = {}

    def end(partitions: Iterable[str], at_s: float, how: Ended) -> Iterator[Holding]:
        for each in partitions:
            if each in held:
                yield Holding(worker, each, held.pop(each), at_s, how)

    for line in _LINE.finditer(said):
        hours, minutes, seconds, thousandths = (int(each) for each in line.groups()[:4])
        at_s = (hours * 3600 + minutes * 60 + seconds + thousandths / 1000 - since_s) % DAY_S
        if line["stopping"]:
            yield from end(list(held), at_s, "stopped")
            return
        partitions = line["partitions"].partition(": ")[0].split(", ")
        if line["what"] == "assigned":
            held.update(dict.fromkeys(partitions, at_s))
        else:
            yield from end(partitions, at_s, "lost" if line["what"] == "lost" else "given back")
    if killed_s is None:
        yield from end(list(held), DAY_S, "not yet")
    else:
        yield from end(list(held), (killed_s - since_s) % DAY_S, "killed")


def check_held_once(found: Iterable[Holding]) -> int:
    """Nobody was assigned what another one had; who was taken for dead may be told after his successor has begun.

    Returns:
        How many holdings there were.
    """
    by_partition: dict[str, list[Holding]] = defaultdict(list)
    for each in found:
        by_partition[each.partition].append(each)
    for partition, all_of_it in by_partition.items():
        all_of_it.sort(key=lambda each: each.begin_s)
        for number, later in enumerate(all_of_it):
            for earlier in all_of_it[:number]:
                assert earlier.ended == "lost" or earlier.end_s <= later.begin_s, (
                    f"{partition} was assigned to {later.worker} at {later.begin_s:.3f} s, and {earlier.worker} had it "
                    f"from {earlier.begin_s:.3f} to {earlier.end_s:.3f} s ({earlier.ended})"
                )
    return sum(len(each) for each in by_partition.values())


async def unsettled(workers: Sequence[Worker], topics: int, partitions: int) -> str:
    """Why the group has not settled; empty when every partition is owned once, and every worker ready and live."""
    owners: Counter[tuple[str, int]] = Counter()
    for worker in workers:
        if not re.search(r"web +http", worker.said):
            return f"the worker with pid {worker.pid} has not started yet"
        code, answer = await worker.get("/status.json")
        if code != 200:
            return f"the worker with pid {worker.pid} says nothing ({code}): {answer}"
        status = json.loads(answer)[0]["status"]
        if not (status["ready"] and status["live"]):
            tasks = [(task["task"], task["state"]) for task in status["tasks"]]
            return f"the worker with pid {worker.pid} is {status['state']}, {status['live_reason']}, tasks {tasks}"
        owners.update(_owned(status))
    twice = sorted(each for each, count in owners.items() if count > 1)
    if twice:
        return f"owned by more than one worker: {twice}"
    wanted = topics * partitions
    return "" if len(owners) == wanted else f"{len(owners)} of {wanted} partitions are owned: {sorted(owners)}"


def _owned(status: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    tasks = status["tasks"]
    assert isinstance(tasks, list)
    for task in tasks:
        for each in task["partitions"]:
            yield each["topic"], each["partition"]
