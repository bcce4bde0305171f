"""What one worker asks another about a table, and what it is answered: msgpack by field name.

Unknown fields are passed over and missing ones have defaults, so that workers of two versions understand each other.
Keys travel as the store has them, values as the changelog has them.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

import msgspec

from streamflow.errors import ConfigurationError
from streamflow.processing.remote import LONGEST_READ_S

PATH = "/-/table-reads"
"""Where a worker answers other workers."""


class Question(msgspec.Struct, frozen=True, omit_defaults=True):
    """Committed values of some partitions of one table: of a key, of a set's members, or of a range; one of these.

    Attributes:
        table: Its name.
        partitions: Which; none of them twice.
        order: How the asker writes keys; see `KeyOrder.name`.
        key: One key; None for a range.
        under: A key of a set table, as its source has it: its members are asked for.
        low: Where the range begins.
        high: Where it ends, exclusive; None for the end.
        limit: Most rows to give, >= 1.
        at: Positions that the partitions must have come to.
        stale_ok: Whether a standby may answer.
        timeout_s: Seconds to wait for what is being restored, or for `at`; 0 to 60.
        app: Id of the asker's app; empty from a version that does not say it.
        topic_id: Tells the log, see `CommittedReads.topic_id`: another one may have an app of the same id. Empty from a
            version that does not say it, and where the log has none.
        partly: Whether to answer for those of the partitions that can be read, if there is one. A version before
            answers for all or for none.
    """

    table: str
    partitions: tuple[int, ...]
    order: str = ""
    key: bytes | None = None
    under: bytes | None = None
    low: bytes = b""
    high: bytes | None = None
    limit: Annotated[int, msgspec.Meta(ge=1)] = 1
    at: str = ""
    stale_ok: bool = False
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=LONGEST_READ_S)] = 0.0
    app: str = ""
    topic_id: str = ""
    partly: bool = False

    def __post_init__(self) -> None:
        # Who is asked whether this may be read is told one key: it has to be the one that is read.
        if self.key is not None and (self.under is not None or self.low or self.high is not None):
            raise ValueError("it asks for a key and for a range at once")
        if self.under is not None and self.high is not None:
            raise ValueError("it asks for the members of a key and for a range at once")
        if len(set(self.partitions)) != len(self.partitions):
            raise ValueError("it asks for a partition twice")

    def query(self) -> str:
        """As part of an address."""
        return "q=" + base64.urlsafe_b64encode(_encode(self)).decode().rstrip("=")

    @classmethod
    def of_query(cls, text: str) -> Question:
        """Read the value of `q`.

        Raises:
            ConfigurationError: It is something else.
        """
        try:
            return _decode_question(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        except (binascii.Error, ValueError, msgspec.MsgspecError) as exc:
            raise ConfigurationError(f"this is no read of a table: {exc}") from exc


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What there is.

    Attributes:
        rows: Store keys and values in key order.
        is_complete: Whether there are no more rows in the range.
        position: What the partitions had come to when they were read, as text.
        lag: Records that the answer may lack, where a standby gave it; None from owners.
        without: Partitions that it leaves out, because they cannot be read here now, and why.
    """

    rows: list[tuple[bytes, bytes]]
    is_complete: bool = True
    position: str = ""
    lag: int | None = None
    without: dict[int, str] = {}

    def data(self) -> bytes:
        """As bytes."""
        return _encode(self)

    @classmethod
    def of_data(cls, data: bytes) -> Answer:
        """Read `data`; raises `msgspec.MsgspecError`."""
        return _decode_answer(data)


_encode = msgspec.msgpack.Encoder().encode
_decode_question = msgspec.msgpack.Decoder(Question).decode
_decode_answer = msgspec.msgpack.Decoder(Answer).decode
