"""What must hold of the log and of the local stores once all input is processed, whatever happened meanwhile.

Constant memory but for one source partition's numbers, so that the soak can use it, too.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from streamflow.log.api import Log
from streamflow.model.partitioner import partition_for
from streamflow.model.record import TopicPartition
from tests.oracle.app import DIGITS, OUTPUTS, TABLES, Fold, digit_of, key_of, sequence_of
from tests.oracle.reading import number_in, records
from tests.oracle.repeats import Rewind
from tests.oracle.stores import Found, stores_of

logger = logging.getLogger("oracle")

Table = dict[bytes, Any]


@dataclass
class Verdict:
    """What was found.

    Attributes:
        total: How many input records there are.
        rewinds: Where outputs repeat; none under exactly-once.
        regrouped_repeats: How many records behind `group_by` came more than once.
    """

    total: int = 0
    rewinds: list[Rewind] = field(default_factory=list)
    regrouped_repeats: int = 0


class Oracle:
    """Checks one app of `tests/oracle/app.py`.

    Args:
        log: Its log.
        app_id: Its id.
        name: Full topic name of a short one.
        partitions: How many each topic has.
        exactly: Whether repeats are wrong.
    """

    def __init__(self, log: Log, app_id: str, name: Callable[[str], str], partitions: int, *, exactly: bool) -> None:
        self._log = log
        self._app_id = app_id
        self._name = name
        self._partitions = partitions
        self._exactly = exactly
        self.verdict = Verdict()
        self._tables: dict[str, dict[int, Table]] = {table: {} for table in TABLES}
        # By source partition and digit: how many records went there.
        self._regrouped: Counter[tuple[int, bytes]] = Counter()

    async def check(self, data_dir: Path | None) -> Verdict:
        """Everything; raises AssertionError with the place.

        Args:
            data_dir: Where the local stores are; None leaves them out.
        """
        for partition in range(self._partitions):
            await self._check_partition(partition)
        for partition in range(self._partitions):
            await self._check_regrouped(partition)
        await self._check_tables([] if data_dir is None else list(stores_of(data_dir, self._app_id)), data_dir)
        await self._check_no_open_transaction()
        return self.verdict

    def _tp(self, name: str, partition: int) -> TopicPartition:
        return TopicPartition(self._name(name), partition)

    def _changelog(self, table: str, partition: int) -> TopicPartition:
        return TopicPartition(f"{self._app_id}-{table}-changelog", partition)

    # --- outputs -----------------------------------------------------------------------------------------------

    async def _check_partition(self, partition: int) -> None:
        """The outputs of one source partition are the fold of what is committed of it."""
        source = self._tp("numbers", partition)
        marks = await self._log.admin.group_offsets(self._app_id)
        ends = await self._log.admin.end_offsets([source])
        committed = marks[source].offset if source in marks else 0
        assert committed == ends[source], f"{source}: committed up to {committed} of {ends[source]}"
        fold = Fold()
        expected: dict[str, array[int]] = {name: array("q") for name in OUTPUTS}
        keys = array("B")
        async for record in records(self._log, source, stop=committed):
            number = number_in(record.value)
            made = fold.step(key_of(number), number)
            for name, value in zip(OUTPUTS, made, strict=True):
                expected[name].append(value)
            keys.append(number & 0xFF)
            self._regrouped[partition, digit_of(number)] += 1
        self.verdict.total += len(keys)
        self._tables["sums"][partition] = dict(fold.sums)
        self._tables["extremes"][partition] = {key: list(pair) for key, pair in fold.extremes.items()}
        for name in OUTPUTS:
            await self._check_output(self._tp(name, partition), expected[name], keys)

    async def _check_output(self, tp: TopicPartition, expected: array[int], keys: array[int]) -> None:
        at = reached = 0
        async for record in records(self._log, tp):
            value = number_in(record.value)
            if at < reached < len(expected) and value == expected[reached] != expected[at]:
                at = reached  # what somebody sent late is over
            elif at >= len(expected) or value != expected[at]:
                back = _found_before(expected, reached, value)
                assert back is not None, (
                    f"{tp}-{record.offset}: {record.key!r} = {value} where the fold has "
                    f"{expected[at] if at < len(expected) else 'nothing more'} (number {at} of {len(expected)})"
                )
                assert not self._exactly, f"{tp}-{record.offset}: number {back} again, after {at}"
                self.verdict.rewinds.append(Rewind(tp.topic, tp.partition, back, back))
                at = back
            assert record.key == b"k%d" % keys[at], f"{tp}-{record.offset}: {record.key!r}"
            at += 1
            if at <= reached:
                self.verdict.rewinds[-1].until = at
            reached = max(reached, at)
        assert reached == len(expected), f"{tp}: ends after {reached} of {len(expected)} records"

    async def _check_regrouped(self, partition: int) -> None:
        """What lies behind `group_by`: each record of each source partition, in its order; counts as a set's."""
        tp = self._tp("counted", partition)
        digits = [
            b"d%d" % number for number in range(DIGITS) if partition_for(b"d%d" % number, self._partitions) == partition
        ]
        last: dict[tuple[int, bytes], int] = defaultdict(lambda: -1)
        new: Counter[tuple[int, bytes]] = Counter()
        seen: dict[bytes, set[int]] = defaultdict(set)
        async for record in records(self._log, tp):
            value = number_in(record.value)
            number, size = value >> 8, value & 0xFF
            where = f"{tp}-{record.offset}"
            digit = digit_of(number)
            assert record.key == digit, f"{where}: {record.key!r} for {number}"
            lane = partition_for(key_of(number), self._partitions), digit
            seen[digit].add(number & 0xFF)
            if sequence_of(number) > last[lane]:
                last[lane] = sequence_of(number)
                new[lane] += 1
            else:
                assert not self._exactly, f"{where}: {number} again, or out of order"
                self.verdict.regrouped_repeats += 1
            if self._exactly:
                assert size == len(seen[digit]), f"{where}: {size} distinct keys, and there are {len(seen[digit])}"
        for source in range(self._partitions):
            for digit in digits:
                expected = self._regrouped[source, digit]
                found = new[source, digit]
                assert found == expected, f"{tp}: {found} of {expected} records of {digit!r} from partition {source}"
        self._tables["distinct"][partition] = {digit: keys for digit, keys in seen.items() if keys}

    # --- tables ------------------------------------------------------------------------------------------------

    async def _check_tables(self, stores: Sequence[Found], data_dir: Path | None) -> None:
        """Each changelog ends as the fold does; each store is what its changelog was at its checkpoint.

        One store of each task is level with its changelog.
        """
        level: set[tuple[str, int]] = set()
        for table in TABLES:
            for partition in range(self._partitions):
                mine = [each for each in stores if each.identity.partition == partition and table in each.tables]
                stops = {each.checkpoint.changelogs.get(table, 0) for each in mine}
                at, found = await self._folded(table, partition, stops)
                expected = self._tables[table][partition]
                assert found == expected, _differing(f"changelog of {table}-{partition}", found, expected)
                for each in mine:
                    self._check_store(each, table, at)
                    if _decoded_all(table, each.tables[table]) == expected:
                        level.add((table, partition))
        if data_dir is not None:
            missing = {(table, partition) for table in TABLES for partition in range(self._partitions)} - level
            assert not missing, f"no store has the final state of {sorted(missing)}"

    def _check_store(self, store: Found, table: str, at: Mapping[int, Table]) -> None:
        position = store.checkpoint.changelogs.get(table, 0)
        found = _decoded_all(table, store.tables[table])
        assert found == at[position], _differing(f"{store.path}, {table} at {position}", found, at[position])

    async def _folded(self, table: str, partition: int, stops: Iterable[int]) -> tuple[dict[int, Table], Table]:
        """What a changelog makes of a table up to some offsets, and to its end; it is read once for all of them."""
        left = sorted(stops, reverse=True)
        at: dict[int, Table] = {}
        found: Table = {}
        async for record in records(self._log, self._changelog(table, partition)):
            while left and record.offset >= left[-1]:
                at[left.pop()] = dict(found)
            assert record.key is not None
            if record.value is None:
                found.pop(record.key, None)
            else:
                found[record.key] = record.value
        at |= dict.fromkeys(left, found)
        return {stop: _decoded_all(table, values) for stop, values in at.items()}, _decoded_all(table, found)

    async def _check_no_open_transaction(self) -> None:
        names = [self._name(name) for name in ("numbers", *OUTPUTS, "counted")]
        names += [f"{self._app_id}-{table}-changelog" for table in TABLES]
        tps = [TopicPartition(name, partition) for name in names for partition in range(self._partitions)]
        stable, high = await self._log.admin.end_offsets(tps), await self._log.admin.high_watermarks(tps)
        assert stable == high, {str(tp): (stable[tp], high[tp]) for tp in tps if stable[tp] != high[tp]}


def _found_before(expected: array[int], at: int, value: int) -> int | None:
    for index in range(min(at, len(expected)) - 1, -1, -1):
        if expected[index] == value:
            return index
    return None


def _decoded_all(table: str, values: Mapping[bytes, bytes]) -> Table:
    return {key: _decoded(table, value) for key, value in values.items()}


def _decoded(table: str, value: bytes) -> Any:
    if table == "sums":
        return number_in(value)
    decoded = msgspec.json.decode(value)
    return set(decoded) if table == "distinct" else decoded


def _differing(what: str, found: Mapping[bytes, Any], expected: Mapping[bytes, Any]) -> str:
    keys: Iterable[bytes] = sorted(found.keys() | expected.keys())
    wrong = {key: (found.get(key), expected.get(key)) for key in keys if found.get(key) != expected.get(key)}
    return f"{what}: {len(wrong)} of {len(expected)} keys differ (found, expected): {dict(list(wrong.items())[:5])}"
