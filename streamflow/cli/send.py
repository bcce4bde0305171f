"""`streamflow send APP TOPIC VALUE`: check values against the topic's type and write them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from streamflow.cli.lines import Lines, opened
from streamflow.cli.names import topic_names
from streamflow.cli.options import Session
from streamflow.cli.output import as_json, introduce, note, run_async, write
from streamflow.cli.progress import Reporter, progress
from streamflow.config import nearest
from streamflow.errors import ConfigurationError, StreamFlowError
from streamflow.model.record import RecordMetadata
from streamflow.model.text import reader_of
from streamflow.processing.topic import Topic
from streamflow.runtime.client import Client


class SendCommand(typer.core.TyperCommand):
    """Says how to send a value that begins with a dash, where the command line took it for an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click."""
        try:
            return super().parse_args(ctx, args)
        except Exception as exc:
            # click's NoSuchOption, which typer has under another name in each of its versions.
            if type(exc).__name__ == "NoSuchOption" and not getattr(exc, "possibilities", None):
                vars(exc)["message"] += " (a value that begins with a dash goes last, behind --: `-- -5`)"
            raise


def send(
    session: Session,
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="The topic's name.", autocompletion=topic_names)],
    value: Annotated[
        str | None,
        typer.Argument(metavar="VALUE", help="JSON, or plain text for str and bytes; - reads one value a line."),
    ] = None,
    key: Annotated[str | None, typer.Option("--key", "-k", help="The key; without it the key is null.")] = None,
    key_field: Annotated[
        str | None, typer.Option("--key-field", help="Take the key from this field of each value.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Read one value a line from this file.", dir_okay=False)
    ] = None,
    tombstone: Annotated[bool, typer.Option("--tombstone", help="Send null: delete the key.")] = False,
    partition: Annotated[int | None, typer.Option("--partition", min=0, help="Where to, whatever the key.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Say where each record went, one JSON object a line.")] = False,
) -> None:
    """Send a value, or one a line, checked against the topic's type first."""
    if sum((value is not None, file is not None, tombstone)) != 1:
        raise ConfigurationError("give one of VALUE (- for standard input), --file and --tombstone")
    if key is not None and key_field is not None:
        raise ConfigurationError("give one of --key and --key-field")
    declared = session.app.topics.get(topic)
    if declared is None:
        raise ConfigurationError(
            f"app {session.app.id!r} has no topic {topic!r}{nearest(topic, list(session.app.topics))}"
        )
    sending = _Sending(session, declared, key, key_field, partition, json=json)
    if file is None and value != "-":
        # Checked before the log is opened: what is refused leaves no trace.
        sending.take(None if tombstone else value)
    introduce(session)
    run_async(sending.one if file is None and value != "-" else lambda: sending.lines(file))


class _Sending:
    """Turns text into records of one topic and sends them."""

    def __init__(
        self,
        session: Session,
        topic: Topic[Any, Any],
        key: str | None,
        key_field: str | None,
        partition: int | None,
        *,
        json: bool,
    ) -> None:
        self._session = session
        self._topic = topic
        self._value_of = reader_of(topic.value_codec)
        self._fixed_key = None if key is None else reader_of(topic.key_codec)(key)
        self._key_field = key_field
        self._partition = partition
        self._json = json
        self._record: tuple[Any, Any] = (None, None)

    def take(self, text: str | None) -> tuple[Any, Any]:
        """Read a key and a value from a value's text; None is a tombstone."""
        value = None if text is None else self._value_of(text)
        self._record = (self._fixed_key if self._key_field is None else self._key_in(value), value)
        return self._record

    def _key_in(self, value: Any) -> Any:
        name = str(self._key_field)
        try:
            return value[name] if isinstance(value, dict) else getattr(value, name)
        except (KeyError, AttributeError):
            raise ConfigurationError(f"--key-field: the value has no field {name!r}") from None

    async def one(self) -> None:
        """Send the record taken."""
        async with Client(self._session.app, self._session.settings) as client:
            key, value = self._record
            sent = await client.send(self._topic, key=key, value=value, partition=self._partition)
        write([self._line(sent)])

    async def lines(self, file: Path | None) -> None:
        """Send one value a line; blank lines are passed over."""
        with opened(file) as source:
            async with Client(self._session.app, self._session.settings) as client:
                with progress("sending", quiet=source.interactive) as report:
                    sent = await self._send_all(client, source, report)
        note(f"sent {sent:,} record{'' if sent == 1 else 's'} to {self._topic.name}")

    async def _send_all(self, client: Client, source: Lines, report: Reporter) -> int:
        sent = number = 0
        async for chunk in source.chunks():
            pending: list[asyncio.Future[RecordMetadata]] = []
            failed = ""
            for line in chunk:
                number += 1
                text = line.removesuffix(b"\r")
                if not text:
                    continue
                try:
                    key, value = self.take(text.decode())
                except (StreamFlowError, UnicodeDecodeError) as exc:
                    failed = f"{source.name}, line {number}: {exc}"
                    break
                # Started in order, so stored in order in each partition; acknowledged together.
                send = client.send(self._topic, key=key, value=value, partition=self._partition)
                pending.append(asyncio.ensure_future(send))
            done = await asyncio.gather(*pending)
            sent += len(done)
            if self._json:
                write(self._line(one) for one in done)
            report(sent, None if source.total is None else max(source.total, sent))
            if failed:
                raise StreamFlowError(f"{failed} ({sent:,} sent before it)")
        return sent

    def _line(self, sent: RecordMetadata) -> str:
        return as_json(sent._asdict()) if self._json else f"{sent.topic}-{sent.partition}-{sent.offset}"
