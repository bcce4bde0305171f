"""What local state takes on this machine, as its files say: no store is opened, so that live ones can be looked at."""

from __future__ import annotations

import os

from streamflow.config import Settings
from streamflow.processing.declarations import Declarations
from streamflow.processing.topology import SubTopology
from streamflow.state.slots import safe_name


def size_of(path: str) -> int:
    """Bytes of a file, or of all files below a directory; what vanishes meanwhile counts as nothing.

    Args:
        path: Where it is.
    """
    if not os.path.isdir(path) or os.path.islink(path):
        return _file_size(path)
    return sum(_file_size(os.path.join(folder, file)) for folder, _, files in os.walk(path) for file in files)


def local_bytes(app: Declarations, settings: Settings, sub: SubTopology, partitions: int) -> int:
    """Bytes that the stores of a sub-topology's tasks take on this machine, in all slots.

    Args:
        app: The app.
        settings: For `data_dir`.
        sub: The sub-topology.
        partitions: How many tasks it has.
    """
    parent = os.path.join(settings.data_dir, safe_name(app.id))
    if not os.path.isdir(parent):
        return 0
    slots = [os.path.join(parent, name) for name in os.listdir(parent) if name.isdecimal()]
    tasks = [safe_name(f"{sub.name}-{number}") for number in range(partitions)]
    places = [os.path.join(slot, task) for slot in slots for task in tasks]
    return sum(size_of(place) for place in places if os.path.isdir(place))


def _file_size(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return 0
