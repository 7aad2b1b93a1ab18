"""Atomic writing: files and folders appear whole or not at all, and have one writer at a time.

They are written beside their place, flushed to disk, and renamed:

    parent/
        .OUTPUT.lock                held while OUTPUT is written (s2ft/common/locks.py)
        .OUTPUT.unfinished-3f2a     a new OUTPUT, folder or file, in the making: one rename, and it is there
    OUTPUT/
        .unfinished-3f2a/           what is being added to a folder that is there; renamed once it is whole, to
        .finished-3f2a/             whose entries are then moved up: by the next writer, if this one was killed meanwhile

What a killed writer leaves behind, the next writer removes or completes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open

from s2ft.common.errors import S2FTError, no_space
from s2ft.common.locks import locked, no_empty_folders
from s2ft.common.outputs import FINISHED, UNFINISHED, check_free

_CONFIGS = "config.json"  # moved last: with it, a folder counts as an adapter or a model
_DEVICES = ("/dev", "/proc")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `folder` in one rename; nothing is left if the block raises.

    An empty folder that exists already is filled as by `staged`.

    Raises:
        S2FTError: if something lies at `folder` already, someone else is writing there, or the disk is full.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "new"
        >>> with new_folder(target) as aside:
        ...     _ = (aside / "a.txt").write_text("whole")
        >>> sorted(path.name for path in target.iterdir())
        ['a.txt']
    """
    target = folder.resolve()
    with _writing(folder), locked(folder):
        _settle(target)
        check_free(folder)
        if target.is_dir():  # empty; it stays itself, with its permissions, and with those who are in it
            with staged(target) as aside:
                yield aside
            return
        with _aside(target.parent / f".{target.name}{UNFINISHED}") as aside:
            yield aside
            flush(aside)
            aside.rename(target)
            flush_names(target.parent)


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `file` in one rename; nothing is left if the block raises.

    Raises:
        S2FTError: if something lies at `file` already, someone else is writing there, or the disk is full.
    """
    target = file.resolve()
    with _writing(file), locked(file):
        _settle(target)
        check_free(file, file.suffix)
        with _one_file(target) as aside:
            yield aside


@contextmanager
def replaced_file(file: Path) -> Iterator[Path]:
    """Yields a path to write to, which replaces `file` in one rename; if the block raises, the old file stays.

    A device, a pipe, or a file in a folder that is not writable is written directly.
    """
    target = file.resolve()
    if _is_device(file) or not os.access(target.parent, os.W_OK | os.X_OK):
        yield file
        return
    with _writing(file), locked(file, wait=True):
        _settle(target)
        with _one_file(target) as aside:
            yield aside


def write_json(file: Path, value: Any, indent: int = 2, **how: Any) -> None:
    """Writes `value` as JSON; if that fails, the old file stays. `how` goes to `json.dumps`."""
    text = json.dumps(value, indent=indent, **how) + "\n"
    with replaced_file(file) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields a new folder inside `folder` to write into; afterwards its entries move up into `folder`, one rename each.

    Nothing is moved if the block raises. Entries that exist already are replaced; the configuration is moved last.

    Raises:
        S2FTError: if the folder cannot be made, someone else is writing there, or the disk is full.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp())
        >>> with staged(target) as aside:
        ...     _ = (aside / "a.txt").write_text("whole")
        >>> sorted(path.name for path in target.iterdir())
        ['a.txt']
    """
    target = folder.resolve()
    with _writing(folder), locked(folder), no_empty_folders(target):
        _settle(target)
        with _aside(target / UNFINISHED) as aside:
            yield aside
            flush(aside)
            _move_up(aside.rename(target / aside.name.replace(UNFINISHED, FINISHED)))


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keeps others from writing into `folder` during the block, and clears what a killed writer left there.

    Raises:
        S2FTError: if someone else is writing there.
    """
    with locked(folder):
        _settle(folder.resolve())
        yield


@contextmanager
def _writing(given: Path) -> Iterator[None]:
    """Reports a full disk as an `S2FTError`, whichever library runs into it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, S2FTError) or (reason := no_space(error)) is None:
            raise
        raise S2FTError(f"{str(given)!r} cannot be written: {reason}; nothing half-written is left") from error


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A new folder that is gone afterwards, unless the block renames it."""
    aside = path.with_name(f"{path.name}-{_unique()}")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise S2FTError(f"{str(path.parent)!r} cannot be written to: {error.strerror}") from error
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _one_file(target: Path) -> Iterator[Path]:
    aside = target.with_name(f".{target.name}{UNFINISHED}-{_unique()}{target.suffix}")
    try:
        yield aside
        _flush_file(aside)
        aside.replace(target)
        flush_names(target.parent)
    finally:
        aside.unlink(missing_ok=True)


def _settle(target: Path) -> None:
    """After a killed writer: moves what was whole to its place, and removes the rest. The caller holds the lock."""
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        if path.name.startswith(f".{target.name}{UNFINISHED}-"):
            _remove(path)
    for path in list(target.iterdir()) if target.is_dir() else ():
        if path.name.startswith(UNFINISHED):
            _remove(path)
        elif path.name.startswith(FINISHED):
            _move_up(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _unique() -> str:
    return uuid4().hex[:8]


def _move_up(done: Path) -> None:
    for entry in sorted(done.iterdir(), key=lambda path: (path.name.endswith(_CONFIGS), path.name)):
        target = done.parent / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    done.rmdir()
    flush_names(done.parent)


def flush(folder: Path) -> None:
    """Returns once the files in `folder` are on the disk: a rename must not reach it before the contents do.

    Raises:
        S2FTError: if a safetensors file is shorter than its tensors need.
    """
    for path in [*folder.rglob("*"), folder]:
        flush_names(path) if path.is_dir() else _flush_file(path)


def _flush_file(path: Path) -> None:
    if path.suffix == ".safetensors":
        _check_whole(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _check_whole(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):  # checks the file's length against its tensors
            pass
    except SafetensorError as error:
        raise S2FTError(f"{path.name} was not written whole, so it is not kept: {error}") from error


def flush_names(folder: Path) -> None:
    """Returns once the disk knows which entries `folder` has."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_device(file: Path) -> bool:
    """Whether a rename cannot replace it, as with /dev/stdout, even where that is redirected to a file."""
    named = file.absolute()
    return any(named.is_relative_to(root) for root in _DEVICES) or (file.exists() and not file.is_file())
