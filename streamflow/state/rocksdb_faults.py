"""What RocksDB's errors mean: rocksdict raises plain exceptions with RocksDB's text."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from streamflow.errors import (
    ClosedError,
    InternalError,
    StateCorruptedError,
    StateFullError,
    StateLockedError,
    StateRefusedError,
    StreamFlowError,
)

_NO_ROOM = ("No space left on device", "File too large", "Disk quota exceeded")
_LOCKED = ("lock hold by current process", "While lock file")
_REFUSED = ("Permission denied", "Read-only file system", "Too many open files", "Not a directory", "File exists")
_PROBE = "room"


def translate(exc: Exception, path: str) -> StreamFlowError:
    """Name a RocksDB error by its consequence.

    Args:
        exc: What rocksdict raised.
        path: The store's directory.

    Returns:
        The error to raise from it.
    """
    text = str(exc)
    if isinstance(exc, StreamFlowError):
        return exc
    if type(exc).__name__ == "DbClosedError":
        return ClosedError(f"state {path} is closed")
    if any(sign in text for sign in _NO_ROOM):
        return no_room(path, text)
    if any(sign in text for sign in _LOCKED):
        return StateLockedError(
            f"state {path}: {_holder(path, text)} has it open. Stop that one, or choose another data_dir"
        )
    if any(sign in text for sign in _REFUSED):
        return StateRefusedError(
            f"state {path} cannot be used ({text}). The directory and all below must be readable and writable by this "
            "user; or choose another data_dir"
        )
    if "orruption" in text or "IO error" in text or "Not implemented" in text or "Invalid argument" in text:
        return StateCorruptedError(f"state {path} is damaged ({text}); set aside, it is restored from its changelogs")
    return InternalError(f"state {path}: {text}")


def no_room(path: str, why: str) -> StateFullError:
    """The error of a full disk."""
    return StateFullError(
        f"state {path}: no room to write ({why}). Nothing is lost: the log has what the store lacks; free space on its "
        "disk (or raise the quota or file size limit), and writing goes on"
    )


def check_room(path: str, wanted_bytes: int) -> None:
    """Raise `StateFullError` unless a file of that size can be written: the only test that knows quotas and limits."""
    probe = os.path.join(path, _PROBE)
    try:
        with open(probe, "wb") as file:
            file.write(bytes(wanted_bytes))
    except OSError as exc:
        raise no_room(path, exc.strerror or str(exc)) from exc
    finally:
        if os.path.exists(probe):
            os.unlink(probe)


def has_data(path: str) -> bool:
    """Whether a directory holds data of a store.

    Where the files that name its state are gone or cut short, RocksDB would make an empty store there and remove it.
    """
    return any(name.endswith(".sst") or (name.endswith(".log") and size) for name, size in file_sizes(path).items())


def file_sizes(path: str) -> dict[str, int]:
    """The sizes of a store's files by name, in bytes; RocksDB may delete some while they are looked at."""
    sizes: dict[str, int] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
    return sizes


def _holder(path: str, text: str) -> str:
    """Who holds the lock, for people."""
    if "current process" in text:
        return "another part of this process"
    try:
        inode = str(os.stat(os.path.join(path, "LOCK")).st_ino)
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return "another process"
    for line in locks.splitlines():
        words = line.split()
        # "1: POSIX  ADVISORY  WRITE 4242 fe:00:1234 0 EOF"; the device may be numbered differently (btrfs, overlays)
        if len(words) >= 6 and words[1] == "POSIX" and words[3] == "WRITE" and words[5].rpartition(":")[2] == inode:
            return f"process {words[4]}"
    return "another process"
