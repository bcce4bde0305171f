"""What SQLite's errors mean, and what this machine knows about a file: the one place that translates `sqlite3`."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from streamflow import disk
from streamflow.errors import (
    ConfigurationError,
    FatalError,
    InternalError,
    LogCorruptedError,
    LogFullError,
    LogUnavailableError,
    StreamFlowError,
)

_WRITE_LOCK_BYTE = 120
"""Where SQLite's write lock lies in the `-shm` file (its WAL-index format is fixed)."""
_NO_ROOM = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_TRUNCATE}
)
_NOT_USABLE = {
    sqlite3.SQLITE_READONLY: "cannot be written",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_PERM: "cannot be used by this user",
    sqlite3.SQLITE_AUTH: "cannot be used by this user",
}


@contextmanager
def translated(path: str) -> Generator[None]:
    """Turn SQLite's errors into StreamFlow's.

    Args:
        path: The file as messages name it.

    Raises:
        StreamFlowError: Whatever the error means for the run.
    """
    try:
        yield
    except sqlite3.Error as exc:
        raise translate(exc, path) from exc


def translate(exc: sqlite3.Error, path: str) -> StreamFlowError:
    """Name a SQLite error by its consequence.

    Args:
        exc: What SQLite raised.
        path: The file as messages name it.

    Returns:
        The error to raise from it.
    """
    extended: int = getattr(exc, "sqlite_errorcode", None) or 0
    code = extended & 0xFF
    if extended in _NO_ROOM or code == sqlite3.SQLITE_FULL:
        return LogFullError(
            f"log {path}: no room to write ({exc}). What was acknowledged is safe; free space on its disk "
            "(or raise the quota or file size limit), and writing goes on by itself"
        )
    if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}:
        return LogUnavailableError(f"log {path}: locked ({exc}){held_by(path)}")
    if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB} or extended == sqlite3.SQLITE_IOERR_SHORT_READ:
        return LogCorruptedError(
            f"log {path}: the file is damaged or no SQLite database ({exc}). Restore it from a backup, or save what "
            f"can be read with `sqlite3 {path} .recover`"
        )
    if code in _NOT_USABLE:
        return ConfigurationError(
            f"log {path}: {_NOT_USABLE[code]} ({exc}). The file, its -wal and -shm neighbours and their directory must "
            "be writable by this user; or choose another place with data_dir or broker"
        )
    if code == sqlite3.SQLITE_IOERR:
        return FatalError(f"log {path}: the disk failed ({exc}); check it before starting again")
    return InternalError(f"log {path}: {exc}")


def locked_too_long(path: str, waited_s: float) -> LogUnavailableError:
    """The error after waiting for the write lock in vain."""
    return LogUnavailableError(
        f"log {path}: another process has kept it locked for {waited_s:.0f} s{held_by(path)}. Nothing was stored; let "
        "that process go on (SIGCONT) or end it"
    )


def identity(path: str) -> tuple[int, int]:
    """Which file it is that stands at a path."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def check_identity(path: str, opened: tuple[int, int]) -> None:
    """Raise `FatalError` when another file, or none, stands where the log was opened.

    SQLite goes on with a deleted file, and what it acknowledges is gone with the process.

    Args:
        path: The log.
        opened: Its `identity` then.
    """
    try:
        if identity(path) == opened:
            return
        what = "was replaced by another file"
    except FileNotFoundError:
        what = "was deleted"
    except OSError:
        return  # nothing is known
    raise FatalError(
        f"log {path}: the file {what} while it was in use, so nothing more is written. Stop all processes that use it, "
        "put the file back if you have it (with its -wal neighbour), and start again"
    )


def held_by(path: str) -> str:
    """Who holds the write lock, for people: empty where the machine does not say (macOS) or nobody does."""
    try:
        status = os.stat(path + "-shm")
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return ""
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in locks.splitlines():
        words = line.split()
        # "1: POSIX  ADVISORY  WRITE 4242 fe:00:1234 120 120"
        if len(words) < 8 or words[1] != "POSIX" or words[3] != "WRITE" or words[5] != device:
            continue
        if words[6].isdigit() and words[7].isdigit() and int(words[6]) <= _WRITE_LOCK_BYTE <= int(words[7]):
            return f", held by process {words[4]}{_described(words[4])}"
    return ""


def _described(pid: str) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    name, _, rest = stat.partition("(")[2].rpartition(")")
    return f" ({name}, stopped)" if rest.split()[0] in {"T", "t"} else f" ({name})"


def refuse_network_file_system(path: str) -> None:
    """Refuse a place whose locks and shared memory SQLite's WAL cannot rely on.

    Args:
        path: Absolute path of the log.

    Raises:
        ConfigurationError: It lies on a network file system.
    """
    kind = disk.network_file_system(path)
    if kind is not None:
        raise ConfigurationError(
            f"log {path}: it lies on a network file system ({kind}), where SQLite's locks and shared memory do not "
            "work and the log would be damaged. Put data_dir on a local disk, or use kafka:// for several machines"
        )


def prepare_directory(path: str) -> None:
    """Make the log's directory.

    Args:
        path: Absolute path of the log.

    Raises:
        ConfigurationError: It cannot be made, or cannot be written.
        LogFullError: The disk is full.
    """
    directory = os.path.dirname(path)
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise LogFullError(f"log {path}: no room to make its directory ({exc.strerror})") from exc
        raise ConfigurationError(f"log {path}: its directory cannot be made ({exc.strerror}): {directory}") from exc
    if os.path.isdir(path):
        raise ConfigurationError(f"log {path}: this is a directory; name a file in it, such as {path}/log.db")
    if not _may(directory, os.W_OK | os.X_OK):
        raise ConfigurationError(f"log {path}: its directory cannot be written by this user: {directory}")
    for file in (path, f"{path}-wal", f"{path}-shm"):
        if os.path.exists(file) and not _may(file, os.R_OK | os.W_OK):
            raise ConfigurationError(f"log {path}: the file {file} cannot be read and written by this user")


def _may(path: str, mode: int) -> bool:
    # SQLite opens what it may only read without a word, and fails with the first write.
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)
