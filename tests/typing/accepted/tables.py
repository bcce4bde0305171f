"""Tables and set tables as they are meant to be used: both checkers must accept every line."""

from collections.abc import Iterator
from typing import assert_type

import msgspec

import streamflow as sf


class Total(msgspec.Struct):
    user: str
    total: float


app = sf.App("tables")
orders = app.topic("orders", key_type=str, value_type=float)
totals = app.table("totals", key_type=str, value_type=float, default=float)
structs = app.table("structs", key_type=tuple[str, int], value_type=Total, ttl_s=60)
days = app.table("days", key_type=tuple[str, int], value_type=float, partition_by=lambda key: key[0].lower())
lists = app.table("lists", key_type=int, value_type=list[int], default=list)
tags = app.set_table("tags", key_type=str, member_type=int)
seen = app.set_table("seen", key_type=tuple[str, int], member_type=int, partition_by=lambda key: key[0].lower())

assert_type(totals, sf.Table[str, float])
assert_type(structs, sf.Table[tuple[str, int], Total])
assert_type(lists, sf.Table[int, list[int]])
assert_type(tags, sf.SetTable[str, int])


@app.agent(orders, tables=[totals, structs, lists, tags])
async def total(stream: sf.Stream[float, str]) -> None:
    async for user, amount in stream.items():
        totals[user] += amount
        assert_type(totals[user], float)
        assert_type(totals.get(user), float | None)
        assert_type(totals.get(user, 0.0), float)
        assert_type(totals.get(user, "none"), float | str)
        totals.update({user: 1.0})
        assert_type(totals.pop(user), float)
        assert_type(totals.pop(user, None), float | None)
        assert_type(totals.setdefault(user, 2.0), float)
        structs[user, 1] = Total(user, amount)
        structs[user, 1].total += amount
        lists[1].append(2)
        del totals[user]
        tags[user].add(3)
        tags[user].update([1, 2], {3})
        tags[user].discard(3)
        tags[user] |= {4}
        if user in tags and 4 in tags[user]:
            del tags[user]
        for member in tags[user]:
            assert_type(member, int)
        for key in tags:
            assert_type(key, str)
        for key, members in tags.items():
            assert_type(key, str)
            members.add(3)
        found = tags.get(user)
        if found is not None:
            found.add(3)
        for members in tags.values():
            members.discard(4)
        if tags.get(user, frozenset[int]()) & {3}:
            del tags[user]
        for key, value in totals.scan("a", "b", reverse=True):
            assert_type(key, str)
            assert_type(value, float)
        for pair, struct in structs.scan(prefix=("a",)):
            assert_type(pair, tuple[str, int])
            assert_type(struct, Total)


def everything() -> Iterator[tuple[str, float]]:
    yield from totals.items()


def migrated(key: str, value: float) -> float | None:
    return value * 2 if key else None


@app.task
async def elsewhere() -> None:
    assert_type(await totals.update_async("a", lambda value: (value or 0.0) + 1), float | None)
    await tags.update_async("a", lambda members: members.add(1))
    assert_type(await totals.get_remote("a"), float | None)
    assert_type(await totals.get_remote("a", 0.0, timeout_s=1), float)
    assert_type(await totals.get_remote("a", "none", stale_ok=True, at=totals.position("a")), float | str)
    async for key, total in totals.scan_remote(prefix="a"):
        assert_type(key, str)
        assert_type(total, float)
    assert_type(await tags.get_remote("a"), set[int])
    done = await app.visit(totals, migrated)
    assert_type(done.partitions, frozenset[int])
    assert_type(done.keys, int)
    await app.visit(tags.pairs, lambda pair, _: None)


users = app.topic("users", key_type=str, value_type=Total, compacting=True)
people = app.table("people", source=users)
prices = app.global_table("prices", key_type=int, value_type=float)
named = app.global_table("named", source=users, help="by name")


@app.task
async def filled() -> None:
    assert_type(people["a"], Total)
    assert_type(prices[1], float)
    assert_type(prices.get(1), float | None)
    assert_type(named.get("a", 3), Total | int)
    for key, value in named.scan(prefix="a"):
        assert_type(key, str)
        assert_type(value, Total)
    assert_type(list(prices), list[int])
    assert_type(prices.lag, int)
    await prices.caught_up(timeout_s=3)
    await prices.source.send(key=1, value=2.0)


@app.authorize_reads
async def allowed(read: sf.TableRead) -> bool:
    return "authorization" in read.headers
