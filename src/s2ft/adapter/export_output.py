"""Where the result of an export or a merge may be written, and how large it became."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from s2ft.errors import S2FTError
from s2ft.files import STAGING, staged

Progress = Callable[[list[str]], Iterable[str]]
"""Goes through the steps of a long work: `iter`, or a progress bar."""


def check_free(output: Path, suffix: str | None = None) -> None:
    """Raises `S2FTError` if something lies at `output` already (an empty folder aside), or it cannot be made.

    Args:
        output: What is to be written.
        suffix: Of a file; None for a folder.
    """
    given = f"output={str(output)!r}"
    if suffix is not None and output.suffix != suffix:
        raise S2FTError(f"{given} must be a file that ends in {suffix}")
    if suffix is not None and (output.exists() or output.is_symlink()):
        raise S2FTError(f"{given} exists already; name another file")
    if suffix is None and (output.is_file() or (output.is_symlink() and not output.exists())):
        raise S2FTError(f"{given} is a file; name a folder")
    if suffix is None and output.is_dir() and any(output.iterdir()):
        raise S2FTError(f"{given} is a folder that holds files already; name another")
    above = next(parent for parent in output.absolute().parents if parent.exists())
    if not above.is_dir():
        raise S2FTError(f"{given}: {str(above)!r} is a file, not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise S2FTError(f"{given}: {str(above)!r} is not a folder that you may write to")


@contextmanager
def staged_file(output: Path) -> Iterator[Path]:
    """A path beside `output` to write to; afterwards the file is moved there, in one rename."""
    with staged(output.parent, f"{STAGING}-{output.name}") as aside:
        yield aside / output.name


def bytes_of(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
