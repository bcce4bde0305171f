"""Global tables in whole workers on a log in memory; `tests/system/test_global_tables.py` has processes and crashes."""

import asyncio
import logging
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest

import streamflow as sf
from streamflow.errors import (
    ConfigurationError,
    LogUnavailableError,
    NotHeld,
    OffsetOutOfRangeError,
    StateCorruptedError,
    TopologyError,
)
from streamflow.log.api import Fetched, NewTopic
from streamflow.metrics import Exposition, PrometheusSensors
from streamflow.model.record import TopicPartition
from streamflow.testing import TestApp
from tests.runtime.machine import Machine
from tests.runtime.waiting import until


class User(msgspec.Struct):
    name: str
    tags: list[str] = []


def rates_app(**options: Any) -> tuple[sf.App, Any, Any, Any]:
    app = sf.App("shop")
    rates = app.global_table("rates", key_type=str, value_type=float, **options)
    orders = app.topic("orders", key_type=str, value_type=float, partitions=2)
    priced = app.topic("priced", key_type=str, value_type=float)

    @app.agent(orders, sink=priced)
    async def price(stream: sf.Stream[float, str]) -> AsyncIterator[float]:
        async for currency, amount in stream.items():
            yield amount * rates.get(currency, 0.0)

    return app, rates, orders, priced


async def test_an_agent_reads_every_key_whatever_the_partition() -> None:
    app, rates, orders, priced = rates_app()
    async with TestApp(app) as test:
        for currency, rate in (("eur", 2.0), ("usd", 3.0), ("krw", 4.0), ("jpy", 5.0)):
            await test.send(rates.source, rate, key=currency)
        await test.settle()
        for partition in range(2):
            for currency in ("eur", "usd", "krw", "jpy"):
                await test.send(orders, 1.0, key=currency, partition=partition)
        await test.settle()
        assert sorted(event.value for event in test.records(priced)) == [2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0]


async def test_reading_from_outside_of_agents() -> None:
    app, rates, _, _ = rates_app()
    with pytest.raises(NotHeld, match="does not run in this process"):
        rates["eur"]
    assert rates.partitions == frozenset()
    async with TestApp(app, partitions=3) as test:
        assert (len(rates), bool(rates), list(rates), "eur" in rates, rates.get("eur")) == (0, False, [], False, None)
        for number, key in enumerate(["d", "a", "c", "b", "cc"]):
            await test.send(rates.source, float(number), key=key)
        await test.settle()
        assert rates.partitions == {0, 1, 2}
        assert list(rates.items()) == [("a", 1.0), ("b", 3.0), ("c", 2.0), ("cc", 4.0), ("d", 0.0)]
        assert (list(rates), list(rates.keys())) == (["a", "b", "c", "cc", "d"],) * 2
        assert list(rates.values()) == [1.0, 3.0, 2.0, 4.0, 0.0]
        assert list(rates.scan("b", "cc")) == [("b", 3.0), ("c", 2.0)]
        assert list(rates.scan(prefix="c", reverse=True)) == [("cc", 4.0), ("c", 2.0)]
        with pytest.raises(ConfigurationError, match="not both"):
            rates.scan("a", prefix="c")
        with pytest.raises(KeyError):
            rates["missing"]
        assert (rates["d"], rates.get("missing", -1), len(rates), bool(rates)) == (0.0, -1, 5, True)
        with pytest.raises(sf.StreamFlowError, match="takes keys of type str"):
            rates[1]
        assert await asyncio.to_thread(lambda: (rates["a"], list(rates))) == (1.0, ["a", "b", "c", "cc", "d"])
        await test.send(rates.source, None, key="a")
        await test.send(rates.source, 9.0, key="b")
        await test.settle()
        assert "a" not in rates
        assert rates["b"] == 9.0
    with pytest.raises(NotHeld):
        rates["b"]


