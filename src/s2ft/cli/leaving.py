"""How errors leave the command line: one message on stderr, and an exit code.

Bad input, a missing library, a full disk and the like end with code 2, Ctrl-C with 130. All else is a bug, shown in full.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

from s2ft.common.errors import S2FTError, no_space
from s2ft.common.extras import from_extra

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell would say
_OUTSIDE = {  # what is wrong with the machine, not with the program
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM", "ENAMETOOLONG", "EMFILE", "ENFILE")
}
_EXTRAS = {
    "eval": "eval",
    "serve": "serve",
    "reproduce": "lab",
    "bench": "lab",
    "study": "lab",
}  # command → its extra, unless `train`

_QUOTED = r"""((?<!\w)'(?:[^'\\]|\\.)*'|(?<!\w)"(?:[^"\\]|\\.)*")"""
_KEYWORD = re.compile(
    r"(?<![\w./-])(?P<name>[a-z]\w*)(?:(?P<on>=True\b)|(?=[=\[]))"  # liger=True, base='...', ratios['...']
    r"|(?<![\w./-])(?P<long>[a-z]+(?:_[a-z]+)+)(?![\w./(=\[])"  # set gradient_checkpointing
    r"|^(?P<first>(?:  - )?)(?P<word>[a-z]+)(?= (?:is missing|names|needs)\b)",  # model is missing: ...
    flags=re.MULTILINE,
)


@contextmanager
def leaving(words: Sequence[str], spelled: Callable[[str], str] = str) -> Iterator[None]:
    """Ends the process for what the command `words` raises.

    Args:
        words: What was typed after `s2ft`.
        spelled: Turns a message's `base=` into `--base=`: see `as_flags`.
    """
    name = next((word for word in words if not word.startswith("-")), "")
    try:
        with from_extra(_EXTRAS.get(name, "train"), f"s2ft {name}".rstrip()):
            yield
    except S2FTError as error:
        leave(f"error: {spelled(str(error))}", BAD_INPUT)
    except OSError as error:
        if error.errno not in _OUTSIDE:
            raise
        where = "" if error.filename is None else f": {str(error.filename)!r}"
        leave(f"error: {no_space(error) or error.strerror}{where}", BAD_INPUT)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own usage errors have it
            raise
        message = error.format_message()  # empty where a group without a command has shown its help
        leave(message and f"error: {message}", BAD_INPUT)


def leave(message: str, code: int) -> NoReturn:
    """Prints a message on stderr and ends the process."""
    print(_printable(message), file=sys.stderr)
    sys.exit(code)


def as_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message that names Python's arguments, with the command's own options in their place.

    What stands in quotes is somebody's value, and stays.

    Args:
        flags: Argument → option.

    Example:
        >>> as_flags("max_length=0 is too short for 'max_length=0.json'", {"max_length": "--max-length"})
        "--max-length=0 is too short for 'max_length=0.json'"
    """

    def option(match: re.Match[str]) -> str:
        name = match["name"] or match["long"] or match["word"]
        return (match["first"] or "") + (flags[name] if name in flags else name + (match["on"] or ""))

    parts = re.split(_QUOTED, message)
    return "".join(part if index % 2 else _KEYWORD.sub(option, part) for index, part in enumerate(parts))


def _printable(message: str) -> str:
    """Without control characters: names come from files, and a terminal would obey them."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in message)
