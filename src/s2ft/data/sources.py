"""Checks what a name of data stands for (a file, a folder, a data set on the Hub), before anything slow is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

from s2ft.common.errors import S2FTError

SUFFIXES = (".json", ".jsonl", ".parquet")


def check_source(source: str) -> None:
    """Raises `S2FTError` for a path where nothing is, and for what is neither a path nor a name on the Hub."""
    path = Path(source)
    if path.exists():
        return
    if path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise S2FTError(f"data={source!r}: there is no such file")
    check_hub_name(source)


def check_hub_name(name: str) -> None:
    """Raises `S2FTError` for a name that `datasets` takes for a format, reading such files from the current folder."""
    bare = name.removeprefix("hf://datasets/")
    if "/" not in bare and bare in _formats():
        raise S2FTError(
            f"data={name!r} names no data set, but a format, and `datasets` would read the current folder's files of it; "
            "name a file, a folder or a data set on the Hub"
        )


def _formats() -> frozenset[str]:
    """The formats that `datasets` loads by name, such as "text" and "json": one module each, found without importing it."""
    found = find_spec("datasets")
    folders = [f"{folder}/packaged_modules" for folder in (found.submodule_search_locations or () if found else ())]
    return frozenset(module.name for module in iter_modules(folders))
