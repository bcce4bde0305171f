"""Ask and reply: send a value to an agent and wait for its answer; its errors come to the asker.

The program hosts a worker and asks it. With a log that others reach (the SQLite file, Kafka) the agent may as well run
elsewhere: `async with app.client() as client: await client.ask(...)`.

    python examples/ask_reply.py
"""

import asyncio
from collections.abc import AsyncIterator

import msgspec

import streamflow as sf

PRICES = {"tea": 3.5, "cake": 4.0}


class Line(msgspec.Struct):
    item: str
    count: int


app = sf.App("till", broker="memory://")  # one process asks and answers, so the log may be its memory
lines = app.topic("lines", key_type=str, value_type=Line)


@app.agent(lines, on_error=sf.Skip())  # the asker is told of the error; the agent goes on with the next line
async def price(stream: sf.Stream[Line]) -> AsyncIterator[float]:
    async for line in stream:
        yield PRICES[line.item] * line.count


async def main() -> None:
    async with app.running():
        asked = [Line("tea", 2), Line("cake", 1)]
        answers = await asyncio.gather(*(price.ask(line, key=line.item, timeout_s=10) for line in asked))
        for line, answer in zip(asked, answers, strict=True):
            print(f"{line.count} x {line.item}: {answer:.2f}")
        try:
            await price.ask(Line("wine", 1), key="wine", timeout_s=10)
        except sf.AskError as error:
            print(f"1 x wine: refused ({error})")


if __name__ == "__main__":
    asyncio.run(main())
