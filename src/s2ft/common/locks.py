"""One writer at a time: a lock beside what is written, which the system takes back when its process ends.

parent/.OUTPUT.lock    there while something is written to parent/OUTPUT; a killed process leaves it unlocked
OUTPUT/.lock           where OUTPUT is a folder whose parent is not ours to write to
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from filelock import FileLock, Timeout

from s2ft.common.errors import S2FTError

_SUFFIX = ".lock"
_SHORT, _LONG = 0.2, 60  # seconds: the first for who would rather be refused
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())  # by this thread


@contextmanager
def locked(given: Path, wait: bool = False) -> Iterator[None]:
    """Keeps other processes and threads from writing to a path during the block, however they spell it.

    Whoever holds the lock may ask for it again.

    Raises:
        S2FTError: if another holds it, or it cannot be made.
    """
    target = given.resolve()
    if target in _held.get():
        yield
        return
    with no_empty_folders(target.parent):
        lock = _acquire(given, target, _LONG if wait else _SHORT)
        token = _held.set(_held.get() | {target})
        try:
            yield
        finally:
            _held.reset(token)
            with suppress(OSError):
                os.unlink(lock.lock_file)  # who waits for it sees that, and makes another
            lock.release()


def is_lock(path: Path) -> bool:
    """Whether this is a lock of the folder that it lies in."""
    return path.name == _SUFFIX


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """Takes `folder` and its parents away again, if the block makes them and leaves nothing in them."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # not empty, or gone
                path.rmdir()


def _acquire(given: Path, target: Path, seconds: float) -> FileLock:
    inside = target.is_dir() and not os.access(target.parent, os.W_OK | os.X_OK)
    path = target / _SUFFIX if inside else target.with_name(f".{target.name}{_SUFFIX}")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=seconds)
    except Timeout:
        if not path.exists():  # nobody holds it: on some file systems nothing can be made
            raise S2FTError(f"{str(path.parent)!r} cannot be written to") from None
        raise S2FTError(f"{str(given)!r} is being written by another process; wait for it, or name another") from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise S2FTError(f"{str(path.parent)!r} cannot be written to: {reason}") from error
    return lock
