"""What only a part of s2ft needs is in an extra of the package: `pip install 's2ft[train]'`.

pyproject.toml says which library is in which extra; what is missing is said with the command that installs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version

from s2ft.common.errors import S2FTError

_PACKAGES = {"yaml": "pyyaml"}  # modules that their package is not named after
_NEED = re.compile(r"(?P<package>[\w.-]+)(\[(?P<inner>[\w,.-]+)\])?.*?(; .*extra == [\"'](?P<extra>[\w.-]+)[\"'].*)?$")


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


def what_extras_lack() -> dict[str, list[str]]:
    """Each extra, with those of its packages that are not installed; the extras that it includes are looked through, too."""
    needs = [found.groupdict() for found in map(_NEED.match, _requires()) if found]

    def packages(extra: str) -> set[str]:
        own = [need for need in needs if need["extra"] == extra]
        inner = [name for need in own for name in (need["inner"] or "").split(",") if need["package"] == "s2ft"]
        return {need["package"] for need in own if need["package"] != "s2ft"}.union(*map(packages, inner))

    extras = dict.fromkeys(need["extra"] for need in needs if need["extra"])
    return {extra: sorted(name for name in packages(extra) if not _is_installed(name)) for extra in extras}


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _declared() -> set[str]:
    """The packages that s2ft asks for, extras included."""
    return {found["package"].lower().replace("_", "-") for found in map(_NEED.match, _requires()) if found}


def _requires() -> list[str]:
    """As pyproject.toml has them, with the extra that brings each; none where s2ft runs from its source."""
    try:
        return requires("s2ft") or []
    except PackageNotFoundError:
        return []
