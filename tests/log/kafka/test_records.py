"""From fetched bytes to batches, without a broker."""

import struct

import hypothesis
import hypothesis.strategies as st
import pytest

from streamflow.errors import LogCorruptedError
from streamflow.log import codec
from streamflow.log.batch import BatchBuilder
from streamflow.log.kafka.records import open_records
from streamflow.model.record import TopicPartition

TP = TopicPartition("t", 0)
COMMIT, ABORT = b"\x00\x00\x00\x01", b"\x00\x00\x00\x00"


def stored(
    base: int, values: list[bytes], *, pid=-1, transactional=False, control=False, compression=codec.NONE
) -> bytes:
    builder = BatchBuilder(compression, 1 << 20)
    for value in values:
        builder.append(1, value if control else None, value, [])
    data = bytearray(builder.seal().stamped(pid, 0, 0, transactional=transactional or control))
    if control:
        data[22] |= 0x20
        struct.pack_into(">I", data, 17, codec.crc32c(memoryview(data)[21:]))
    codec.set_base_offset(data, base)
    return bytes(data)


def marker(base: int, pid: int, kind: bytes) -> bytes:
    return stored(base, [kind], pid=pid, control=True)


def values(opened) -> list[bytes | None]:
    return [record.value for batch in opened.batches for record in batch.open()]


def test_whole_batches_come_and_the_cut_off_one_waits():
    data = stored(0, [b"a", b"b"]) + stored(2, [b"c"]) + stored(3, [b"d"])[:-1]
    opened = open_records(TP, data, 0, ())
    assert values(opened) == [b"a", b"b", b"c"]
    assert (opened.next_offset, opened.error) == (3, None)
    assert opened.size_bytes == len(stored(0, [b"a", b"b"]) + stored(2, [b"c"]))


@hypothesis.given(cut=st.integers(0, 400))
def test_bytes_may_end_anywhere(cut):
    data = stored(0, [b"a", b"b"]) + stored(2, [b"c"]) + stored(3, [b"d"])
    opened = open_records(TP, data[:cut], 0, ())
    assert opened.error is None
    assert values(opened) == [b"a", b"b", b"c", b"d"][: opened.next_offset]


def test_the_first_batch_is_skipped_up_to_the_position():
    data = stored(10, [b"a", b"b", b"c"]) + stored(13, [b"d"])
    assert values(open_records(TP, data, 12, ())) == [b"c", b"d"]
    assert values(open_records(TP, data, 13, ())) == [b"d"]
    assert open_records(TP, stored(10, [b"a"]), 11, ()).next_offset == 11


@pytest.mark.parametrize("compression", range(5))
def test_a_damaged_batch_is_an_error_and_what_is_before_it_is_not(compression):
    good, bad = stored(0, [b"a"]), bytearray(stored(1, [b"b" * 100] * 10, compression=compression))
    bad[-3] ^= 1
    opened = open_records(TP, good + bytes(bad), 0, ())
    assert values(opened) == [b"a"]
    assert opened.next_offset == 1
    assert isinstance(opened.error, LogCorruptedError)
    assert "t-0" in str(opened.error)
    assert "offset 1" in str(opened.error)


@hypothesis.given(at=st.integers(21, 90), bit=st.integers(0, 7))
def test_no_flipped_bit_gets_through(at, bit):
    data = bytearray(stored(0, [b"some value of a record"]))
    data[min(at, len(data) - 1)] ^= 1 << bit
    assert open_records(TP, bytes(data), 0, ()).error is not None


def test_an_old_message_format_is_named():
    data = bytearray(stored(5, [b"a"]))
    data[16] = 1
    opened = open_records(TP, bytes(data), 5, ())
    assert "message format 1" in str(opened.error)


def test_aborted_transactions_are_left_out_between_their_first_offset_and_their_marker():
    data = (
        stored(0, [b"plain"])
        + stored(1, [b"aborted"], pid=7, transactional=True)
        + stored(2, [b"committed"], pid=8, transactional=True)
        + marker(3, 7, ABORT)
        + stored(4, [b"next of 7"], pid=7, transactional=True)
        + marker(5, 8, COMMIT)
        + marker(6, 7, COMMIT)
        + stored(7, [b"idempotent"], pid=7)
    )
    opened = open_records(TP, data, 0, [(7, 1)])
    assert values(opened) == [b"plain", b"committed", b"next of 7", b"idempotent"]
    assert opened.next_offset == 8
    assert b"aborted" in values(open_records(TP, data, 0, ()))


def test_the_same_producer_may_abort_twice():
    data = (
        stored(0, [b"x"], pid=7, transactional=True)
        + marker(1, 7, ABORT)
        + stored(2, [b"good"], pid=7, transactional=True)
        + marker(3, 7, COMMIT)
        + stored(4, [b"y"], pid=7, transactional=True)
        + marker(5, 7, ABORT)
    )
    opened = open_records(TP, data, 0, [(7, 4), (7, 0)])
    assert values(opened) == [b"good"]
    assert opened.next_offset == 6


def test_markers_alone_move_the_position():
    opened = open_records(TP, marker(4, 7, COMMIT), 4, ())
    assert (opened.batches, opened.next_offset) == ([], 5)


def test_holes_of_compaction_are_passed_over():
    opened = open_records(TP, stored(100, [b"a"]) + stored(250, [b"b"]), 40, ())
    assert values(opened) == [b"a", b"b"]
    assert opened.next_offset == 251
