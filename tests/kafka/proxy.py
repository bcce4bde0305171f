"""A TCP proxy in front of a broker: cuts connections, swallows answers, holds bytes back."""

import asyncio
import contextlib
from collections.abc import Callable


class Proxy:
    """Forwards `port` to `target`. `on_answer(size)` decides about each chunk from the broker: True cuts the connection
    instead of handing the chunk on, so that the request was carried out and its answer is lost."""

    def __init__(self, port: int, target: int, on_answer: Callable[[bytes], bool] = lambda chunk: False) -> None:
        self.port = port
        self.on_answer = on_answer
        self.cut_connections = 0
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._open = asyncio.Event()
        self._open.set()

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.sleep(0.05)

    def cut(self) -> None:
        """Close every connection now."""
        for writer in list(self._writers):
            writer.transport.abort()

    def hold(self) -> None:
        """Pass nothing on, until `release`: the connections stay open."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_broker, to_broker = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, to_broker}
        pumps = [
            asyncio.create_task(self._pump(reader, to_broker, None)),
            asyncio.create_task(self._pump(from_broker, writer, self.on_answer)),
        ]
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        for end in (writer, to_broker):
            end.transport.abort()
            self._writers.discard(end)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, decide: Callable[[bytes], bool] | None
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(1 << 16):
                await self._open.wait()
                if decide is not None and decide(chunk):
                    self.cut_connections += 1
                    return
                sink.write(chunk)
                await sink.drain()
