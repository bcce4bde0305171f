"""The topics of a measurement: filled once with the same JSON orders, counted while a peer works."""

import json
import random
import sys

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from benchmarks.settings import FIRST_TIMESTAMP_MS, PARTITIONS

CALL_TIMEOUT_S = 10
MOST_FAILURES = 100


def create(bootstrap: str, *names: str, partitions: int = PARTITIONS) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 4})
    for created in admin.create_topics([NewTopic(name, partitions, 1) for name in names]).values():
        created.result(CALL_TIMEOUT_S)


def delete(bootstrap: str, *names: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 4})
    for deleted in admin.delete_topics(list(names)).values():
        deleted.result(CALL_TIMEOUT_S)


def order(number: int, user: str, amount: float, country: str, timestamp_ms: int) -> bytes:
    """About 100 bytes of JSON."""
    fields = {"order_id": number, "user": user, "amount": amount, "country": country, "ts": timestamp_ms}
    return json.dumps(fields, separators=(",", ":")).encode()


def fill(bootstrap: str, topic: str, records: int, keys: int) -> None:
    """Write the orders, unless the topic holds them from an earlier run on this broker."""
    counter = Counter(bootstrap, topic)
    if counter.exists() and counter.total() == records:
        counter.close()
        return
    counter.close()
    print(f"Filling {topic} ...", file=sys.stderr, flush=True)
    create(bootstrap, topic)
    producer = Producer(
        {
            "bootstrap.servers": bootstrap,
            "linger.ms": 50,
            "batch.size": 1 << 20,
            "queue.buffering.max.messages": 2_000_000,
        }
    )
    chance = random.Random(7)
    for number in range(records):
        user, at = f"user-{chance.randrange(keys)}", FIRST_TIMESTAMP_MS + number
        value = order(number, user, round(chance.random() * 100, 2), chance.choice(("DE", "KR", "US")), at)
        while True:
            try:
                producer.produce(topic, key=user.encode(), value=value, timestamp=at)
                break
            except BufferError:
                producer.poll(0.1)
        if number % 10_000 == 0:
            producer.poll(0)
    producer.flush()


class Counter:
    """Asks the broker for a topic's end offsets: what a peer has written so far."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        self._topic = topic
        self._ends = dict.fromkeys(range(PARTITIONS), 0)
        self._failures = 0
        self._consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": f"count-{topic}"})

    def exists(self) -> bool:
        described = self._consumer.list_topics(self._topic, timeout=CALL_TIMEOUT_S).topics[self._topic]
        return described.error is None

    def total(self) -> int:
        """What the topic holds; a partition whose leader does not answer (it may be new) counts as it did before."""
        for partition in self._ends:
            at = TopicPartition(self._topic, partition)
            try:
                self._ends[partition] = self._consumer.get_watermark_offsets(at, timeout=CALL_TIMEOUT_S)[1]
                self._failures = 0
            except KafkaException:
                self._failures += 1
                if self._failures > MOST_FAILURES:
                    raise
        return sum(self._ends.values())

    def close(self) -> None:
        self._consumer.close()
