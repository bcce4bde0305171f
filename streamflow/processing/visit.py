"""A visit: a function over every key of a table, in slices between records, for migrations and repairs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeVar
from weakref import WeakKeyDictionary

from streamflow.errors import NotHeld, ProcessingError, ProductionError, StateError, TopologyError
from streamflow.processing.context import RunningApp
from streamflow.processing.global_table import GlobalTable
from streamflow.processing.holding import Holder, holders_of
from streamflow.processing.set_table import SetTable
from streamflow.processing.table import Table
from streamflow.state.stage import Stage

K = TypeVar("K")
V = TypeVar("V")

_SLICE_KEYS = 500
_SLICE_S = 0.005
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Visited:
    """What a visit did.

    Attributes:
        partitions: Partitions visited to their end in this process.
        left: Partitions that were assigned to this process and not visited to their end, since they went to another
            worker or the worker stopped; what was visited of them is committed. All of the table where the worker
            stopped before it was assigned any.
        keys: How many keys were visited.
        written: How many of them got a new value, or one that was changed in place.
        deleted: How many of them were deleted.
    """

    partitions: frozenset[int]
    left: frozenset[int]
    keys: int
    written: int
    deleted: int


@dataclass(slots=True)
class _Course:
    """How far a visit is in one partition."""

    after: bytes = b""
    is_over: bool = False


@dataclass(slots=True)
class _Counts:
    keys: int = 0
    written: int = 0
    deleted: int = 0


@dataclass(slots=True)
class _Slice:
    """One slice: what it did and where the next one begins."""

    counts: _Counts = field(default_factory=_Counts)
    next: bytes | None = None


_under_way: WeakKeyDictionary[RunningApp, list[object]] = WeakKeyDictionary()


def is_visited(app: RunningApp) -> bool:
    """Whether visits of an app's tables are in progress in this process."""
    return bool(_under_way.get(app))


@contextmanager
def _announced(app: RunningApp) -> Generator[None]:
    """A visit is in progress while the block runs: a run to the end waits for it."""
    visits, this = _under_way.setdefault(app, []), object()
    visits.append(this)
    try:
        yield
    finally:
        visits.remove(this)


async def visit(table: Table[K, V], fn: Callable[[K, V], V | None]) -> Visited:
    """See `App.visit`."""
    _refuse_unfit(table)
    table.refuse_if_filled()
    with _announced(table.app):
        return await _visit(table, fn)


def _refuse_unfit(table: object) -> None:
    if isinstance(table, SetTable):
        name = table.pairs.name
        raise TopologyError(
            f"app.visit: set table {name!r} is visited by its pairs: `app.visit({name}.pairs, fn)`, where fn takes "
            "(key, member) and b''"
        )
    if isinstance(table, GlobalTable):
        raise TopologyError(
            f"app.visit: global table {table.name!r} is what its source {table.source.name!r} says, and is not "
            f"written: go through it with `{table.name}.items()`, and send to the topic, "
            f"`await {table.name}.source.send(key=..., value=...)`"
        )


async def _visit(table: Table[K, V], fn: Callable[[K, V], V | None]) -> Visited:
    courses: dict[int, _Course] = {}
    counts = _Counts()
    while True:
        holders = holders_of(table.app)
        if not holders:
            raise NotHeld(
                f"table {table.name!r}: app {table.app.id!r} is not running in this process: visit it from a task, or "
                "within `async with app.running():`"
            )
        for holder in holders:
            for number in holder.assigned(table.name):
                courses.setdefault(number, _Course())
        held = {number: holder for holder in holders for number in holder.overlays(table.name)}
        open_ones = [number for number in sorted(held) if not courses.setdefault(number, _Course()).is_over]
        for number in open_ones:
            await _visit_partition(table, fn, held[number], number, courses[number], counts)
        if not open_ones:
            if not any(holder.awaits(table.name) for holder in holders):
                break
            await asyncio.sleep(_POLL_S)
    over = frozenset(number for number, course in courses.items() if course.is_over)
    return Visited(over, frozenset(courses) - over, counts.keys, counts.written, counts.deleted)


async def _visit_partition(
    table: Table[K, V], fn: Callable[[K, V], V | None], holder: Holder, number: int, course: _Course, counts: _Counts
) -> None:
    """Visit a partition to its end, or until it leaves; then it goes on from there if it comes back."""
    while not course.is_over:

        def work(stage: Stage) -> _Slice:
            return _visit_slice(table, fn, stage, course.after)

        try:
            done: _Slice = await holder.change(table.name, number, work)
        except NotHeld:
            return
        counts.keys += done.counts.keys
        counts.written += done.counts.written
        counts.deleted += done.counts.deleted
        course.is_over = done.next is None
        course.after = done.next or b""


def _visit_slice(table: Table[K, V], fn: Callable[[K, V], V | None], stage: Stage, after: bytes) -> _Slice:
    done = _Slice()
    until_s = perf_counter() + _SLICE_S
    end = stage.overlay.stored_key_after(after, _SLICE_KEYS)  # so that a slice looks at its own part only
    done.next = end
    for key, value in stage.entries(after, end):
        if done.counts.keys and perf_counter() > until_s:
            done.next = table.keys_in_order.encode(key)
            break
        _call(table, fn, stage, key, value)
        done.counts.keys += 1
    stage.check()
    done.counts.written, done.counts.deleted = stage.written_and_deleted()
    return done


def _call(table: Table[K, V], fn: Callable[[K, V], V | None], stage: Stage, key: K, value: V) -> None:
    try:
        new = fn(key, value)
        if new is not None and new is not value:
            stage.set(key, new)
    except (StateError, ProductionError):
        raise
    except Exception as exc:
        raise ProcessingError(
            f"app.visit: the function raised {type(exc).__name__} for the key {key!r} of table {table.name!r}: {exc}; "
            "what was visited before is committed"
        ) from exc