async def test_writing_is_refused_with_the_way_to_do_it() -> None:
    app, rates, _, _ = rates_app()
    async with TestApp(app):
        ways: list[Any] = [
            lambda: rates.__setitem__("eur", 1.0),
            lambda: rates.__delitem__("eur"),
            lambda: rates.pop("eur"),
            lambda: rates.setdefault("eur", 1.0),
            lambda: rates.update({"eur": 1.0}),
            rates.clear,
        ]
        for way in ways:
            with pytest.raises(TopologyError, match=r"await rates.source.send\(key=..., value=...\)"):
                way()
        with pytest.raises(TopologyError, match="not written"):
            await rates.update_async("eur", lambda _: 1.0)


async def test_a_value_that_can_be_changed_in_place_is_a_copy() -> None:
    app = sf.App("shop")
    users = app.global_table("users", key_type=int, value_type=User)
    async with TestApp(app) as test:
        await test.send(users.source, User("ann", ["a"]), key=7)
        await test.settle()
        users[7].tags.append("b")
        next(iter(users.values())).tags.append("c")
        assert users[7] == User("ann", ["a"])


async def test_the_newest_value_is_read_after_it_was_kept_decoded() -> None:
    """A value that was read before is kept decoded; an update takes its place."""
    app, rates, _, _ = rates_app()
    async with TestApp(app) as test:
        for number in range(5):
            assert rates.get("eur") == (None if number == 0 else float(number - 1))
            await test.send(rates.source, float(number), key="eur")
            await test.settle()


async def test_a_record_that_cannot_be_read_is_passed_over_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    app, rates, _, _ = rates_app()
    sensors = PrometheusSensors()
    async with TestApp(app, sensors=sensors, partitions=1) as test:
        await test.send(rates.source, 2.0, key="eur")
        with caplog.at_level(logging.WARNING):
            await test.send_bytes(rates.source, b"x", key=b"eur")
            await test.send_bytes(rates.source, b"\x00" * 8, key=b"\xff\xfe")
            await test.send_bytes(rates.source, b"\x00" * 8, key=None)
            await test.send(rates.source, 3.0, key="usd")
            await test.settle()
        assert dict(rates.items()) == {"eur": 2.0, "usd": 3.0}
        (told,) = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
        assert "'rates'" in told
        assert "rates-0-1 cannot be read" in told
        assert sensors.errors["table rates", "skip"] == 3
        (status,) = test.worker.status().global_tables
        assert (status.table, status.source, status.complete, status.lag) == ("rates", "rates", True, 0)
        assert status.passed_over == 3
        exposition = Exposition(sensors, test.worker.status).text().decode()
        assert 'streamflow_global_table_lag_records{table="rates"} 0.0' in exposition


async def test_a_worker_starts_when_all_of_the_table_is_there() -> None:
    app, rates, orders, priced = rates_app()
    seen: list[dict[str, float]] = []
    app.on_start(lambda: seen.append(dict(rates.items())))
    async with Machine(app) as machine:
        for number in range(3000):
            await machine.send(rates.source, float(number), key=f"c{number % 500}")
        running = await machine.start()
        assert seen == [{f"c{number % 500}": float(number) for number in range(2500, 3000)}]
        await machine.send(orders, 1.0, key="c7")
        await machine.settle()
        assert machine.values(priced) == [2507.0]
        await machine.stop(running)


async def test_every_worker_has_all_of_it() -> None:
    """Two workers of one process; an app of its own each, since a table reads the newest copy of its process."""
    (first, mine, _, _), (second, theirs, _, _) = rates_app(), rates_app()
    async with Machine(first, partitions=4) as machine:
        one = await machine.start(app=first)
        for number in range(40):
            await machine.send(mine.source, float(number), key=f"c{number}")
        other = await machine.start(app=second)
        expected = {f"c{number}": float(number) for number in range(40)}
        await mine.caught_up()
        assert dict(mine.items()) == dict(theirs.items()) == expected
        await machine.send(mine.source, 100.0, key="c7")
        await machine.send(mine.source, None, key="c8")
        for table in (mine, theirs):
            await table.caught_up()
            assert (table["c7"], table.get("c8"), table.lag) == (100.0, None, 0)
        await machine.stop(one)
        await machine.stop(other)


