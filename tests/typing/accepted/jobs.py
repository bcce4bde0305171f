"""Timers, crontabs, tasks and hooks: the function stays what it is."""

from typing import assert_type

import streamflow as sf

app = sf.App("jobs")


@app.timer(10.0)
async def every_ten_seconds() -> int:
    return 1


@app.timer(interval_s=1, on_leader=True, name="leader")
def on_the_leader() -> None: ...


@app.crontab("0 20 * * *", timezone="Europe/Berlin", on_leader=True)
async def in_the_evening() -> None: ...


@app.task
async def once() -> None: ...


@app.task(on_leader=True)
async def once_on_the_leader() -> None: ...


@app.on_start
async def opened() -> None: ...


@app.on_stop
def closed() -> None: ...


@app.on_assigned
async def came(partitions: set[sf.TopicPartition]) -> None: ...


@app.on_revoked
def went(partitions: set[sf.TopicPartition]) -> None: ...


async def use() -> None:
    assert_type(await every_ten_seconds(), int)
    on_the_leader()
    await came({sf.TopicPartition("orders", 0)})
    assert_type(app.topology(), sf.Topology)
