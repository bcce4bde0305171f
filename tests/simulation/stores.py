"""What a process keeps on its disk: it survives the process, and may be full."""

from streamflow.errors import StateFullError
from streamflow.state.identity import Identity
from streamflow.state.memory import MemoryStore, MemoryStores
from streamflow.state.store import Store, StoreBatch, Stores
from tests.simulation.faults import Wire


class Seat:
    """A slot of a data directory; `streamflow.state.slots.Slot` for a worker."""

    def __init__(self, number: int) -> None:
        self.id = f"seat-{number}"
        self.disk = MemoryStores()

    def adopt(self, task: str, stores: Stores) -> None:
        """Nothing: the seats are on machines of their own."""

    def store_path(self, task: str) -> str:
        return task


class FaultyStores(MemoryStores):
    """The stores of one process, on the disk of its seat."""

    def __init__(self, seat: Seat, wire: Wire) -> None:
        seat.disk.close()  # whoever had them open is gone
        self._contents = seat.disk._contents
        self._wire = wire

    def open(self, path: str, identity: Identity) -> Store:
        opened = super().open(path, identity)
        assert isinstance(opened, MemoryStore)
        return FaultyStore(opened, self._wire)


class FaultyStore(MemoryStore):
    """One of them."""

    def __init__(self, opened: MemoryStore, wire: Wire) -> None:
        super().__init__(opened.path, opened._content, opened.set_aside)
        self._wire = wire

    def write(self, batch: StoreBatch) -> None:
        self._wire.strike(f"write store {self.path}", commit=True)
        if self._wire.chance("full"):
            raise StateFullError("simulated: no room")
        if self._wire.process.state != "dead":
            super().write(batch)
            self._wire.world.owners.stored(self._wire.process, self.identity, self.checkpoint)
        self._wire.strike(f"store {self.path} is written", commit=True)
