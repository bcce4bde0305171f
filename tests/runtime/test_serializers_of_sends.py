"""Serializers see the same headers wherever a record is sent from: all that the record will have."""

from typing import Any

import streamflow as sf
from streamflow.testing import TestApp

TRACE = ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
OWN = ("own", b"1")


class Noting:
    """A serializer that notes the headers it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[tuple[str, bytes | None]]]] = []

    def bind(self, form: Any, *, topic: str, part: str) -> Any:
        noting = self

        class Codec:
            def encode(self, value: str, headers: sf.Headers) -> bytes:
                noting.seen.append((part, list(headers)))
                return value.encode()

            def decode(self, data: bytes, headers: sf.Headers) -> str:
                return data.decode()

        return Codec()


async def test_key_and_value_are_encoded_with_the_headers_of_the_record() -> None:
    app, noting = sf.App("noting"), Noting()
    source = app.topic("source", value_type=str)
    target = app.topic("target", key_type=str, value_type=str, key_serializer=noting, value_serializer=noting)

    @app.agent(source)
    async def copy(value: str) -> None:
        await target.send(key="turn", value=value, headers=[OWN])

    @app.timer(10)
    async def tick() -> None:
        await target.send(key="timer", value="v", headers=[OWN])

    @app.timer(20, on_leader=True)
    async def lead() -> None:
        await target.send(key="leader", value="v", headers=[OWN])

    async with TestApp(app) as test:
        await test.send(source, "v", headers=[TRACE])
        await test.settle()
        assert noting.seen == [("key", [TRACE, OWN]), ("value", [TRACE, OWN])]
        noting.seen.clear()
        await test.advance(21)
    assert noting.seen == 3 * [("key", [OWN]), ("value", [OWN])]
