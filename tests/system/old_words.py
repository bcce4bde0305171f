"""A worker that speaks to its group on Kafka as workers did before they had words, up to commit 352dfaa.

    python -m tests.system.old_words worker APP ...

It says nothing with its subscription, does not read what others say, tells only the topics that nobody reads, a name a
line, and fails at what is no text, as those did.
"""

import sys

from streamflow.cli.main import main
from streamflow.log.kafka import assignment, member, wire_group
from streamflow.log.kafka.assignment import Claim, Share, flat, nested
from streamflow.log.kafka.user_data import Answer
from streamflow.log.kafka.wire import Call, Newest
from streamflow.model.record import TopicPartition


def write_claim(topics: frozenset[str], owned: frozenset[TopicPartition], generation: int, says: bytes) -> bytes:
    return wire_group.encode_subscription(sorted(topics), b"", nested(owned), generation)


def read_claim(member_id: str, instance_id: str | None, metadata: bytes) -> Claim:
    topics, _, owned, generation = wire_group.decode_subscription(metadata)
    return Claim(member_id, frozenset(topics), flat(owned), generation)


def read_share(data: bytes) -> Share:
    assigned, lines = wire_group.decode_assignment(data)
    return Share(flat(assigned), Answer(unread=lines.decode().split()), is_spoken=False)


def oldest(self: Newest, versions: object) -> Call:
    return self._calls[-1].prepare(versions)


if __name__ == "__main__":
    for changed in (write_claim, read_claim, read_share):
        for module in (assignment, member):
            setattr(module, changed.__name__, changed)
    Newest.prepare = oldest
    sys.exit(main())
