"""What a RocksDB store notes of itself, in a column family of its own: what it belongs to, and how far it has come."""

from __future__ import annotations

import msgspec

from streamflow.errors import StateCorruptedError
from streamflow.state.identity import Difference, Identity
from streamflow.state.store import Checkpoint

CHECKPOINT = b"checkpoint"
IDENTITY = b"identity"

encode_identity = msgspec.json.Encoder(order="deterministic").encode
_decode = msgspec.json.Decoder(Identity).decode


class UnfitError(Exception):
    """A store belongs to something else; only `RocksStores` sees it.

    Args:
        differing: In what.
    """

    def __init__(self, differing: Difference) -> None:
        super().__init__(differing.text)
        self.differing = differing


def read_identity(data: bytes) -> Identity:
    """What a store says that it belongs to.

    Raises:
        UnfitError: It cannot be read.
    """
    try:
        return _decode(data)
    except msgspec.MsgspecError as exc:
        raise UnfitError(Difference("unknown", f"what it says it belongs to cannot be read ({exc})")) from exc


def read_checkpoint(data: bytes) -> Checkpoint:
    """How far a store says that it has come.

    Raises:
        StateCorruptedError: It cannot be read.
    """
    try:
        return Checkpoint.decode(data)
    except msgspec.MsgspecError as exc:
        raise StateCorruptedError(f"its checkpoint cannot be read ({exc})") from exc
