"""The requests of a Kafka transaction: what aiokafka lacks, or speaks in versions that are not fenced.

Transaction version 1 (KIP-98, KIP-447) is spoken by Kafka 2.5 to 4.x: partitions and offsets are added by requests of
their own. Version 2 (KIP-890) by Kafka 4: `PRODUCE_2` and `TXN_OFFSET_COMMIT_2` add them by themselves, and `END_TXN_2`
answers with the identity of the next transaction. Produce is packed by hand, as in `log/kafka/hot.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from io import BytesIO
from types import SimpleNamespace
from typing import Any

from streamflow.log.kafka import wire
from streamflow.log.kafka.hot import ProducedPartition, ProduceResponse
from streamflow.log.kafka.wire import (
    CS,
    ERROR,
    TAGS,
    THROTTLE,
    Api,
    Array,
    Boolean,
    Call,
    CompactArray,
    Int16,
    Int32,
    Int64,
    S,
    Schema,
    each,
)
from streamflow.model.record import TopicPartition

ADD_PARTITIONS_TO_TXN = Api(
    "AddPartitionsToTxn",
    24,
    1,
    Schema(
        ("transactional_id", S),
        ("producer_id", Int64),
        ("producer_epoch", Int16),
        ("topics", each(("name", S), ("partitions", Array(Int32)))),
    ),
    Schema(THROTTLE, ("topics", each(("name", S), ("partitions", each(("partition", Int32), ERROR))))),
)
ADD_OFFSETS_TO_TXN = Api(
    "AddOffsetsToTxn",
    25,
    1,
    Schema(("transactional_id", S), ("producer_id", Int64), ("producer_epoch", Int16), ("group", S)),
    Schema(THROTTLE, ERROR),
)
END_TXN = Api(
    "EndTxn",
    26,
    1,
    Schema(("transactional_id", S), ("producer_id", Int64), ("producer_epoch", Int16), ("committed", Boolean)),
    Schema(THROTTLE, ERROR),
)
_TXN_OFFSETS = Schema(
    ("transactional_id", CS),
    ("group", CS),
    ("producer_id", Int64),
    ("producer_epoch", Int16),
    ("generation", Int32),
    ("member_id", CS),
    ("instance_id", CS),
    (
        "topics",
        each(
            ("name", CS),
            (
                "partitions",
                each(("partition", Int32), ("offset", Int64), ("leader_epoch", Int32), ("metadata", CS), flexible=True),
            ),
            flexible=True,
        ),
    ),
    TAGS,
)
_TXN_OFFSETS_ANSWER = Schema(
    THROTTLE,
    ("topics", each(("name", CS), ("partitions", each(("partition", Int32), ERROR, flexible=True)), flexible=True)),
    TAGS,
)
TXN_OFFSET_COMMIT = Api("TxnOffsetCommit", 28, 3, _TXN_OFFSETS, _TXN_OFFSETS_ANSWER, flexible=True)


# --- transaction version 2 ---------------------------------------------------------------------------------------

TXN_OFFSET_COMMIT_2 = Api("TxnOffsetCommit", 28, 5, _TXN_OFFSETS, _TXN_OFFSETS_ANSWER, flexible=True)
END_TXN_2 = Api(
    "EndTxn",
    26,
    5,
    Schema(("transactional_id", CS), ("producer_id", Int64), ("producer_epoch", Int16), ("committed", Boolean), TAGS),
    Schema(THROTTLE, ERROR, ("producer_id", Int64), ("producer_epoch", Int16), TAGS),
    flexible=True,
)

_FIELDS = struct.Struct(">hi")
_INDEX = struct.Struct(">i")
_ANSWER = struct.Struct(">ihqqq")


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _text(value: str) -> bytes:
    data = value.encode()
    return _varint(len(data) + 1) + data


def _skip_tags(data: bytes, at: int) -> int:
    count, at = _read_varint(data, at)
    for _ in range(count):
        _tag, at = _read_varint(data, at)
        size, at = _read_varint(data, at)
        at += size
    return at


class _Produce2:
    name, key, version, flexible = "Produce", 0, 12, True

    def __call__(
        self, batches: Iterable[tuple[TopicPartition, bytes]], *, timeout_ms: int, transactional_id: str | None
    ) -> Call:
        """As `hot.PRODUCE`; the partitions become part of the transaction by it."""
        topics: dict[str, list[tuple[int, bytes]]] = {}
        for (topic, partition), data in batches:
            topics.setdefault(topic, []).append((partition, data))
        name = b"\0" if transactional_id is None else _text(transactional_id)
        parts = [name, _FIELDS.pack(-1, timeout_ms), _varint(len(topics) + 1)]
        for topic, packed in topics.items():
            parts += (_text(topic), _varint(len(packed) + 1))
            for partition, data in packed:
                parts += (_INDEX.pack(partition), _varint(len(data) + 1), data, b"\0")
            parts.append(b"\0")
        parts.append(b"\0")
        return Call(self, b"".join(parts))

    def decode(self, buffer: BytesIO) -> ProduceResponse:
        """Read a response."""
        data, at = buffer.getvalue(), buffer.tell()
        topic_count, at = _read_varint(data, at)
        partitions: list[ProducedPartition] = []
        for _ in range(topic_count - 1):
            length, at = _read_varint(data, at)
            topic = data[at : at + length - 1].decode()
            count, at = _read_varint(data, at + length - 1)
            for _ in range(count - 1):
                at = self._read_partition(data, at, topic, partitions)
            at = _skip_tags(data, at)
        (throttle,) = _INDEX.unpack_from(data, at)
        return ProduceResponse(throttle, partitions)

    def _read_partition(self, data: bytes, at: int, topic: str, into: list[ProducedPartition]) -> int:
        partition, error, base_offset, _append_time, log_start = _ANSWER.unpack_from(data, at)
        into.append(ProducedPartition(TopicPartition(topic, partition), error, base_offset, log_start))
        errors, at = _read_varint(data, at + _ANSWER.size)
        for _ in range(errors - 1):  # which records of the batch were refused
            length, at = _read_varint(data, at + 4)
            at = _skip_tags(data, at + max(length - 1, 0))
        length, at = _read_varint(data, at)
        return _skip_tags(data, at + max(length - 1, 0))


PRODUCE_2 = _Produce2()


# --- what the cluster speaks -------------------------------------------------------------------------------------

_API = each(("key", Int16), ("lowest", Int16), ("highest", Int16), flexible=True)
_FEATURES = CompactArray(("name", CS), ("highest", Int16), ("lowest", Int16), TAGS)
_FINALIZED_FEATURES = 2  # the tag under which they stand


class _FeaturesCall(Call):
    """Its response has the oldest header, so that any client can read it."""

    def parse_response_header(self, buffer: BytesIO) -> SimpleNamespace:
        return SimpleNamespace(correlation_id=_INDEX.unpack(buffer.read(4))[0])


class _ApiVersions:
    name, key, version, flexible = "ApiVersions", 18, 3, True

    _request = Schema(("software_name", CS), ("software_version", CS), TAGS)
    _response = Schema(ERROR, ("apis", _API), THROTTLE, TAGS)

    def __call__(self) -> Call:
        """Ask what a broker speaks, and which features its cluster has agreed on (KIP-584)."""
        return _FeaturesCall(self, self._request.encode(("streamflow", "1", {})))

    def decode(self, buffer: BytesIO) -> wire.Response:
        """Read a response: `error_code`, `highest` version by API key, level by feature in `features`."""
        decoded: Any = self._response.decode(buffer)
        error_code, apis, throttle_time_ms, tags = decoded
        features: Any = _FEATURES.decode(BytesIO(tags[_FINALIZED_FEATURES])) if _FINALIZED_FEATURES in tags else []
        return wire.Response(
            error_code=error_code,
            throttle_time_ms=throttle_time_ms,
            highest={key: highest for key, _lowest, highest, _ in apis},
            features={name: level for name, level, _lowest, _ in features},
        )


API_VERSIONS = _ApiVersions()


def transaction_version(versions: wire.Response) -> int:
    """The version to speak with a cluster: 2 where it has agreed on it and this broker speaks all of it.

    Args:
        versions: The response to `API_VERSIONS`.
    """
    wanted = (PRODUCE_2, TXN_OFFSET_COMMIT_2, END_TXN_2)
    speaks = all(versions.highest.get(api.key, -1) >= api.version for api in wanted)
    return 2 if speaks and versions.features.get("transaction.version", 0) >= 2 else 1
