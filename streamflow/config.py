"""Settings: one table, from which come the fields, the variables, the flags, the checks and docs/settings.md.

Every setting has one name, written `name` in `App(...)` and `[tool.streamflow]`, `STREAMFLOW_NAME` in the environment
and `--name` (with hyphens) on the command line. Strongest first: flag, environment, `App(...)`, pyproject.toml,
default. None and an empty variable mean "not given" wherever they stand.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from streamflow.errors import ConfigurationError

Guarantee: TypeAlias = Literal["exactly_once", "at_least_once"]
OffsetReset: TypeAlias = Literal["earliest", "latest"]
LogFormat: TypeAlias = Literal["console", "json"]
LogLevel: TypeAlias = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
Compression: TypeAlias = Literal["none", "gzip", "snappy", "lz4", "zstd"]

PREFIX = "STREAMFLOW_"
KAFKA_PREFIX = "STREAMFLOW_KAFKA_"
"""Variables of `sf.Kafka(...)`, which checks them itself."""
PROCESS = "STREAMFLOW_PROCESS"
"""Set by `--processes` for each worker process that it starts; not a setting."""
DEFAULT_WEB_PORT = 6066

DAY_MS = 86_400_000
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
# What Kafka takes for `group.instance.id`: the names a topic may have.
_INSTANCE_ID = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,249}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class About:
    """What a setting's type does not say.

    Attributes:
        help: One sentence for people.
        minimum: Least number allowed.
        maximum: Greatest number allowed.
        shown_default: How the default is told; empty for the default itself.
    """

    help: str
    minimum: float = -math.inf
    maximum: float = math.inf
    shown_default: str = ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set, resolved: paths are absolute, values are checked. Made by `resolve`."""

    # `str` or `sf.Kafka`, which lives above this layer.
    broker: Annotated[
        Any,
        About(
            "Where the log is: `sqlite:///PATH`, `memory://` or `kafka://HOST:PORT[,HOST:PORT]`.",
            shown_default="`sqlite:///<data_dir>/log.db`",
        ),
    ] = None
    data_dir: Annotated[
        str,
        About(
            "Folder of the embedded log and of local state; a relative one starts at the nearest pyproject.toml above "
            "the app, else at the app's folder."
        ),
    ] = ".streamflow"
    processing_guarantee: Annotated[
        Guarantee | None,
        About(
            "Whether a crash leaves every result as it was or may repeat some.",
            shown_default="`exactly_once`",
        ),
    ] = None
    commit_interval_ms: Annotated[int, About("Milliseconds between commits.", 1, DAY_MS)] = 100
    auto_offset_reset: Annotated[OffsetReset, About("Where a partition starts that has no committed offset.")] = (
        "earliest"
    )
    partitions: Annotated[int, About("Partitions of topics that StreamFlow creates.", 1, 100_000)] = 4
    replication: Annotated[
        int, About("Replicas of topics that StreamFlow creates; -1 leaves it to the broker.", -1, 32_767)
    ] = -1
    standby_replicas: Annotated[
        int, About("Warm copies of each table partition in other workers; an app without tables has none.", 0, 100)
    ] = 0
    max_warmup_replicas: Annotated[
        int,
        About("Copies at a time, over all workers, that are made only so that a task with tables can move.", 1, 1000),
    ] = 2
    acceptable_lag_records: Annotated[
        int,
        About("Records a copy of a task's tables may be behind and still take the task over at once.", 0, 10**15),
    ] = 10_000
    rack: Annotated[
        str,
        About(
            "Where the worker runs (a zone, a machine): warm copies lie in other racks where they can.",
            shown_default="not said",
        ),
    ] = ""
    capacity: Annotated[
        int,
        About("The worker's share of the tasks beside the others': with 2 it gets twice as many as with 1.", 1, 1000),
    ] = 1
    instance_id: Annotated[
        str | None,
        About(
            "A name of the worker's own that outlives it (`shop-0`): started anew under it within `session_timeout_ms` "
            "it has its partitions back, and the others notice nothing. Letters, digits, `.`, `_` and `-`.",
            shown_default="none",
        ),
    ] = None
    memory_budget_bytes: Annotated[
        int,
        About(
            "Memory for tables and for output that is not yet sent or committed, in bytes.",
            1024 * 1024,
            shown_default="`268435456` (256 MiB)",
        ),
    ] = 256 * 1024 * 1024
    web: Annotated[bool, About("Whether the worker serves HTTP: metrics, health and a status page.")] = True
    web_host: Annotated[str, About("Address the web server listens on.")] = "127.0.0.1"
    web_port: Annotated[
        int | None,
        About(
            "Port of the web server; one that is given and taken is refused.",
            0,
            65_535,
            shown_default=f"`{DEFAULT_WEB_PORT}`, or a free one when it is taken",
        ),
    ] = None
    serve_tables: Annotated[
        bool, About("Whether the web server answers reads of tables, also those of other workers.")
    ] = True
    advertised_url: Annotated[
        str | None,
        About(
            "Where other workers reach this one's web server; `{port}` in it is the port it listens on, which "
            "`--processes` needs there.",
            shown_default="the address it listens on",
        ),
    ] = None
    log_level: Annotated[
        LogLevel,
        About(
            "Least severity that is logged by StreamFlow and your code; other libraries are heard from `WARNING` on."
        ),
    ] = "INFO"
    log_format: Annotated[LogFormat, About("How log lines look.")] = "console"
    session_timeout_ms: Annotated[
        int,
        About("Milliseconds of a worker's silence after which the others take its partitions over.", 100, DAY_MS),
    ] = 10_000
    heartbeat_interval_ms: Annotated[int, About("Milliseconds between a worker's heartbeats.", 10, DAY_MS)] = 300
    rebalance_timeout_ms: Annotated[
        int, About("Milliseconds a rebalance waits for a worker to hand its partitions over.", 100, DAY_MS)
    ] = 60_000
    max_poll_interval_ms: Annotated[
        int, About("Milliseconds one record may take before the worker gives its partitions up.", 100, 7 * DAY_MS)
    ] = 300_000
    shutdown_timeout_s: Annotated[
        float, About("Seconds a stopping worker may take to finish its records and commit.", 0.1, 3600)
    ] = 10.0
    start_timeout_s: Annotated[
        float, About("Seconds a starting worker waits for a log that does not answer.", 0, 3600)
    ] = 30.0
    linger_ms: Annotated[int, About("Milliseconds an output may wait for others to share its batch.", 0, 60_000)] = 5
    compression: Annotated[
        Compression | None,
        About("Compression of the batches written.", shown_default="`zstd`, or `none` where cramjam is not installed"),
    ] = None
    max_task_idle_ms: Annotated[
        int,
        About("Milliseconds a task with several inputs waits for an empty one before it goes on.", 0, DAY_MS),
    ] = 0


