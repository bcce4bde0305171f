"""How log lines look on the command line. Only the commands set this up; the library just uses `logging`.

Two formats: `console` for people (one compact line, coloured on a terminal), `json` for machines (an object a line).
Values of secret variables never appear in either. The level is for StreamFlow and the user's own code, told by where a
line comes from, since loggers have any name; other distributions are heard from `WARNING` on.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from streamflow.config import KAFKA_PREFIX, LogFormat, LogLevel

_SECRET_WORDS = ("PASSWORD", "SECRET", "TOKEN", "PASSPHRASE")
_COLOURS = {"DEBUG": "2", "INFO": "36", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}
_INSTALLED = ("site-packages", "dist-packages")
_STANDARD_LIBRARY = Path(logging.__file__).resolve().parents[1]

_encode_json = msgspec.json.Encoder().encode


class SecretFilter:
    """Replaces secrets in finished text, whichever library wrote it.

    Args:
        environ: Where secrets stand: `STREAMFLOW_KAFKA_*` variables named after a password, secret or token.
        secrets: Others.
    """

    def __init__(self, environ: Mapping[str, str], secrets: Sequence[str] = ()) -> None:
        found = {
            value
            for name, value in environ.items()
            if name.startswith(KAFKA_PREFIX) and any(word in name for word in _SECRET_WORDS)
        }
        # The longest first: one may be part of another. Very short ones would blacken half of every line.
        self._secrets = sorted((one for one in found.union(secrets) if len(one) >= 4), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class ConsoleFormatter(logging.Formatter):
    """`12:30:01.250 INFO worker: message`, with the process index in every line where there are several processes.

    Args:
        process_index: Which of several worker processes this is; None for the only one.
        colour: Use ANSI colours.
        redact: Applied to the finished text.
    """

    def __init__(self, process_index: int | None, *, colour: bool, redact: SecretFilter) -> None:
        super().__init__()
        self._prefix = "" if process_index is None else f"[{process_index}] "
        self._colour = colour
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = f"{record.levelname:<7}"
        if self._colour and record.levelname in _COLOURS:
            level = f"\x1b[{_COLOURS[record.levelname]}m{level}\x1b[0m"
        name = record.name.removeprefix("streamflow.")
        text = f"{moment}.{int(record.msecs):03d} {level} {name}: {record.getMessage()}"
        if details := _details(self, record):
            text += "\n" + details
        if self._prefix:
            text = self._prefix + text.replace("\n", "\n" + self._prefix)
        return self._redact(text)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO, UTC), level, logger, message, app, process, exc_info.

    Args:
        app: The app's id.
        process_index: Which of several worker processes this is; None for the only one.
        redact: Applied to the finished text.
    """

    def __init__(self, app: str, process_index: int | None, redact: SecretFilter) -> None:
        super().__init__()
        self._app = app
        self._process_index = process_index
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": self._redact(record.getMessage()),
            "app": self._app,
        }
        if self._process_index is not None:
            line["process"] = self._process_index
        if details := _details(self, record):
            line["exc_info"] = self._redact(details)
        return _encode_json(line).decode()


def _details(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)


class _StandardError(logging.Handler):
    """Writes to what `sys.stderr` is at the time: a progress bar takes its place while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class OwnLines(logging.Filter):
    """Lets through what StreamFlow and the user's code say, and of others' lines those from `WARNING` on.

    A logger that was given a level of its own (`logging.getLogger("httpx").setLevel(logging.INFO)`) is heard from that.

    Args:
        origin: The app's file: with its whole package it is the user's, even where it is installed.
    """

    def __init__(self, origin: Path) -> None:
        super().__init__()
        self._own_folder = _package_of(origin)
        self._known: dict[str, bool] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING or record.name.partition(".")[0] == "streamflow":
            return True
        return self._is_own(record.pathname) or _has_own_level(record.name)

    def _is_own(self, pathname: str) -> bool:
        known = self._known.get(pathname)
        if known is None:
            path = Path(pathname).resolve()
            known = self._own_folder == path or self._own_folder in path.parents or not _is_installed(path)
            self._known[pathname] = known
        return known


def _package_of(origin: Path) -> Path:
    """The folder of the outermost package that a file is in, or the file itself."""
    found = origin.resolve()
    while (found.parent / "__init__.py").is_file():
        found = found.parent
    return found


def _is_installed(path: Path) -> bool:
    return any(part in _INSTALLED for part in path.parts) or _STANDARD_LIBRARY in path.parents


def _has_own_level(name: str) -> bool:
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None and logger.parent is not None:
        if logger.level != logging.NOTSET:
            return True
        logger = logger.parent
    return False


def configure(
    level: LogLevel,
    log_format: LogFormat,
    *,
    app: str,
    origin: Path,
    process_index: int | None = None,
    secrets: Sequence[str] = (),
    handler: logging.Handler | None = None,
) -> None:
    """Send the whole process's logging to one place.

    Args:
        level: Least severity, for StreamFlow and the user's code (see `OwnLines`).
        log_format: `console` or `json`.
        app: The app's id.
        origin: The app's file.
        process_index: Which of several worker processes this is; None for the only one.
        secrets: What must never be printed, besides what the environment has.
        handler: Where to; standard error by default.
    """
    redact = SecretFilter(os.environ, secrets)
    handler = handler or _StandardError()
    if log_format == "json":
        handler.setFormatter(JsonFormatter(app, process_index, redact))
    else:
        colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        handler.setFormatter(ConsoleFormatter(process_index, colour=colour, redact=redact))
    handler.addFilter(OwnLines(origin))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
