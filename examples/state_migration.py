"""State migration: the type of a table's values changes from version to version of an app, and no value is lost.

The program plays three versions of one app, each a worker on the log and the state of the one before.

1.  counts the visits of people, with their names as they typed them;
2.  has one more field: it has a default, so old values are read as they are, and written anew when they change;
3.  has another shape, which old values do not fit. It has a new table, and moves each value over in the turn that
    first needs it. Both tables are in one commit with everything else of that record, so a person is in one of the two
    at any moment, whatever crashes. What nobody asks for stays in the old table, and can be read there.

    python examples/state_migration.py

A version that cannot read a stored value does not guess: the record fails with an error that names table and key.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

import streamflow as sf


class Visitor1(msgspec.Struct):
    name: str
    visits: int = 0


class Visitor2(msgspec.Struct):
    name: str
    visits: int = 0
    country: str = "unknown"  # a new field needs a default, for the values that do not have it


class Visitor3(msgspec.Struct):
    first: str
    last: str
    visits: int
    country: str


class Visit(msgspec.Struct):
    name: str
    country: str


class Version:
    """An app as it was at some time; the real one is a file that changes, with these lines at its top level."""

    def __init__(self, data_dir: str) -> None:
        self.app = sf.App("visitors", data_dir=data_dir)
        self.visits = self.app.topic("visits", key_type=str, value_type=Visit)
        self.tables: Mapping[str, sf.Table[str, Any]] = {}

    async def run(self, agent: sf.Agent[Any, Visit, Any], *visits: tuple[str, Visit]) -> None:
        """Work on some visits, and print what the tables have then."""
        async with self.app.running():
            for user, visit in visits:
                await agent.ask(visit, key=user, timeout_s=20)
            for name, table in self.tables.items():
                for user, value in sorted(table.items()):
                    print(f"  {name:<10}{user:<5}{value}")


async def version_1(data_dir: str, *visits: tuple[str, Visit]) -> None:
    version = Version(data_dir)
    visitors = version.app.table("visitors", key_type=str, value_type=Visitor1)
    version.tables = {"visitors": visitors}

    @version.app.agent(version.visits)
    async def count(stream: sf.Stream[Visit, str]) -> AsyncIterator[int]:
        async for user, visit in stream.items():
            visitor = visitors.setdefault(user, Visitor1(visit.name))
            visitor.visits += 1
            yield visitor.visits

    await version.run(count, *visits)


async def version_2(data_dir: str, *visits: tuple[str, Visit]) -> None:
    version = Version(data_dir)
    visitors = version.app.table("visitors", key_type=str, value_type=Visitor2)
    version.tables = {"visitors": visitors}

    @version.app.agent(version.visits)
    async def count(stream: sf.Stream[Visit, str]) -> AsyncIterator[int]:
        async for user, visit in stream.items():
            visitor = visitors.setdefault(user, Visitor2(visit.name))
            visitor.visits += 1
            visitor.country = visit.country
            yield visitor.visits

    await version.run(count, *visits)


async def version_3(data_dir: str, *visits: tuple[str, Visit]) -> None:
    version = Version(data_dir)
    old = version.app.table("visitors", key_type=str, value_type=Visitor2)
    people = version.app.table("people", key_type=str, value_type=Visitor3)
    version.tables = {"visitors": old, "people": people}

    @version.app.agent(version.visits)
    async def count(stream: sf.Stream[Visit, str]) -> AsyncIterator[int]:
        async for user, visit in stream.items():
            if user not in people:
                people[user] = moved(old.pop(user, Visitor2(visit.name)))
            people[user].visits += 1
            people[user].country = visit.country
            yield people[user].visits

    await version.run(count, *visits)


def moved(visitor: Visitor2) -> Visitor3:
    """The value in its new shape."""
    first, _, last = visitor.name.partition(" ")
    return Visitor3(first, last, visitor.visits, visitor.country)


async def main() -> None:
    ann, bob = ("ann", Visit("Ann Lee", "KR")), ("bob", Visit("Bob van Dyk", "NL"))
    with tempfile.TemporaryDirectory(prefix="streamflow-migration-") as data_dir:
        print("version 1")
        await version_1(data_dir, ann, ann, bob)
        print("version 2 has one more field")
        await version_2(data_dir, ann)
        print("version 3 has another shape")
        await version_3(data_dir, ann)


if __name__ == "__main__":
    asyncio.run(main())
