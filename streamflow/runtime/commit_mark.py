"""What a commit writes beside an offset: which commit it was, and how far the task's changelogs were in it.

It stands in the metadata of one committed offset per task, the anchor's (its first source partition). Comparing commit
ids, never offsets, tells whether a commit whose outcome is unknown was made, and whether another worker has had the
task in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from uuid import uuid4

import msgspec

from streamflow.errors import TopologyError
from streamflow.log.api import OffsetMark
from streamflow.model.record import TopicPartition

MAX_METADATA_BYTES = 4096
"""Kafka's `offset.metadata.max.bytes`."""


_SHORT = {"id": "c", "changelogs": "l", "times": "t", "incarnations": "i", "serializers": "s"}
_LETTERS = {"int": "i", "float": "f", "str": "s", "raw": "r", "json": "j", "msgpack": "m"}
_NAMES = {letter: name for name, letter in _LETTERS.items()}
_OWN = "c"


class CommitMark(msgspec.Struct, frozen=True, omit_defaults=True, rename=_SHORT):
    """One task's part of a commit.

    Attributes:
        id: Random, one per commit; empty where there is none.
        changelogs: By table: the changelog offset up to which records are committed; what lies behind it is not. None
            where the log commits both together, so that everything it shows is committed.
        times: By table: stream time, where values expire.
        incarnations: By table: the beginning of its changelog's topic id. One that was deleted and made anew has
            another, and does not hold what the offset stands for.
        serializers: By table: a letter each for how its values and its keys are written. A Long reads as a Double, and
            is another number.
    """

    id: str = ""
    changelogs: Mapping[str, int] | None = None
    times: Mapping[str, int] = {}
    incarnations: Mapping[str, str] = {}
    serializers: Mapping[str, str] = {}

    def metadata(self) -> str:
        """The mark as an offset's metadata.

        Raises:
            TopologyError: It has more tables than fit.
        """
        text = _encode(self).decode()
        if len(text) > MAX_METADATA_BYTES:
            raise TopologyError(
                f"a task's tables are too many: what is written beside its offset takes {len(text):,} bytes, and "
                f"{MAX_METADATA_BYTES:,} fit. Let agents that need not share tables read topics of their own"
            )
        return text

    @classmethod
    def of_task(cls, marks: Mapping[TopicPartition, OffsetMark | None]) -> CommitMark | None:
        """The mark of a task; None where nothing of it is committed.

        It is the anchor's. A task whose sources have changed since may find its mark with another partition.

        Args:
            marks: What is committed, by source partition.
        """
        found = [cls.of(marks[tp]) for tp in sorted(marks) if marks[tp] is not None]
        return next((mark for mark in found if mark.id), found[0] if found else None)

    @classmethod
    def of(cls, mark: OffsetMark | None) -> CommitMark:
        """Read a committed offset's metadata; an empty mark where something else wrote it, or nobody."""
        if mark is None or not mark.metadata.startswith("{"):
            return cls()
        try:
            return _decode(mark.metadata)
        except msgspec.MsgspecError:
            return cls()


_encode = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder(CommitMark).decode


def check_mark(tables: Iterable[str], expiring: Iterable[str]) -> None:
    """Make sure that the mark of a task with these tables always fits, however far its changelogs come.

    Args:
        tables: Names of its tables.
        expiring: Names of those whose values expire.

    Raises:
        TopologyError: It may not.
    """
    names = list(tables)
    far, late, topic_id = 10**15, 10**14, "0" * 8
    CommitMark(
        new_commit_id(),
        dict.fromkeys(names, far),
        dict.fromkeys(expiring, late),
        dict.fromkeys(names, topic_id),
        dict.fromkeys(names, "cc"),
    ).metadata()


def letters_of(value_serializer: str, key_serializer: str) -> str:
    """How the records of a changelog are written, as a mark says it; all serializers of users' are one."""
    return _LETTERS.get(value_serializer, _OWN) + _LETTERS.get(key_serializer, _OWN)


def other_serializer(before: str, now: str) -> str | None:
    """What differs between two of `letters_of`, in words; None where nothing does."""
    for part, old, new in zip(("values", "keys"), before, now, strict=False):
        if old != new:
            names = [_NAMES.get(letter, "a serializer of your own") for letter in (old, new)]
            return f"its {part} were written by {names[0]}, and its type of today is written by {names[1]}"
    return None


def refuse_other_serializers(where: str, serializers: Mapping[str, str], mark: CommitMark) -> None:
    """The bytes of one type may well decode as another one, and are another value then.

    Args:
        where: What reads them, for the error.
        serializers: By table: `letters_of` its types of today.
        mark: The last commit's; one without letters refuses nothing.

    Raises:
        TopologyError: A table was written by other serializers.
    """
    for name, letters in serializers.items():
        difference = other_serializer(mark.serializers.get(name, letters), letters)
        if difference is not None:
            raise TopologyError(
                f"{where}: table {name!r}: {difference}: read so they would be others. Give the type back; or let "
                "the new type have a table of its own; or, while no worker runs, `streamflow table export` under the "
                "old type, change the lines, and `streamflow table import --replace` under the new one"
            )


def new_commit_id() -> str:
    """An id that no other commit has."""
    return uuid4().hex


def anchor_of(partitions: Iterable[TopicPartition]) -> TopicPartition:
    """The source partition of a task that carries its commit mark."""
    return min(partitions)
