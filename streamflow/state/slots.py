"""Who works in which directory: `<data_dir>/<app>/<slot>/<task>/`.

A slot is a directory that one process has locked: that of its name, which a worker with an `instance_id` has, or the
lowest free one, so that a worker finds its state again after a restart and several workers on one machine share a
`data_dir`. The lock is the kernel's (`flock`): it ends with the process, whatever ends it, and a process that was
stopped keeps it. Slots are never deleted: what is in them may be somebody's only copy of what a topic has lost.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import logging
import os
import re
import time
import uuid
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from streamflow import disk
from streamflow.errors import ClosedError, StateFullError, StateLockedError, StateRefusedError, StreamFlowError
from streamflow.state.store import Checkpoint, Stores

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_ID = ".id"
_NAME = ".name"
_TURN_TIMEOUT_S = 5.0
_NAME_BYTES = 120


class Slot:
    """A locked directory; a context manager that lets go of it. Made by `claim`.

    Attributes:
        number: Its number, from 0.
        path: Its directory.
        id: What it is called for ever, 32 hexadecimal digits: a copy of the directory has the same.
    """

    def __init__(self, number: int, path: str, lock: int) -> None:
        self.number = number
        self.path = path
        self._lock = lock
        _note_holder(lock)
        self.id = _read_or_make_id(path)
        _held.add(self)

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<slot {self.path}>"

    def store_path(self, task: str) -> str:
        """The directory of a task's store in this slot.

        Args:
            task: The task's name and partition; any text.
        """
        return os.path.join(self.path, safe_name(task))

    def adopt(self, task: str, stores: Stores) -> bool:
        """Take over a task's store from a slot that nobody works in, when this one has none.

        Of several, the one whose checkpoint is furthest; what cannot be read is left where it is. The store moves by
        one rename, while both slots are locked.

        Args:
            task: As for `store_path`.
            stores: What can read a store's checkpoint.

        Returns:
            Whether this slot has the store now and did not before.

        Raises:
            ClosedError: The slot was released.
        """
        if self._lock < 0:
            raise ClosedError(f"slot {self.path} was released")
        place = self.store_path(task)
        if os.path.lexists(place):
            return False
        parent = os.path.dirname(self.path)
        best: tuple[tuple[int, int, int], str, int] | None = None
        with _turn(parent):
            try:
                for number in _numbers(parent):
                    found = self._candidate(os.path.join(parent, str(number)), os.path.basename(place), stores)
                    if found is not None:
                        best, worse = (found, best) if best is None or found[0] > best[0] else (best, found)
                        if worse is not None:
                            os.close(worse[2])
                return best is not None and _moved(best[1], place)
            finally:
                if best is not None:
                    os.close(best[2])

    def _candidate(self, slot: str, name: str, stores: Stores) -> tuple[tuple[int, int, int], str, int] | None:
        """A free slot's store of that name: how far it is, where it is, and the slot's lock."""
        path = os.path.join(slot, name)
        if slot == self.path or not os.path.isdir(path):
            return None
        lock = _try_lock(os.path.join(slot, _LOCK))
        if lock is None:
            return None
        try:
            checkpoint = stores.peek(path)
        except StreamFlowError as exc:
            logger.warning("state %s of a free slot is not taken over: %s", path, exc)
            checkpoint = None
        if checkpoint is None:
            os.close(lock)
            return None
        return _progress(checkpoint), path, lock

    def contents(self) -> list[str]:
        """Paths of everything in it, stores that were set aside included, but for what names and locks the slot."""
        own = {_LOCK, _ID, f"{_ID}.new", _NAME}
        return [os.path.join(self.path, name) for name in sorted(os.listdir(self.path)) if name not in own]

    def release(self) -> None:
        """Let another process have the slot; its stores must be closed. Does nothing the second time."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            _held.discard(self)
            os.close(lock)

    def forget(self) -> None:
        """In a child that was forked: the lock is the parent's, and must not outlive it here."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


_held: weakref.WeakSet[Slot] = weakref.WeakSet()


def _after_fork() -> None:
    for slot in list(_held):
        slot.forget()
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)


def claim(data_dir: str, app: str, name: str = "") -> Slot:
    """Lock a slot of an app: the one that a worker of this name had last, else the lowest free one, else a new one.

    Args:
        data_dir: The app's `data_dir`, absolute.
        app: The app's id.
        name: What the worker is called over restarts, its `instance_id`; empty for none.

    Raises:
        StateRefusedError: The directory cannot be used, or lies on a network file system.
        StateFullError: There is no room.
    """
    parent = os.path.join(data_dir, safe_name(app))
    kind = disk.network_file_system(data_dir)
    if kind is not None:
        raise StateRefusedError(
            f"state {parent}: it lies on a network file system ({kind}), whose locks cannot be relied on. Put data_dir "
            "on a local disk; state comes back from its changelogs"
        )
    try:
        os.makedirs(parent, exist_ok=True)
        with _turn(parent):
            for number in _to_try(parent, name):
                path = os.path.join(parent, str(number))
                os.makedirs(path, exist_ok=True)
                lock = _try_lock(os.path.join(path, _LOCK))
                if lock is None:
                    continue
                try:
                    slot = Slot(number, path, lock)
                except OSError:
                    os.close(lock)
                    raise
                _note_name(path, name)
                return slot
            raise AssertionError("there is always one more number")
    except OSError as exc:
        raise _refused(parent, exc) from exc


def claim_all(data_dir: str, app: str) -> list[Slot]:
    """Lock every slot of an app that there is; none is made.

    Args:
        data_dir: The app's `data_dir`, absolute.
        app: The app's id.

    Raises:
        StateLockedError: A live process works in one of them; none is kept locked.
        StateRefusedError: The directory cannot be used.
    """
    parent = os.path.join(data_dir, safe_name(app))
    if not os.path.isdir(parent):
        return []
    slots: list[Slot] = []
    try:
        with _turn(parent):
            for number in _numbers(parent):
                path = os.path.join(parent, str(number))
                lock = _try_lock(os.path.join(path, _LOCK))
                if lock is None:
                    raise StateLockedError(
                        f"state {path}: a live process works in it{_holder(path)}; stop that worker first"
                    )
                try:
                    slots.append(Slot(number, path, lock))
                except OSError:
                    os.close(lock)
                    raise
    except BaseException as exc:
        for slot in slots:
            slot.release()
        if isinstance(exc, OSError):
            raise _refused(parent, exc) from exc
        raise
    return slots


def safe_name(name: str) -> str:
    """A name as one path component: different names never meet, also where upper and lower case are the same.

    Letters, digits, `_`, `-` and `.` stay; everything else, capitals too, becomes `%` and two digits per byte of UTF-8.
    Very long names end in a digest.

    Args:
        name: Any text; the name of an app or a task.
    """
    safe = re.sub(r"[^a-z0-9_.-]|^\.|\.(?=aside-)", _escaped, name) or "%"
    if len(safe) <= _NAME_BYTES:
        return safe
    return f"{safe[: _NAME_BYTES - 33]}%{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def _escaped(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02x}" for byte in found[0].encode(errors="surrogatepass"))


def _progress(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """How far a store is, for comparison with others of the same task."""
    return sum(checkpoint.changelogs.values()), sum(checkpoint.inputs.values()), checkpoint.caught_up_at_ms


def _numbers(parent: str) -> list[int]:
    return sorted(int(name) for name in os.listdir(parent) if re.fullmatch(r"0|[1-9][0-9]*", name))


def _to_try(parent: str, name: str) -> Iterator[int]:
    """The slots in the order in which a worker of this name wants them: its own, nobody's, others', then new ones.

    Processes that are started together come in any order: each would find the state of another one in the lowest.
    """
    names = {number: _name_of(os.path.join(parent, str(number))) for number in _numbers(parent)}
    yield from sorted(names, key=lambda number: (names[number] != name, names[number] != "", number))
    yield from (number for number in itertools.count() if number not in names)


def _name_of(path: str) -> str:
    """Which worker had a slot last; empty for one without a name."""
    try:
        with open(os.path.join(path, _NAME), encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _note_name(path: str, name: str) -> None:
    """Note which worker has a slot, where that has changed."""
    if _name_of(path) == name:
        return
    place = os.path.join(path, _NAME)
    with contextlib.suppress(OSError):  # a full disk: the next start finds it where it is free
        if name:
            with open(place, "w", encoding="utf-8") as file:
                file.write(name)
        else:
            os.unlink(place)


def _moved(source: str, place: str) -> bool:
    try:
        os.rename(source, place)
    except OSError as exc:
        logger.warning("state %s of a free slot could not be moved to %s: %s", source, place, exc)
        return False
    logger.info("state %s was taken over from a free slot, it is now %s", source, place)
    return True


def _try_lock(path: str) -> int | None:
    """Lock a file without waiting: its descriptor, None when somebody else has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _note_holder(lock: int) -> None:
    """Write into a lock's file who has it: for people, who are to stop it."""
    with contextlib.suppress(OSError):  # a full disk: it is locked all the same
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)


