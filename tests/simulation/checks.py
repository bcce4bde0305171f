"""What must be true when everything has settled: the log is what a fold over its input says, and so are the tables."""

from collections.abc import Mapping

import msgspec

from streamflow.log.api import Log, OffsetMark
from streamflow.log.batch import LogRecord
from streamflow.model.partitioner import partition_for
from streamflow.model.record import TopicPartition
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.dead_letter import HEADER_OFFSET, HEADER_PARTITION, HEADER_TOPIC
from streamflow.state.format import unpack
from tests.simulation.apps import APP_ID, Folded, Seen, Work, fold, group_of
from tests.simulation.population import Broken
from tests.simulation.world import World


async def read_all(log: Log, topics: list[str]) -> dict[TopicPartition, list[LogRecord]]:
    """Every record of these topics."""
    described = await log.admin.describe(topics)
    partitions = [TopicPartition(name, number) for name, each in described.items() for number in range(each.partitions)]
    ends = await log.admin.end_offsets(partitions)
    found: dict[TopicPartition, list[LogRecord]] = {tp: [] for tp in partitions}
    left = {tp for tp in partitions if ends[tp]}
    async with log.reader("check") as reader:
        for tp in sorted(left):
            reader.add(tp, 0)
            reader.ask(tp)
        while left:
            for fetched in await reader.receive():
                for batch in fetched.batches:
                    found[fetched.tp].extend(batch.open())
                if fetched.next_offset >= ends[fetched.tp]:
                    left.discard(fetched.tp)
                else:
                    reader.ask(fetched.tp)
    return found


