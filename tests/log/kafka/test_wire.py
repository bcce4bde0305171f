"""Requests and responses as bytes, and the seams into aiokafka."""

import struct
from io import BytesIO

import pytest
from aiokafka.protocol import admin

from streamflow.errors import (
    AuthorizationError,
    ConfigurationError,
    FatalError,
    LogUnavailableError,
    RetriableError,
    UnknownTopicError,
)
from streamflow.log.kafka import codes, wire, wire_admin, wire_group
from streamflow.log.kafka.hot import FETCH, PRODUCE, FetchById
from streamflow.log.kafka.producer import next_sequence
from streamflow.log.kafka.wire_transaction import (
    API_VERSIONS,
    END_TXN_2,
    PRODUCE_2,
    TXN_OFFSET_COMMIT_2,
    transaction_version,
)
from streamflow.model.record import TopicPartition


def test_an_aiokafka_that_does_not_fit_is_refused_with_the_version_to_pin(monkeypatch):
    monkeypatch.setattr(wire, "version", lambda name: "0.15.0")
    with pytest.raises(ImportError, match=r"aiokafka>=0\.14,<0\.15.*installed: aiokafka 0\.15\.0"):
        wire._check()


def test_aiokafkas_debug_log_shows_no_credentials():
    assert "secret" not in repr(admin.SaslAuthenticateRequest_v0(b"\0ann\0secret"))
    assert "secret" not in repr(admin.SaslAuthenticateRequest_v1(b"\0ann\0secret"))


def test_a_broker_that_does_not_speak_a_version_is_named():
    with pytest.raises(wire.errors.IncompatibleBrokerVersion) as info:
        wire_group.OFFSET_FETCH("g", None, True).prepare({9: (0, 6)})
    error = codes.translated(info.value, "kafka broker h:1")
    assert isinstance(error, ConfigurationError)
    assert "OffsetFetch v7" in str(error)
    assert "Kafka 2.5" in str(error)


@pytest.mark.kafka
@pytest.mark.parametrize(("broker", "transactions"), [("kafka_broker", 2), ("old_kafka_broker", 1)])
async def test_the_broker_speaks_every_request_we_send(broker, transactions, request):
    host, port = request.getfixturevalue(broker).bootstrap.split(":")
    newer = {TXN_OFFSET_COMMIT_2, END_TXN_2, PRODUCE_2} if transactions == 1 else set()
    assert wire_admin.DELETE_GROUPS in wire.Api.known
    connection = await wire.connect(host, int(port), client_id="test")
    try:
        for api in {*wire.Api.known, FETCH, FetchById({}), PRODUCE, PRODUCE_2, API_VERSIONS} - newer:
            lowest, highest = connection._versions[api.key]
            assert lowest <= api.version <= highest, api.name
        assert transaction_version(await connection.send(API_VERSIONS())) == transactions
    finally:
        await connection.close()


def text(value: str) -> bytes:
    return struct.pack(">h", len(value)) + value.encode()


def test_a_fetch_response_is_read():
    part = struct.pack(">ihqqq", 3, 0, 100, 90, 5) + struct.pack(">i", 2) + struct.pack(">qqqq", 7, 1, 8, 2)
    part += struct.pack(">ii", -1, 4) + b"data"
    failed = struct.pack(">ihqqq", 4, 6, -1, -1, -1) + struct.pack(">i", -1) + struct.pack(">ii", -1, -1)
    head = struct.pack(">ihii", 12, 0, 0, 2)
    topics = text("t") + struct.pack(">i", 2) + part + failed + text("topic-ü").replace(b"\x00\x07", b"\x00\x08", 1)
    response = FETCH.decode(_after_header(head + topics + struct.pack(">i", 0)))
    assert response.throttle_time_ms == 12
    assert response.partitions == [
        (TopicPartition("t", 3), 0, 100, 5, [(7, 1), (8, 2)], b"data"),
        (TopicPartition("t", 4), 6, -1, -1, [], b""),
    ]


def test_a_fetch_response_by_ids_is_read():
    known = {"t": b"t" * 16, "topic-ü": b"u" * 16}
    tags = b"\x02\x00\x03abc\x01\x01x"
    part = struct.pack(">ihqqq", 3, 0, 100, 90, 5) + b"\x03" + struct.pack(">qq", 7, 1) + b"\0"
    part += struct.pack(">qq", 8, 2) + tags + struct.pack(">i", -1) + b"\x81\x02" + b"d" * 256 + tags
    failed = struct.pack(">ihqqq", 4, 100, -1, -1, -1) + b"\0" + struct.pack(">i", -1) + b"\0\0"
    topics = b"\x03" + known["t"] + b"\x03" + part + failed + tags + known["topic-ü"] + b"\x01\0"
    response = FetchById(known).decode(_after_header(struct.pack(">ihi", 12, 0, 0) + topics + b"\0"))
    assert response.throttle_time_ms == 12
    assert response.partitions == [
        (TopicPartition("t", 3), 0, 100, 5, [(7, 1), (8, 2)], b"d" * 256),
        (TopicPartition("t", 4), 100, -1, -1, [], b""),
    ]


