"""A steady load over all partitions and a look at what comes of it: which outputs came, how late, and how often.

Every order is worth 1, so the n-th sum of a user answers the n-th order of that user: an output that is missing, or
there twice, shows.
"""

import json
import threading
import time
from collections import Counter, defaultdict
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaError, Message, Producer

from benchmarks import topics

USERS_PER_PARTITION = 50
TICK_S = 0.005
FIRST_RECORDS_S = 20


class Answer(NamedTuple):
    """One output: when its order was sent, and how many seconds later it was here; both of one clock."""

    sent_s: float
    latency_s: float


class SteadyLoad:
    """Sends orders at a rate and reads the sums, while the `with` block runs.

    Args:
        bootstrap: The broker.
        source: Topic of the orders.
        out: Topic of the sums.
        rate: Orders per second, spread evenly over partitions and users.
        partitions: Partitions of the source.
    """

    def __init__(self, bootstrap: str, source: str, out: str, rate: int, partitions: int) -> None:
        self._bootstrap = bootstrap
        self._source = source
        self._out = out
        self.rate = rate
        self._partitions = partitions
        self._users: dict[str, int] = {}
        self._counts: Counter[str] = Counter()
        self._due: dict[tuple[str, int], float] = {}
        self._ending = threading.Event()
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)]
        self.answers: dict[int, list[Answer]] = defaultdict(list)
        self.sent = 0
        self.doubled = 0

    def __enter__(self) -> "SteadyLoad":
        self._find_users()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ending.set()
        self._closing.set()
        for thread in self._threads:
            thread.join()

    @property
    def missing(self) -> int:
        """Orders that have no output yet."""
        return len(self._due)

    def end(self, within_s: float) -> None:
        """Send no more, and wait for the outputs that are missing."""
        self._ending.set()
        deadline = time.monotonic() + within_s
        while self._due and time.monotonic() < deadline:
            time.sleep(0.1)

    def silent_partitions(self, since_s: float) -> list[int]:
        """Those that gave no output of an order that was sent since then (`time.perf_counter`)."""
        answers = {partition: self.answers[partition] for partition in range(self._partitions)}
        return [partition for partition, each in answers.items() if not each or each[-1].sent_s < since_s]

    def _producer(self) -> Producer:
        return Producer(
            {
                "bootstrap.servers": self._bootstrap,
                "linger.ms": 1,
                "partitioner": "murmur2_random",
                "log_level": 4,
            }
        )

    def _find_users(self) -> None:
        """The broker tells the partition of each user by one order; as many of each partition are kept."""
        found: dict[int, list[str]] = defaultdict(list)

        def stored(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                raise SystemExit(f"the first orders could not be written: {error}")
            partition, key = message.partition(), message.key()
            if partition is not None and key is not None:
                found[partition].append(bytes(key).decode())

        producer = self._producer()
        for number in range(3 * USERS_PER_PARTITION * self._partitions):
            user = f"user-{number}"
            self._order(producer, user, stored)
        producer.flush(FIRST_RECORDS_S)
        self._users = {user: partition for partition, users in found.items() for user in users}
        chosen = [users[:USERS_PER_PARTITION] for _, users in sorted(found.items())]
        if len(chosen) < self._partitions or min(map(len, chosen)) < USERS_PER_PARTITION:
            raise SystemExit("too few users of some partition")
        self._turns = [user for same_rank in zip(*chosen, strict=True) for user in same_rank]

    def _order(self, producer: Producer, user: str, stored: object = None) -> None:
        self._counts[user] += 1
        self._due[user, self._counts[user]] = time.perf_counter()
        value = topics.order(self.sent, user, 1.0, "DE", int(time.time() * 1000))
        producer.produce(self._source, key=user.encode(), value=value, on_delivery=stored)
        self.sent += 1

    def _send(self) -> None:
        producer = self._producer()
        started_s, sent = time.perf_counter(), 0
        while not self._ending.is_set():
            wanted = int((time.perf_counter() - started_s) * self.rate)
            for number in range(sent, wanted):
                self._order(producer, self._turns[number % len(self._turns)])
            sent = wanted
            producer.poll(0)
            time.sleep(TICK_S)
        producer.flush()

    def _receive(self) -> None:
        consumer = Consumer(
            {
                "bootstrap.servers": self._bootstrap,
                "group.id": f"load-{self._out}",
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 10,
            }
        )
        consumer.subscribe([self._out])
        while not self._closing.is_set():
            messages = consumer.consume(500, 0.02)
            now_s = time.perf_counter()
            for message in messages:
                if message.error() is None:
                    self._take(json.loads(message.value() or b"{}"), now_s)
        consumer.close()

    def _take(self, output: dict[str, object], now_s: float) -> None:
        user, total = str(output["user"]), int(float(str(output["total"])))
        sent_s = self._due.pop((user, total), None)
        if sent_s is None:
            self.doubled += 1
        else:
            self.answers[self._users[user]].append(Answer(sent_s, now_s - sent_s))
