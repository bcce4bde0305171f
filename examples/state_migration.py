"""State migration: the type of a table's values changes from version to version of an app, and no value is lost.

The program plays three versions of one app, each a worker on the log and the state of the one before.

1.  counts the visits of people, with their names as they typed them;
2.  wants first and last name apart. It has both as new fields, with defaults, so that old values are read as they are.
    `app.visit` fills them in for every key there is, also for people who never come again;
3.  has no field `name` any more: after the visit nothing needs it.

Between the second and the third version all partitions have to be visited. A version that cannot read a stored value
does not guess: the record fails with an error that names table and key.

    python examples/state_migration.py
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import msgspec

import streamflow as sf

V = TypeVar("V")


class Visitor1(msgspec.Struct):
    name: str
    visits: int = 0


class Visitor2(msgspec.Struct):
    name: str
    visits: int = 0
    first: str = ""  # a new field needs a default, for the values that do not have it
    last: str = ""


class Visitor3(msgspec.Struct):
    first: str
    last: str
    visits: int = 0


def split(name: str) -> tuple[str, str]:
    first, _, last = name.partition(" ")
    return first, last


class Version:
    """An app as it was at some time; the real one is a file that changes, with these lines at its top level."""

    def __init__(self, data_dir: str, value_type: type[V], new: Callable[[str], V]) -> None:
        self.app = sf.App("visitors", data_dir=data_dir)
        self.visits = self.app.topic("visits", key_type=str, value_type=str)
        self.visitors: sf.Table[str, Any] = self.app.table("visitors", key_type=str, value_type=value_type)
        visitors = self.visitors

        @self.app.agent(self.visits)
        async def count(stream: sf.Stream[str, str]) -> AsyncIterator[int]:
            async for user, name in stream.items():
                visitor = visitors.setdefault(user, new(name))
                visitor.visits += 1
                yield visitor.visits

        self.count = count

    async def work(self, *visits: tuple[str, str]) -> None:
        """Work on some visits, and print what the table has then."""
        for user, name in visits:
            await self.count.ask(name, key=user, timeout_s=20)
        for user, visitor in sorted(self.visitors.items()):
            print(f"  {user:<5}{visitor}")


def fill_in(user: str, visitor: Visitor2) -> None:
    """What the visit does with each value; changed in place, it is written."""
    if not visitor.first:  # a key may be visited twice, where its partition has moved
        visitor.first, visitor.last = split(visitor.name)


async def main() -> None:
    ann, bob = ("ann", "Ann Lee"), ("bob", "Bob van Dyk")
    with tempfile.TemporaryDirectory(prefix="streamflow-migration-") as data_dir:
        print("version 1")
        one = Version(data_dir, Visitor1, Visitor1)
        async with one.app.running():
            await one.work(ann, ann, bob)

        print("version 2 has new fields, and fills them in")
        two = Version(data_dir, Visitor2, lambda name: Visitor2(name, 0, *split(name)))
        async with two.app.running():
            done = await two.app.visit(two.visitors, fill_in)  # in a service: in a function with `@app.task`
            print(f"  visited {done.keys} keys, changed {done.written}")
            await two.work(ann)

        print("version 3 has no field for the whole name")
        three = Version(data_dir, Visitor3, lambda name: Visitor3(*split(name)))
        async with three.app.running():
            await three.work(ann)


if __name__ == "__main__":
    asyncio.run(main())
