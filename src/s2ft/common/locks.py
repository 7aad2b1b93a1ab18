"""One writer at a time: a lock file beside what is written; the system releases it when the process ends.

parent/.OUTPUT.lock    exists while parent/OUTPUT is written; a killed process leaves it behind, unlocked
OUTPUT/.lock           instead, where OUTPUT is a folder and its parent is not writable
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
_SHORT, _LONG = 0.2, 60  # seconds until an attempt is refused; the second where the caller is ready to wait
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())  # locked by this thread


@contextmanager
def locked(given: Path, wait: bool = False) -> Iterator[None]:
    """Keeps other processes and threads from writing to a path during the block, however they spell it.

    The lock is reentrant: its holder may take it again.

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
                os.unlink(lock.lock_file)  # those who wait for it notice, and make a new one
            lock.release()


def is_lock(path: Path) -> bool:
    """Whether this is a lock of the folder that it lies in."""
    return path.name == _SUFFIX


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """Removes `folder` and its parents again, as far as the block made them and left them empty."""
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
        if not path.exists():  # nobody holds it: some file systems answer so where nothing can be created
            raise S2FTError(f"{str(path.parent)!r} cannot be written to") from None
        raise S2FTError(f"{str(given)!r} is being written by another process; wait for it, or name another") from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise S2FTError(f"{str(path.parent)!r} cannot be written to: {reason}") from error
    return lock
