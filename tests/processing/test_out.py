import pytest

from streamflow.processing.out import INHERIT, Out


def test_what_is_left_out_is_inherited():
    out = Out(1)
    assert (out.value, out.key, out.timestamp_ms, out.headers, out.partition) == (1, INHERIT, INHERIT, (), None)
    assert repr(INHERIT) == "INHERIT"


def test_none_as_a_key_is_a_null_key():
    assert Out(None, key=None).key is None
    assert Out(1, key=None) != Out(1)


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        Out(1).value = 2