class Judge:
    """Judges one run."""

    def __init__(
        self, world: World, records: dict[TopicPartition, list[LogRecord]], marks: Mapping[TopicPartition, OffsetMark]
    ) -> None:
        self._world = world
        self._records = records
        self._marks = marks
        self._exact = world.plan.guarantee == "exactly_once"

    def judge(self) -> None:
        """Raises `Broken` where something is not as it must be."""
        for work in self._world.plan.works:
            inputs = self._inputs_of(work)
            folded = {partition: fold(work, records) for partition, records in inputs.items()}
            self._outputs(work, folded)
            self._dead_letters(work, folded)
            if work.table is not None:
                self._changelogs(work, folded)
                self._disks(work, folded)

    def _seen(self, topic: str) -> dict[int, list[Seen]]:
        return {
            tp.partition: [Seen.of(record) for record in records]
            for tp, records in sorted(self._records.items())
            if tp.topic == topic
        }

    def _inputs_of(self, work: Work) -> dict[int, list[Seen]]:
        if work.kind != "distinct":
            return self._seen(work.source)
        regrouped = self._seen(work.input)
        if not regrouped:
            raise Broken(f"there is no topic {work.input}: {sorted({tp.topic for tp in self._records})}")
        self._regrouped(work, regrouped)
        return regrouped

    def _regrouped(self, work: Work, regrouped: dict[int, list[Seen]]) -> None:
        wanted = {each.value for records in self._seen(work.source).values() for each in records} - {None}
        got = [each.value for records in regrouped.values() for each in records]
        _missing(f"{work.sink}: grouped anew", wanted, set(got))
        if self._exact and len(got) != len(set(got)):
            raise Broken(f"{work.sink}: records were grouped twice: {sorted(v for v in got if got.count(v) > 1)}")
        for records in regrouped.values():
            for each in records:
                if each.value is None or each.key != group_of(each.value):
                    raise Broken(f"{work.sink}: {each} is in the wrong group")

    def _outputs(self, work: Work, folded: dict[int, Folded]) -> None:
        """Where a source got more partitions than the sink has, several of them come together in one of the sink's."""
        came_from = {value: partition for partition, each in folded.items() for _, value in each.outputs}
        for number in range(self._world.plan.partitions):
            got = [
                (int.from_bytes(record.key or b"", "big", signed=True), (record.value or b"").decode())
                for record in self._records[TopicPartition(work.sink, number)]
            ]
            for partition, each in folded.items():
                where = f"{work.sink}-{number}, of partition {partition}"
                wanted = [output for output in each.outputs if self._home(output[0]) == number]
                if self._exact:
                    _equal(where, wanted, [output for output in got if came_from.get(output[1]) == partition])
                else:
                    _missing(where, set(wanted), set(got))
            if self._exact and (strange := [value for _, value in got if value not in came_from]):
                raise Broken(f"{work.sink}-{number} has what no record stands for: {strange}")

    def _home(self, key: int) -> int:
        return partition_for(key.to_bytes(8, "big"), self._world.plan.partitions)

    def _dead_letters(self, work: Work, folded: dict[int, Folded]) -> None:
        if work.policy != "dead":
            return
        letters = [dict(record.headers) for record in self._records[TopicPartition(work.dead, 0)]]
        # What cannot be grouped is the grouping step's, and goes where the agent's failures go.
        mine = [each for each in letters if work.kind != "distinct" or each[HEADER_TOPIC] != work.source.encode()]
        got = [(int(each[HEADER_PARTITION] or b""), int(each[HEADER_OFFSET] or b"")) for each in mine]
        wanted = [(partition, offset) for partition, each in folded.items() for offset in each.failed]
        if self._exact:
            _equal(work.dead, sorted(wanted), sorted(got))
        else:
            _missing(work.dead, set(wanted), set(got))

    def _changelog(self, work: Work, partition: int) -> list[LogRecord]:
        return self._records[TopicPartition(f"{APP_ID}-{work.table}-changelog", partition)]

    def _committed(self, work: Work, partition: int) -> list[LogRecord]:
        """The changelog up to where the last commit says that it is committed, where that is not in the log itself.

        What is behind is a crash's, or was written by a process that was stopped and woke up.
        """
        ends = CommitMark.of(self._marks.get(TopicPartition(work.input, partition))).changelogs
        records = self._changelog(work, partition)
        assert work.table is not None
        return records if ends is None else [each for each in records if each.offset < ends[work.table]]

    def _changelogs(self, work: Work, folded: dict[int, Folded]) -> None:
        for partition, each in folded.items():
            got = replayed(self._committed(work, partition))
            wanted = {key.to_bytes(8, "big"): value for key, value in each.table.items()}
            _equal(f"changelog of {work.table}-{partition}", wanted, {k: decoded(v) for k, v in got.items()})

    def _disks(self, work: Work, folded: dict[int, Folded]) -> None:
        """Every store, also one that was left behind, is what its changelog said at its checkpoint."""
        assert work.table is not None
        name = work.table
        keys = self._world.population.all[0].built.tables[name].keys_in_order
        for seat in dict.fromkeys(running.seat for running in self._world.population.all):
            for path, content in seat.disk._contents.items():
                if name not in content.tables:
                    continue
                reached = content.checkpoint.changelogs.get(name, 0)
                changelog = self._changelog(work, content.identity.partition)
                wanted = replayed([record for record in changelog if record.offset < reached])
                got = content.tables[name].values
                _equal(
                    f"table {name} in store {path} on {seat.id}, which says it is at {reached}",
                    {int.from_bytes(key, "big", signed=True): decoded(value) for key, value in wanted.items()},
                    {keys.decode(key): decoded(unpack(value, table=name)[0]) for key, value in got.items()},
                )


def replayed(records: list[LogRecord]) -> dict[bytes, bytes]:
    """What a changelog stands for."""
    values: dict[bytes, bytes] = {}
    for record in records:
        assert record.key is not None
        if record.value is None:
            values.pop(record.key, None)
        else:
            values[record.key] = record.value
    return values


def decoded(value: bytes) -> object:
    return int.from_bytes(value, "big", signed=True) if len(value) == 8 else msgspec.json.decode(value)


def _equal(where: str, wanted: object, got: object) -> None:
    if wanted != got:
        raise Broken(f"{where}: it should be\n  {wanted}\nand is\n  {got}")


def _missing(where: str, wanted: set, got: set) -> None:  # type: ignore[type-arg]
    if missing := wanted - got:
        raise Broken(f"{where}: it lacks {sorted(missing)} and has {sorted(got)}")
