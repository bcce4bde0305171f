"""What a seed stands for: the app, its input, and what may go wrong."""

import random
from dataclasses import dataclass, replace

from tests.simulation.apps import Work
from tests.simulation.faults import Rates

POINTS: dict[str, tuple[str, ...]] = {
    "join": ("connect", "take id over", "join"),
    "assignment": ("group says Assigned", "ask for offsets", "offsets"),
    "restore": ("fetch restore", "high watermarks", "end offsets", "write store"),
    "revocation": ("group says Revoked", "gives back"),
    "loss": ("group says Lost",),
    "commit": ("commit", "produce"),
}
"""Where a process may be when the group changes, by how these points are told; `END` is the other one."""
END = "end"
"""Whatever a process does after it was asked to stop."""


@dataclass(frozen=True)
class Crowd:
    """How the members of the group come and go.

    Attributes:
        points: What has to be under way when they do: names of `POINTS`, and `END`.
        at_points: How probable a change is at each of these points.
        changes: How many there may be.
        burst: How many members a change is of, at most.
        most: How many workers there are at a time, at most.
        grows: How many partitions a source gets, where none of its agents has a table.
        hangs: How probable it is that a record takes seconds.
        rebalance_timeout_ms: The setting.
        max_poll_interval_ms: The setting.
        standby_replicas: The setting.
        acceptable_lag_records: The setting; where it is small, a task with tables is warmed up before it moves.
        max_warmup_replicas: The setting.
        is_static: Whether the members have instance ids, and are taken for each other at times.
    """

    points: tuple[str, ...] = ()
    at_points: float = 0.0
    changes: int = 0
    burst: int = 1
    most: int = 4
    grows: int = 0
    hangs: float = 0.0
    rebalance_timeout_ms: int = 4000
    max_poll_interval_ms: int = 300_000
    standby_replicas: int = 0
    acceptable_lag_records: int = 10_000
    max_warmup_replicas: int = 2
    is_static: bool = False

    @classmethod
    def of(cls, seed: int) -> "Crowd":
        """Two of five groups are left to themselves."""
        draw = random.Random(f"crowd {seed}")
        if draw.random() < 0.4:
            return cls()
        return cls(
            points=tuple(draw.sample([*POINTS, END], draw.choice([1, 2, 4]))),
            at_points=draw.choice([0.05, 0.3]),
            changes=draw.choice([1, 3, 6]),
            burst=draw.choice([1, 1, 2, 3]),
            most=draw.choice([3, 4, 6]),
            grows=draw.choice([0, 0, 1, 2]),
            hangs=draw.choice([0.0, 0.0, 0.0, 0.02]),
            rebalance_timeout_ms=draw.choice([800, 4000]),
            max_poll_interval_ms=draw.choice([300_000, 300_000, 2500]),
            standby_replicas=draw.choice([0, 0, 1, 2]),
            acceptable_lag_records=draw.choice([0, 3, 3, 10_000]),
            max_warmup_replicas=draw.choice([1, 2]),
            is_static=draw.random() < 0.3,
        )


@dataclass(frozen=True)
class Plan:
    """All of it."""

    seed: int
    guarantee: str
    works: tuple[Work, ...]
    partitions: int
    workers: int
    records: int
    poison: float
    horizon_s: float
    kills: int
    stops: int
    restarts: float
    """Joins, clean stops, fences and wiped disks: how many a second."""
    commit_interval_ms: int
    store_every_s: float
    rates: Rates
    keys: int
    """Few, that are written over and over, or so many that most are written once."""
    crowd: Crowd
    is_one_away: bool = False
    """Whether `Population.send_away` does what it is for."""

    @classmethod
    def of(cls, seed: int) -> "Plan":
        draw = random.Random(f"plan {seed}")
        shares = draw.random() < 0.5
        works = [
            Work.drawn(draw, number, "numbers" if shares else f"numbers-{number}")
            for number in range(draw.choice([1, 1, 2]))
        ]
        plan = cls(
            seed,
            draw.choice(["exactly_once", "exactly_once", "at_least_once"]),
            tuple(works),
            partitions=draw.choice([1, 2, 3]),
            workers=draw.choice([1, 2, 2, 3]),
            records=draw.choice([10, 40, 80]),
            poison=draw.choice([0.0, 0.05]),
            horizon_s=draw.choice([3.0, 6.0]),
            kills=draw.choice([0, 1, 3]),
            stops=draw.choice([0, 1, 3]),
            restarts=draw.choice([0.0, 0.2, 0.6]),
            commit_interval_ms=draw.choice([20, 100, 400]),
            store_every_s=draw.choice([0.1, 0.5, 5.0]),
            rates=Rates.drawn(draw),
            keys=draw.choice([5, 60]),
            crowd=Crowd.of(seed),
        )
        return plan.away() if draw.random() < 0.2 else plan

    def away(self) -> "Plan":
        """The same, where a worker is stopped until others have its work, and hears late of what is its own again."""
        return replace(
            self,
            workers=max(2, self.workers),
            horizon_s=6.0,
            rates=replace(self.rates, late_loss=1.0),
            is_one_away=True,
        )

    def sources(self) -> list[str]:
        """The topics that the world writes."""
        return sorted({work.source for work in self.works})

    def may_grow(self) -> list[str]:
        """Those of them that may get more partitions: what is kept by key has to stay where it is."""
        return [name for name in self.sources() if all(w.kind != "sums" for w in self.works if w.source == name)]
