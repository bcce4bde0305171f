"""One peer at a steady, small rate: milliseconds from handing a record to the producer to receiving its result."""

import json
import threading
import time
from dataclasses import dataclass

from confluent_kafka import Consumer, Producer

from benchmarks import topics
from benchmarks.peers import Peer
from benchmarks.runs import Run
from benchmarks.settings import Settings

WARM_UP_RECORDS = 200
WARM_UP_RATE = 20
SETTLE_PART = 0.05  # of the results, left out at the beginning
LAST_RESULTS_S = 20


@dataclass(frozen=True)
class Latency:
    """What one run gave: results received, of those sent, and their latency in milliseconds."""

    sent: int
    received: int
    p50_ms: float
    p99_ms: float
    p999_ms: float


class _Receiver(threading.Thread):
    """Reads the results as they are committed and matches them to their orders by the user, who is unique."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        super().__init__(daemon=True)
        self.sent: dict[str, float] = {}
        self.latencies_s: list[float] = []
        self.seen = 0
        self.stopping = threading.Event()
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": f"latency-{topic}",
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 10,
            }
        )
        self._consumer.subscribe([topic])

    def run(self) -> None:
        while not self.stopping.is_set():
            message = self._consumer.poll(0.05)
            if message is None or message.error():
                continue
            now = time.perf_counter()
            self.seen += 1
            if sent := self.sent.pop(json.loads(message.value() or b"{}").get("user", ""), None):
                self.latencies_s.append(now - sent)
        self._consumer.close()


def measure(peer: Peer, bootstrap: str, settings: Settings) -> Latency:
    """Send `rate` records a second for `latency_s` seconds, after a slow warm-up."""
    records = int(settings.rate * settings.latency_s)
    with Run(peer, bootstrap, settings.mode) as run, run.program():
        producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 1, "log_level": 4})
        receiver = _Receiver(bootstrap, run.out)
        receiver.start()
        try:
            _warm_up(producer, receiver, run.source, settings.limit_s)
            _send(producer, receiver, run.source, records, settings.rate)
            producer.flush()
            deadline = time.monotonic() + LAST_RESULTS_S
            while len(receiver.latencies_s) < records and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            receiver.stopping.set()
            receiver.join()
    return _evaluate(receiver.latencies_s, records)


def _warm_up(producer: Producer, receiver: _Receiver, topic: str, limit_s: float) -> None:
    """Slow records until the peer has answered some: it has started, joined its group and run its code once."""
    deadline = time.monotonic() + limit_s
    number = 0
    while number < WARM_UP_RECORDS or receiver.seen < WARM_UP_RECORDS // 2:
        if time.monotonic() > deadline:
            return
        _produce(producer, topic, number, f"warm-{number}")
        number += 1
        time.sleep(1 / WARM_UP_RATE)


def _send(producer: Producer, receiver: _Receiver, topic: str, records: int, rate: int) -> None:
    started = time.perf_counter()
    for number in range(records):
        user = f"u{number}"
        receiver.sent[user] = time.perf_counter()
        _produce(producer, topic, number, user)
        ahead_s = started + (number + 1) / rate - time.perf_counter()
        if ahead_s > 0.001:
            time.sleep(ahead_s)


def _produce(producer: Producer, topic: str, number: int, user: str) -> None:
    value = topics.order(number, user, 1.0, "DE", int(time.time() * 1000))
    producer.produce(topic, key=user.encode(), value=value)
    producer.poll(0)


def _evaluate(latencies_s: list[float], sent: int) -> Latency:
    settled = sorted(latencies_s[int(len(latencies_s) * SETTLE_PART) :]) or [float("nan")]

    def quantile_ms(part: float) -> float:
        return settled[min(len(settled) - 1, int(len(settled) * part))] * 1000

    return Latency(sent, len(latencies_s), quantile_ms(0.5), quantile_ms(0.99), quantile_ms(0.999))