@dataclass(frozen=True)
class Setting:
    """One row of the table, read from a field of `Settings`.

    Attributes:
        name: As in `App(...)`.
        kind: `int`, `float`, `bool`, `str`, or `object` for what is taken as it is given.
        choices: The values allowed; empty for any.
        default: Its default.
        about: The rest.
    """

    name: str
    kind: type
    choices: tuple[str, ...]
    default: object
    about: About

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        """Its flag of `streamflow worker`."""
        return "--" + self.name.replace("_", "-")


def _table() -> dict[str, Setting]:
    hints = get_type_hints(Settings, include_extras=True)
    table: dict[str, Setting] = {}
    for item in fields(Settings):
        annotated, about = get_args(hints[item.name])
        members = [member for member in get_args(annotated) if member is not NoneType]
        inner = members[0] if NoneType in get_args(annotated) else annotated
        choices = get_args(inner) if get_origin(inner) is Literal else ()
        kind = str if choices else object if inner is Any else inner
        table[item.name] = Setting(item.name, kind, choices, item.default, about)
    return table


TABLE: Mapping[str, Setting] = _table()
"""Every setting by name, in the order of the documentation."""


# --- finding ------------------------------------------------------------------------------------------------------


def nearest_pyproject(start: Path) -> Path | None:
    """Find the pyproject.toml that rules a file.

    Args:
        start: The app's file, or a folder.

    Returns:
        The nearest one in its folder or above, or None.
    """
    folder = start if start.is_dir() else start.parent
    for candidate in (folder, *folder.parents):
        path = candidate / "pyproject.toml"
        if path.is_file():
            return path
    return None


