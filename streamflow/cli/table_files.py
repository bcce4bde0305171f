"""`streamflow table export` and `import`: a table as JSON lines, `{"key": ..., "value": ...}`."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from streamflow.cli.errors import print_out
from streamflow.cli.lines import Lines, opened
from streamflow.cli.options import Session
from streamflow.cli.output import as_json, introduce, note, run_async
from streamflow.cli.progress import progress
from streamflow.cli.table import TableName, checked_table, read_rows
from streamflow.clock import SystemClock
from streamflow.errors import ConfigurationError, StreamFlowError
from streamflow.log.connect import connect
from streamflow.model.serde import BoundCodec
from streamflow.processing.table import Table
from streamflow.runtime.table_import import Imported, import_table
from streamflow.runtime.table_reader import changelog_key

File = Annotated[Path, typer.Argument(metavar="FILE", help="A file; - is standard output or input.", dir_okay=False)]
STANDARD = Path("-")
_AT_ONCE = 1_000


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    key: msgspec.Raw
    value: msgspec.Raw


# --- export ---------------------------------------------------------------------------------------------------------


def export_file(session: Session, table_name: TableName, file: File = STANDARD) -> None:
    """Write the committed entries of a table as JSON lines, in key order; nothing that cannot be read back."""
    table = checked_table(session, table_name)
    introduce(session)

    async def run() -> None:
        rows = await read_rows(session, table)
        key_text, value_text = (_Portable(codec) for codec in (table.key_codec, table.changelog.value_codec))
        with _output(file) as out:
            lines: list[str] = []
            for row in rows:
                try:
                    key = await key_text.of(row.key)
                    lines.append(f'{{"key":{key},"value":{await value_text.of(row.value)}}}\n')
                except StreamFlowError as exc:
                    where = f"partition {row.partition}, key bytes {row.key[:60]!r}"
                    raise StreamFlowError(f"table {table.name!r}, {where}: not exported: {exc}") from exc
                if len(lines) >= _AT_ONCE:
                    out("".join(lines))
                    lines.clear()
            out("".join(lines))
        note(f"exported {_entries(len(rows))} of table {table.name}")

    run_async(run)


@contextmanager
def _output(file: Path) -> Generator[Callable[[str], object]]:
    """Where to write: a file appears under its name only when it is whole."""
    if file == STANDARD:
        yield print_out
        return
    draft = file.with_name(f"{file.name}.part")
    try:
        with draft.open("w", encoding="utf-8") as stream:
            yield stream.write
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
    except BaseException as exc:
        draft.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise StreamFlowError(f"FILE {file} cannot be written: {exc.strerror}") from exc
        raise


class _Portable:
    """Turns stored keys or values into JSON, and makes sure that an import reads the same from it.

    Args:
        codec: The changelog's.
    """

    def __init__(self, codec: BoundCodec[Any]) -> None:
        self._codec = codec
        self._read = _json_reader(codec)

    async def of(self, data: bytes) -> str:
        """The JSON text of stored bytes.

        Raises:
            StreamFlowError: They do not decode, or JSON cannot hold what they say (such as a float that is no number).
        """
        value = await self._codec.decode_loading(data)
        try:
            text = as_json(_builtin(self._codec, value))
            again = self._codec.encode(self._read(text.encode()))
        except Exception as exc:
            raise StreamFlowError(f"{self._codec.part} {value!r} cannot be written as JSON: {exc}") from exc
        if again != self._codec.encode(value):
            raise StreamFlowError(f"{self._codec.part} {value!r} is not the same when it is read back from {text}")
        return text


def _builtin(codec: BoundCodec[Any], value: Any) -> Any:
    if codec.serializer != "raw":
        return msgspec.to_builtins(value, enc_hook=str, str_keys=True)
    try:
        return bytes(value).decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def _json_reader(codec: BoundCodec[Any]) -> Callable[[bytes | msgspec.Raw], Any]:
    if codec.serializer == "raw":
        return _bytes_of
    try:
        return msgspec.json.Decoder(codec.type).decode
    except TypeError:  # a type that only the user's own serializer knows
        return msgspec.json.Decoder(Any).decode


class _Base64(msgspec.Struct, forbid_unknown_fields=True):
    base64: bytes


_read_bytes = msgspec.json.Decoder(str | _Base64)


def _bytes_of(text: bytes | msgspec.Raw) -> bytes:
    found = _read_bytes.decode(text)
    return found.encode() if isinstance(found, str) else found.base64


# --- import ---------------------------------------------------------------------------------------------------------


def import_file(
    session: Session,
    table_name: TableName,
    file: File = STANDARD,
    replace: Annotated[bool, typer.Option("--replace", help="Delete the keys that are not in the file.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Say what was done as one JSON object.")] = False,
) -> None:
    """Write JSON lines into a table, each checked against its types first; refused while workers run."""
    table = checked_table(session, table_name)
    introduce(session)

    async def run() -> None:
        with opened(None if file == STANDARD else file, called="FILE") as source:
            rows = _Rows(table, source.name)
            await rows.read(source)
        if replace and not rows.values:
            raise ConfigurationError(
                f"{source.name} has no lines, and --replace would delete every key of table {table.name!r}: is it what "
                "an interrupted export left? To empty the table, start the app over with `streamflow reset APP`"
            )
        broker = session.settings.broker
        async with connect(broker, clock=SystemClock(), client_id=f"{session.app.id}-import") as log:
            with progress("importing") as report:
                done = await import_table(
                    log,
                    session.app,
                    session.settings,
                    table.name,
                    rows.values,
                    replace=replace,
                    place_of=rows.place_of,
                    on_progress=report,
                )
        _tell(table, done, json=json)

    run_async(run)


class _Rows:
    """What a file says, as the changelog will have it.

    Args:
        table: The table.
        source: The file, for errors.

    Attributes:
        values: Value bytes by key bytes.
    """

    def __init__(self, table: Table[Any, Any], source: str) -> None:
        self._table = table
        self._source = source
        self._readers = [(codec, _json_reader(codec)) for codec in (table.key_codec, table.changelog.value_codec)]
        self._decode = msgspec.json.Decoder(_Line).decode
        self._lines: dict[bytes, int] = {}
        self.values: dict[bytes, bytes] = {}

    def place_of(self, key: bytes) -> str:
        """The line of a key."""
        return f"{self._source}, line {self._lines[key]}"

    async def read(self, source: Lines) -> None:
        """Read all of it; blank lines are passed over.

        Raises:
            ConfigurationError: A line does not fit, or a key stands there twice.
        """
        number = 0
        async for chunk in source.chunks():
            for line in chunk:
                number += 1
                if line.strip():
                    self._take(number, line)

    def _take(self, number: int, line: bytes) -> None:
        try:
            parsed = self._decode(line)
            key, value = (self._encoded(at, raw) for at, raw in enumerate((parsed.key, parsed.value)))
            key = changelog_key(self._table, self._table.key_codec.decode(key))
        except (StreamFlowError, msgspec.MsgspecError, ValueError) as exc:
            raise ConfigurationError(f"{self._source}, line {number}: {exc}; nothing was imported") from exc
        if key in self._lines:
            raise ConfigurationError(
                f"{self._source}, line {number}: its key is on line {self._lines[key]} as well; nothing was imported"
            )
        self._lines[key] = number
        self.values[key] = value

    def _encoded(self, at: int, raw: msgspec.Raw) -> bytes:
        codec, read = self._readers[at]
        try:
            data = codec.encode(read(raw))
        except msgspec.MsgspecError as exc:
            raise ConfigurationError(f"its {codec.part} does not fit: {exc}") from exc
        if data is None:
            raise ConfigurationError(f"its {codec.part} is null, which a table cannot hold")
        codec.decode(data)  # what is read back must be of the type, limits included
        return data


def _tell(table: Table[Any, Any], done: Imported, *, json: bool) -> None:
    if json:
        print_out(
            as_json(
                {
                    "table": table.name,
                    "written": done.written,
                    "cleared": done.cleared,
                    "restored": done.restored,
                    "offsets_set": done.started,
                }
            )
            + "\n"
        )
    note(f"imported {_entries(done.written)} into table {table.name}")
    if done.cleared:
        note(f"deleted {_entries(done.cleared)} that the file does not have")
    if done.restored:
        note(f"set {_entries(done.restored)} back to what was committed: updates that no offset was committed with")
    if done.started:
        note(f"the app had no offsets for {done.started} partition(s) of its sources; they were set to where it starts")


def _entries(count: int) -> str:
    return f"{count:,} entr{'y' if count == 1 else 'ies'}"