def _holder(slot: str) -> str:
    """Who has locked a slot, in words; empty where that is not known."""
    try:
        with open(os.path.join(slot, _LOCK), encoding="ascii", errors="replace") as file:
            found = file.read(20).strip()
    except OSError:
        return ""
    return f" (process {found})" if found.isdecimal() else ""


@contextmanager
def _turn(parent: str) -> Generator[None]:
    """One process at a time looks for slots, so that nobody takes a slot for busy that another only looks at.

    It is a courtesy, not a safeguard: when the other one was stopped meanwhile, this one goes on after some seconds.
    """
    path = os.path.join(parent, _LOCK)
    deadline = time.monotonic() + _TURN_TIMEOUT_S
    while (descriptor := _try_lock(path)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _read_or_make_id(path: str) -> str:
    place = os.path.join(path, _ID)
    try:
        with open(place, encoding="ascii", errors="replace") as file:
            found = file.read().strip()
    except FileNotFoundError:
        pass
    else:
        if re.fullmatch(r"[0-9a-f]{32}", found):
            return found
        logger.warning("slot %s: its id %r cannot be read and is made anew", path, found[:40])
    made = uuid.uuid4().hex
    draft = f"{place}.new"
    with open(draft, "w", encoding="ascii") as file:
        file.write(made + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, place)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return made


def _refused(path: str, exc: OSError) -> StateFullError | StateRefusedError:
    if exc.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return StateFullError(f"state {path}: no room to make its directory ({exc.strerror})")
    return StateRefusedError(
        f"state {path}: its directory cannot be used ({exc.strerror}: {exc.filename}); make it writable for this user, "
        "or choose another data_dir"
    )