def resolve_for(
    app_options: Mapping[str, object],
    *,
    origin: Path,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str],
    warn: Callable[[str], None] = logger.warning,
) -> Settings:
    """Resolve the settings of an app that stands in a file: finds its pyproject.toml and its root, then `resolve`.

    Args:
        app_options: What was given to `App(...)`.
        origin: The app's file, or the folder that stands for it.
        flags: What was given on the command line.
        environ: The environment.
        warn: Told of unknown variables.
    """
    origin = origin.resolve()
    pyproject = nearest_pyproject(origin)
    root = pyproject.parent if pyproject else origin if origin.is_dir() else origin.parent
    return resolve(app_options, flags=flags, environ=environ, pyproject_path=pyproject, root=root, warn=warn)


def resolve(
    app_options: Mapping[str, object],
    *,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str],
    pyproject_path: Path | None,
    root: Path,
    warn: Callable[[str], None] = logger.warning,
) -> Settings:
    """Put the sources together, strongest first: flag, environment, `App(...)`, pyproject.toml, default.

    Args:
        app_options: What was given to `App(...)`, by setting name; None means not given.
        flags: What was given on the command line, by setting name; None means not given.
        environ: The environment.
        pyproject_path: The project's pyproject.toml, if there is one.
        root: Absolute folder at which relative paths start.
        warn: Told of each unknown `STREAMFLOW_*` variable.

    Returns:
        Checked settings with an absolute `data_dir` and `broker`.

    Raises:
        ConfigurationError: An unknown name or a value that does not fit; the message says where it was given.
    """
    flags = flags or {}
    table = _pyproject_table(pyproject_path)
    check_names(app_options, "App(...) has no setting {!r}")
    check_names(flags, "there is no setting {!r}")
    check_names(table, f"[tool.streamflow] in {pyproject_path} has no setting {{!r}}")
    for message in unknown_variables(environ):
        warn(message)
    values: dict[str, Any] = {}
    for name, row in TABLE.items():
        for value, place in (
            (flags.get(name), row.flag),
            (environ.get(row.variable) or None, row.variable),
            (app_options.get(name), f"App({name}=...)"),
            (table.get(name), f"[tool.streamflow] {name}"),
        ):
            if value is not None:
                values[name] = parse(row, value, place)
                break
    return _absolute(values, root)


def check_names(given: Mapping[str, object], message: str) -> None:
    """Refuse a name that is no setting.

    Args:
        given: By name.
        message: A format with one place for the name.

    Raises:
        ConfigurationError: It names the nearest setting.
    """
    for name in given:
        if name not in TABLE:
            raise ConfigurationError(message.format(name) + nearest(name, TABLE))


def nearest(name: str, known: Mapping[str, object] | Sequence[str]) -> str:
    """The end of a sentence about an unknown name: the one that was probably meant, or all of them.

    Args:
        name: What was written.
        known: What could have been.
    """
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each `STREAMFLOW_*` variable that sets nothing (Kubernetes injects such names)."""
    known = {row.variable: name for name, row in TABLE.items()}
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable.startswith(KAFKA_PREFIX):
            continue
        if variable not in known and variable != PROCESS:
            yield f"the environment variable {variable} sets nothing{close_to(variable, known)}"


def close_to(variable: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown variable: the one that was probably meant, or nothing.

    Args:
        variable: What is set.
        known: What could have been.
    """
    close = difflib.get_close_matches(variable, list(known), n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""


def _pyproject_table(path: Path | None) -> Mapping[str, object]:
    if path is None:
        return {}
    try:
        tool = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc}") from exc
    table: object = tool.get("streamflow", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise ConfigurationError(f"{path}: [tool.streamflow] is to be a table of settings")
    return table


# --- checking -----------------------------------------------------------------------------------------------------


def parse(row: Setting, value: object, place: str) -> object:
    """Check one value, and convert it where it came as text.

    Args:
        row: The setting.
        value: As given.
        place: Where, for the message.

    Raises:
        ConfigurationError: It does not fit.
    """
    if row.kind is object:
        return value
    if row.kind is bool:
        return _boolean(value, place)
    if row.kind is str:
        return _text(row, value, place)
    return _number(row, value, place)


def _boolean(value: object, place: str) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ConfigurationError(f"{place} is to be true or false, not {value!r}")


def _text(row: Setting, value: object, place: str) -> str:
    if isinstance(value, Path):
        value = str(value)
    if value == row.default == "":
        return ""
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"{place} is to be text, not {value!r}")
    if row.name == "instance_id" and not _INSTANCE_ID.fullmatch(value):
        raise ConfigurationError(f"{place} is to be at most 249 letters, digits, '.', '_' and '-', not {value!r}")
    if row.name == "advertised_url":
        return _url(value, place)
    if not row.choices or value in row.choices:
        return value
    for choice in row.choices:
        if value.strip().lower() == choice.lower():
            return choice
    raise ConfigurationError(f"{place} is to be {_listed(row.choices)}, not {value!r}")


