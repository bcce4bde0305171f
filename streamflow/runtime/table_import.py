"""Writing a table from outside: changelog records, and the offsets that make an app start with them.

The importer is the only member of the app's group while it works, so no worker sees half of it. Local stores need no
word: they notice by their position in the changelog that there is more to read. What was imported counts as committed
once the commit marks say so, which is the last thing done; where changelogs are committed with a transaction it counts
as soon as it is written. Doing an interrupted import again comes to the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from streamflow.clock import Clock, SystemClock
from streamflow.config import Settings
from streamflow.errors import ConfigurationError, ProductionError, TopologyError
from streamflow.log.api import Log, OffsetMark
from streamflow.log.batch import BatchBuilder
from streamflow.log.codec import compression_number
from streamflow.model.record import TopicPartition
from streamflow.processing.declarations import Declarations
from streamflow.runtime.beginnings import beginnings
from streamflow.runtime.commit_mark import CommitMark, anchor_of, new_commit_id, other_serializer
from streamflow.runtime.group_hold import HeldGroup, held_group, refuse_live_members
from streamflow.runtime.internal_topics import prepare_topics
from streamflow.runtime.layout import Layout
from streamflow.runtime.outputs import Target
from streamflow.runtime.table_reader import TableLog, sub_of, table_of
from streamflow.runtime.targets import KnownTargets
from streamflow.runtime.task_tables import largest_key


@dataclass(slots=True)
class Imported:
    """What an import did.

    Attributes:
        written: Keys written.
        cleared: Keys deleted, because they were not among those written.
        restored: Keys whose updates were in no commit and were set back to their committed values.
        started: Partitions whose offsets were set, as the app had none.
    """

    written: int = 0
    cleared: int = 0
    restored: int = 0
    started: int = 0


@dataclass(slots=True)
class _Part:
    """One task of the table.

    Attributes:
        sources: Its source partitions, with their committed offsets.
        mark: What its last commit says; None where it has none.
        changes: By key: value bytes, None deletes.
        at_ms: Timestamp of the records.
    """

    sources: dict[TopicPartition, OffsetMark | None]
    mark: CommitMark | None
    changes: dict[bytes, bytes | None]
    at_ms: int = 0


async def import_table(
    log: Log,
    app: Declarations,
    settings: Settings,
    name: str,
    rows: Mapping[bytes, bytes],
    *,
    replace: bool = False,
    clock: Clock | None = None,
    place_of: Callable[[bytes], str] = lambda key: f"key {key[:60]!r}",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Imported:
    """Write keys and values into a table whose app does not run.

    Into an app without committed offsets it commits where each partition starts (`auto_offset_reset`), so that the
    first worker begins with these values and with its whole input.

    Args:
        log: The open log.
        app: The app; its topics are created where they are missing.
        settings: Its settings.
        name: The table.
        rows: Value bytes by key bytes, as the changelog has them.
        replace: Delete all keys that are not in `rows`.
        clock: Time; None is the system's.
        place_of: How errors name the row of a key.
        on_progress: Told of records done and to do.

    Raises:
        ConfigurationError: The app has no such table, or its source fills it.
        GroupInUseError: A worker runs, or was started meanwhile.
        TopologyError: There is state without offsets that it belongs to.
        ProductionError: A record is too large; nothing was written.

    Delivery: durable when it returns. Interrupted, a part of the rows may be written; doing it again writes the same.
    Cancellation: as interrupted.
    """
    table = table_of(app, name)
    if table.source is not None:
        raise ConfigurationError(
            f"table {name!r} is what its source says: send to topic {table.source.name!r} instead (`streamflow send`)"
        )
    sub_of(app, name)
    await refuse_live_members(log, app.id, settings, "import")
    topology = app.topology()
    layout = Layout.of(topology, await prepare_topics(app, topology, settings, log.admin))
    subs = {sub.name: sub.topics for sub in layout.sub_topologies}
    async with held_group(log, app.id, settings, subs, layout.counts) as held:
        work = _Import(log, app, settings, clock or SystemClock(), layout, await TableLog.find(app, name, log.admin))
        work.take(rows, place_of)
        return await work.run(held, replace, on_progress)


class _Import:
    def __init__(
        self, log: Log, app: Declarations, settings: Settings, clock: Clock, layout: Layout, found: TableLog
    ) -> None:
        self._log = log
        self._app = app
        self._settings = settings
        self._clock = clock
        self._layout = layout
        self._found = found
        self._name = found.table.name
        self._letters = found.letters
        known = KnownTargets(log.admin, compression_number(settings.compression))
        self._target: Target = known.add(found.table.changelog, found.changelog)
        self._changes: list[dict[bytes, bytes | None]] = [{} for _ in range(found.changelog.partitions)]
        self._done = Imported()

    def take(self, rows: Mapping[bytes, bytes], place_of: Callable[[bytes], str]) -> None:
        """Check sizes, as agents would, and find each key's partition."""
        max_key_bytes = largest_key(self._target.max_record_bytes)
        max_value_bytes = self._target.max_record_bytes - max_key_bytes
        for key, value in rows.items():
            for what, data, limit in (("key", key, max_key_bytes), ("value", value, max_value_bytes)):
                if len(data) > limit:
                    raise ProductionError(
                        f"{place_of(key)}: its {what} of {len(data):,} bytes is too large for table {self._name!r}, "
                        f"which takes {limit:,}; nothing was imported"
                    )
            self._changes[self._home_of(key, place_of)][key] = value
        self._done.written = len(rows)

    def _home_of(self, key: bytes, place_of: Callable[[bytes], str]) -> int:
        try:
            return self._found.home_of(self._found.table.key_codec.decode(key))
        except ProductionError as exc:
            raise ProductionError(f"{place_of(key)}: {exc.message}; nothing was imported") from exc

    async def run(self, held: HeldGroup, replace: bool, on_progress: Callable[[int, int], None]) -> Imported:
        """Write what was taken, then the offsets."""
        parts = await self._parts(held)
        self._refuse_other_serializer(parts, replace)
        await self._refuse_foreign_state(parts, replace)
        await self._complete(parts, replace)
        await self._write(parts, on_progress)
        if offsets := await self._offsets(parts):
            await held.commit(offsets)
        return self._done

    async def _parts(self, held: HeldGroup) -> list[_Part]:
        sources = [self._layout.of_task(self._found.sub, number) for number in range(self._found.changelog.partitions)]
        committed = await held.committed([tp for each in sources for tp in each])
        parts: list[_Part] = []
        for each, changes in zip(sources, self._changes, strict=True):
            marks = {tp: committed[tp] for tp in each}
            parts.append(_Part(marks, CommitMark.of_task(marks), changes))
        return parts

    async def _refuse_foreign_state(self, parts: list[_Part], replace: bool) -> None:
        """State without offsets is refused by a start, and an import must not make it look as if it had some."""
        fresh = [number for number, part in enumerate(parts) if part.mark is None]
        for table in self._written_tables():
            found = await TableLog.find(self._app, table, self._log.admin)
            held = sum(fold.records for fold in await found.fold(self._log, dict.fromkeys(fresh, CommitMark())))
            if not held or (table == self._name and replace):
                continue
            again = "If an import was interrupted, do it again with --replace; else s" if table == self._name else "S"
            raise TopologyError(
                f"table {table!r} has {held:,} changelog records in {found.changelog.name}, but the group has no "
                f"committed offsets that say which input they stand for. {again}tart over with `streamflow reset APP`"
            )

    def _refuse_other_serializer(self, parts: list[_Part], replace: bool) -> None:
        """Values that stay would be read by another serializer than they were written by."""
        for part in parts:
            difference = other_serializer(self._letters_before(part), self._letters)
            if difference is not None and not replace:
                raise TopologyError(
                    f"table {self._name!r}: {difference}, so what the file does not have could not be read any more: "
                    "give it all lines, those of `streamflow table export` under the old type with what has to change, "
                    "and --replace"
                )

    def _letters_before(self, part: _Part) -> str:
        return self._letters if part.mark is None else part.mark.serializers.get(self._name, self._letters)

    def _written_tables(self) -> list[str]:
        """The tables of the task that have changelogs of their own."""
        return [name for name in self._found.sub.tables if self._app.tables[name].source is None]

    async def _complete(self, parts: list[_Part], replace: bool) -> None:
        """Add what the rows do not say: keys to be deleted, and updates that no commit holds."""
        topic = self._found.changelog.name
        tps = [TopicPartition(topic, number) for number in range(len(parts))]
        ends = await self._log.admin.high_watermarks(tps)
        marks = {
            number: part.mark or CommitMark()
            for number, part in enumerate(parts)
            if replace or self._has_tail(part.mark, ends[tps[number]])
        }
        now_ms = self._clock.now_ms()
        for part in parts:
            time_ms = part.mark.times.get(self._name, -1) if part.mark is not None else -1
            part.at_ms = time_ms if self._found.table.ttl_s is not None and time_ms >= 0 else now_ms
        for fold in await self._found.fold(self._log, marks):
            changes = parts[fold.partition].changes
            if replace:
                gone = fold.values.keys() - changes.keys()
                changes.update(dict.fromkeys(gone))
                self._done.cleared += len(gone)
            for key in fold.uncommitted.keys() - changes.keys():
                changes[key] = fold.values[key][1] if key in fold.values else None
                self._done.restored += 1

    def _has_tail(self, mark: CommitMark | None, end: int) -> bool:
        return mark is not None and mark.changelogs is not None and mark.changelogs.get(self._name, end) < end

    async def _write(self, parts: list[_Part], on_progress: Callable[[int, int], None]) -> None:
        total = sum(len(part.changes) for part in parts)
        done = 0
        async with self._log.producer() as producer:
            for number, part in enumerate(parts):
                tp = TopicPartition(self._found.changelog.name, number)
                builder = self._builder()
                for key, value in part.changes.items():
                    if not builder.append(part.at_ms, key, value, ()):
                        await producer.enqueue(tp, builder.seal())
                        on_progress(done, total)
                        builder = self._builder()
                        builder.append(part.at_ms, key, value, ())
                    done += 1
                if builder.num_records:
                    await producer.enqueue(tp, builder.seal())
            await producer.flush()
        on_progress(done, total)

    def _builder(self) -> BatchBuilder:
        return BatchBuilder(self._target.compression, self._target.batch_bytes)

    async def _offsets(self, parts: list[_Part]) -> dict[TopicPartition, OffsetMark]:
        """New marks; offsets only where there are none yet."""
        tables = {name: self._app.tables[name].changelog.name for name in self._written_tables()}
        tps = [TopicPartition(topic, number) for topic in tables.values() for number in range(len(parts))]
        ends = await self._log.admin.high_watermarks(tps)
        missing = [tp for part in parts for tp, mark in part.sources.items() if mark is None]
        starts = await beginnings(self._log.admin, self._app, self._settings, missing)
        offsets: dict[TopicPartition, OffsetMark] = {}
        for number, part in enumerate(parts):
            if part.mark is not None and not part.changes and self._letters_before(part) == self._letters:
                continue
            positions = {table: ends[TopicPartition(topic, number)] for table, topic in tables.items()}
            anchor = anchor_of(part.sources)
            for tp, mark in part.sources.items():
                if mark is None:
                    offsets[tp] = OffsetMark(starts[tp])
            self._done.started += sum(mark is None for mark in part.sources.values())
            known = part.sources[anchor]
            metadata = self._new_mark(part.mark, positions).metadata()
            offsets[anchor] = OffsetMark(starts[anchor] if known is None else known.offset, metadata)
        return offsets

    def _new_mark(self, before: CommitMark | None, positions: Mapping[str, int]) -> CommitMark:
        if before is None:
            return CommitMark(new_commit_id(), positions, serializers={self._name: self._letters})
        serializers = {**before.serializers, self._name: self._letters}
        after = msgspec.structs.replace(before, id=new_commit_id(), serializers=serializers)
        if before.changelogs is None:
            return after
        changelogs = {**before.changelogs, self._name: positions[self._name]}
        return msgspec.structs.replace(after, changelogs=changelogs)
