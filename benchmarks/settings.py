"""The settings of a measurement, read from the environment once; `run.sh` explains them."""

import os
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
APPS = ROOT / "benchmarks" / "apps"
HOST = "127.0.0.1"
PARTITIONS = 4
FIRST_TIMESTAMP_MS = 1_700_000_000_000  # of the orders; each is a millisecond later than the one before
COMPARED = ("map", "table", "table-eos")  # the work that peers share
MODES = (*COMPARED, "busy")


def bench_home() -> Path:
    return Path(os.environ.get("BENCH_HOME") or Path.home() / ".cache" / "streamflow-bench").absolute()


def _number(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        return float(text.replace("_", ""))
    except ValueError:
        raise SystemExit(f"{name}={text!r} is not a number") from None


@dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are those of `run.sh`."""

    mode: str = field(default_factory=lambda: os.environ.get("MODE") or "map")
    records: int = field(default_factory=lambda: int(_number("N", 500_000)))
    skip: float = field(default_factory=lambda: _number("SKIP", 0.1))
    keys: int = field(default_factory=lambda: int(_number("KEYS", 100_000)))
    rounds: int = field(default_factory=lambda: int(_number("ROUNDS", 1)))
    rate: int = field(default_factory=lambda: int(_number("RATE", 1000)))
    latency_s: float = field(default_factory=lambda: _number("LATENCY_S", 10))
    limit_s: float = field(default_factory=lambda: _number("LIMIT_S", 150))

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SystemExit(f"MODE={self.mode!r} is none of {', '.join(MODES)}")
        if not 0 <= self.skip < 1:
            raise SystemExit(f"SKIP={self.skip} is a part of the run: at least 0, below 1")
        if self.records < 1 or self.keys < 1 or self.rounds < 1:
            raise SystemExit("N, KEYS and ROUNDS are at least 1")
