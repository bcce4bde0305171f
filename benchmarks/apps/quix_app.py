"""Quix Streams: MODE map | table | table-eos."""

import os
from typing import Any

from quixstreams import Application, State

MODE = os.environ["MODE"]
app = Application(
    broker_address=os.environ["BOOTSTRAP"],
    consumer_group=os.environ["APPID"],
    auto_offset_reset="earliest",
    processing_guarantee="exactly-once" if MODE.endswith("eos") else "at-least-once",
    state_dir=os.environ["DATADIR"],
    loglevel="WARNING",
    commit_interval=float(os.environ.get("COMMIT_S", "5")),
)
orders = app.topic(os.environ["IN"], value_deserializer="json", key_deserializer="str")
out = app.topic(os.environ["OUT"], value_serializer="json", key_serializer="str")


def total(order: dict[str, Any], state: State) -> dict[str, Any]:
    new = state.get(order["user"], 0.0) + order["amount"]
    state.set(order["user"], new)
    return {"user": order["user"], "total": new}


frame = app.dataframe(orders)
if MODE == "map":
    frame = frame.apply(lambda order: {"user": order["user"], "total": order["amount"] * 2})
else:
    frame = frame.apply(total, stateful=True)
frame = frame.to_topic(out)

if __name__ == "__main__":
    app.run()
