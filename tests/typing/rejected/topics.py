"""Topics, jobs and hooks that are declared wrongly. `# error` marks the lines that both checkers must refuse."""

from typing import Any

import streamflow as sf

app = sf.App("topics")
app.topic("b", value_type=3)  # error: a type
app.topic("c", partitons=4)  # error: no such option
app.topic("d", partitions="4")  # error: a number
app.topic("e", value_serializer=7)  # error: a name or an object with bind
app.topic("f", config=["retention.ms"])  # error: a mapping
app.topic()  # error: a name
sf.App("g", borker="memory://")  # error: no such setting
sf.App()  # error: a name


class NotASerializer:
    def encode(self, value: Any) -> bytes:
        return b""


app.topic("h", value_type=str, value_serializer=NotASerializer())  # error: it has no bind


@app.timer  # error: an interval
async def bare() -> None: ...


@app.timer("10")  # error: a number
async def text() -> None: ...


@app.crontab(5)  # error: an expression
async def number() -> None: ...


@app.on_assigned  # error: it is called with the partitions
async def came() -> None: ...


@app.on_start  # error: it is called without arguments
async def opened(worker: int) -> None: ...
