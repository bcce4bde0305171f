"""What goes wrong between one worker and the broker, while both live and the other workers are well connected."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from tests.kafka.proxy import Direction, Proxy, Verdict, api_key
from tests.system.harness import until

PRODUCE, TXN_OFFSET_COMMIT, END_TXN = 0, 28, 26

IN_A_COMMIT: Mapping[str, tuple[int, Verdict]] = {
    "records: answer lost": (PRODUCE, "lose answer"),
    "offsets: answer lost": (TXN_OFFSET_COMMIT, "lose answer"),
    "offsets: never arrive": (TXN_OFFSET_COMMIT, "cut"),
    "offsets: no answer": (TXN_OFFSET_COMMIT, "fall silent"),
    "end: answer lost": (END_TXN, "lose answer"),
    "end: never arrives": (END_TXN, "cut"),
    "end: no answer": (END_TXN, "fall silent"),
}
"""One request of a commit, and what happens to it."""
CUT_OFF: Mapping[str, tuple[Direction, ...]] = {
    "nothing from the worker": ("requests",),
    "nothing from the broker": ("answers",),
    "nothing either way": ("requests", "answers"),
}
"""For longer than session and transaction time-outs: the others take over, and then it is back."""
AT_ONCE = ("all cut", "all forgotten")
FAULTS = (*IN_A_COMMIT, *CUT_OFF, *AT_ONCE)


class Links:
    """The connections of one worker.

    Args:
        proxy: What they go through.
        servers: Where the worker finds it.
        cut_off_s: How long "nothing" lasts.
    """

    def __init__(self, proxy: Proxy, servers: str, cut_off_s: float) -> None:
        self._proxy = proxy
        self.servers = servers
        self._cut_off_s = cut_off_s

    async def happen(self, kind: str) -> None:
        """One of `FAULTS`; returns once it has met a request, or is over."""
        await until(lambda: self._proxy.connections, "the worker connected again, if the last fault has cut it off")
        if kind in IN_A_COMMIT:
            await self._meet(*IN_A_COMMIT[kind])
        elif kind in CUT_OFF:
            self._proxy.hold(*CUT_OFF[kind])
            await asyncio.sleep(self._cut_off_s)
            self._proxy.release()
        elif kind == "all cut":
            self._proxy.cut()
        else:
            assert kind == "all forgotten", kind
            self._proxy.forget()

    async def _meet(self, key: int, verdict: Verdict) -> None:
        met = asyncio.Event()

        def decide(request: bytes) -> Verdict:
            if met.is_set() or api_key(request) != key:
                return "pass"
            met.set()
            return verdict

        self._proxy.on_request = decide
        await until(met.is_set, f"a request {key} of the worker's")
