"""What a commit writes beside an offset: that it always fits is known at the start."""

import pytest

from streamflow.errors import TopologyError
from streamflow.log.api import OffsetMark
from streamflow.runtime.commit_mark import MAX_METADATA_BYTES, CommitMark, check_mark


def test_a_mark_is_read_as_it_was_written() -> None:
    mark = CommitMark("id", {"totals": 7}, {"totals": 1_700_000_000_000}, {"totals": "0a1b2c3d"})
    assert CommitMark.of(OffsetMark(3, mark.metadata())) == mark
    assert CommitMark.of(OffsetMark(3, "somebody else's")) == CommitMark()
    assert CommitMark.of(OffsetMark(3, '{"c":7}')) == CommitMark()


def test_tables_whose_mark_might_not_fit_one_day_are_refused_at_once() -> None:
    few = [f"table-{number}" for number in range(30)]
    check_mark(few, few)
    many = [f"table-{number}" for number in range(90)]
    assert len(CommitMark("0" * 32, dict.fromkeys(many, 0)).metadata()) < MAX_METADATA_BYTES  # today it would
    with pytest.raises(TopologyError, match="tables are too many"):
        check_mark(many, [])
