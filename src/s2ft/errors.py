"""The one exception type: a message that repeats the user's value and says what is allowed."""

from collections.abc import Iterable


class S2FTError(ValueError):
    """What was given cannot be used; nothing has been changed or written.

    Example:
        >>> raise_together(["ratios=1.5 is outside (0, 1]", "strategy='best' is unknown"])
        Traceback (most recent call last):
            ...
        s2ft.errors.S2FTError: 2 problems:
          - ratios=1.5 is outside (0, 1]
          - strategy='best' is unknown
    """


def raise_together(problems: Iterable[str]) -> None:
    """Raises one `S2FTError` that lists all `problems`; does nothing when there are none."""
    found = list(problems)
    if len(found) == 1:
        raise S2FTError(found[0])
    if found:
        raise S2FTError(f"{len(found)} problems:\n" + "\n".join(f"  - {problem}" for problem in found))
