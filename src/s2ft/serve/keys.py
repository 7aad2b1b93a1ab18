"""The keys of those who may ask, from a file or the environment. Needs no heavy library."""

from __future__ import annotations

import os
from pathlib import Path

from s2ft.common.errors import S2FTError
from s2ft.common.reading import check_regular

KEYS = "S2FT_KEYS"
"""The environment variable that holds keys, divided by spaces, unless a file is given."""

SHORTEST = 8  # characters of a key


def read_keys(file: Path | None) -> list[str]:
    """The keys of the file, or those of the environment; none where neither is given.

    Raises:
        S2FTError: if the file cannot be read or holds no key, or a key is too short to be one.
    """
    if file is None:
        keys, where = os.environ.get(KEYS, "").split(), f"${KEYS}"
    else:
        where = f"keys={str(file)!r}"
        try:
            check_regular(file)
            keys = file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise S2FTError(f"{where} cannot be read: {error}") from None
        if not keys:
            raise S2FTError(f"{where} holds no key; expected one a line")
    if any(len(key) < SHORTEST or not key.isascii() for key in keys):
        raise S2FTError(f"{where} holds a key of less than {SHORTEST} characters, or of others than ASCII")
    return keys
