"""Connections that break, in one direction or both, at any request of a commit: still the fold of what came in."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kafka.broker import HOST, Broker
from tests.kafka.proxy import Proxy
from tests.oracle.chaos import PAUSE_S, Chaos
from tests.oracle.links import FAULTS, Links
from tests.oracle.test_processes import PER_S, SEED
from tests.ports import free_port
from tests.system.harness import System

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.kafka, pytest.mark.timeout(240)]


async def test_exactly_once_over_broken_connections(make_broker: Callable[..., Broker], tmp_path: Path) -> None:
    """One worker of two is behind a bad network; the other one takes over and gives back."""
    port = free_port()
    broker = make_broker(proxied_ports=[port])
    target = broker.proxied()
    async with Proxy(port, target) as proxy, System(tmp_path, f"kafka://{broker.bootstrap}") as system:
        links = Links(proxy, f"{HOST}:{port}", PAUSE_S)
        chaos = Chaos(system, SEED, "exactly_once", kafka={"request_timeout_ms": 2000}, links=links)
        await chaos.begin(2)
        faults = list(FAULTS)
        random.Random(SEED).shuffle(faults)
        async with chaos.load(per_s=PER_S):
            for kind in faults:
                await chaos.pass_time()
                await chaos.happen(kind)
        await chaos.finish()
        assert set(FAULTS) <= set(chaos.did)
