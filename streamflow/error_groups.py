"""What went wrong inside exception groups: the shape of the task groups around an error is nobody's business.

One rule for all: one error comes out as itself. Of several the most important one comes out, with the others as its
notes (`BaseException.__notes__`), so that an `except` clause always meets a plain exception and nothing is lost. The
most important one is what is no `Exception` (Ctrl-C, `SystemExit`); else the block's own, where the caller says which
that is; else StreamFlow's first, as it says what to do; else the first. A cancellation beside an error comes last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from streamflow.errors import StreamFlowError


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The plain exceptions of a group, in its order; of a plain exception, itself.

    Args:
        error: Any exception.
    """
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def main_error(error: BaseException, own: BaseException | None = None) -> BaseException:
    """The one to raise, with the others as its notes.

    Args:
        error: Any exception.
        own: What the caller's block raised itself; it may be a group, too.
    """
    found = list(dict.fromkeys(leaves(error)))
    mine = set() if own is None else set(leaves(own))
    main = min(found, key=lambda each: _rank(each, mine))
    for other in found:
        if other is not main:
            note = f"and also: {type(other).__name__}: {other}"
            if note not in getattr(main, "__notes__", ()):
                main.add_note(note)
    return main


@contextmanager
def one_error() -> Generator[None]:
    """Replace an exception group by its `main_error`, whose traceback stays whole."""
    try:
        yield
    except BaseExceptionGroup as group:
        main = main_error(group)
        raise main from main.__cause__


def _rank(error: BaseException, own: set[BaseException]) -> int:
    if isinstance(error, asyncio.CancelledError):
        return 4
    if not isinstance(error, Exception):
        return 0
    if error in own:
        return 1
    return 2 if isinstance(error, StreamFlowError) else 3
