"""Where in the user's code something was declared, for errors that name two places."""

from __future__ import annotations

import sys
from types import FrameType

_PACKAGE = __name__.partition(".")[0]


def calling_frame() -> FrameType | None:
    """The innermost frame that is not StreamFlow's own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    return frame


def _is_ours(frame: FrameType) -> bool:
    module: str = frame.f_globals.get("__name__", "")
    is_generated = frame.f_code.co_filename == "<string>" and module != "__main__"  # a dataclass's __init__
    return is_generated or module.partition(".")[0] == _PACKAGE


def place_in(error: BaseException) -> str:
    """`file:line` of the user's innermost frame in a traceback; empty where there is none."""
    found, traceback = "", error.__traceback__
    while traceback is not None:
        if not _is_ours(traceback.tb_frame):
            found = f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found


def place_of_yield(results: object) -> str:
    """`file:line` of the `yield` at which an asynchronous generator stands; empty where it has ended."""
    frame: FrameType | None = getattr(results, "ag_frame", None)
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def place_of_call() -> str:
    """`file:line` of the user's call."""
    frame = calling_frame()
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
