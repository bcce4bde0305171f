"""Who may commit, who opens a task anew and why, and whether what everybody has comes to rest, in balance."""

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streamflow.log.api import Admin, Assigned, Membership
from streamflow.model.record import TopicPartition
from streamflow.runtime.assignment.cluster import Cluster, ClusterMember, Plan, TaskId
from streamflow.runtime.assignment.plan import plan
from streamflow.runtime.commit import Commits
from streamflow.runtime.commit_mark import CommitMark
from streamflow.runtime.task import Task
from streamflow.runtime.task_manager import TaskManager
from streamflow.runtime.task_view import TaskView
from streamflow.state.identity import Identity
from streamflow.state.store import Checkpoint
from tests.simulation.apps import APP_ID
from tests.simulation.population import SESSION_S, Broken
from tests.simulation.processes import Process, current
from tests.simulation.workers import Running

if TYPE_CHECKING:
    from tests.simulation.world import World

SETTLE_S = 30.0
"""For how long tasks may still move after the last fault, when everything is committed."""
REST_S = 1.0
"""For how long nothing may move then."""
_ROUND_S = 1.0
"""For how long a rebalance takes that changes nothing, at most."""
_LOOK_S = 0.1
_MEASURED_S = 6.0
"""For how long who lost a task may find that its state is level here: what lies on its disk is measured every 5 s."""


