"""What a worker says to the leader of its group with each round, and what it is told beside its partitions.

It says where it is reached, how much it can take, how far behind each state is that it has, and what its commits are
fenced by. It is told which tasks to be a standby of, which are to come to it, and the same of the others. The words are
in `assignment/words.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import anyio

from streamflow.config import Settings
from streamflow.log.api import Group
from streamflow.log.api import Told as ToldBytes
from streamflow.runtime.abandoned_transactions import AbandonedTransactions
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.words import Route, Says, Told
from streamflow.runtime.routes import Routes
from streamflow.runtime.standbys import Standbys
from streamflow.runtime.task_manager import TaskManager

logger = logging.getLogger("streamflow.standbys")

_SAY_EVERY_S = 0.25
_ASK_AGAIN_S = 30.0
_ASK_SOON_S = 5.0


def says(
    settings: Settings,
    url: str,
    standbys: Standbys,
    lags: Mapping[TaskId, int],
    transactional_id: str,
    ran: frozenset[TaskId],
) -> Says:
    """What a worker says of itself.

    Args:
        settings: Its settings.
        url: Where other workers reach its HTTP server; empty where they do not.
        standbys: Its standbys.
        lags: How far behind each state is that it has.
        transactional_id: What its commits are fenced by; empty where there is none.
        ran: Tasks that run with all of their state.
    """
    return Says(
        url=url,
        rack=settings.rack,
        capacity=settings.capacity,
        follows=standbys.has_room,
        standby=standbys.told,
        lags=lags,
        unpacks=True,
        refused=standbys.refused(),
        transactional_id=transactional_id,
        ran=ran,
    )


class Conversation:
    """One member's side.

    Args:
        settings: The worker's settings.
        url: Where other workers reach its HTTP server now; empty where they do not.
        manager: Its tasks.
        standbys: Its standbys.
        routes: Told where tasks are.
        abandoned: Told whose transactional id is whose.
        group: Its membership.

    Attributes:
        told: What it was told last.
    """

    def __init__(
        self,
        settings: Settings,
        url: Callable[[], str],
        manager: TaskManager,
        standbys: Standbys,
        routes: Routes,
        abandoned: AbandonedTransactions,
        group: Group,
    ) -> None:
        self._settings = settings
        self._url = url
        self._manager = manager
        self._standbys = standbys
        self._routes = routes
        self._abandoned = abandoned
        self._group = group
        self._asked_at_s: float | None = None
        self._asked_as: int | None = None
        self._asked_for: frozenset[TaskId] = frozenset()
        self._new_since_s: float | None = None
        self._logged = "standbys: none"
        self.told = Told()

    async def heard(self, event: ToldBytes) -> None:
        """Act on what the leader tells."""
        before = self._wanted()
        told = self.told = Told.decode(event.told)
        if self._wanted() != before:
            # Who leads may take no notice of what cannot be followed: that is asked for once.
            self._asked_at_s, self._asked_for = None, self._asked_for & self._standbys.stuck()
        self._abandoned.told(told.routes.values())
        self._routes.told(told.routes.values())
        if (described := self._described()) != self._logged:
            self._logged = described
            logger.info("%s", described)
        if self._manager.is_finishing:
            return
        # What is followed and comes here now is handed over open when it is assigned, which is said next.
        coming = self._own() & self._standbys.held().keys()
        await self._standbys.follow(told.standby, told.warm_up | coming, self._manager.has)

    def _described(self) -> str:
        """What is followed here, and what for: a copy to fall back on, to be had when it is level, or had next."""
        own = self._own()
        parts = [f"standbys: {_named(self.told.standby)}"]
        if warming := self.told.warm_up - own:
            parts.append(f"warming up, to run here once they have caught up: {_named(warming)}")
        if coming := frozenset(task for task in self.told.warm_up & own if not self._manager.has(task)):
            parts.append(f"about to run here: {_named(coming)}")
        return "; ".join(parts)

    async def run(self) -> None:
        """Keep what is said current, and ask for a round where one would change who has what.

        That is when what is to come here is near enough, or never will be, and when others restore what lies here.
        """
        while True:
            lags, own_id = self._manager.lags(), self._abandoned.own_id
            word = says(self._settings, self._url(), self._standbys, lags, own_id, self._manager.ran())
            self._group.say(word.encode())
            self._ask(word)
            await anyio.sleep(_SAY_EVERY_S)

    def _ask(self, word: Says) -> None:
        if self._is_taken_for_another(word):
            if self._rejoin("the others know another address, rack, capacity or room of this worker", _ASK_AGAIN_S):
                self._asked_as = word.checksum
            return
        coming = self._to_ask_for()
        warm = self._standbys.warm(coming, self._enough)
        stuck = self._standbys.stuck() & (coming | self.told.standby)
        new = (warm | stuck) - self._asked_for
        if not new:
            self._new_since_s = None
        elif self._new_since_s is None:
            self._new_since_s = anyio.current_time()
        # Those that are done at the same time come with one round; but none waits for one that takes hours.
        waits = coming - warm - stuck and self._since(self._new_since_s) < _ASK_SOON_S
        if (new and not waits) or (warm and not new):
            why = [f"warmed up {_named(warm)}"] if warm else []
            why += [f"cannot follow {_named(stuck)}"] if stuck else []
            if self._rejoin("; ".join(why), _ASK_SOON_S if new else _ASK_AGAIN_S):
                self._asked_for = warm | stuck
        lying = self._restored_elsewhere()
        if lying and self._rejoin(f"the state of {_named(lying)} is here, and is restored elsewhere", 0.0):
            self._manager.lost -= lying  # once for each loss: the leader may see it otherwise

    def _rejoin(self, why: str, apart_s: float) -> bool:
        """Ask for a round, unless that was done a moment ago."""
        if self._group.membership is None:
            return False
        if self._asked_at_s is not None and self._since(self._asked_at_s) < apart_s:
            return False
        self._asked_at_s = anyio.current_time()
        self._group.rejoin(why)
        return True

    @staticmethod
    def _since(at_s: float | None) -> float:
        return 0.0 if at_s is None else anyio.current_time() - at_s

    @property
    def _enough(self) -> int:
        """The leader's acceptable lag: it moves nothing for a round that is asked for by another one."""
        told = self.told.acceptable_lag_records
        return self._settings.acceptable_lag_records if told is None else told

    def _restored_elsewhere(self) -> frozenset[TaskId]:
        """Tasks that were lost and that others have to restore: the leader knew nothing of the state that lies here."""
        most, lags, refused = self._enough, self._standbys.dormant.lags, self._standbys.refused()
        lost = self.told.behind & self._manager.lost
        return frozenset(task for task in lost - self._own() - refused if lags.get(task, most + 1) <= most)

    def _to_ask_for(self) -> frozenset[TaskId]:
        """What comes only if it is asked for; what is this worker's by the plan comes as its owner lets go of it."""
        return self.told.warm_up - self._own()

    def _wanted(self) -> tuple[frozenset[TaskId], frozenset[TaskId], int | None]:
        """What rounds are asked for. A warm-up that had come and was lost is another one than before."""
        return self.told.standby, self._to_ask_for(), self.told.acceptable_lag_records

    def _own(self) -> frozenset[TaskId]:
        """The tasks that are this worker's by the plan, whether they have come already or not."""
        if self.told.active is not None:
            return self.told.active
        own = self._own_route()
        return frozenset() if own is None else own.active

    def _own_route(self) -> Route | None:
        """This worker's among the routes that a leader of before tells; a static member that is back has another id."""
        membership, url, routes = self._group.membership, self._url(), self.told.routes
        if membership is not None and (own := routes.get(membership.member_id)) is not None:
            return own
        return next((route for route in routes.values() if url and route.url == url), None)

    def _is_taken_for_another(self, word: Says) -> bool:
        """Whether the plan was made for who was in this worker's place before.

        A static member that comes back takes no round, so nobody hears what it says. It asks for a round once: a leader
        that cannot read what it says would go on as before.
        """
        if word.checksum == self._asked_as:
            return False
        if self.told.said is not None:
            return self.told.said != word.checksum
        return bool(word.url and self.told.routes) and word.url not in {each.url for each in self.told.routes.values()}


def _named(tasks: frozenset[TaskId]) -> str:
    return ", ".join(map(str, sorted(tasks))) or "none"
