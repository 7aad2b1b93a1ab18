"""The one exception type: a message that repeats the user's value and says what is allowed."""

import errno
import re
from collections.abc import Callable, Iterable

_REASONS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file of that size is not allowed there",
}
_FULL = (  # what torch.save and NumPy say of a full disk
    r"No space left|PytorchStreamWriter failed writing|iostream error|unexpected pos \d+ vs \d+|"
    r"\d+ requested and \d+ written"
)

MOST_PROBLEMS = 50  # listed in one message
DIFFERENT_PROBLEMS = 10  # listed in one message about places


class S2FTError(ValueError):
    """What was given cannot be used; nothing has been changed or written.

    Example:
        >>> raise_together(["ratios=1.5 is outside (0, 1]", "strategy='best' is unknown"])
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: 2 problems:
          - ratios=1.5 is outside (0, 1]
          - strategy='best' is unknown

    Attributes:
        problems: Each problem that the message lists, so that it can be raised again beside others; without a list, the
            message itself.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems) or [message]


def raise_together(problems: Iterable[str]) -> None:
    """Raises one `S2FTError` that lists all `problems` (of very many, the first 50); does nothing when there are none."""
    found = list(problems)
    if len(found) == 1:
        raise S2FTError(found[0])
    if found:
        lines = [f"  - {problem}" for problem in found[:MOST_PROBLEMS]]
        lines += [f"  ... and {len(found) - MOST_PROBLEMS:,} more"] * (len(found) > MOST_PROBLEMS)
        raise S2FTError(f"{len(found):,} problems:\n" + "\n".join(lines), found)


def gathered(*checks: Callable[[], object]) -> list[str]:
    """Makes every check, and returns all the problems that they raise.

    Example:
        >>> gathered(lambda: raise_together(["a"]), lambda: None, lambda: raise_together(["b", "c"]))
        ['a', 'b', 'c']
    """
    found = []
    for check in checks:
        try:
            check()
        except S2FTError as error:
            found += error.problems
    return found


def raise_by_place(problems: Iterable[tuple[str, str]], others: Iterable[str] = ()) -> None:
    """Raises one `S2FTError` for problems at places, after `others`; does nothing when there are none.

    A problem that many places share is listed once, with its places; of different problems the first ten are listed, and all
    are counted.

    Example:
        >>> raise_by_place([("a:1", "no text"), ("a:2", "no text"), ("a:3", "no end"), ("a:4", "no text")])
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: 4 problems:
          - a:1: no text (also a:2, a:4)
          - a:3: no end
    """
    places: dict[str, list[str]] = {}
    for place, problem in problems:
        places.setdefault(problem, []).append(place)
    lines = [f"{found[0]}: {problem}{_also(found[1:])}" for problem, found in places.items()]
    rest = sum(len(found) for found in list(places.values())[DIFFERENT_PROBLEMS:])
    lines[DIFFERENT_PROBLEMS:] = [f"... and {rest} more"] if rest else []
    elsewhere = list(others)
    if len(lines) + len(elsewhere) > 1:
        count = len(elsewhere) + sum(map(len, places.values()))
        told = [*elsewhere, *lines]
        raise S2FTError(f"{count} problems:\n" + "\n".join(f"  - {line}" for line in told), told)
    raise_together([*elsewhere, *lines])


def _also(places: list[str]) -> str:
    named = 3
    rest = f" and {len(places) - named} more" if len(places) > named else ""
    return f" (also {', '.join(places[:named])}{rest})" if places else ""


def first_line(error: BaseException) -> str:
    r"""The first line of a library's error message; the error's type where it has none.

    It is made printable, since it may repeat what a file holds.

    Example:
        >>> first_line(OSError("not found\nsee the docs")), first_line(KeyError()), first_line(ValueError("no \x1b[2J"))
        ('not found', 'KeyError', 'no \\x1b[2J')
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def no_space(error: BaseException) -> str | None:
    """Why nothing more can be written, if that is what `error` means: the system's error, or a library's words for it.

    Example:
        >>> no_space(OSError(errno.ENOSPC, "No space left on device"))
        'no space left on the disk'
    """
    found = error.errno if isinstance(error, OSError) else None
    if found is None:
        code = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors says it
        found = int(code[1]) if code else None
    if found is None and re.search(_FULL, str(error)):
        found = errno.ENOSPC
    return _REASONS.get(found) if found is not None else None