def _url(text: str, place: str) -> str:
    try:
        parts = urlsplit(text.strip().replace("{port}", "1"))
        fits = parts.scheme in {"http", "https"} and bool(parts.hostname) and not (parts.query or parts.fragment)
        _ = parts.port
    except ValueError:
        fits = False
    if not fits:
        raise ConfigurationError(f"{place} is to be an address such as http://orders-0:{{port}}, not {text!r}")
    return text.strip().rstrip("/")


def _number(row: Setting, value: object, place: str) -> int | float:
    what = "a whole number" if row.kind is int else "a number"
    number: int | float
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise TypeError
        number = row.kind(value)
        if row.kind is int and isinstance(value, float) and value != number:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigurationError(f"{place} is to be {what}{_range(row)}, not {value!r}") from None
    if not row.about.minimum <= number <= row.about.maximum:  # also refuses NaN
        raise ConfigurationError(f"{place} is to be {what}{_range(row)}, not {value!r}")
    if row.name == "replication" and number == 0:
        raise ConfigurationError(f"{place} is to be -1 (the broker's default) or at least 1, not 0")
    return number


def _range(row: Setting) -> str:
    if row.about.maximum < math.inf:
        return f" from {row.about.minimum:.16g} to {row.about.maximum:.16g}"
    return f" of at least {row.about.minimum:.16g}" if row.about.minimum > -math.inf else ""


def _listed(choices: Sequence[str]) -> str:
    return ", ".join(repr(choice) for choice in choices[:-1]) + f" or {choices[-1]!r}"


def _absolute(values: dict[str, Any], root: Path) -> Settings:
    data_dir = _absolute_path(values.get("data_dir") or str(TABLE["data_dir"].default), root)
    values["data_dir"] = str(data_dir)
    broker = values.get("broker")
    if broker is None:
        values["broker"] = f"sqlite:///{data_dir / 'log.db'}"
    elif isinstance(broker, str):
        values["broker"] = _absolute_broker(broker.strip(), root)
    settings = Settings(**values)
    if settings.heartbeat_interval_ms >= settings.session_timeout_ms:
        raise ConfigurationError(
            f"heartbeat_interval_ms ({settings.heartbeat_interval_ms}) is to be well below session_timeout_ms "
            f"({settings.session_timeout_ms}): a third of it at most is usual"
        )
    return settings


def _absolute_broker(broker: str, root: Path) -> str:
    """`sqlite:///PATH` with an absolute PATH (so four slashes where paths start with one); others as they are."""
    scheme, separator, rest = broker.partition("://")
    if not separator:
        raise ConfigurationError(
            f"broker {broker!r} is no address: use sqlite:///PATH, memory:// or kafka://HOST:PORT[,HOST:PORT]"
        )
    if scheme != "sqlite":
        return broker
    path = rest.removeprefix("/")
    if not rest.startswith("/") or not path:
        raise ConfigurationError(
            f"broker {broker!r} names no file: three slashes, then the path (sqlite:///orders.db, "
            "sqlite:////var/lib/orders.db)"
        )
    return f"sqlite:///{_absolute_path(path, root)}"


def _absolute_path(path: str, root: Path) -> Path:
    # normpath and not resolve: a symbolic link stays the name people know.
    return Path(os.path.normpath(root / Path(path).expanduser()))


# --- documentation ------------------------------------------------------------------------------------------------


def markdown_table() -> str:
    """The table of docs/settings.md; a test keeps the page equal to it."""
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for row in TABLE.values():
        default = row.about.shown_default or f"`{str(row.default).lower() if row.kind is bool else row.default}`"
        meaning = row.about.help
        if row.choices:
            meaning += " One of " + ", ".join(f"`{choice}`" for choice in row.choices) + "."
        elif _range(row):
            meaning += f" A number{_range(row)}."
        lines.append(f"| `{row.name}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"