def test_a_produce_response_is_read():
    parts = struct.pack(">ihqqq", 0, 0, 50, -1, 3) + struct.pack(">ihqqq", 1, 10, -1, -1, -1)
    data = struct.pack(">i", 1) + text("t") + struct.pack(">i", 2) + parts + struct.pack(">i", 9)
    response = PRODUCE.decode(_after_header(data))
    assert response.throttle_time_ms == 9
    assert response.partitions == [(TopicPartition("t", 0), 0, 50, 3), (TopicPartition("t", 1), 10, -1, -1)]


def _after_header(data: bytes) -> BytesIO:
    buffer = BytesIO(b"\0\0\0\1" + data)
    buffer.read(4)
    return buffer


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (29, AuthorizationError),
        (30, AuthorizationError),
        (3, UnknownTopicError),
        (35, FatalError),
        (6, RetriableError),
        (74, RetriableError),
        (-1, RetriableError),
        (9999, RetriableError),
    ],
)
def test_what_a_code_means(code, kind):
    error = codes.error(code, "read topic t")
    assert type(error) is kind
    assert str(error).startswith("read topic t: ")


def test_a_code_that_nobody_knows_is_named_by_its_number():
    assert "9999" in codes.name(9999)


def test_exceptions_of_others_are_translated():
    assert isinstance(codes.translated(TimeoutError(), "x"), LogUnavailableError)
    assert isinstance(codes.translated(ConnectionRefusedError(), "x"), LogUnavailableError)
    assert isinstance(codes.translated(wire.errors.SaslAuthenticationFailed("secret"), "x"), AuthorizationError)
    assert "secret" not in str(codes.translated(wire.errors.SaslAuthenticationFailed("secret"), "x"))


@pytest.mark.parametrize(
    ("sequence", "records", "expected"),
    [(0, 1, 1), (2**31 - 2, 1, 2**31 - 1), (2**31 - 1, 1, 0), (2**31 - 3, 10, 7), (5, 2**31 - 1, 4)],
)
def test_sequence_numbers_wrap_to_zero_as_the_broker_wants_it(sequence, records, expected):
    assert next_sequence(sequence, records) == expected


def test_a_produce_request_of_transaction_version_2_is_written():
    call = PRODUCE_2([(TopicPartition("t", 3), b"x" * 200)], timeout_ms=9, transactional_id="id")
    wanted = b"\x03id" + struct.pack(">hi", -1, 9) + b"\x02" + b"\x02t" + b"\x02" + struct.pack(">i", 3)
    assert call.encode() == wanted + b"\xc9\x01" + b"x" * 200 + b"\0\0\0"


def test_its_response_is_read_with_the_records_that_were_refused_and_tags_from_the_future():
    refused = struct.pack(">i", 7) + b"\x04why\0" + struct.pack(">i", 8) + b"\0\0"
    part = struct.pack(">ihqqq", 3, 87, -1, -1, 5) + b"\x03" + refused + b"\x06wrong" + b"\x01\0\x03abc"
    fine = struct.pack(">ihqqq", 4, 0, 42, -1, 5) + b"\x01\0\0"
    data = b"\x02" + b"\x02t" + b"\x03" + part + fine + b"\0" + struct.pack(">i", 17) + b"\0"
    response = PRODUCE_2.decode(BytesIO(data))
    assert response.throttle_time_ms == 17
    assert [tuple(each) for each in response.partitions] == [
        (TopicPartition("t", 3), 87, -1, 5),
        (TopicPartition("t", 4), 0, 42, 5),
    ]


@pytest.mark.parametrize(
    ("features", "produce", "version"),
    [
        ({"transaction.version": 2}, 12, 2),
        ({"transaction.version": 1}, 12, 1),
        ({}, 12, 1),
        ({"transaction.version": 2}, 11, 1),
    ],
)
def test_version_2_is_spoken_where_the_cluster_has_agreed_and_the_broker_can(features, produce, version):
    assert transaction_version(wire.Response(features=features, highest={0: produce, 26: 5, 28: 5})) == version
