"""What two workers may say about one partition, and what they may not: a check that takes everything proves nothing."""

from __future__ import annotations

import pytest

from tests.chaos.ownership import Holding, check_held_once, holdings

SAID = """\
23:59:59.500 INFO    tasks: assigned: by-digit-1, numbers-0, numbers-1
    web  http://127.0.0.1:1234
00:00:01.250 INFO    tasks: revoked: numbers-1
00:00:02.000 WARNING tasks: lost: numbers-0: its session has expired: the coordinator let it go
00:00:03.000 INFO    tasks: assigned: numbers-0
"""
SINCE_S = 86_399.0


def held(worker: str, begin_s: float, end_s: float, ended: str = "given back") -> Holding:
    return Holding(worker, "numbers-0", begin_s, end_s, ended)  # type: ignore[arg-type]


def test_holdings_are_read_from_what_a_worker_says_past_midnight() -> None:
    assert list(holdings("a", SAID, since_s=SINCE_S)) == [
        Holding("a", "numbers-1", 0.5, 2.25, "given back"),
        Holding("a", "numbers-0", 0.5, 3.0, "lost"),
        Holding("a", "by-digit-1", 0.5, 86_400, "not yet"),
        Holding("a", "numbers-0", 4.0, 86_400, "not yet"),
    ]


def test_who_is_killed_or_stops_holds_nothing_any_more() -> None:
    killed = list(holdings("a", SAID, since_s=SINCE_S, killed_s=5.0))
    assert [(each.end_s, each.ended) for each in killed[2:]] == [(6.0, "killed")] * 2
    stopped = list(
        holdings("a", SAID + "00:00:04.000 INFO    worker: stopping: finishing the records in hand\n", since_s=0)
    )
    assert [(each.end_s, each.ended) for each in stopped[2:]] == [(4.0, "stopped")] * 2


@pytest.mark.parametrize("ended", ["given back", "killed", "stopped"])
def test_one_after_another_is_right(ended: str) -> None:
    assert check_held_once([held("b", 5, 9), held("a", 1, 5, ended), held("a", 10, 86_400, "not yet")]) == 3


def test_who_was_taken_for_dead_may_hear_of_it_late() -> None:
    assert check_held_once([held("a", 1, 7, "lost"), held("b", 5, 9)]) == 2


@pytest.mark.parametrize("ended", ["given back", "killed", "stopped", "not yet"])
def test_two_at_once_are_found(ended: str) -> None:
    with pytest.raises(AssertionError, match=r"numbers-0 was assigned to b at 5\.000 s, and a had it from 1\.000"):
        check_held_once([held("a", 1, 5.001, ended), held("b", 5, 9)])


def test_two_at_once_are_found_behind_who_was_lost() -> None:
    with pytest.raises(AssertionError, match="assigned to c"):
        check_held_once([held("a", 1, 9), held("b", 0, 20, "lost"), held("c", 5, 12)])
