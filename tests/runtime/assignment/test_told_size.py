"""The broker keeps what all members of a group are told in one record of 1 MB, and refuses a round where it is more."""

import random
import uuid

import pytest

from streamflow.log.api import Given
from streamflow.log.kafka.assignment import Claim, Shares, read_share, write_claim, write_shares
from streamflow.log.kafka.user_data import Spoken
from streamflow.model.record import TopicPartition
from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.words import Route, Says, Teller, Told

RECORD_BYTES = 1_048_588
TOPICS = frozenset({"orders"})


def fleet(tasks: int, workers: int) -> dict[str, Route]:
    """Workers after a long time: who has what has no order any more."""
    chance = random.Random(1)
    order = [TaskId("orders", number) for number in chance.sample(range(tasks), tasks)]
    after = [*order[1:], order[0]]  # the neighbour's tasks are this one's standbys
    return {
        f"stock-{uuid.UUID(int=chance.getrandbits(128))}": Route(
            f"http://stock-{number}.stock-workers.production.svc.cluster.local:6066",
            frozenset(order[number::workers]),
            frozenset(after[number::workers]),
        )
        for number in range(workers)
    }


def told_to(routes: dict[str, Route], *, unpacks: bool) -> tuple[Shares, dict[str, Told]]:
    teller = Teller(routes, 10_000)
    claims: list[Claim] = []
    given: dict[str, Given] = {}
    said_bytes = 0
    for member_id, route in routes.items():
        lags = dict.fromkeys(route.standby, 5_000)
        word = Says(route.url, standby=route.standby, lags=lags, follows=True, unpacks=unpacks)
        says = word.encode()
        owned = frozenset(TopicPartition(*task) for task in route.active)
        claims.append(Claim(member_id, TOPICS, owned, 7, Spoken(says)))
        given[member_id] = Given(owned, *teller.tell(member_id, word, route.standby, []))
        said_bytes += len(write_claim(TOPICS, owned, 7, says))
    counts = {"orders": sum(len(route.active) for route in routes.values())}
    shares = write_shares(claims, given, counts, claims[0].member_id, said_bytes=said_bytes)
    return shares, {member_id: Told.decode(read_share(data).answer.told) for member_id, data in shares.assignments}


@pytest.mark.parametrize(
    ("tasks", "workers", "without"),
    [
        (100, 100, ""),
        (1_000, 50, ""),
        (600, 200, ""),
        (2_000, 100, ""),
        (2_000, 200, "where standbys are"),
        (2_000, 400, "where tasks are"),
    ],
)
def test_what_all_are_told_is_no_more_than_one_record(tasks: int, workers: int, without: str) -> None:
    routes = fleet(tasks, workers)
    shares, told = told_to(routes, unpacks=True)
    assert shares.size_bytes < 900_000 < RECORD_BYTES
    assert without in shares.without
    assert bool(without) == bool(shares.without)
    for member_id, each in told.items():
        # What it has to do is told in any case.
        assert (each.active, each.standby) == (routes[member_id].active, routes[member_id].standby)
        assert len(each.routes) == (workers if without != "where tasks are" else 0)
        assert all(bool(route.standby) == (not without) for route in each.routes.values())


def test_who_reads_the_long_form_only_is_told_what_there_is_room_for() -> None:
    shares, told = told_to(fleet(600, 200), unpacks=False)
    assert "where tasks are" in shares.without
    assert shares.size_bytes < 900_000
    assert all(each.standby and not each.routes for each in told.values())
