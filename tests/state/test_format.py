import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.errors import StateCorruptedError
from streamflow.state import format


@given(st.binary(max_size=20), st.none() | st.integers(-(2**63), 2**63 - 1))
def test_a_value_reads_back(payload, expires_ms):
    assert format.unpack(format.pack(payload, expires_ms), table="t") == (payload, expires_ms)


def test_the_layout_is_fixed():
    assert format.pack(b"x") == b"\1x"
    assert format.pack(b"x", 1) == b"\2\0\0\0\0\0\0\0\1x"


@pytest.mark.parametrize("value", [b"", b"\0x", b"\3x", b"\2\0\0"])
def test_an_unknown_format_names_the_table(value):
    with pytest.raises(StateCorruptedError, match="table 'totals'"):
        format.unpack(value, table="totals")
