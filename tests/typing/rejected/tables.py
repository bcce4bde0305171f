"""Tables that are used wrongly. `# error` marks the lines that both checkers must refuse."""

import streamflow as sf

app = sf.App("tables")
totals = app.table("totals", key_type=str, value_type=float, default=float)
tags = app.set_table("tags", key_type=str, member_type=int)
prices = app.global_table("prices", key_type=int, value_type=float)
app.global_table("g", key_type=str)  # error: a value type
app.table("h", source="orders")  # error: a topic
app.table("a", key_type=str)  # error: a value type
app.table("b", key_type=str, value_type=3)  # error: a type
app.table("c", key_type=str, value_type=float, ttl=3)  # error: no such option
app.table("d", key_type=str, value_type=float, ttl_s="3")  # error: a number
app.table("i", key_type=tuple[str, int], value_type=float, partition_by=lambda key: key.user)  # error: it has no user
app.table("j", source=app.topic("k", key_type=str, value_type=int), partition_by=str.lower)  # error: it is a source's
app.set_table("e", key_type=str)  # error: a member type
app.set_table("f", key_type=str, value_type=int)  # error: it has members


def use() -> None:
    totals[1] = 2.0  # error: the key
    totals["a"] = "b"  # error: the value
    totals["a"] += "b"  # error: the value
    totals["a"].append(1)  # error: it is a number
    totals.setdefault("a", "b")  # error: the value
    totals.pop(3)  # error: the key
    tags[1].add(2)  # error: the key
    tags["a"].add("b")  # error: the member
    tags["a"].update(["b"])  # error: the members
    tags["a"] = 3  # error: a set


def renamed(key: str, value: float) -> str:
    return key


async def elsewhere() -> None:
    await totals.update_async("a", lambda value: "b")  # error: the value
    await totals.update_async(1, lambda value: 1.0)  # error: the key
    await app.visit(totals, renamed)  # error: the value
    await app.visit(tags, lambda key, members: None)  # error: its pairs


def filled() -> None:
    prices["a"]  # error: the key
    prices[1] = 2.0  # error: it is filled from its source
    del prices[1]  # error: likewise
    prices.pop(1)  # error: likewise
