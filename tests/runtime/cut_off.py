"""Standbys that are cut off from the log."""

from typing import Any

import anyio

from streamflow.errors import LogUnavailableError
from tests.runtime.machine import Running


class CutOff:
    """The standbys of one worker hear nothing of the log until `over`; the worker itself does."""

    def __init__(self, running: Running) -> None:
        self._over = anyio.Event()
        standbys = running.worker.standbys
        assert standbys is not None
        reader: Any = standbys._reader
        admin: Any = standbys._admin
        self._put_between(reader, "_fetch", self._waiting)
        self._put_between(admin, "group_offsets", self._failing)
        self._put_between(admin, "high_watermarks", self._failing)

    def over(self) -> None:
        self._over.set()

    def _put_between(self, owner: Any, name: str, between: Any) -> None:
        asked = getattr(owner, name)

        async def ask(*args: Any, **options: Any) -> Any:
            if not self._over.is_set():
                await between()
            return await asked(*args, **options)

        setattr(owner, name, ask)

    async def _waiting(self) -> None:
        await self._over.wait()

    async def _failing(self) -> None:
        raise LogUnavailableError("cut off")
