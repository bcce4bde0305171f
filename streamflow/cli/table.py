"""`streamflow table get` and `scan`: committed values, from the changelog, also while workers run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from streamflow.cli.names import table_names
from streamflow.cli.options import Session
from streamflow.cli.output import as_json, introduce, run_async, write
from streamflow.cli.progress import progress
from streamflow.clock import SystemClock
from streamflow.errors import ConfigurationError, DeserializationError, RecordError, StreamFlowError
from streamflow.log.connect import connect
from streamflow.model.text import plain, reader_of, shown
from streamflow.processing.key_text import range_of
from streamflow.processing.table import Table
from streamflow.runtime.table_reader import Fold, TableLog, changelog_key, sub_of, table_of

TableName = Annotated[str, typer.Argument(metavar="TABLE", help="The table's name.", autocompletion=table_names)]
ByteRange = tuple[bytes, bytes | None]


@dataclass(frozen=True)
class Row:
    """A key and its committed value.

    Attributes:
        partition: Where it is.
        key: Its bytes in the changelog.
        value: The value's bytes.
        place: What it is ordered by; None for a key that does not decode.
    """

    partition: int
    key: bytes
    value: bytes
    place: bytes | None


def get(
    session: Session,
    table_name: TableName,
    key: Annotated[str, typer.Argument(metavar="KEY", help="JSON, or plain text for str and bytes.")],
    json: Annotated[bool, typer.Option("--json", help="Key, value and partition as one JSON object.")] = False,
) -> None:
    """Print the committed value of a key; exit with 1 where there is none, or none that its type can read."""
    table = checked_table(session, table_name)
    asked = reader_of(table.key_codec, owner=f"table {table.name!r}")(key)
    key_bytes = changelog_key(table, asked)
    introduce(session)

    async def run() -> None:
        found, folds = await read(
            session, table.name, lambda log: [log.home_of(asked)], wanted=lambda other: other == key_bytes
        )
        (fold,) = folds
        value = fold.live(table.ttl_s).get(key_bytes)
        if value is None:
            expired = " (its last value has expired)" if key_bytes in fold.values else ""
            raise StreamFlowError(f"table {table.name!r} has no key {key!r} in partition {fold.partition}{expired}")
        line = await _line(found.table, Row(fold.partition, key_bytes, value, None))
        if "error" in line:
            shows = f"`streamflow table scan --partition {fold.partition}` shows what is stored"
            raise StreamFlowError(f"table {table.name!r}, key {key!r}: {line['error']}; {shows}")
        write([as_json(line) if json else _text(line["value"])])

    run_async(run)


def scan(
    session: Session,
    table_name: TableName,
    prefix: Annotated[
        str | None,
        typer.Option("--prefix", help="Only keys that begin so: text, or a JSON list of a tuple's first elements."),
    ] = None,
    start: Annotated[str | None, typer.Option("--start", help="First key, inclusive.")] = None,
    stop: Annotated[str | None, typer.Option("--stop", help="End, exclusive.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="Stop after so many keys.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="From the last key to the first.")] = False,
    partition: Annotated[int | None, typer.Option("--partition", min=0, help="Only this partition.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print committed keys and values in key order, of all partitions together."""
    table = checked_table(session, table_name)
    span = range_of(table, table.key_codec, prefix=prefix, start=start, stop=stop)
    introduce(session)

    async def run() -> None:
        rows = await read_rows(session, table, span=span, partition=partition)
        if reverse:
            rows.reverse()
        for at in range(0, len(rows[:limit]), _AT_ONCE):
            lines = [await _line(table, row) for row in rows[:limit][at : at + _AT_ONCE]]
            write(as_json(line) if json else _for_people(line) for line in lines)

    run_async(run)


_AT_ONCE = 1_000


def checked_table(session: Session, name: str) -> Table[Any, Any]:
    """A table that can be read, found before the log is opened.

    Raises:
        ConfigurationError: The app has none of that name, or no agent uses it.
    """
    table = table_of(session.app, name)
    sub_of(session.app, name)
    return table


async def read(
    session: Session,
    name: str,
    choose: Callable[[TableLog], Collection[int]],
    *,
    wanted: Callable[[bytes], bool] = lambda key: True,
) -> tuple[TableLog, list[Fold]]:
    """Fold partitions of a table's changelog.

    Args:
        session: The command's.
        name: The table.
        choose: Says which partitions.
        wanted: See `TableLog.fold`.

    Raises:
        TopologyError: Other serializers wrote it than those of its types of today.
    """
    broker = session.settings.broker
    async with connect(broker, clock=SystemClock(), client_id=f"{session.app.id}-table") as log:
        found = await TableLog.find(session.app, name, log.admin)
        numbers = choose(found)
        marks = found.marks(await log.admin.group_offsets(session.app.id))
        found.refuse_other_serializers(marks)
        with progress("reading the changelog") as report:
            chosen = {number: marks[number] for number in numbers}
            return found, await found.fold(log, chosen, wanted=wanted, on_progress=report)


async def read_rows(
    session: Session, table: Table[Any, Any], *, span: ByteRange | None = None, partition: int | None = None
) -> list[Row]:
    """The committed rows of a table in key order; keys that do not decode stand last.

    Args:
        session: The command's.
        table: The table.
        span: Only these keys; None is all of them, with those that do not decode.
        partition: Only this partition.
    """

    def choose(found: TableLog) -> Collection[int]:
        count = found.changelog.partitions
        if partition is not None and partition >= count:
            raise ConfigurationError(f"--partition {partition}: table {table.name!r} has partitions 0 to {count - 1}")
        return range(count) if partition is None else [partition]

    def wanted(key: bytes) -> bool:
        if span is None:
            return True
        try:
            return _holds(span, _place(table, key))
        except Exception:  # a schema that is not loaded yet, or a key that does not decode: decided below
            return True

    _, folds = await read(session, table.name, choose, wanted=wanted)
    rows: list[Row] = []
    for fold in folds:
        for key, value in fold.live(table.ttl_s).items():
            place = await _loaded_place(table, key)
            if span is None or (place is not None and _holds(span, place)):
                rows.append(Row(fold.partition, key, value, place))
    rows.sort(key=lambda row: (row.place is None, row.place or b"", row.key))
    return rows


def _place(table: Table[Any, Any], key: bytes) -> bytes:
    order = table.keys_in_order
    return key if order.same_as_serialized else order.encode(table.key_codec.decode(key))


async def _loaded_place(table: Table[Any, Any], key: bytes) -> bytes | None:
    try:
        return table.keys_in_order.encode(await table.key_codec.decode_loading(key))
    except RecordError:
        return None


def _holds(span: ByteRange, place: bytes) -> bool:
    low, high = span
    return place >= low and (high is None or place < high)


# --- what is printed ------------------------------------------------------------------------------------------------


async def _line(table: Table[Any, Any], row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {}
    errors: list[str] = []
    for part, codec, data in (
        ("key", table.key_codec, row.key),
        ("value", table.changelog.value_codec, row.value),
    ):
        try:
            line[part] = await shown(codec, data, ())
        except DeserializationError as exc:
            line[part] = plain(data)
            errors.append(exc.message)
    line["partition"] = row.partition
    if errors:
        line["error"] = "; ".join(errors)
    return line


def _for_people(line: dict[str, Any]) -> str:
    text = f"{_text(line['key'])} {_text(line['value'])}"
    return f"{text} !! {line['error']}" if "error" in line else text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value)
