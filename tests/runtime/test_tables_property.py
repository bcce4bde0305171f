"""Tables in running apps, held against plain dicts: a record that raises leaves no trace in any table or output."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamflow as sf
from streamflow.testing import TestApp

KEYS = ["a", "b", "c"]
Op = list[Any]


class Failure(Exception):
    """What the programs raise."""


class Model:
    """What the tables and the output should be."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.lists: dict[str, list[int]] = {}
        self.outputs: list[int] = []

    def copy(self) -> Model:
        copy = Model()
        copy.counts = dict(self.counts)
        copy.lists = {key: list(value) for key, value in self.lists.items()}
        copy.outputs = list(self.outputs)
        return copy

    def take(self, other: Model) -> None:
        self.counts, self.lists, self.outputs = other.counts, other.lists, other.outputs


def play(ops: list[Op], counts: Any, lists: Any, send: Any) -> bool:
    """Run a record's program on tables, or on dicts; returns whether the record may go on."""
    for name, key, n in ops:
        if name == "add":
            counts[key] = counts.get(key, 0) + n
        elif name == "append":
            lists.setdefault(key, []).append(n)
        elif name == "replace":
            lists[key] = [n]
        elif name == "delete":
            counts.pop(key, None)
            lists.pop(key, None)
        elif name == "clear":
            lists.clear()
        elif name == "sum":
            send(sum(counts.values()) + sum(map(sum, lists.values())) + len(lists))
        elif name == "send":
            send(counts.get(key, 0) + len(lists.get(key, [])))
        elif name == "raise":
            raise Failure
        elif name == "bad":  # a value that cannot be written, noticed at once
            counts[key] = "no number" if not isinstance(counts, dict) else fail()
        elif name == "worse":  # one that is noticed only when the turn ends
            value = lists.setdefault(key, [])
            value.append("no number" if not isinstance(lists, dict) else fail())
            return False
    return True


def fail() -> Any:
    raise Failure


OPS = st.tuples(
    st.sampled_from(
        ["add", "add", "append", "append", "replace", "delete", "clear", "sum", "send", "raise", "bad", "worse"]
    ),
    st.sampled_from(KEYS),
    st.integers(0, 9),
).map(list)
PROGRAMS = st.lists(st.lists(OPS, max_size=5), min_size=1, max_size=14)
POLICIES = ["skip", "retry", "letter"]


