"""What happens to a record that fails: `on_error=` of an agent.

The same policy takes a record that does not decode, one on which the agent raises, and one whose output cannot be
written.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeAlias

from streamflow.errors import ConfigurationError
from streamflow.keywords import known_keywords
from streamflow.processing.topic import Topic, is_number, is_whole


@known_keywords("sf.Stop(...)")
@dataclass(frozen=True, slots=True)
class Stop:
    """Stop the worker with exit code 1; nothing is committed past the record, so it comes again after a restart."""


@known_keywords("sf.Skip(...)")
@dataclass(frozen=True, slots=True)
class Skip:
    """Log and count the record, and go on behind it."""


@known_keywords("sf.DeadLetter(...)")
@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Copy the raw record to a topic, with its cause in the headers, in the same commit, and go on behind it.

    Args:
        topic: Any topic of the app. The record's bytes are copied as they are, so the topic's types do not matter;
            leave them out (`app.topic("orders-dead")`).
    """

    topic: Topic[Any, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.topic, Topic):
            raise ConfigurationError(
                f"DeadLetter({self.topic!r}): give a declared topic: sf.DeadLetter(app.topic('orders-dead'))"
            )


@known_keywords("sf.Retry(...)")
@dataclass(frozen=True, slots=True)
class Retry:
    """Try the record again, holding its partition (order is kept; other partitions go on).

    Args:
        times: Attempts after the first one, >= 1.
        backoff_s: Seconds before the first of them, >= 0, default 0.1; doubled each time.
        max_backoff_s: Longest pause in seconds, default 30.
        then: What happens when all of them failed, default `Stop()`.
    """

    times: int
    _: KW_ONLY
    backoff_s: float = 0.1
    max_backoff_s: float = 30.0
    then: Stop | Skip | DeadLetter = field(default_factory=Stop)

    def __post_init__(self) -> None:
        if not is_whole(self.times, least=1):
            raise ConfigurationError(f"Retry({self.times!r}): times is how often to try again, at least 1")
        for name, least in (("backoff_s", 0.0), ("max_backoff_s", self.backoff_s)):
            value = getattr(self, name)
            if not is_number(value) or not least <= value < math.inf:
                raise ConfigurationError(f"Retry({name}={value!r}): seconds, at least {least:g}")
        if isinstance(self.then, Retry):
            raise ConfigurationError("Retry(then=Retry(...)): one Retry is enough, raise its `times`")
        check_policy(self.then, "Retry(then=...)")

    def delay_s(self, attempt: int) -> float:
        """Seconds to wait before an attempt.

        Args:
            attempt: 1 for the first attempt after the failed one.
        """
        return float(min(self.max_backoff_s, self.backoff_s * 2.0 ** min(attempt - 1, 64)))


ErrorPolicy: TypeAlias = Stop | Skip | Retry | DeadLetter

_POLICIES = (Stop, Skip, Retry, DeadLetter)


def check_policy(policy: object, where: str) -> None:
    """Refuse what is not a policy.

    Args:
        policy: What was given.
        where: Beginning of the error message.

    Raises:
        ConfigurationError: It is a class instead of an instance, or something else.
    """
    if isinstance(policy, _POLICIES):
        return
    if isinstance(policy, type) and issubclass(policy, _POLICIES):
        name = policy.__name__
        arguments = {"Retry": "3", "DeadLetter": "topic"}.get(name, "")
        raise ConfigurationError(f"{where}: write sf.{name}({arguments}), not the class sf.{name}")
    raise ConfigurationError(
        f"{where}: {policy!r} is no error policy; there are sf.Stop(), sf.Skip(), sf.Retry(times) and "
        "sf.DeadLetter(topic)"
    )


def policy_text(policy: ErrorPolicy) -> str:
    """A policy as a user would write it, for the topology and error messages."""
    if isinstance(policy, DeadLetter):
        return f"DeadLetter({policy.topic.name})"
    if isinstance(policy, Retry):
        return f"Retry({policy.times}, then={policy_text(policy.then)})"
    return f"{type(policy).__name__}()"


def dead_letter_topic(policy: ErrorPolicy) -> Topic[Any, Any] | None:
    """The topic a policy may write to, or None."""
    last = policy.then if isinstance(policy, Retry) else policy
    return last.topic if isinstance(last, DeadLetter) else None
