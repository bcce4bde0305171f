"""The requests of administration: topics, their configuration and records, groups. Spoken by Kafka 2.5 to 4.x."""

from __future__ import annotations

from streamflow.log.kafka.wire import (
    ERROR,
    THROTTLE,
    Api,
    Array,
    Boolean,
    Bytes,
    Int8,
    Int16,
    Int32,
    Int64,
    S,
    Schema,
    each,
)

CREATE_TOPICS = Api(
    "CreateTopics",
    19,
    4,
    Schema(
        (
            "topics",
            each(
                ("name", S),
                ("partitions", Int32),
                ("replication", Int16),
                ("assignments", each(("partition", Int32), ("replicas", Array(Int32)))),
                ("config", each(("name", S), ("value", S))),
            ),
        ),
        ("timeout_ms", Int32),
        ("validate_only", Boolean),
    ),
    Schema(THROTTLE, ("topics", each(("name", S), ERROR, ("error_message", S)))),
)
DELETE_TOPICS = Api(
    "DeleteTopics",
    20,
    3,
    Schema(("topics", Array(S)), ("timeout_ms", Int32)),
    Schema(THROTTLE, ("topics", each(("name", S), ERROR))),
)
DELETE_RECORDS = Api(
    "DeleteRecords",
    21,
    1,
    Schema(
        ("topics", each(("name", S), ("partitions", each(("partition", Int32), ("offset", Int64))))),
        ("timeout_ms", Int32),
    ),
    Schema(
        THROTTLE,
        (
            "topics",
            each(("name", S), ("partitions", each(("partition", Int32), ("low_watermark", Int64), ERROR))),
        ),
    ),
)
DESCRIBE_CONFIGS = Api(
    "DescribeConfigs",
    32,
    2,
    Schema(("resources", each(("kind", Int8), ("name", S), ("keys", Array(S)))), ("synonyms", Boolean)),
    Schema(
        THROTTLE,
        (
            "resources",
            each(
                ERROR,
                ("error_message", S),
                ("kind", Int8),
                ("name", S),
                (
                    "entries",
                    each(
                        ("name", S),
                        ("value", S),
                        ("read_only", Boolean),
                        ("source", Int8),
                        ("sensitive", Boolean),
                        ("synonyms", each(("name", S), ("value", S), ("source", Int8))),
                    ),
                ),
            ),
        ),
    ),
)
LIST_GROUPS = Api(
    "ListGroups",
    16,
    2,
    Schema(),
    Schema(THROTTLE, ERROR, ("groups", each(("group", S), ("protocol_type", S)))),
)
DESCRIBE_GROUPS = Api(
    "DescribeGroups",
    15,
    4,
    Schema(("groups", Array(S)), ("operations", Boolean)),
    Schema(
        THROTTLE,
        (
            "groups",
            each(
                ERROR,
                ("group", S),
                ("state", S),
                ("protocol_type", S),
                ("protocol", S),
                (
                    "members",
                    each(
                        ("member_id", S),
                        ("instance_id", S),
                        ("client_id", S),
                        ("host", S),
                        ("metadata", Bytes),
                        ("assignment", Bytes),
                    ),
                ),
                ("operations", Int32),
            ),
        ),
    ),
)
DELETE_GROUPS = Api(
    "DeleteGroups",
    42,
    1,
    Schema(("groups", Array(S))),
    Schema(THROTTLE, ("results", each(("group", S), ERROR))),
)
