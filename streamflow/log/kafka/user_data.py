"""What travels in the user data of subscriptions and assignments: a version byte, then MessagePack by field name.

Fields that are not known are passed over, missing ones have their defaults, so that the version byte changes only when
that does not do. Workers before this wrote nothing into a subscription, and into an assignment the topics that nobody
reads, a name a line: such data is read, and who wrote the one is answered with the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

_VERSION = b"\x01"
"""No topic name begins with it: that tells it from the lines of before."""


class Spoken(msgspec.Struct, omit_defaults=True, frozen=True):
    """What a member says beside its subscription.

    Attributes:
        says: The app's own words.
    """

    says: bytes = b""


class Answer(msgspec.Struct, omit_defaults=True, frozen=True):
    """What the leader tells a member beside its partitions.

    Attributes:
        told: The app's own words.
        unread: Topics that nobody reads.
        withheld: Whether it was not given all that it claimed: it has to join again, once it gave that up.
        topics: Checksum of the topics that it subscribed to then: a static member may have come back with others.
        counts: To the leader: partitions per topic that this is made of.
    """

    told: bytes = b""
    unread: list[str] = []
    withheld: bool = False
    topics: int = 0
    counts: dict[str, int] = {}


_Data = TypeVar("_Data", Spoken, Answer)


def write(data: Spoken | Answer) -> bytes:
    """Encode it."""
    return _VERSION + msgspec.msgpack.encode(data)


def read_spoken(data: bytes) -> Spoken | None:
    """Decode the user data of a subscription; None is what a worker says that knows of none."""
    return _read(data, Spoken)


def read_answer(data: bytes) -> Answer | None:
    """Decode the user data of an assignment; None is what a leader wrote that knows of none, or took us for one."""
    return _read(data, Answer)


def write_answer(answer: Answer, spoken: Spoken | None) -> bytes:
    """Encode what one member is told, as it can read it.

    Args:
        answer: What it is told.
        spoken: What it said.
    """
    return old_lines(answer.unread) if spoken is None else write(answer)


def old_lines(unread: Sequence[str]) -> bytes:
    """The topics that nobody reads, as workers of before wrote and read them."""
    return "\n".join(unread).encode()


def read_old_lines(data: bytes) -> list[str]:
    """The topics that nobody reads, as a leader of before wrote them; none where it is something else."""
    is_lines = data[:1] >= b"-"  # names begin with a letter, a digit, `.`, `_` or `-`; versions are lower
    return data.decode().split() if is_lines else []


def _read(data: bytes, kind: type[_Data]) -> _Data | None:
    if data[:1] != _VERSION:
        return None
    try:
        return msgspec.msgpack.decode(data[1:], type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
