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
    """

    told: bytes = b""
    unread: list[str] = []


_Data = TypeVar("_Data", Spoken, Answer)


def write(data: Spoken | Answer) -> bytes:
    """Encode it."""
    return _VERSION + msgspec.msgpack.encode(data)


def read_spoken(data: bytes) -> Spoken | None:
    """Decode the user data of a subscription; None is what a worker says that knows of none."""
    return _read(data, Spoken)


def read_answer(data: bytes) -> Answer:
    """Decode the user data of an assignment, whatever the leader's version."""
    answer = _read(data, Answer)
    if answer is None:
        is_lines = data[:1] >= b"-"  # names begin with a letter, a digit, `.`, `_` or `-`; versions are lower
        answer = Answer(unread=data.decode().split() if is_lines else [])
    return answer


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


def _read(data: bytes, kind: type[_Data]) -> _Data | None:
    if data[:1] != _VERSION:
        return None
    try:
        return msgspec.msgpack.decode(data[1:], type=kind)
    except msgspec.DecodeError:
        return None
