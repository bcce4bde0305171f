"""A worker that says and tells where tasks are as workers did before that was packed, up to commit 466b351.

    python -m tests.system.old_routes worker APP ...

As the leader it tells everybody the routes by name, and of what it is told it reads those only.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace

import msgspec

from streamflow.cli.main import main
from streamflow.log.api import Shorter
from streamflow.runtime.assignment import words
from streamflow.runtime.assignment.cluster import TaskId

SAID = ("url", "rack", "capacity", "follows", "standby", "lags")
TOLD = ("standby", "warm_up", "routes")


def only(names: Iterable[str], data: bytes) -> bytes:
    fields = msgspec.msgpack.decode(data[1:], strict=False)
    return data[:1] + msgspec.msgpack.encode({name: fields[name] for name in names if name in fields})


def main_of_before() -> int:
    encode: Callable[[words.Says], bytes] = words.Says.encode
    decode, tell = words.Told.decode, words.Teller.tell

    def old_tell(
        self: words.Teller, member_id: str, says: words.Says, standby: Iterable[TaskId], warm_up: Iterable[TaskId]
    ) -> tuple[bytes, list[Shorter]]:
        told, _ = tell(self, member_id, replace(says, unpacks=False), standby, warm_up)
        return only(TOLD, told), []

    words.Says.encode = lambda self: only(SAID, encode(self))  # type: ignore[method-assign]
    words.Told.decode = lambda data: decode(only(TOLD, data) if data else data)  # type: ignore[method-assign]
    words.Teller.tell = old_tell  # type: ignore[method-assign]
    return main()


if __name__ == "__main__":
    sys.exit(main_of_before())
