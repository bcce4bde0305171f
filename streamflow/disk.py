"""What this machine knows about the disk under a path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

NETWORK_FILE_SYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs"}
    | {"gfs2", "glusterfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "smb", "smb3", "smbfs"}
)


def network_file_system(path: str) -> str | None:
    """The type of the network file system that holds a path, None when it is a local one or cannot be told.

    Known on Linux only, from /proc/self/mountinfo; macOS tells the type through an interface Python does not have.

    Args:
        path: Absolute path; it need not exist.
    """
    if not sys.platform.startswith("linux"):
        return None
    kind = file_system_type(path)
    return kind if kind in NETWORK_FILE_SYSTEMS else None


def file_system_type(path: str, mountinfo: str = "/proc/self/mountinfo") -> str | None:
    """The type of the file system that holds a path, or None when it cannot be told.

    Args:
        path: Absolute path; it need not exist.
        mountinfo: Where the kernel lists the mounts.
    """
    try:
        lines = Path(mountinfo).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    real = os.path.realpath(path)
    best, kind = "", None
    for line in lines:
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        point = fields[4].encode(errors="surrogateescape").decode("unicode_escape")  # a space stands as \040
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of several mounts on one point, the last is on top
            best, kind = point, right.split()[0]
    return kind