class Owners:
    """Who has what, as the log and the workers say it while they run."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._assigned: dict[tuple[TopicPartition, int], str] = {}
        self._committers: dict[TopicPartition, tuple[int, list[str]]] = {}
        self._last: dict[TopicPartition, tuple[str, float]] = {}
        self._opened: dict[tuple[str, TopicPartition], float] = {}
        self._restored_elsewhere: dict[tuple[str, TaskId], float] = {}
        self.opened_anew: Counter[str] = Counter()
        """How many times tasks that stayed were opened anew, by why."""
        self.settled_s = 0.0
        """How long it took to come to rest."""

    def assigned(self, process: Process, event: Assigned) -> None:
        """A partition has one owner in a generation; who has its instance id takes its place within one."""
        owner = process.instance_id or process.name
        for tp in event.partitions:
            if self._assigned.setdefault((tp, event.generation), owner) != owner:
                raise Broken(f"{tp} was given to two members in generation {event.generation}")

    def committed(self, process: Process, partitions: Iterable[TopicPartition], by: Membership, sent_s: float) -> None:
        """Who commits is the only owner: nobody does in an older generation, nor two in turns in the same."""
        name = f"{process.name} ({by.member_id[-4:]})"
        for tp in partitions:
            generation, names = self._committers.get(tp, (-1, []))
            if by.generation > generation:
                self._committers[tp] = by.generation, [name]
            elif names[-1] != name:
                if by.generation < generation or name in names:
                    raise Broken(f"{name} commits {tp} in generation {by.generation} after {names} in {generation}")
                names.append(name)
            self._last[tp] = process.name, sent_s

    def opened(self, process: Process, task: Task) -> None:
        """A task begins."""
        self._opened[process.name, task.anchor] = self._world.loop.time()

    def was_overtaken(self, process: Process, task: TaskView) -> None:
        """A task that stays is dropped because another one has committed for it, which has to be so.

        It may be the one before it in the same process, which was lost while a commit was on its way.
        """
        name, sent_s = self._last.get(task.anchor, (process.name, math.inf))
        if name == process.name and sent_s > self._opened[name, task.anchor]:
            raise self._world.broken(f"{name} drops what it has of {task.name}, for which nobody else has committed")

    def stored(self, process: Process, identity: Identity, checkpoint: Checkpoint) -> None:
        """Nobody has in a store what is not committed, where the last commit says how far a changelog is."""
        for work in self._world.plan.works:
            mark = self._world.marks.get(TopicPartition(work.input, identity.partition))
            ends = None if mark is None else CommitMark.of(mark).changelogs
            if ends is None or work.table is None or work.table not in checkpoint.changelogs:
                continue
            if checkpoint.changelogs[work.table] > ends.get(work.table, 0):
                what = f"{work.table}-{identity.partition} up to {checkpoint.changelogs[work.table]}"
                raise self._world.broken(f"{process.name} has {what} in its store, and committed is only {ends}")

    def planned(self, cluster: Cluster) -> Plan:
        """The assignor's plan, which has to give every task to one member, that is caught up if any is."""
        made = plan(cluster)
        for task in cluster.tasks:
            given = [each for each in cluster.members if task.id in made.active[each.member_id]]
            if len(given) != 1 or task.id in made.standby[given[0].member_id]:
                raise self._world.broken(f"{task.id} is given to {[each.member_id for each in given]}: {made}")
            if task.stateful and not _may_go_on(cluster, task.id, given[0]):
                raise self._world.broken(f"{task.id} is to go on where its state is not: {made} of {cluster}")
        return made

    # --- coming to rest ----------------------------------------------------------------------------------------

    async def come_to_rest(self, admin: Admin) -> None:
        """Wait until everything is assigned, open and in balance; then nothing may move any more."""
        loop = self._world.loop
        since_s = loop.time()
        while why := self.unsettled() or self._undecided() or await self._absent(admin):
            if self._world.breaks is not None:
                raise self._world.breaks
            if loop.time() - since_s > SETTLE_S:
                raise Broken(f"the group does not come to rest: {why}; {self._told()}")
            await asyncio.sleep(_LOOK_S)
        self.settled_s = loop.time() - since_s
        self._world.trace(f"at rest: {self._told()}")
        before = self._held()
        await asyncio.sleep(REST_S)
        if before != self._held():
            raise Broken(f"the group was at rest, and changed: it was {before}, and is {self._held()}")
        await self._ask_for_a_round()
        if self._world.plan.crowd.is_static:
            await self._bounce()

    async def _bounce(self) -> None:
        """A static member that is back within its session has what it had, and the others notice nothing."""
        population = self._world.population
        chosen = self._world.draw.choice(population.running)
        before, tasks = self._held(), self._told()[chosen.process.name]
        population.leave(chosen, "rest, to be back at once", for_good=True)
        await chosen.gone.wait()
        again = population.start(chosen.seat, chosen.instance_id)
        await asyncio.sleep(_LOOK_S)
        while chosen in population.running or self.unsettled():
            if self._world.breaks is not None:
                raise self._world.breaks
            await asyncio.sleep(_LOOK_S)
        after = self._held()
        if self._told()[again.process.name] != tasks:
            raise Broken(
                f"{again.process.name} was away for a moment, and has other tasks than {tasks}: {self._told()}"
            )
        if changed := [name for name, held in before.items() if after.get(name, held) != held]:
            raise Broken(
                f"{again.process.name} was away for a moment, and {changed} had a rebalance: {before}, {after}"
            )

    async def _ask_for_a_round(self) -> None:
        """A rebalance that changes nothing moves nothing."""
        chosen = self._world.draw.choice(self._world.population.running)
        if chosen.worker is None or chosen.worker.group is None:
            raise Broken(f"{chosen.process.name} has no group")
        before = self._held()
        chosen.process.context().run(chosen.worker.group.rejoin, "to see whether anything moves")
        await asyncio.sleep(_ROUND_S)
        after = self._held()
        if any(after.get(name, held)[1] != held[1] for name, held in before.items()):
            raise Broken(f"a rebalance that changes nothing moved tasks: it was {before}, and is {after}")
        if before[chosen.process.name][0] == after[chosen.process.name][0]:
            raise Broken(f"{chosen.process.name} asked for a rebalance, and there was none: {after}")

    def unsettled(self) -> str:
        """What is not yet as it has to be when nothing happens any more."""
        population = self._world.population
        if population.coming:
            return f"{population.coming} are to start"
        managers: dict[str, TaskManager] = {}
        for each in population.running:
            name, worker = each.process.name, each.worker
            if each.process.state != "running" or worker is None or worker.manager is None or worker.state != "running":
                return f"{name} does not run"
            if each.process in population.hear_late:
                return f"{name} has not heard of everything"
            # It may have been stopped for longer than its session. The group finds that out when it looks, which is
            # after it woke, and takes a round then: what it has now is not yet at rest.
            if self._world.loop.time() - each.process.went_on_s < SESSION_S:
                return f"{name} went on a moment ago, and may have lost its session"
            managers[name] = worker.manager
        owners = Counter(tp for manager in managers.values() for task in manager.running() for tp in task.committed)
        if wrong := {str(tp): owners[tp] for tp in self._world.sources.partitions() if owners[tp] != 1}:
            return f"not owned once: {wrong}"
        if idle := [name for name, manager in managers.items() if not manager.has_restored]:
            return f"{idle} have tasks to open or to restore"
        counts = [len(manager.tasks) for manager in managers.values()]
        if max(counts) - min(counts) > 1:
            return f"out of balance: {counts}"
        return self._standbys_unsettled(managers)

    def _undecided(self) -> str:
        """Who lost a task that somebody else was to restore, and may ask for a round: once, when its disk is measured.

        It cannot know whether that one is done, which it may be for hours yet. Of a loss it may have heard late: the
        round then moves nothing, but there is one.
        """
        now_s = self._world.loop.time()
        lost = [
            (each.process.name, task)
            for each in self._world.population.running
            if (worker := each.worker) is not None and worker.manager is not None and worker.conversation is not None
            for task in worker.conversation.told.behind & worker.manager.lost
        ]
        self._restored_elsewhere = since = {key: self._restored_elsewhere.get(key, now_s) for key in lost}
        looking = sorted(f"{name}: {task}" for (name, task), at_s in since.items() if now_s - at_s < _MEASURED_S)
        return f"lost, and restored elsewhere, which may be known not to be needed: {looking}" if looking else ""

    async def _absent(self, admin: Admin) -> str:
        """Whether the group still takes one for a member that is gone: a static one is, until its session is over."""
        members = await admin.group_members(APP_ID)
        return f"gone, and still a member: some of {members}" if len(members) > len(self._held()) else ""

    def _standbys_unsettled(self, managers: Mapping[str, TaskManager]) -> str:
        """Every task with tables has as many copies elsewhere as there are to be, level with it, and no other ones."""
        wanted = min(self._world.plan.crowd.standby_replicas, len(managers) - 1)
        copies: Counter[tuple[str, int]] = Counter()
        for name, manager in managers.items():
            standbys = manager.standbys
            if coming := standbys.warm_ups - manager.tasks.keys():  # its own ones have come since it was told
                return f"{name} warms {sorted(map(str, coming))} up"
            if standbys.told != standbys.held().keys() or standbys.told & manager.tasks.keys():
                return f"{name} is told {standbys.told}, holds {standbys.held().keys()} and runs {manager.tasks.keys()}"
            if behind := {str(task): each.lag for task, each in standbys.held().items() if each.lag != 0}:
                return f"{name} is behind with {behind}"
            copies.update(standbys.told)
        tasks = [key for each in managers.values() for key, task in each.tasks.items() if task.tables is not None]
        wrong = {f"{sub}-{number}": copies[sub, number] for sub, number in tasks if copies[sub, number] != wanted}
        return f"not {wanted} standbys: {wrong}" if wrong or copies.keys() - set(tasks) else ""

    def _held(self) -> dict[str, tuple[object, dict[str, int]]]:
        """What must not change: who is in which generation, with which tasks as they were opened."""
        return {each.process.name: _held_by(each) for each in self._world.population.running}

    def _told(self) -> dict[str, list[str]]:
        return {
            each.process.name: sorted(task.name for task in each.worker.manager.running())
            for each in self._world.population.running
            if each.worker is not None and each.worker.manager is not None
        }


