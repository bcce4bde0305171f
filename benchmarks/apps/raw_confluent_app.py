"""What one writes by hand without a framework: confluent-kafka, msgspec and a loop; no guarantee beyond auto commit."""

import os

import msgspec
from confluent_kafka import Consumer, Producer


class Order(msgspec.Struct):
    order_id: int
    user: str
    amount: float
    country: str
    ts: int


class Out(msgspec.Struct):
    user: str
    total: float


def main() -> None:
    decode, encode = msgspec.json.Decoder(Order).decode, msgspec.json.Encoder().encode
    broker = {"bootstrap.servers": os.environ["BOOTSTRAP"]}
    consumer = Consumer({**broker, "group.id": os.environ["APPID"], "auto.offset.reset": "earliest"})
    producer = Producer({**broker, "linger.ms": 5, "queue.buffering.max.messages": 1_000_000})
    consumer.subscribe([os.environ["IN"]])
    out = os.environ["OUT"]
    while True:
        for message in consumer.consume(1000, 0.05):
            order = decode(message.value())
            producer.produce(out, encode(Out(order.user, order.amount * 2)), message.key())
        producer.poll(0)


if __name__ == "__main__":
    main()
