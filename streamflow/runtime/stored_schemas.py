"""Schemas that a table's stored values need: loaded while it is opened, since reads of a table do not wait."""

from __future__ import annotations

from itertools import islice

import anyio.to_thread

from streamflow.errors import StateError
from streamflow.model.serde import BoundCodec, NeedSchema
from streamflow.state.overlay import Overlay

_VALUES_AT_ONCE = 10_000


async def load_schemas(overlay: Overlay, codec: BoundCodec[object]) -> None:
    """Let a codec load every schema that a restored table needs, where it is one that has to load some.

    Args:
        overlay: The table, restored.
        codec: Its values.

    Raises:
        StateError: A schema cannot be loaded, or is still missing once it was.
        StateCorruptedError: The store is damaged.

    Cancellation: what was loaded is known to the codec.
    """
    load = codec.load_schema
    if load is None:
        return
    start: bytes | None = b""
    tried: set[int | str] = set()
    while start is not None:
        start, missing = await anyio.to_thread.run_sync(_look, overlay, codec, start)
        if missing is None:
            tried.clear()
            continue
        where = f"table {overlay.name!r}, partition {overlay.partition}: stored values need schema {missing}"
        if missing in tried:
            raise StateError(f"{where}, which their serializer still asks for when load_schema({missing!r}) is done")
        tried.add(missing)
        try:
            await load(missing)
        except Exception as exc:
            raise StateError(
                f"{where}, and loading it raised {type(exc).__name__}: {exc}. Nothing was processed; start the worker "
                "again when it can be had"
            ) from exc


def _look(overlay: Overlay, codec: BoundCodec[object], start: bytes) -> tuple[bytes | None, int | str | None]:
    """Try to read some values from a store key on; runs in a thread.

    Returns:
        Where to go on, None at the end, and the schema that is missing there.
    """
    entries = overlay.entries(start, None)
    for store_key, payload in islice(entries, _VALUES_AT_ONCE):
        try:
            codec.decode(payload)
        except NeedSchema as need:
            return store_key, need.id
        except Exception:  # of another kind: it is told to who reads it
            continue
    return next((store_key for store_key, _ in entries), None), None
