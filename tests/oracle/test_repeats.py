"""What explains a repeat, and what does not: a check that takes everything proves nothing."""

from __future__ import annotations

import pytest

from tests.oracle.repeats import Rewind, Window, check_repeats

PLACE = ("out", 0)


def window(committed: int, made: int, times: int = 1) -> Window:
    return Window("kill", {0: committed}, {PLACE: made}, times)


def rewind(back_to: int, until: int) -> Rewind:
    return Rewind(*PLACE, back_to, until)


@pytest.mark.parametrize(
    ("rewinds", "windows"),
    [
        ([rewind(10, 30)], [window(10, 30)]),
        ([rewind(12, 20), rewind(60, 70)], [window(10, 30), window(50, 70)]),
        ([rewind(10, 30), rewind(10, 30)], [window(10, 30), window(5, 40)]),
        ([rewind(10, 30), rewind(15, 25), rewind(28, 30)], [window(10, 30, times=2)]),
        ([], []),
    ],
)
def test_what_lies_between_committed_and_made_is_explained(rewinds: list[Rewind], windows: list[Window]) -> None:
    check_repeats(rewinds, windows)


@pytest.mark.parametrize(
    ("rewinds", "windows"),
    [
        ([rewind(10, 30)], []),
        ([rewind(9, 30)], [window(10, 30)]),
        ([rewind(10, 31)], [window(10, 30)]),
        ([rewind(10, 30), rewind(10, 30)], [window(10, 30)]),
        ([rewind(10, 30), rewind(15, 25), rewind(10, 30)], [window(10, 30, times=2)]),
        ([rewind(31, 49)], [window(10, 30), window(50, 70)]),
    ],
    ids=["no fault", "before it", "beyond it", "twice", "thrice", "in between"],
)
def test_more_than_a_fault_repeats_is_found(rewinds: list[Rewind], windows: list[Window]) -> None:
    with pytest.raises(AssertionError, match="and the windows are"):
        check_repeats(rewinds, windows)
