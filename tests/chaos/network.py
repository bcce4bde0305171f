"""The ways between each worker and each broker, to be cut one by one: each has a listener and a proxy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence

from tests.kafka.broker import HOST, Cluster
from tests.kafka.proxy import Direction, Proxy, Verdict, api_key


class Network:
    """The ways of one worker.

    Args:
        proxies: What stands before each broker, by node.
    """

    def __init__(self, proxies: Mapping[int, Proxy]) -> None:
        self._proxies = proxies

    @property
    def servers(self) -> str:
        """Where the worker finds the brokers."""
        return ",".join(f"{HOST}:{proxy.port}" for proxy in self._proxies.values())

    def hold(self, directions: Sequence[Direction], nodes: Collection[int] | None = None) -> None:
        """Let nothing through in these directions, to and from some brokers or all, until `release`."""
        for node in self._proxies if nodes is None else nodes:
            self._proxies[node].hold(*directions)

    def release(self) -> None:
        """Let everything through, also what was held."""
        for proxy in self._proxies.values():
            proxy.release()

    @contextlib.contextmanager
    def holding_next(self, keys: Collection[int]) -> Iterator[asyncio.Event]:
        """Hold the next request of one of these kinds until the end of the block; what it yields is set when it came.

        Only that request and those behind it on its connection wait.
        """
        came, goes_on = asyncio.Event(), asyncio.Event()

        def decide(request: bytes) -> Verdict:
            if came.is_set() or api_key(request) not in keys:
                return "pass"
            came.set()
            return goes_on

        for proxy in self._proxies.values():
            proxy.on_request = decide
        try:
            yield came
        finally:
            for proxy in self._proxies.values():
                proxy.on_request = lambda request: "pass"
            goes_on.set()


@contextlib.asynccontextmanager
async def networks(cluster: Cluster, ports: Mapping[int, Sequence[int]]) -> AsyncIterator[list[Network]]:
    """The networks of as many workers as each broker has ports for.

    Args:
        cluster: Running, with these `proxied_ports`.
        ports: Of each node.
    """
    async with contextlib.AsyncExitStack() as stack:
        places = range(len(next(iter(ports.values()))))
        made: list[dict[int, Proxy]] = [{} for _ in places]
        for node, of_node in ports.items():
            for place in places:
                proxy = Proxy(of_node[place], cluster.brokers[node].proxied(place))
                made[place][node] = await stack.enter_async_context(proxy)
        yield [Network(proxies) for proxies in made]
