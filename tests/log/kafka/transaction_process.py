"""A process that stops in the middle of a transaction, everything sent but its end: to be killed or stopped then.

`python -m tests.log.kafka.transaction_process SERVERS TRANSACTIONAL_ID OUTPUT SOURCE GROUP MEMBER GENERATION`
"""

import asyncio
import sys

from streamflow.errors import StreamFlowError
from streamflow.log.api import AtomicCommit, Membership, OffsetMark
from streamflow.log.kafka.log import KafkaLog
from streamflow.log.kafka.options import Kafka
from streamflow.log.kafka.transaction_coordinator import TransactionCoordinator
from streamflow.model.record import TopicPartition
from tests.contracts.records import batch


async def main(servers: str, transactional_id: str, output: str, source: str, group: str, member: str, at: str) -> None:
    end = TransactionCoordinator.commit

    async def end_later(*arguments):
        print("sent", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return await end(*arguments)

    TransactionCoordinator.commit = end_later  # type: ignore[method-assign]
    commit = AtomicCommit(
        [(TopicPartition(output, 0), batch(b"of the child"))],
        {TopicPartition(source, 0): OffsetMark(9, "of the child")},
        Membership(group, member, int(at)),
    )
    async with (
        KafkaLog(Kafka(servers=servers), client_id="child") as log,
        log.transactional_producer(transactional_id) as producer,
    ):
        try:
            await producer.commit(commit)
        except StreamFlowError as error:
            print(type(error).__name__, flush=True)
        else:
            print("committed", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