async def test_caught_up_waits_no_longer_than_it_may() -> None:
    app, rates, _, _ = rates_app()
    async with TestApp(app) as test:
        with pytest.raises(ConfigurationError, match="above 0"):
            await rates.caught_up(timeout_s=0)
        copy = rates.copies[0]
        copy.positions = {TopicPartition("rates", 0): 5}
        await test.send(rates.source, 1.0, key="a", partition=1)
        copy._admin = _Ahead()
        with pytest.raises(TimeoutError):
            await rates.caught_up(timeout_s=0.05)
        copy._admin = test.worker._log.admin


class _Ahead:
    """An end that is never reached."""

    async def end_offsets(self, partitions: Any) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 1_000_000)


async def test_an_app_of_nothing_but_a_table_and_a_timer() -> None:
    app = sf.App("shop")
    rates = app.global_table("rates", key_type=str, value_type=float)
    seen: list[dict[str, float]] = []

    @app.timer(10)
    async def look() -> None:
        seen.append(dict(rates.items()))

    async with TestApp(app) as test:
        await test.send(rates.source, 2.0, key="eur")
        await test.advance(10)
        await test.send(rates.source, 3.0, key="eur")
        await test.advance(10)
    assert seen[-2:] == [{"eur": 2.0}, {"eur": 3.0}]


async def test_on_recover_is_called_once_the_table_may_be_read() -> None:
    seen: list[float] = []
    app = sf.App("shop")

    async def note() -> None:
        seen.append(rates["eur"])

    rates = app.global_table("rates", key_type=str, value_type=float, on_recover=note)
    async with Machine(app) as machine:
        await machine.send(rates.source, 2.0, key="eur")
        running = await machine.start()
        assert seen == [2.0]
        await machine.stop(running)


async def test_an_on_recover_that_raises_stops_the_worker() -> None:
    app = sf.App("shop")

    def fail() -> None:
        raise ValueError("no")

    app.global_table("rates", key_type=str, value_type=float, on_recover=fail)
    with pytest.raises(sf.StreamFlowError, match="on_recover of global table 'rates' raised ValueError: no"):
        async with TestApp(app):
            pass


async def test_threads_read_while_it_changes() -> None:
    """No reader sees a value go back, whatever is kept decoded."""
    app, rates, _, _ = rates_app()
    stop = threading.Event()
    errors: list[str] = []

    def read() -> None:
        last = -1.0
        while not stop.is_set():
            value = rates.get("eur", -1.0)
            if value < last:
                errors.append(f"{value} after {last}")
            last = value

    async with TestApp(app, partitions=1) as test:
        readers = [asyncio.create_task(asyncio.to_thread(read)) for _ in range(2)]
        for number in range(150):
            await test.send(rates.source, float(number), key="eur")
        await test.settle()
        stop.set()
        await asyncio.gather(*readers)
        assert rates["eur"] == 149.0
    assert errors == []


async def test_a_topic_that_is_made_anew_is_read_anew(caplog: pytest.LogCaptureFixture) -> None:
    """With more partitions than before, which are noticed within half a minute."""
    app, rates, _, _ = rates_app()
    async with TestApp(app, partitions=1) as test:
        for number in range(3):
            await test.send(rates.source, float(number), key=f"old{number}")
        await test.settle()
        admin = test.worker._log.admin
        await admin.delete(["rates"])
        await admin.create([NewTopic("rates", 2, config={"cleanup.policy": "compact"})])
        await test.advance(30)
        await until(lambda: rates.partitions == {0, 1})
        assert dict(rates.items()) == {}
        assert "global table 'rates' is read anew" in caplog.text
        for number in range(8):
            await test.send_bytes(rates.source, struct.pack(">d", number), key=b"n%d" % number, partition=number % 2)
        await test.settle()
        assert set(rates) == {f"n{number}" for number in range(8)}


