"""How long one attempt may take, and whether it is still worth trying."""

from __future__ import annotations

import time

import anyio

from streamflow.errors import RetriableError
from streamflow.log.kafka.client import backoff_s

_LEAST_WAIT_S = 0.001
_FIRST_S, _CAP_S = 0.02, 0.2
_BRIEF_S, _BRIEF_CAP_S, _BRIEF_TIMES = 0.002, 0.006, 20


class Attempt:
    """A bound that several requests share, and a mark that the first failure sets, so that the others stop trying.

    Each runs in `with attempt:`; to leave it by an exception loses the attempt for all.

    Args:
        timeout_s: How long from now.

    Attributes:
        lost: It cannot succeed any more; what is under way is waited for, and nothing is tried again.
    """

    __slots__ = ("_deadline", "lost")

    def __init__(self, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s
        self.lost = False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        self.lost |= kind is not None

    def remaining_s(self) -> float:
        """Seconds left, at least a millisecond: a wait that ends at once is one that says why."""
        return max(self._deadline - time.monotonic(), _LEAST_WAIT_S)

    async def pause(self, failures: int, error: RetriableError, *, brief: bool = False) -> None:
        """Wait before trying again.

        Args:
            failures: How many in a row, >= 1.
            error: The last one.
            brief: It is about something that takes milliseconds as a rule, such as a transaction that is ending.

        Raises:
            RetriableError: `error`, when the time is over or the attempt is lost.
        """
        first_s, cap_s = (_BRIEF_S, _BRIEF_CAP_S) if brief and failures <= _BRIEF_TIMES else (_FIRST_S, _CAP_S)
        wait = backoff_s(failures, first_s=first_s, cap_s=cap_s)
        if self.lost or time.monotonic() + wait > self._deadline:
            raise error
        await anyio.sleep(wait)
