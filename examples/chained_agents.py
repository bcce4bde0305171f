"""Chained agents: the sink of one is the source of the next, so each step can be read, tested and scaled by itself.

Thermometers send Fahrenheit. One agent turns that into Celsius and drops what no thermometer can have measured; a
second one looks at each thermometer's readings in their order and reports where it gets hot, and when that is over.

    streamflow send examples/chained_agents.py fahrenheit '{"sensor": "roof", "degrees": 104.5}' --key roof
    streamflow worker examples/chained_agents.py --until-end
    streamflow tail examples/chained_agents.py alarms --limit 1
    streamflow topology examples/chained_agents.py
"""

from collections.abc import AsyncIterator

import msgspec

import streamflow as sf

HOT_C = 40.0
POSSIBLE_C = (-90.0, 60.0)


class Reading(msgspec.Struct):
    sensor: str
    degrees: float


class Alarm(msgspec.Struct):
    sensor: str
    degrees: float
    hot: bool


app = sf.App("thermometers")
fahrenheit = app.topic("fahrenheit", key_type=str, value_type=Reading)
celsius = app.topic("celsius", key_type=str, value_type=Reading)
alarms = app.topic("alarms", key_type=str, value_type=Alarm)
hot = app.table("hot", key_type=str, value_type=float, help="what a thermometer said when it became hot")


@app.agent(fahrenheit, sink=celsius)
async def convert(stream: sf.Stream[Reading]) -> AsyncIterator[Reading]:
    low, high = POSSIBLE_C
    converted = stream.map(lambda reading: Reading(reading.sensor, (reading.degrees - 32) / 1.8))
    async for reading in converted.filter(lambda reading: low <= reading.degrees <= high):
        yield reading


@app.agent(celsius, sink=alarms)
async def watch(stream: sf.Stream[Reading]) -> AsyncIterator[Alarm]:
    async for reading in stream:
        if reading.degrees >= HOT_C and reading.sensor not in hot:
            hot[reading.sensor] = reading.degrees
            yield Alarm(reading.sensor, round(reading.degrees, 1), hot=True)
        elif reading.degrees < HOT_C and reading.sensor in hot:
            del hot[reading.sensor]
            yield Alarm(reading.sensor, round(reading.degrees, 1), hot=False)


if __name__ == "__main__":
    app.main()
