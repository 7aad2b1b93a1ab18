"""What a command is to write: can it be written where it is wanted? Asked before the work, which may take hours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from s2ft.common.errors import S2FTError
from s2ft.common.extras import from_extra
from s2ft.common.locks import is_lock

UNFINISHED, FINISHED = ".unfinished", ".finished"  # what writers leave in a folder while they write (common/files.py)

Progress = Callable[[list[str]], Iterable[str]]
"""Goes through the steps of a long work: `iter`, or a progress bar."""


def check_place(output: str | Path, option: str = "output", is_folder: bool = True) -> None:
    """Raises `S2FTError` unless something can be written at `output`, the value of `option`.

    It may exist already; missing folders above it can be made.

    Example:
        >>> check_place("/dev/null/result")
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: output='/dev/null/result': '/dev/null' is a file, not a folder
    """
    path, given = Path(output), f"{option}={str(output)!r}"
    _check_name(output, option)
    if is_folder and not path.is_dir() and (path.exists() or path.is_symlink()):
        raise S2FTError(f"{given} is a file; name a folder")
    if not is_folder and path.is_dir():
        raise S2FTError(f"{given} is a folder; name a file")
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if nearest != path and not nearest.is_dir():
        raise S2FTError(f"{given}: {str(nearest)!r} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK if nearest.is_dir() else os.W_OK):
        raise S2FTError(f"{given}: you may not write there ({str(nearest)!r}); name another {_kind(is_folder)}")


def check_free(output: Path, suffix: str | None = None) -> None:
    """Raises `S2FTError` as `check_place` does, or if `output` exists already; it may be an empty folder.

    Args:
        suffix: Of a file; None for a folder.
    """
    _check_name(output, "output")
    given = f"output={str(output)!r}"
    if suffix is not None and output.suffix != suffix:
        raise S2FTError(f"{given} must be a file that ends in {suffix}")
    if suffix is not None and (output.exists() or output.is_symlink()):
        raise S2FTError(f"{given} exists already; name another file")
    if suffix is None and output.is_dir() and _holds_files(output):
        raise S2FTError(f"{given} is a folder that holds files already; name another")
    check_place(output, is_folder=suffix is None)


def check_writable(file: str | Path | None, option: str = "json", suffix: str | None = None) -> None:
    """Raises `S2FTError` as `check_place` does, or if `file` does not end in `suffix` or its folder is missing.

    Where `suffix` is .png, also if what draws is not installed.
    """
    if file is None:
        return
    _check_name(file, option)
    path, given = Path(file), f"{option}={str(file)!r}"
    if not path.resolve().parent.is_dir():
        raise S2FTError(f"{given}: there is no folder {str(path.parent)!r} to write it in")
    check_place(path, option, is_folder=False)
    if suffix is not None and path.suffix.lower() != suffix:
        raise S2FTError(f"{given} must end in {suffix}")
    if suffix == ".png":
        with from_extra("lab", given):
            import matplotlib  # noqa: F401 - is it there?


def _check_name(path: str | Path, option: str) -> None:
    if "\0" in str(path):
        raise S2FTError(f"{option}={str(path)!r} holds a NUL character, which no file's name can")


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, but for what writers leave there while they write, or when they are killed."""
    ours = (UNFINISHED, FINISHED)
    return [path for path in folder.iterdir() if not path.name.startswith(ours) and not is_lock(path)]


def bytes_of(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _holds_files(folder: Path) -> bool:
    """False where a writer was killed while it moved its files: the next one finishes that, and looks again."""
    return bool(entries(folder)) and not any(path.name.startswith(FINISHED) for path in folder.iterdir())


def _kind(is_folder: bool) -> str:
    return "folder" if is_folder else "file"