def _may_go_on(cluster: Cluster, task: TaskId, one: ClusterMember) -> bool:
    """Whether a member is caught up with a task, or else its owner; anyone is, where nobody is and it has no owner."""
    lags = {each.member_id: each.lags.get(task, 0 if task in each.active else math.inf) for each in cluster.members}
    ready = {name for name, lag in lags.items() if lag <= cluster.acceptable_lag_records}
    owners = {each.member_id for each in cluster.members if task in each.active}
    return one.member_id in (ready or owners or lags)


def _held_by(running: Running) -> tuple[object, dict[str, int]]:
    worker = running.worker
    if worker is None or worker.manager is None or worker.group is None:
        return None, {}
    return worker.group.membership, {task.name: id(task) for task in worker.manager.running()}


class WatchedTasks(TaskManager):
    """The tasks of one worker; counts those that are opened anew though they stayed."""

    owners: Owners

    async def _open(self, key: tuple[str, int], *args: Any) -> None:
        await super()._open(key, *args)
        process = current.get()
        if process is not None and key in self.tasks:
            self.owners.opened(process, self.tasks[key])

    async def _close(self, tasks: Sequence[Task], partitions: frozenset[TopicPartition], *args: Any) -> None:
        process = current.get()
        if not partitions and process is not None and not self.is_finishing:
            for task in tasks:
                is_damaged = task.tables is not None and task.tables.damage is not None
                self.owners.opened_anew["damaged" if is_damaged else "overtaken" if task.lost else "grown"] += 1
        await super()._close(tasks, partitions, *args)


def watched(owners: Owners) -> dict[str, Any]:
    """What stands for the runtime's own while a simulation runs, by where it stands."""
    found = Commits._is_committed_elsewhere

    def is_committed_elsewhere(self: Commits, task: TaskView) -> None:
        process = current.get()
        if process is not None:
            owners.was_overtaken(process, task)
        found(self, task)

    manager = type("WatchedTasks", (WatchedTasks,), {"owners": owners})
    return {"manager": manager, "is_committed_elsewhere": is_committed_elsewhere, "plan": owners.planned}
