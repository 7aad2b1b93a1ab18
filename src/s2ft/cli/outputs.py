"""Can the result be written where it is wanted? Asked before the work starts, which may take hours."""

from __future__ import annotations

import os
from pathlib import Path

from s2ft.common.errors import S2FTError


def check_writable(file: str | Path | None, option: str = "json", suffix: str | None = None) -> None:
    """Raises `S2FTError` if `file`, the value of `option`, could not be written, or does not end in `suffix`."""
    if file is None:
        return
    path, given = Path(file), f"{option}={str(file)!r}"
    folder = path.resolve().parent
    if not folder.is_dir():
        raise S2FTError(f"{given}: there is no folder {str(path.parent)!r} to write it in")
    if path.is_dir():
        raise S2FTError(f"{given} is a folder; name a file")
    if suffix is not None and path.suffix.lower() != suffix:
        raise S2FTError(f"{given} must end in {suffix}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise S2FTError(f"{given}: you may not write there; name another file")
