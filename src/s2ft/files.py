"""Files that are whole or not there: written aside, flushed to disk, then renamed into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s2ft.errors import S2FTError

STAGING = ".unfinished"


@contextmanager
def staged(folder: Path, name: str = STAGING) -> Iterator[Path]:
    """A new folder inside `folder` to write into; afterwards its entries are moved into `folder`, one rename each.

    Nothing is moved if the block raises. An entry that is there already is replaced. `name` is the new folder's: those who
    write into one folder at the same time need different ones.

    Raises:
        S2FTError: if the folder cannot be made.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp())
        >>> with staged(target) as aside:
        ...     _ = (aside / "a.txt").write_text("whole")
        >>> sorted(path.name for path in target.iterdir())
        ['a.txt']
    """
    aside = folder / name
    with no_empty_folders(folder):
        shutil.rmtree(aside, ignore_errors=True)  # what a killed run may have left
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            raise S2FTError(f"{str(folder)!r} cannot be written to: {error.strerror}") from error
        try:
            yield aside
            _flush(aside)
            for entry in sorted(aside.iterdir()):
                _replace(entry, folder / entry.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """Takes `folder` and its parents away again, if the block makes them and leaves nothing in them."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(source, target)


def _flush(folder: Path) -> None:
    """A rename must not reach the disk before the contents do."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
