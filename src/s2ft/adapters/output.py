"""How an export or a merge tells of its progress, and how large its result became."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

Progress = Callable[[list[str]], Iterable[str]]
"""Goes through the steps of a long work: `iter`, or a progress bar."""


def bytes_of(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
