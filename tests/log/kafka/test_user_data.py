"""Words between members in what the group protocol leaves to its users: nobody fails by what is written there."""

import msgspec
import pytest

from streamflow.log.kafka.user_data import Answer, Spoken, read_answer, read_spoken, write

VERSION = write(Spoken())[:1]


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xfe", b"topic-a\ntopic-b", VERSION, VERSION + b"\xc1", VERSION + msgspec.msgpack.encode([1, 2])],
    ids=["nothing", "another version", "lines of before", "a version alone", "no msgpack", "another shape"],
)
def test_what_is_something_else_is_passed_over(data: bytes) -> None:
    assert read_spoken(data) is None
    assert read_answer(data) is None


def test_text_that_is_not_utf_8_is_passed_over() -> None:
    assert read_answer(VERSION + b"\x81\xa6unread\x91\xa1a") == Answer(unread=["a"])
    assert read_answer(VERSION + b"\x81\xa6unread\x91\xa1\xff") is None
