"""One error comes out as itself; of several the most important one, with the others as its notes."""

import asyncio

import pytest

from streamflow.error_groups import leaves, main_error, one_error
from streamflow.errors import FatalError, LogUnavailableError

OURS, THEIRS, OTHER = FatalError("ours"), ValueError("theirs"), KeyError("other")


@pytest.fixture(autouse=True)
def without_notes():
    for error in (OURS, THEIRS, OTHER):
        if hasattr(error, "__notes__"):
            del error.__notes__


def group(*errors):
    return BaseExceptionGroup("g", errors)


def test_leaves_are_in_order_however_deep():
    assert list(leaves(group(THEIRS, group(group(OURS), OTHER)))) == [THEIRS, OURS, OTHER]
    assert list(leaves(OURS)) == [OURS]


def test_one_error_is_itself_and_has_no_notes():
    for shape in (OURS, group(OURS), group(group(OURS), OURS)):
        assert main_error(shape) is OURS
        assert not hasattr(OURS, "__notes__")


@pytest.mark.parametrize(
    ("errors", "own", "main"),
    [
        ([THEIRS, OTHER], None, THEIRS),
        ([THEIRS, OURS, OTHER], None, OURS),
        ([OURS, LogUnavailableError("later")], None, OURS),
        ([OURS, THEIRS, OTHER], OTHER, OTHER),
        ([OURS, THEIRS], group(THEIRS), THEIRS),
    ],
)
def test_of_several_the_most_important_comes_out(errors, own, main):
    assert main_error(group(*errors), own) is main
    assert len(main.__notes__) == len(errors) - 1
    for other in errors:
        assert other is main or f"and also: {type(other).__name__}: {other}" in main.__notes__


def test_ctrl_c_comes_before_all():
    stop = KeyboardInterrupt()
    assert main_error(group(OURS, THEIRS, stop), OURS) is stop


def test_a_cancellation_comes_after_all():
    cancelled = asyncio.CancelledError()
    assert main_error(group(cancelled, THEIRS), cancelled) is THEIRS
    assert main_error(group(cancelled), cancelled) is cancelled


def test_unwrapped_twice_says_it_once():
    for _ in range(2):
        main_error(group(OURS, THEIRS))
    assert OURS.__notes__ == ["and also: ValueError: theirs"]


def test_a_block_raises_the_main_error_with_its_own_cause():
    cause = OSError("why")
    error = FatalError("consequence")
    error.__cause__ = cause
    with pytest.raises(FatalError) as caught, one_error():
        raise group(group(THEIRS, error))
    assert caught.value is error
    assert error.__cause__ is cause
    assert error.__notes__ == ["and also: ValueError: theirs"]
