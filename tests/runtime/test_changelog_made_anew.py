"""A changelog that somebody deletes and makes anew while workers run: what they hold is not in it."""

import pytest

import streamflow as sf
from streamflow.log.api import NewTopic
from tests.runtime.machine import Machine
from tests.runtime.waiting import until


@pytest.mark.parametrize("standby_replicas", [0, 1])
async def test_who_takes_a_task_over_does_not_go_on_with_what_has_come_since(standby_replicas: int) -> None:
    def make() -> sf.App:
        app = sf.App("counting")
        words = app.topic("words", key_type=str, value_type=int, partitions=2)
        counts = app.table("counts", key_type=str, value_type=int, default=int)

        @app.agent(words, tables=[counts])
        async def count(stream: sf.Stream[int, str]) -> None:
            async for event in stream.events():
                counts[event.key] += event.value

        return app

    async with Machine(make(), standby_replicas=standby_replicas) as machine:
        workers = [await machine.start(app=make()) for _ in range(2)]
        await until(lambda: all(len(each.tasks) == 1 for each in workers))
        words = machine.app.topics["words"]
        for key in "abcdefgh":
            await machine.send(words, 1, key=key)
        await machine.settle()
        for each in workers:
            await machine.commit(each)

        changelog = "counting-counts-changelog"
        (before,) = (await machine.log.admin.describe([changelog])).values()
        await machine.log.admin.delete([changelog])
        await machine.log.admin.create([NewTopic(changelog, 2, config=before.config)])
        for key in "abcd":
            await machine.send(words, 1, key=key)
        await machine.settle()
        for each in workers:
            await machine.commit(each)

        first, second = workers
        await machine.crash(first)
        with pytest.raises(sf.TopologyError, match="was deleted and made anew since the last commit"):
            await machine.ended(second)
