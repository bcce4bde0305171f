"""Pathway: MODE map."""

import os

import pathway as pw


class Order(pw.Schema):
    order_id: int
    user: str
    amount: float
    country: str
    ts: int


BROKER = {"bootstrap.servers": os.environ["BOOTSTRAP"]}
READER = {"group.id": os.environ["APPID"], "auto.offset.reset": "earliest", "session.timeout.ms": "10000"}

orders = pw.io.kafka.read(
    {**BROKER, **READER}, topic=os.environ["IN"], schema=Order, format="json", autocommit_duration_ms=100
)
doubled = orders.select(user=orders.user, total=orders.amount * 2)
pw.io.kafka.write(doubled, BROKER, topic_name=os.environ["OUT"], format="json")
pw.run(monitoring_level=pw.MonitoringLevel.NONE)