class Game:
    """One app with two tables, and what they should be."""

    def __init__(self, form: str, policy: str) -> None:
        app = self.app = sf.App("game", partitions=1)
        self.source = app.topic("source", key_type=str, value_type=list[Op])
        self.sink = app.topic("sink", key_type=str, value_type=int)
        letters = app.topic("letters")
        self.counts = counts = app.table("counts", key_type=str, value_type=int)
        self.lists = lists = app.table("lists", key_type=str, value_type=list[int])
        policies: dict[str, Any] = {
            "skip": sf.Skip(),
            "retry": sf.Retry(1, backoff_s=0.01, then=sf.Skip()),
            "letter": sf.DeadLetter(letters),
        }
        self.agents = 2 if form == "two" else 1
        options: dict[str, Any] = {"on_error": policies[policy], "tables": [counts, lists]}
        sink = self.sink

        async def generator(stream: sf.Stream[list[Op]]) -> AsyncIterator[int]:
            async for ops in stream:
                sent: list[int] = []
                if play(ops[: len(ops) // 2], counts, lists, sent.append):
                    await asyncio.sleep(0)
                    play(ops[len(ops) // 2 :], counts, lists, sent.append)
                for each in sent:
                    yield each

        def per_record(ops: list[Op]) -> None:
            play(ops, counts, lists, lambda n: sink.send_nowait(key="k", value=n))

        async def take(stream: sf.Stream[list[Op]]) -> None:
            async for unit in stream.take(3, within_s=0.5):
                for ops in unit:
                    if not play(ops, counts, lists, lambda n: sink.send_nowait(key="k", value=n)):
                        break
                    await asyncio.sleep(0)

        if form in ("generator", "two"):
            app.agent(self.source, sink=sink, **options)(generator)
        if form == "two":
            app.agent(self.source, sink=sink, name="second", **options)(generator)
        if form in ("per_record", "thread"):
            app.agent(self.source, thread=form == "thread", **options)(per_record)
        if form == "take":
            app.agent(self.source, **options)(take)
        self.model = Model()

    def expect(self, ops: list[Op]) -> None:
        """One record, by each agent in turn."""
        for _ in range(self.agents):
            attempt = self.model.copy()
            try:
                play(ops, attempt.counts, attempt.lists, attempt.outputs.append)
            except Failure:
                continue
            self.model.take(attempt)

    def check(self, test: TestApp) -> None:
        assert dict(self.counts.items()) == self.model.counts
        assert dict(self.lists.items()) == self.model.lists
        assert [event.value for event in test.records(self.sink)] == self.model.outputs
        for table in (self.counts, self.lists):
            fold: dict[str, Any] = {}
            for event in test.records(table.changelog):
                fold.pop(event.key, None)
                if event.value is not None:
                    fold[event.key] = event.value
            assert fold == dict(table.items())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", ["generator", "per_record", "thread", "two"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs=PROGRAMS, commits=st.sets(st.integers(0, 13)))
def test_tables_outputs_and_changelogs_are_what_the_good_records_made(form, policy, programs, commits):
    async def run() -> None:
        game = Game(form, policy)
        async with asyncio.timeout(20), TestApp(game.app) as test:
            for number, ops in enumerate(programs):
                await test.send(game.source, ops, key="k")
                if number % 5 == 4:
                    await test.send_bytes(game.source, b"no program", key=b"k")
                game.expect(ops)
                if number in commits:
                    await test.worker.unsettled()
            await test.advance(1)
            game.check(test)

    asyncio.run(run())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs=PROGRAMS)
def test_a_unit_of_take_leaves_all_or_nothing(programs):
    async def run() -> None:
        game = Game("take", "skip")
        async with asyncio.timeout(20), TestApp(game.app) as test:
            for at in range(0, len(programs), 3):
                unit = programs[at : at + 3]
                for ops in unit:
                    await test.send(game.source, ops, key="k")
                await test.advance(1)
                game.expect([op for ops in unit for op in ops])
                game.check(test)

    asyncio.run(run())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(records=st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(["ok", "ok", "raise", "late"])), max_size=25))
def test_with_concurrency_each_key_is_counted_once_per_good_record(records):
    async def run() -> None:
        app = sf.App("game", partitions=1)
        source = app.topic("source", key_type=str, value_type=str)
        sink = app.topic("sink", key_type=str, value_type=int)
        counts = app.table("counts", key_type=str, value_type=dict[str, int], default=dict)

        @app.agent(source, sink=sink, concurrency=3, on_error=sf.Skip(), tables=[counts])
        async def count(stream: sf.Stream[str, str]) -> AsyncIterator[int]:
            async for key, what in stream.items():
                entry = counts[key]
                entry["n"] = entry.get("n", 0) + 1
                await asyncio.sleep(0.002 if what == "late" else 0)
                if what == "raise":
                    raise Failure
                yield counts[key]["n"]

        async with asyncio.timeout(20), TestApp(app) as test:
            for key, what in records:
                await test.send(source, what, key=key)
            await test.settle()
            wanted = {key: sum(1 for one, what in records if one == key and what != "raise") for key, _ in records}
            assert {key: value["n"] for key, value in counts.items()} == {k: n for k, n in wanted.items() if n}
            for key in KEYS:
                numbers = [event.value for event in test.records(sink) if event.key == key]
                assert numbers == list(range(1, wanted.get(key, 0) + 1))

    asyncio.run(run())
