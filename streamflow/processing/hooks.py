"""What runs besides agents: timers, crontabs, tasks, and functions called when the worker starts or its work moves."""

from __future__ import annotations

import datetime
import difflib
import inspect
import math
import zoneinfo
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from cronsim import CronSim, CronSimError

from streamflow.errors import ConfigurationError
from streamflow.model.record import TopicPartition

Action: TypeAlias = Callable[[], object] | Callable[[], Awaitable[object]]
"""A function without arguments, sync or async."""

PartitionsAction: TypeAlias = (
    Callable[[set[TopicPartition]], object] | Callable[[set[TopicPartition]], Awaitable[object]]
)
"""A function of a set of partitions, sync or async."""

A = TypeVar("A", bound=Callable[[], object])
P = TypeVar("P", bound=Callable[[set[TopicPartition]], object])

_NO_ZONES = "no time zone database on this machine; install the package tzdata"


@dataclass(frozen=True, slots=True)
class Timer:
    """Runs every so often.

    Attributes:
        name: Its name.
        fn: The function.
        interval_s: Seconds from one start to the next.
        on_leader: Whether it runs in one worker only, its effects in the leader task's commit.
    """

    name: str
    fn: Action
    interval_s: float
    on_leader: bool = False


@dataclass(frozen=True, slots=True)
class Crontab:
    """Runs at times of the calendar.

    Attributes:
        name: Its name.
        fn: The function.
        expression: Five fields: minute, hour, day of month, month, day of week.
        timezone: IANA name of the zone the expression is in.
        on_leader: Whether it runs in one worker only.
    """

    name: str
    fn: Action
    expression: str
    timezone: str = "UTC"
    on_leader: bool = False

    def next_ms(self, after_ms: int) -> int:
        """The next time to run.

        Args:
            after_ms: Milliseconds since the epoch, UTC; the answer is later than this.

        Returns:
            Milliseconds since the epoch, UTC. Where clocks go forward, a time that does not exist moves on; where they
            go back, a time of day comes once (as in Debian's cron).
        """
        zone = zoneinfo.ZoneInfo(self.timezone)
        after = datetime.datetime.fromtimestamp(after_ms / 1000, zone)
        return round(next(CronSim(self.expression, after)).timestamp() * 1000)


@dataclass(frozen=True, slots=True)
class BackgroundTask:
    """Runs once, beside the agents, from the worker's start.

    Attributes:
        name: Its name.
        fn: The function.
        on_leader: Whether it runs in one worker only.
    """

    name: str
    fn: Action
    on_leader: bool = False


def checked_interval(interval_s: object) -> float:
    """A timer's interval.

    Raises:
        ConfigurationError: It is not a number of seconds above 0.
    """
    if callable(interval_s):
        raise ConfigurationError("@app.timer needs its interval in seconds: @app.timer(10.0)")
    if isinstance(interval_s, bool) or not isinstance(interval_s, int | float) or not 0 < interval_s < math.inf:
        raise ConfigurationError(f"@app.timer({interval_s!r}): seconds above 0, for example @app.timer(10.0)")
    return float(interval_s)


def check_crontab(expression: object, timezone: object) -> None:
    """Check a crontab's expression and time zone.

    Raises:
        ConfigurationError: One of them cannot be read; the message has an example.
    """
    example = "for example @app.crontab('0 20 * * *', timezone='Europe/Berlin')"
    if callable(expression):
        raise ConfigurationError(f"@app.crontab needs an expression: {example}")
    if not isinstance(expression, str):
        raise ConfigurationError(f"@app.crontab({expression!r}): an expression is a string, {example}")
    if not isinstance(timezone, str):
        raise ConfigurationError(f"@app.crontab(timezone={timezone!r}): an IANA name, {example}")
    try:
        zone = zoneinfo.ZoneInfo(timezone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as exc:
        known = zoneinfo.available_timezones()
        near = difflib.get_close_matches(timezone, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "give an IANA name" if known else _NO_ZONES
        raise ConfigurationError(f"@app.crontab(timezone={timezone!r}): not a time zone; {hint}; {example}") from exc
    try:
        next(CronSim(expression, datetime.datetime(2024, 1, 1, tzinfo=zone)))
    except StopIteration:
        raise ConfigurationError(f"@app.crontab({expression!r}): such a time never comes; {example}") from None
    except CronSimError as exc:
        raise ConfigurationError(
            f"@app.crontab({expression!r}): {exc}: five fields are minute, hour, day of month, month, day of week; "
            f"{example}"
        ) from exc


def check_action(fn: object, decorator: str, argument: str = "") -> None:
    """Refuse a function that cannot be called as `fn()`, or `fn(argument)`.

    Args:
        fn: The function.
        decorator: How it is written, for the error: `@app.timer(...)`.
        argument: Name of the one argument it is called with; empty for none.

    Raises:
        ConfigurationError: It is not a function, a generator, or takes other arguments.
    """
    name = getattr(fn, "__name__", "refresh")
    example = f"async def {name}({argument}): ..."
    if not callable(fn) or isinstance(fn, type):
        raise ConfigurationError(f"{decorator}: it decorates a function, not {fn!r}: {example}")
    inner: Any = inspect.unwrap(fn)
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise ConfigurationError(f"{decorator}: {name} must not yield; send what it makes: await topic.send(value=...)")
    try:
        inspect.signature(fn).bind(*([object()] if argument else []))
    except TypeError as exc:
        takes = f"one argument, {argument}" if argument else "no argument"
        raise ConfigurationError(f"{decorator}: {name} is called with {takes} ({exc}): {example}") from exc
