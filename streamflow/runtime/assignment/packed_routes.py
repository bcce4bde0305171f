"""Who has what, as short as it gets: each worker of a group is told it, and a log may have to keep all copies at once.

Per sub-topology one number a partition, that of the worker in the list of addresses, and all of it compressed: about a
byte a task, where names and lists of numbers take four.
"""

from __future__ import annotations

import sys
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from streamflow.runtime.assignment.cluster import TaskId

_MOST_BYTES = 64 * 1024 * 1024
_MOST_WORKERS = 65_535
_CODES: Mapping[int, str] = {1: "B", 2: "H"}

Tasks = frozenset[TaskId]
Worker = tuple[str, Tasks, Tasks, str]
"""Address, active tasks, standbys, transactional id."""


class _Packed(msgspec.Struct, omit_defaults=True):
    """In `active` and `standby`, a row has by partition the number of a worker, from 1; 0 is nobody.

    Several rows are for tasks that several have. `ids` are in the order of `urls`; none where nobody has one.
    """

    urls: Annotated[list[str], msgspec.Meta(max_length=_MOST_WORKERS)] = []
    ids: Annotated[list[str], msgspec.Meta(max_length=_MOST_WORKERS)] = []
    bytes_each: Literal[1, 2] = 1
    active: dict[str, list[bytes]] = {}
    standby: dict[str, list[bytes]] = {}


_decode = msgspec.msgpack.Decoder(_Packed).decode


def pack(workers: Iterable[Worker]) -> bytes:
    """As bytes.

    Args:
        workers: At most 65,535. Their order is not kept.
    """
    ordered = sorted(workers, key=lambda worker: worker[0])  # neighbours are alike, which compresses well
    ids = [transactional_id for _, _, _, transactional_id in ordered]
    bytes_each: Literal[1, 2] = 1 if len(ordered) < 256 else 2
    code = _CODES[bytes_each]
    word = _Packed(
        [url for url, _, _, _ in ordered],
        ids if any(ids) else [],
        bytes_each,
        _rows([active for _, active, _, _ in ordered], code),
        _rows([standby for _, _, standby, _ in ordered], code),
    )
    return zlib.compress(msgspec.msgpack.encode(word), 9)


def unpack(data: bytes) -> list[Worker]:
    """Read `pack`.

    Raises:
        ValueError: It is something else; `msgspec.DecodeError` is one, too.
    """
    inflating = zlib.decompressobj()
    try:
        plain = inflating.decompress(data, _MOST_BYTES)
    except zlib.error as exc:
        raise ValueError(f"routes: {exc}") from exc
    if not inflating.eof:
        raise ValueError("routes: they do not end where they should")
    word = _decode(plain)
    code, count = _CODES[word.bytes_each], len(word.urls)
    active, standby = _tasks(word.active, code, count), _tasks(word.standby, code, count)
    ids = word.ids or [""] * count
    if len(ids) != count:
        raise ValueError(f"routes: {len(ids)} transactional ids of {count} workers")
    return [(url, frozenset(active[at]), frozenset(standby[at]), ids[at]) for at, url in enumerate(word.urls)]


def _rows(tasks: Sequence[Tasks], code: str) -> dict[str, list[bytes]]:
    holders: dict[str, dict[int, list[int]]] = {}
    for number, mine in enumerate(tasks, 1):
        for sub_topology, partition in mine:
            holders.setdefault(sub_topology, {}).setdefault(partition, []).append(number)
    packed: dict[str, list[bytes]] = {}
    for sub_topology, of_partition in sorted(holders.items()):
        length, deepest = max(of_partition) + 1, max(map(len, of_partition.values()))
        rows = [array(code, [0]) * length for _ in range(deepest)]
        for partition, numbers in of_partition.items():
            for row, number in zip(rows, numbers, strict=False):
                row[partition] = number
        packed[sub_topology] = [_little(row).tobytes() for row in rows]
    return packed


def _tasks(packed: Mapping[str, Sequence[bytes]], code: str, count: int) -> list[list[TaskId]]:
    tasks: list[list[TaskId]] = [[] for _ in range(count)]
    for sub_topology, rows in packed.items():
        for data in rows:
            row = array(code)
            row.frombytes(data)
            for partition, number in enumerate(_little(row)):
                if number > count:
                    raise ValueError(f"routes: worker {number} of {count}")
                if number:
                    tasks[number - 1].append(TaskId(sub_topology, partition))
    return tasks


def _little(row: array[int]) -> array[int]:
    """To and from the order of bytes in which it travels."""
    if sys.byteorder == "big":
        row.byteswap()
    return row