async def test_what_was_fetched_of_a_table_before_it_is_read_anew_is_not_put_into_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app, rates, _, _ = rates_app()
    zero, one = TopicPartition("rates", 0), TopicPartition("rates", 1)
    async with TestApp(app, partitions=2) as test:
        await test.send_bytes(rates.source, struct.pack(">d", 2.0), key=b"eur", partition=0)
        await test.settle()
        reader = rates.copies[0]._reader
        receive = reader.receive
        gone = Fetched(zero, [], 1, 0, error=OffsetOutOfRangeError(*zero, 1, 0, 0))
        together = [[gone, Fetched(one, [], 100, 100)]]

        async def receiving() -> list[Fetched]:
            return together.pop() if together else await receive()

        monkeypatch.setattr(reader, "receive", receiving)
        await test.advance(30)  # it looks at its topics, and receives again
        await until(lambda: not together and rates.copies[0].positions == {zero: 1, one: 0})
        assert dict(rates.items()) == {"eur": 2.0}


async def test_a_copy_that_turns_out_damaged_is_set_aside(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(_: Any) -> None:
        raise StateCorruptedError("state rates is damaged: a block", reason="damaged")

    app, rates, _, _ = rates_app()
    async with Machine(app) as machine:
        running = await machine.start()
        monkeypatch.setattr(rates.copies[0].replica._store, "write", damaged)
        await machine.send(rates.source, 2.0, key="eur")
        with pytest.raises(StateCorruptedError, match="a block"):
            await machine.ended(running)
        assert "cannot be used: state rates is damaged: a block. It was dropped from memory" in caplog.text


async def test_damage_that_a_scan_meets_sets_the_copy_aside_at_the_stop(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: Any, **__: Any) -> Iterator[Any]:
        raise StateCorruptedError("state rates is damaged: a block", reason="damaged")
        yield

    app, rates, _, _ = rates_app()
    async with Machine(app) as machine:
        running = await machine.start()
        monkeypatch.setattr(rates.copies[0].replica._store, "scan", damaged)
        with pytest.raises(StateCorruptedError, match="a block"):
            list(rates)
        await machine.stop(running)
        assert "cannot be used: state rates is damaged: a block. It was dropped from memory" in caplog.text


async def test_a_source_that_is_deleted_stops_the_worker() -> None:
    app, *_ = rates_app()
    async with Machine(app) as machine:
        running = await machine.start()
        await machine.log.admin.delete(["rates"])
        with pytest.raises(sf.StreamFlowError, match="the source of global table 'rates', was deleted"):
            await machine.ended(running)


async def test_a_log_that_does_not_say_whether_the_source_was_made_anew_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app, rates, *_ = rates_app()
    async with Machine(app) as machine:
        running = await machine.start()
        admin = rates.copies[0]._admin
        describe, asked = admin.describe, 0

        async def is_away_at_first(topics: list[str]) -> Any:
            nonlocal asked
            asked += 1
            if asked <= 12:
                raise LogUnavailableError("the broker is away")
            return await describe(topics)

        monkeypatch.setattr(admin, "describe", is_away_at_first)
        await machine.log.admin.delete(["rates"])
        await machine.log.admin.create([NewTopic("rates", len(rates.partitions), config={"cleanup.policy": "compact"})])
        while not asked > 12:
            assert running.error is None
            machine.clock.advance(1)
            await asyncio.sleep(0.001)
        await machine.send(rates.source, 2.0, key="eur")
        await until(lambda: rates.get("eur") == 2.0)


# --- declaration -----------------------------------------------------------------------------------------------------


def test_the_source_is_a_topic_that_keeps_the_newest_of_each_key() -> None:
    app, rates, _, _ = rates_app()
    assert rates.source is app.topics["rates"]
    assert rates.source.topic_config() == {"cleanup.policy": "compact"}
    assert rates is app.global_table("rates", source=rates.source)
    assert repr(rates) == "<global table 'rates': str to float>"


@pytest.mark.parametrize("options", [{}, {"retention_s": 3600}, {"compacting": True, "retention_s": 60}])
async def test_a_source_that_forgets_is_refused(options: Any) -> None:
    app = sf.App("shop")
    app.global_table("users", source=app.topic("users", key_type=str, value_type=str, **options))
    with pytest.raises(TopologyError, match="Declare it with compacting=True"):
        async with TestApp(app):
            pass


async def test_a_source_that_keeps_everything_will_do() -> None:
    app = sf.App("shop")
    users = app.global_table("users", source=app.topic("users", key_type=str, value_type=str, retention_s=float("inf")))
    async with TestApp(app) as test:
        await test.send("users", "ann", key="a")
        await test.settle()
        assert users["a"] == "ann"


async def test_an_existing_topic_that_forgets_is_refused() -> None:
    app = sf.App("shop")
    app.global_table("users", key_type=str, value_type=str)
    async with Machine(sf.App("other")) as machine:
        await machine.log.admin.create([NewTopic("users", 2, config={"retention.ms": "5000"})])
        running = await machine.start(app=app)
        with pytest.raises(TopologyError, match=r"retention\.ms=5000.*Set its cleanup\.policy to compact"):
            await machine.ended(running)


def test_what_does_not_fit_is_refused_where_it_is_declared() -> None:
    app, rates, orders, _ = rates_app()
    with pytest.raises(ConfigurationError, match="types and serializers are those of its source"):
        app.global_table("more", source=orders, key_type=str)
    with pytest.raises(ConfigurationError, match="give a topic"):
        app.global_table("more", source=orders.group_by(lambda value: str(value), name="by", key_type=str).topic)
    with pytest.raises(TopologyError, match="of app 'other'"):
        app.global_table("more", source=sf.App("other").topic("users", key_type=str, value_type=str))
    with pytest.raises(TopologyError, match="have the same source 'rates'"):
        app.global_table("more", source=rates.source)
    with pytest.raises(TopologyError, match="two tables are called 'rates'"):
        app.table("rates", key_type=str, value_type=int)
    app.table("counts", key_type=str, value_type=int)
    with pytest.raises(TopologyError, match="two tables are called 'counts'"):
        app.global_table("counts", key_type=str, value_type=int)
    with pytest.raises(TopologyError, match="declared twice"):
        app.global_table("rates", key_type=str, value_type=int)
    with pytest.raises(TopologyError, match="which every agent may read; leave it out"):
        app.agent(orders, tables=[rates])(free)


async def free(value: float) -> None:
    """An agent of nothing."""


def test_it_joins_no_sub_topologies_and_the_topology_shows_it() -> None:
    app = sf.App("shop")
    rates = app.global_table("rates", key_type=str, value_type=float, help="by currency")
    orders = app.topic("orders", key_type=str, value_type=float)
    returns = app.topic("returns", key_type=str, value_type=float)

    @app.agent(orders)
    async def one(value: float) -> None:
        rates["eur"]

    @app.agent(returns)
    async def other(value: float) -> None:
        rates["eur"]

    @app.timer(1)
    async def look() -> None:
        list(rates)

    topology = app.topology()
    assert [sub.topics for sub in topology.sub_topologies] == [("orders",), ("returns",)]
    (table,) = topology.tables
    assert (table.kind, table.changelog, table.help) == ("global", "rates", "by currency")
    edges = {(edge.source, edge.target) for edge in topology.edges if edge.kind in ("uses", "fills")}
    assert edges == {
        ("topic:rates", "table:rates"),
        ("agent:one", "table:rates"),
        ("agent:other", "table:rates"),
        ("timer:look", "table:rates"),
    }
    text = topology.to_text()
    assert "global table rates (str: float)\n  filled from topic rates (str: float)" in text
    assert text.count("uses -> global table rates (str: float)") == 3
    assert "-->|fills|" in topology.to_mermaid()
    assert topology.to_json()["tables"][0]["kind"] == "global"
