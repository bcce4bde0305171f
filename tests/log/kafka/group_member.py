"""A group member in a process of its own: `python -m tests.log.kafka.group_member SERVERS GROUP TOPIC SESSION_MS`.

A static name and a rebalance time-out may follow. Prints one line of JSON for every event; a test kills or stops it.
"""

import asyncio
import json
import sys

from streamflow.log.api import Assigned, GroupSettings, Revoked
from streamflow.log.kafka.log import KafkaLog
from streamflow.log.kafka.options import Kafka
from tests.contracts.records import spread


async def main(
    servers: str,
    group_id: str,
    topic: str,
    session_timeout_ms: str,
    instance_id: str | None = None,
    rebalance_timeout_ms: str = "60000",
) -> None:
    settings = GroupSettings(
        session_timeout_ms=int(session_timeout_ms),
        heartbeat_interval_ms=100,
        rebalance_timeout_ms=int(rebalance_timeout_ms),
        instance_id=instance_id,
    )
    async with (
        KafkaLog(Kafka(servers=servers), client_id="member") as log,
        log.group(group_id, frozenset({topic}), spread, settings) as group,
    ):
        while True:
            event = await group.next_event()
            kind = type(event).__name__
            print(json.dumps([kind, sorted(tp.partition for tp in event.partitions)]), flush=True)
            if isinstance(event, Revoked):
                group.revoked(event.partitions)
            elif isinstance(event, Assigned) and group.membership is not None:
                now = group.membership
                print(json.dumps(["Membership", [now.member_id, now.generation]]), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
