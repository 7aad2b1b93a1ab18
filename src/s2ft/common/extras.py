"""What only a part of s2ft needs is in an extra of the package: `pip install 's2ft[train]'`.

pyproject.toml says which library is in which extra; what is missing is said with the command that installs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires

from s2ft.common.errors import S2FTError

_PACKAGES = {"yaml": "pyyaml"}  # modules that their package is not named after


@contextmanager
def from_extra(extra: str, who: str) -> Iterator[None]:
    """Around imports of what `extra` brings, on behalf of `who`, a command or a feature.

    Raises:
        S2FTError: if a library that s2ft declares is not installed.

    Example:
        >>> with from_extra("lab", "a picture"):
        ...     raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: a picture needs matplotlib, which is not installed: pip install 's2ft[lab]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = error.name or ""
        package = _PACKAGES.get(module, module.replace("_", "-"))
        if package not in _declared():  # also a module that a library lacks of itself: a bug, shown in full
            raise
        raise S2FTError(f"{who} needs {package}, which is not installed: pip install 's2ft[{extra}]'") from error


def _declared() -> set[str]:
    """The packages that s2ft asks for, extras included."""
    try:
        needs = requires("s2ft") or []
    except PackageNotFoundError:  # run from its source
        needs = []
    return {re.split(r"[^\w.-]", need)[0].lower().replace("_", "-") for need in needs}
