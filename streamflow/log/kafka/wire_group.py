"""The requests of a consumer group (KIP-62, 345, 394, 447, 814), and what members write into them.

One version each, as in `log/kafka/wire.py`. JoinGroup is spoken in two: version 9 (Kafka 3.2) tells a static member
that it leads, when it comes back while the group stands still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from streamflow.log.kafka.wire import (
    CS,
    ERROR,
    TAGS,
    THROTTLE,
    Api,
    Array,
    Boolean,
    Bytes,
    Call,
    CompactArray,
    CompactBytes,
    Int16,
    Int32,
    Int64,
    Newest,
    S,
    Schema,
    each,
)

JOIN_GROUP = Api(
    "JoinGroup",
    11,
    5,
    Schema(
        ("group", S),
        ("session_timeout_ms", Int32),
        ("rebalance_timeout_ms", Int32),
        ("member_id", S),
        ("instance_id", S),
        ("protocol_type", S),
        ("protocols", each(("name", S), ("metadata", Bytes))),
    ),
    Schema(
        THROTTLE,
        ERROR,
        ("generation", Int32),
        ("protocol", S),
        ("leader", S),
        ("member_id", S),
        ("members", each(("member_id", S), ("instance_id", S), ("metadata", Bytes))),
    ),
)
JOIN_GROUP_9 = Api(
    "JoinGroup",
    11,
    9,
    Schema(
        ("group", CS),
        ("session_timeout_ms", Int32),
        ("rebalance_timeout_ms", Int32),
        ("member_id", CS),
        ("instance_id", CS),
        ("protocol_type", CS),
        ("protocols", each(("name", CS), ("metadata", CompactBytes), flexible=True)),
        ("reason", CS),
        TAGS,
    ),
    Schema(
        THROTTLE,
        ERROR,
        ("generation", Int32),
        ("protocol_type", CS),
        ("protocol", CS),
        ("leader", CS),
        ("skip_assignment", Boolean),
        ("member_id", CS),
        ("members", each(("member_id", CS), ("instance_id", CS), ("metadata", CompactBytes), flexible=True)),
        TAGS,
    ),
    flexible=True,
)
SYNC_GROUP = Api(
    "SyncGroup",
    14,
    3,
    Schema(
        ("group", S),
        ("generation", Int32),
        ("member_id", S),
        ("instance_id", S),
        ("assignments", each(("member_id", S), ("assignment", Bytes))),
    ),
    Schema(THROTTLE, ERROR, ("assignment", Bytes)),
)
HEARTBEAT = Api(
    "Heartbeat",
    12,
    3,
    Schema(("group", S), ("generation", Int32), ("member_id", S), ("instance_id", S)),
    Schema(THROTTLE, ERROR),
)
LEAVE_GROUP = Api(
    "LeaveGroup",
    13,
    3,
    Schema(("group", S), ("members", each(("member_id", S), ("instance_id", S)))),
    Schema(THROTTLE, ERROR, ("members", each(("member_id", S), ("instance_id", S), ERROR))),
)
OFFSET_COMMIT = Api(
    "OffsetCommit",
    8,
    7,
    Schema(
        ("group", S),
        ("generation", Int32),
        ("member_id", S),
        ("instance_id", S),
        (
            "topics",
            each(
                ("name", S),
                (
                    "partitions",
                    each(("partition", Int32), ("offset", Int64), ("leader_epoch", Int32), ("metadata", S)),
                ),
            ),
        ),
    ),
    Schema(THROTTLE, ("topics", each(("name", S), ("partitions", each(("partition", Int32), ERROR))))),
)
OFFSET_FETCH = Api(
    "OffsetFetch",
    9,
    7,
    Schema(
        ("group", CS),
        ("topics", CompactArray(("name", CS), ("partitions", CompactArray(Int32)), TAGS)),
        ("require_stable", Boolean),
        TAGS,
    ),
    Schema(
        THROTTLE,
        (
            "topics",
            each(
                ("name", CS),
                (
                    "partitions",
                    each(
                        ("partition", Int32),
                        ("offset", Int64),
                        ("leader_epoch", Int32),
                        ("metadata", CS),
                        ERROR,
                        flexible=True,
                    ),
                ),
                flexible=True,
            ),
        ),
        ERROR,
        TAGS,
    ),
    flexible=True,
)


def join_group(
    group_id: str,
    session_timeout_ms: int,
    rebalance_timeout_ms: int,
    member_id: str,
    instance_id: str | None,
    protocol: str,
    metadata: bytes,
) -> Call:
    """Join, in the newest version that the broker speaks; in the older one nothing says `skip_assignment`."""
    fields = (group_id, session_timeout_ms, rebalance_timeout_ms, member_id, instance_id, "consumer")
    return Newest(JOIN_GROUP_9(*fields, [(protocol, metadata, {})], None), JOIN_GROUP(*fields, [(protocol, metadata)]))


_SUBSCRIPTION = Schema(
    ("version", Int16),
    ("topics", Array(S)),
    ("user_data", Bytes),
    ("owned", each(("topic", S), ("partitions", Array(Int32)))),
    ("generation", Int32),
)
_ASSIGNMENT = Schema(
    ("version", Int16), ("assigned", each(("topic", S), ("partitions", Array(Int32)))), ("user_data", Bytes)
)
_SUBSCRIPTION_VERSION = 2  # with owned partitions (KIP-429) and the generation they were owned in (KIP-792)


def encode_subscription(
    topics: Sequence[str], user_data: bytes, owned: Mapping[str, Sequence[int]], generation: int
) -> bytes:
    """What a member says when it joins."""
    encoded: bytes = _SUBSCRIPTION.encode([_SUBSCRIPTION_VERSION, topics, user_data, list(owned.items()), generation])
    return encoded


def decode_subscription(data: bytes) -> tuple[list[str], bytes, list[tuple[str, list[int]]], int]:
    """Topics, user data, owned partitions per topic, and the generation these were owned in."""
    decoded: Any = _SUBSCRIPTION.decode(BytesIO(data))
    _version, topics, user_data, owned, generation = decoded
    return topics, user_data or b"", owned, generation


def encode_assignment(assigned: Mapping[str, Sequence[int]], user_data: bytes) -> bytes:
    """What the leader gives a member."""
    encoded: bytes = _ASSIGNMENT.encode([0, list(assigned.items()), user_data])
    return encoded


def decode_assignment(data: bytes) -> tuple[list[tuple[str, list[int]]], bytes]:
    """Partitions per topic, and user data; a member without any partitions may get no bytes at all."""
    decoded: Any = _ASSIGNMENT.decode(BytesIO(data)) if data else (0, [], b"")
    _version, assigned, user_data = decoded
    return assigned, user_data or b""
