"""One peer through the whole input: rate, CPU time per record and peak memory, after the warm-up."""

import time
from dataclasses import dataclass

from benchmarks.peers import Peer
from benchmarks.process import Program
from benchmarks.runs import Run
from benchmarks.settings import Settings
from benchmarks.topics import Counter

POLL_S = 0.05
LEAST_CPU_S = 0.2


@dataclass(frozen=True)
class Throughput:
    """What one run gave.

    Args:
        records: Records counted in the output at the end.
        measured: Of these, the ones after the warm-up, which rate and CPU are about.
        complete: Whether the peer came to the end; false when the time was over or the program ended.
        rate: Records per second; None if there was nothing to measure.
        cpu_us: User and system time of the process tree per record, in microseconds; None if the run was so short that
            the system's clock of CPU time, which ticks every 10 ms, would be guessing.
        whole_cpu_us: The same over the whole run, start and warm-up included: an upper bound. (`cpu_us` leaves out what
            was spent before the warm-up's end on records that were not yet written then, so it is a little low in
            short runs of peers that work on many records at a time.)
        memory_mb: Peak resident size.
        memory_each_mb: The same of each process.
        first_s: From the start of the program to its first output.
        problem: What it last said when it ended by itself.
    """

    records: int
    measured: int
    complete: bool
    rate: float | None
    cpu_us: float | None
    whole_cpu_us: float | None
    memory_mb: float
    memory_each_mb: list[float]
    first_s: float
    problem: str = ""


@dataclass(frozen=True)
class _Sample:
    at_s: float
    records: int
    cpu_s: float


def measure(peer: Peer, bootstrap: str, topic: str, settings: Settings) -> Throughput:
    """Run the peer until its output has all records, or the limit is over."""
    wanted = min(settings.records, peer.most_records)
    with Run(peer, bootstrap, settings.mode, source=topic) as run, run.program() as program:
        counter = Counter(bootstrap, run.out)
        try:
            samples = _watch(program, counter, wanted, settings.limit_s)
        finally:
            counter.close()
        memory_mb = program.peak_memory_each_mb()
        problem = program.log_tail() if program.ended else ""
    return _evaluate(samples, wanted, settings.skip, memory_mb, problem)


def _watch(program: Program, counter: Counter, wanted: int, limit_s: float) -> list[_Sample]:
    started = time.monotonic()
    samples: list[_Sample] = []
    while True:
        records = counter.total()
        at_s = time.monotonic() - started
        samples.append(_Sample(at_s, records, program.cpu_s()))
        if records >= wanted or at_s > limit_s or program.ended:
            return samples
        time.sleep(POLL_S)


def _evaluate(samples: list[_Sample], wanted: int, skip: float, memory_mb: list[float], problem: str) -> Throughput:
    last = samples[-1]
    first = next((sample for sample in samples if sample.records), last)
    # Of a run that was cut off, the same part is warm-up: of what it did, not of what it should have done.
    warm = next((sample for sample in samples if sample.records >= skip * min(last.records, wanted)), first)
    warm = max(warm, first, key=lambda sample: sample.at_s)
    if warm is last and len(samples) > 1:  # all of it came between two looks: count from the look before
        warm = samples[-2]
    measured = last.records - warm.records
    elapsed_s, cpu_s = last.at_s - warm.at_s, last.cpu_s - warm.cpu_s
    return Throughput(
        records=last.records,
        measured=measured,
        complete=last.records >= wanted,
        rate=measured / elapsed_s if measured and elapsed_s else None,
        cpu_us=cpu_s / measured * 1e6 if measured and cpu_s >= LEAST_CPU_S else None,
        whole_cpu_us=last.cpu_s / last.records * 1e6 if last.records else None,
        memory_mb=sum(memory_mb),
        memory_each_mb=memory_mb,
        first_s=first.at_s,
        problem=problem,
    )
