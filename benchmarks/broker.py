"""The broker of the measurements: the tests' real Kafka, with the heap and the compiler that a server has.

`python -m benchmarks.broker --port N` runs one in the foreground until SIGTERM or Ctrl-C; its data go at the end.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from tests.kafka.broker import JAVA_OPTIONS, Broker

# The orders carry fixed timestamps of 2023, which a retention of days would delete.
CONFIG = {"log.retention.ms": "-1", "log.cleaner.dedupe.buffer.size": "33554432"}


class MeasuredBroker(Broker):
    """Tests want a broker that starts quickly; here it runs long and must not be what limits a peer."""

    def _java(self, main: str, *arguments: str) -> list[str]:
        program, *rest = super()._java(main, *arguments)
        return [program, "-Xms256m", "-Xmx1g", *(part for part in rest if part not in JAVA_OPTIONS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="streamflow-bench-") as scratch:
        broker = MeasuredBroker(Path(scratch), port=arguments.port, config=CONFIG)
        try:
            broker.start()
            print(broker.bootstrap, flush=True)
            broker.wait()
            sys.exit(f"the broker ended by itself:\n{broker.log_tail()}")
        except KeyboardInterrupt:
            pass
        finally:
            broker.stop()


if __name__ == "__main__":
    main()
