"""Waiting for something that happens on a thread or after a stop was asked for, which no virtual clock moves."""

import asyncio
from collections.abc import Callable
from time import perf_counter


async def until(condition: Callable[[], object], *, within_s: float = 5.0) -> None:
    """Let the others run until the condition holds."""
    give_up_s = perf_counter() + within_s
    while not condition():
        assert perf_counter() < give_up_s, "it did not happen in time"
        await asyncio.sleep(0.0005)
