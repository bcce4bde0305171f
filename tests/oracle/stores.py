"""The local stores of an app whose workers have stopped, read as they lie there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rocksdict import Rdict

from streamflow.state.format import unpack
from streamflow.state.identity import Identity
from streamflow.state.rocksdb import RocksStores
from streamflow.state.slots import claim, safe_name
from streamflow.state.store import META, Checkpoint

_BUDGET_BYTES = 16 << 20


@dataclass(frozen=True)
class Found:
    """One store.

    Attributes:
        path: Where it is: several slots may have one of the same task.
        tables: By name: keys and the bytes of their values.
    """

    path: str
    identity: Identity
    checkpoint: Checkpoint
    tables: dict[str, dict[bytes, bytes]]


def stores_of(data_dir: Path, app_id: str) -> Iterator[Found]:
    """Every store of an app on this machine; its slots are claimed meanwhile, so nobody may run."""
    parent = data_dir / safe_name(app_id)
    claimed = []
    try:
        while not claimed or len(claimed) < sum(1 for each in parent.iterdir() if each.name.isdigit()):
            claimed.append(claim(str(data_dir), app_id))
        for slot in claimed:
            for path in sorted(Path(slot.path).iterdir()):
                if (path / "CURRENT").exists() and (found := _read(path)) is not None:
                    yield found
    finally:
        for slot in claimed:
            slot.release()


def _read(path: Path) -> Found | None:
    """What a store has; None where its worker was killed before anything was in it."""
    stores = RocksStores(_BUDGET_BYTES)
    try:
        identity = _identity(path, stores)
        if identity is None:
            return None
        store = stores.open(str(path), identity)
        try:
            assert store.set_aside is None, store.set_aside
            tables = {
                name: {key: unpack(value, table=name)[0] for key, value in store.scan(name, None, None)}
                for name in identity.tables
            }
            return Found(str(path), identity, store.checkpoint, tables)
        finally:
            store.close()
    finally:
        stores.close()


def _identity(path: Path, stores: RocksStores) -> Identity | None:
    options = stores.memory.options
    families = {name: options() for name in Rdict.list_cf(str(path)) if name != "default"}
    db = Rdict(str(path), options(), families)
    try:
        found = db.get_column_family(META).get(b"identity") if META in families else None
        assert found is not None or db.latest_sequence_number() == 0, f"{path} does not say what it belongs to"
        return None if found is None else msgspec.json.decode(found, type=Identity)
    finally:
        db.close()
