"""Who a process is, so that others can tell for certain that it is gone: killed members need not be waited for.

A doubt counts as alive: another boot, another process namespace (containers that share a volume) or a machine without
/proc leave it to the session time-out.
"""

from __future__ import annotations

import os
import uuid
from functools import cache
from pathlib import Path


@cache
def _namespace() -> str:
    """This boot and process namespace, or "" where the machine does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def identity() -> str:
    """This process among all that ever ran here."""
    pid = os.getpid()
    return f"{_namespace() or uuid.uuid4().hex} {pid} {_started(pid) or '?'}"


def is_gone(process: str) -> bool:
    """Whether the process of that identity has certainly ended."""
    namespace, pid, started = process.split(" ")
    if not _namespace() or namespace != _namespace() or started == "?":
        return False
    now = _started(int(pid))
    return now is None or now != started


def is_alive(process: str) -> bool:
    """Whether the process of that identity certainly runs.

    Args:
        process: An `identity`; an empty one is nobody's.
    """
    if not process or not _namespace():
        return False
    namespace, pid, started = process.split(" ")
    return namespace == _namespace() and started == _started(int(pid))


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's clock ticks; None when there is no such process, or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else fields[19]
