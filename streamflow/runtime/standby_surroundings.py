"""What the standbys of a worker share, as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamflow.clock import Clock
from streamflow.errors import StreamFlowError
from streamflow.log.api import Admin, Reader
from streamflow.runtime.fetch_places import FetchPlaces
from streamflow.runtime.local_state import LocalStates
from streamflow.sensors import Sensors


@dataclass(frozen=True, slots=True)
class StandbySurroundings:
    """What the standbys of a worker share.

    Attributes:
        local: Opens stores.
        reader: The lane of all standbys.
        places: For fetches of what they lack.
        admin: For offsets.
        clock: Time.
        sensors: Metrics hooks.
        fail: Told what stops the worker.
    """

    local: LocalStates
    reader: Reader
    places: FetchPlaces
    admin: Admin
    clock: Clock
    sensors: Sensors
    fail: Callable[[StreamFlowError], None]
