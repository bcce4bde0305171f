"""Where a worker believes tasks to be, told by told."""

import asyncio

from streamflow.runtime.assignment.cluster import TaskId
from streamflow.runtime.assignment.words import Route
from streamflow.runtime.routes import Routes

TASK = TaskId("s", 0)
MINE = frozenset({TASK})


def among(*urls: str, owner: str = "") -> list[Route]:
    return [Route(url, MINE if url == owner else frozenset()) for url in urls]


def test_who_had_a_task_is_asked_as_long_as_it_is_a_member() -> None:
    routes = Routes()
    routes.told(among("a", "b", "c", owner="a"))
    assert (routes.owner(TASK), routes.formers(TASK)) == ("a", [])
    routes.told(among("a", "b", "c", owner="b"))
    assert (routes.owner(TASK), routes.formers(TASK)) == ("b", ["a"])
    # It goes on to c before a has given it back, and a still has it.
    routes.told(among("a", "b", "c", owner="c"))
    assert (routes.owner(TASK), routes.formers(TASK)) == ("c", ["b", "a"])
    assert routes.knows("a")
    # a is gone: its address may be anybody's.
    routes.told(among("b", "c", owner="c"))
    assert routes.formers(TASK) == ["b"]
    assert not routes.knows("a")
    routes.told(among("a", "b", "c", owner="b"))
    assert (routes.owner(TASK), routes.formers(TASK)) == ("b", ["c"])


def test_where_nothing_is_told_nobody_is_known() -> None:
    routes = Routes()
    routes.told(among("a", "b", owner="a"))
    routes.told([])
    assert (routes.owner(TASK), routes.formers(TASK), routes.knows("a")) == (None, [], False)


def test_an_owner_without_an_address_has_none_before_either() -> None:
    routes = Routes()
    routes.told([Route("", MINE), Route("b")])
    assert (routes.owner(TASK), routes.knows("")) == ("", False)
    routes.told(among("b", owner="b"))
    assert routes.formers(TASK) == []


def test_only_the_newest_of_many_are_kept() -> None:
    routes = Routes()
    urls = [str(number) for number in range(9)]
    for url in urls:
        routes.told(among(*urls, owner=url))
    assert routes.formers(TASK) == ["7", "6", "5"]


async def test_news_wake_who_waits() -> None:
    routes = Routes()
    waiting = asyncio.create_task(routes.changed(60))
    await asyncio.sleep(0)
    routes.told([])
    await asyncio.wait_for(waiting, 5)
