"""A worker's status and an app's overview for the tests of the site."""

from streamflow.runtime.status import PartitionStatus, TaskStatus, WorkerStatus
from streamflow.web.overview import AgentLine, Overview


def status(**changes) -> WorkerStatus:
    partitions = (PartitionStatus("orders", 0, 7, 10, 3), PartitionStatus("orders", 1, 0, None, None))
    values = {
        "app": "shop",
        "state": "running",
        "address": "memory://",
        "guarantee": "exactly_once",
        "tasks": (TaskStatus("orders-0", "running", partitions, 0.25),),
        "ready": True,
        "live": True,
        "live_reason": "ok",
        "rebalances": 2,
        "rebalance_s": 0.5,
        "last_commit_age_s": 0.1,
    }
    return WorkerStatus(**(values | changes))


def overview(**changes) -> Overview:
    agent = AgentLine("total", ("orders",), ("totals",), "sf.Stop()", 1, "shop.py:20")
    values = {
        "app": "shop",
        "version": "0.1.0",
        "broker": "memory://",
        "guarantee": "exactly_once",
        "data_dir": "/srv/shop/.streamflow",
        "agents": (agent,),
        "topics": ("orders", "totals"),
    }
    return Overview(**(values | changes))
