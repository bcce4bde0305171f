"""Where every worker is when one of them hangs: `SIGUSR1` makes it write the stacks of its threads and of its tasks."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence

from tests.system.harness import Worker

TELL_STACKS = """
import faulthandler
import gc
import inspect
import signal
import sys

def awaited(coroutine):
    while coroutine is not None:
        inner = None
        for kind in ("cr", "ag", "gi"):
            frame = getattr(coroutine, kind + "_frame", None)
            if frame is not None:
                yield f"    {frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
                driven = next(filter(inspect.iscoroutine, frame.f_locals.values()), None)
                inner = getattr(coroutine, kind + ("_yieldfrom" if kind == "gi" else "_await")) or driven
        coroutine = inner

def tell_stacks(*_):
    for task in (each for each in gc.get_objects() if isinstance(each, asyncio.Task)):
        if not task.done():
            print(f"task {task.get_name()}", *awaited(task.get_coro()), sep="\\n", file=sys.stderr)
    print("end of the tasks", file=sys.stderr, flush=True)

signal.signal(signal.SIGUSR1, tell_stacks)
faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)
"""
"""A part of the app: its threads tell at once, its tasks when the main thread runs Python again."""
_WITHIN_S = 10.0
_LINES = 60
_DONE = "end of the tasks"


@contextlib.contextmanager
def telling_stacks(workers: Sequence[Worker]) -> Iterator[None]:
    """What fails in the block, a time-out above all, is raised with what workers said and the stacks of those that run.

    Args:
        workers: Looked at when it fails.
    """
    try:
        yield
    except BaseException as error:  # a time-out of pytest's, too
        for worker in workers:
            state = "runs" if worker.runs else "has ended"
            error.add_note(f"--- the worker with pid {worker.pid} {state}; last it said:\n{_tail(worker.said)}")
        error.add_note(stacks_of([worker for worker in workers if worker.runs]))
        raise


def _tail(said: str) -> str:
    return "\n".join(said.splitlines()[-_LINES:])


def stacks_of(workers: Sequence[Worker]) -> str:
    """The stacks of all threads and tasks of workers, as text; who does not answer is said to."""
    before = [len(worker.said_as_errors) for worker in workers]
    for worker in workers:
        worker.signal(signal.SIGUSR1)
        worker.signal(signal.SIGCONT)
    deadline = time.monotonic() + _WITHIN_S
    while time.monotonic() < deadline and not all(_DONE in each.said_as_errors for each in workers):
        time.sleep(0.05)
    return "\n".join(
        f"--- stacks of the worker with pid {worker.pid}:\n{worker.said_as_errors[start:]}"
        for worker, start in zip(workers, before, strict=True)
    )
