"""The app that the oracle runs: echo, running sum, least and greatest, and distinct keys by way of `group_by`.

A number says all that a check needs: its place in the whole load (so no two are alike, and those of one source
partition grow), its key, and something random. Every output is unique in its partition, so that a repeat is told from
a new record.
"""

from __future__ import annotations

import random
from typing import NamedTuple

KEYS = 200
DIGITS = 10
_RANDOM = 64
_SEQUENCE_MASK = (1 << 24) - 1

BODY = """
echoed = app.topic(ID + "-echoed", key_type=str, value_type=int)
summed = app.topic(ID + "-summed", key_type=str, value_type=int)
spread = app.topic(ID + "-spread", key_type=str, value_type=int)
counted = app.topic(ID + "-counted", key_type=str, value_type=int)
sums = app.table("sums", key_type=str, value_type=int, default=int)
extremes = app.table("extremes", key_type=str, value_type=tuple[int, int])
distinct = app.table("distinct", key_type=str, value_type=set[int], default=set)

@app.agent(numbers, sink=echoed)
async def echo(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for number in stream:
        yield number

@app.agent(numbers, sink=summed)
async def add(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for key, number in stream.items():
        sums[key] += number
        yield sums[key]

@app.agent(numbers, sink=spread)
async def extend(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for key, number in stream.items():
        low, high = extremes.get(key, (number, number))
        extremes[key] = low, high = min(low, number), max(high, number)
        yield ((high - low) << 24) | (number >> 8) & 0xFFFFFF

def digit(number: int) -> str:
    return f"d{(number >> 8 & 0xFFFFFF) % 10}"

@app.agent(numbers.group_by(digit, name="by-digit", key_type=str), sink=counted)
async def count(stream: sf.Stream[int]) -> AsyncIterator[int]:
    async for key, number in stream.items():
        seen = distinct[key]
        seen.add(number & 0xFF)
        yield number << 8 | len(seen)
"""
OUTPUTS = ("echoed", "summed", "spread")
"""Outputs that lie in the partition of their input, in its order."""
TABLES = ("sums", "extremes", "distinct")


def made_number(sequence: int, dice: random.Random) -> tuple[bytes, int]:
    """One record of the load: key and value."""
    key = dice.randrange(KEYS)
    return b"k%d" % key, dice.randrange(_RANDOM) << 32 | sequence << 8 | key


def sequence_of(number: int) -> int:
    return number >> 8 & _SEQUENCE_MASK


def digit_of(number: int) -> bytes:
    return b"d%d" % (sequence_of(number) % DIGITS)


def key_of(number: int) -> bytes:
    return b"k%d" % (number & 0xFF)


class Made(NamedTuple):
    """What one input record makes of each of `OUTPUTS`."""

    echoed: int
    summed: int
    spread: int


class Fold:
    """What a loop over the records of one source partition makes; the model of everything that is checked."""

    def __init__(self) -> None:
        self.sums: dict[bytes, int] = {}
        self.extremes: dict[bytes, tuple[int, int]] = {}

    def step(self, key: bytes, number: int) -> Made:
        total = self.sums[key] = self.sums.get(key, 0) + number
        low, high = self.extremes.get(key, (number, number))
        low, high = self.extremes[key] = min(low, number), max(high, number)
        return Made(number, total, (high - low) << 24 | sequence_of(number))
