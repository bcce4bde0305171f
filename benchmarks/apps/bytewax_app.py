"""Bytewax: MODE map | table (no changelog)."""

import json
import os
from typing import Any

import bytewax.operators as op
from bytewax.connectors.kafka import KafkaSink, KafkaSinkMessage, KafkaSource
from bytewax.dataflow import Dataflow
from confluent_kafka import OFFSET_BEGINNING

BROKERS = [os.environ["BOOTSTRAP"]]


def total(state: float | None, order: dict[str, Any]) -> tuple[float, float]:
    new = (state or 0.0) + order["amount"]
    return new, new


def encode(result: tuple[str, float]) -> KafkaSinkMessage[bytes, bytes]:
    user, value = result
    return KafkaSinkMessage(user.encode(), json.dumps({"user": user, "total": value}).encode())


flow = Dataflow("bench")
source = KafkaSource(BROKERS, [os.environ["IN"]], batch_size=1000, tail=True, starting_offset=OFFSET_BEGINNING)
stream = op.input("in", flow, source)
orders = op.map("decode", stream, lambda message: json.loads(message.value))
if os.environ["MODE"] == "map":
    results = op.map("double", orders, lambda order: (order["user"], order["amount"] * 2))
else:
    results = op.stateful_map("total", op.key_on("key", orders, lambda order: order["user"]), total)
op.output("out", op.map("encode", results, encode), KafkaSink(BROKERS, os.environ["OUT"]))
