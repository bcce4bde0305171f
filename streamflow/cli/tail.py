"""`streamflow tail APP TOPIC`: print records as they come."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import anyio
import typer

from streamflow.cli.names import topic_names
from streamflow.cli.options import Session
from streamflow.cli.output import as_json, introduce, note, run_async, write
from streamflow.cli.signals import HANDLED
from streamflow.clock import SystemClock
from streamflow.config import nearest
from streamflow.errors import ConfigurationError, DeserializationError, OffsetOutOfRangeError
from streamflow.log.api import Admin, Fetched, Log
from streamflow.log.connect import connect
from streamflow.model.record import Headers, TopicPartition
from streamflow.model.serde import BoundCodec
from streamflow.model.text import plain, shown
from streamflow.processing.topic import Topic


def tail(
    session: Session,
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="The topic's name.", autocompletion=topic_names)],
    start: Annotated[Literal["beginning", "end"], typer.Option("--from", help="Where to start.")] = "beginning",
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="Stop after so many records.")] = None,
    until_end: Annotated[bool, typer.Option("--until-end", help="Stop at the end that is found at the start.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print a topic's records, from the beginning by default, and wait for more until Ctrl-C."""
    introduce(session)
    follower = _Follower(session, topic, from_end=start == "end", limit=limit, until_end=until_end, json=json)
    run_async(follower.run)


class _Follower:
    """Reads all partitions of one topic and prints what comes."""

    def __init__(
        self, session: Session, topic: str, *, from_end: bool, limit: int | None, until_end: bool, json: bool
    ) -> None:
        self._session = session
        self._name = topic
        self._topics: dict[str, Topic[Any, Any]] = session.app.every_topic()
        self._declared = self._topics.get(topic)
        self._codecs: dict[str, BoundCodec[Any]] = {}
        if self._declared is not None:
            self._codecs = {"key": self._declared.key_codec, "value": self._declared.value_codec}
        self._from_end = from_end
        self._left = sys.maxsize if limit is None else limit
        self._until_end = until_end
        self._json = json

    async def run(self) -> None:
        """Print until the limit, the end or a signal."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_at_signal, tasks.cancel_scope)
            await self._run()
            tasks.cancel_scope.cancel()

    async def _run(self) -> None:
        broker = self._session.settings.broker
        async with connect(broker, clock=SystemClock(), client_id=f"{self._session.app.id}-tail") as log:
            partitions = await self._wait_for_topic(log)
            if partitions:
                await self._follow(log, partitions)

    async def _wait_for_topic(self, log: Log) -> list[TopicPartition]:
        told = False
        while True:
            found = await log.admin.describe([self._name])
            if self._name in found:
                return [TopicPartition(self._name, number) for number in range(found[self._name].partitions)]
            if self._declared is None:
                # Not our own, and not there either: waiting for a misspelt name would be waiting for ever.
                known = list(dict.fromkeys([*self._topics, *await log.admin.topics()]))
                raise ConfigurationError(f"there is no topic {self._name!r}{nearest(self._name, known)}")
            if self._until_end:
                note(f"topic {self._name!r} does not exist yet")
                return []
            if not told:
                note(f"topic {self._name!r} does not exist yet; waiting for it")
                told = True
            await log.changed()

    async def _follow(self, log: Log, partitions: list[TopicPartition]) -> None:
        ends = await log.admin.end_offsets(partitions) if self._from_end or self._until_end else {}
        starts = ends if self._from_end else await log.admin.start_offsets(partitions)
        waiting = {tp for tp in partitions if starts[tp] < ends[tp]} if self._until_end else set(partitions)
        async with log.reader("tail") as reader:
            for tp in waiting:
                reader.add(tp, starts[tp])
                reader.ask(tp)
            while waiting and self._left:
                for fetched in await reader.receive():
                    await self._take(fetched)
                    tp = fetched.tp
                    if isinstance(fetched.error, OffsetOutOfRangeError):
                        # Retention or a purge overtook us: go on with the first record that is still there.
                        reader.add(tp, await _first(log.admin, tp))
                    if self._until_end and fetched.next_offset >= ends[tp]:
                        waiting.discard(tp)
                    else:
                        reader.ask(tp)

    async def _take(self, fetched: Fetched) -> None:
        if fetched.error is not None and not isinstance(fetched.error, OffsetOutOfRangeError):
            raise fetched.error
        lines: list[str] = []
        for batch in fetched.batches:
            for record in batch.open():
                if self._left <= 0:
                    break
                self._left -= 1
                place = {
                    "topic": fetched.tp.topic,
                    "partition": fetched.tp.partition,
                    "offset": record.offset,
                    "timestamp_ms": record.timestamp,
                }
                lines.append(await self._line(place, record.key, record.value, record.headers))
        write(lines)

    async def _line(self, place: Mapping[str, Any], key: bytes | None, value: bytes | None, headers: Headers) -> str:
        line = dict(place)
        errors = []
        for part, data in (("key", key), ("value", value)):
            try:
                line[part] = await shown(self._codecs.get(part), data, headers)
            except DeserializationError as exc:
                line[part] = None if data is None else plain(data)
                errors.append(exc.message)
        line["headers"] = [[name, None if data is None else plain(data)] for name, data in headers]
        if errors:
            line["error"] = "; ".join(errors)
        return as_json(line) if self._json else _for_people(line)


async def _cancel_at_signal(scope: anyio.CancelScope) -> None:
    # Ours and not Python's own handler of Ctrl-C: a shell's background jobs start without that.
    with anyio.open_signal_receiver(*HANDLED) as received:
        async for _ in received:
            scope.cancel()


async def _first(admin: Admin, tp: TopicPartition) -> int:
    return (await admin.start_offsets([tp]))[tp]


def _for_people(line: Mapping[str, Any]) -> str:
    moment = datetime.fromtimestamp(line["timestamp_ms"] / 1000, UTC).isoformat(timespec="milliseconds")
    key, value = (part if isinstance(part, str) else as_json(part) for part in (line["key"], line["value"]))
    text = f"{moment.removesuffix('+00:00')}Z {line['partition']}-{line['offset']} {key} {value}"
    if line["headers"]:
        text += " " + as_json(line["headers"])
    return f"{text} !! {line['error']}" if "error" in line else text
