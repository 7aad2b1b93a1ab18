"""Reading files that others wrote: within bounds, and without trusting what they hold, or that they are files at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from s2ft.common.errors import S2FTError

LARGEST_JSON = 64 << 20  # bytes; the config of an adapter with a million modules has about as many


def check_regular(path: Path) -> None:
    """Raises `S2FTError` if `path` is something other than a regular file, such as a pipe, which would block for ever.

    Example:
        >>> check_regular(Path("/dev/zero"))
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: '/dev/zero' is no regular file
    """
    try:
        irregular = not path.is_file() and (path.exists() or path.is_symlink())
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, no access, a name that no file can have
        raise S2FTError(f"{str(path)!r} cannot be read: {error}") from error
    if irregular:
        raise S2FTError(f"{str(path)!r} is no regular file")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        S2FTError: if it cannot be read, is larger than `LARGEST_JSON` bytes, no JSON, nested too deeply, or no object.
    """
    check_regular(path)
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise S2FTError(f"{path} has {path.stat().st_size:,} bytes; more than {LARGEST_JSON:,} are not read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except S2FTError:
        raise
    except OSError as error:
        raise S2FTError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise S2FTError(f"{path} is nested too deeply") from error
    except ValueError as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise S2FTError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise S2FTError(f"{path} holds no JSON object, but {shown(value)}")
    return value


def is_clean(text: str) -> bool:
    r"""Whether a name can be shown and stored: no control characters, which a terminal obeys, and no lone surrogates.

    Example:
        >>> is_clean("layers.0.größe"), is_clean("layers.0\x1b[2J"), is_clean("\ud800")
        (True, False, False)
    """
    return text.isprintable()


def shown(value: Any, most: int = 80) -> str:
    r"""A value from a file, for messages: printable, and cut where it is long.

    Example:
        >>> shown("\x1b[2J"), shown("x" * 100, 10)
        ("'\\x1b[2J'", "'xxxxxx...")
    """
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or an integer of too many digits
        text = f"a {type(value).__name__}"
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= most else text[: most - 3] + "..."
