"""The config file of an adapter, as others may have written it: its method, its format version, the kinds of its values.

"format_version": "1.0"    the major number rises when older readers would misread a file, the minor one with keys that
                           they may leave out

without it    from before there were versions: read as 1.0
newer minor   read; the keys that are not known here are left out, with a warning that names them
newer major   refused
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ft.common.errors import S2FTError, gathered, raise_together
from s2ft.common.reading import is_clean, read_json, shown
from s2ft.format.folder import CONFIG_FILE, check_folder
from s2ft.format.slices import Runs
from s2ft.format.terms import METHOD

if TYPE_CHECKING:
    from s2ft.format.saved import SavedConfig

FORMAT_VERSION = "1.0"
_VERSION = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})")


def read_fields(folder: Path) -> dict[str, Any]:
    """What the adapter config in `folder` holds; raises `S2FTError` if there is no readable one."""
    path = folder / CONFIG_FILE
    check_folder(folder)
    return read_json(path)


def method_of(folder: Path) -> Any:
    """What the adapter config in `folder` calls its method; raises `S2FTError` if there is no readable one."""
    return read_fields(folder).get("peft_type")


def check_method(folder: Path, fields: Mapping[str, Any]) -> None:
    """Raises `S2FTError` unless the config in `folder` is of this method."""
    if (method := fields.get("peft_type")) != METHOD:
        raise S2FTError(f"{folder / CONFIG_FILE} is not an S2FT adapter: its peft_type is {shown(method)}")


def version_problem(version: Any) -> str | None:
    """Why files of a format version cannot be read here.

    Example:
        >>> version_problem("1.7"), version_problem("2.0")
        (None, "format_version='2.0' is newer than 1.0, which this s2ft reads: upgrade s2ft (pip install -U s2ft)")
    """
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        return f"format_version={shown(version)} is no format version; expected MAJOR.MINOR, such as {FORMAT_VERSION!r}"
    if int(match[1]) > _numbers(FORMAT_VERSION)[0]:
        return (
            f"format_version={version!r} is newer than {FORMAT_VERSION}, which this s2ft reads: upgrade s2ft "
            "(pip install -U s2ft)"
        )
    return None


def readable(fields: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The fields of a config file without those that only a newer s2ft knows.

    Raises:
        S2FTError: if the file's format is of a newer major version.
    """
    version = fields.get("format_version", FORMAT_VERSION)
    raise_together(filter(None, [version_problem(version)]))
    unknown = [name for name in fields if name not in known]
    if not unknown or _numbers(version) <= _numbers(FORMAT_VERSION):
        return dict(fields)  # PEFT leaves out the unknown ones of these
    warnings.warn(
        f"the adapter's format_version={version!r} is newer than {FORMAT_VERSION}, which this s2ft knows; left out: "
        f"{shown(sorted(unknown))}. Upgrade s2ft to use them (pip install -U s2ft)",
        stacklevel=2,
    )
    return {name: value for name, value in fields.items() if name in known}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def name_problems(config: SavedConfig) -> Iterator[str]:
    """Names that must not reach a terminal or another file, and texts that are no slices."""
    for field in ("slices", "base_digest", "checksums"):
        for name in getattr(config, field) or {}:
            if not name or not is_clean(name):
                yield f"{field} names {shown(name)}, which is empty or holds control characters"
    yield from gathered(*(partial(Runs.parse, text) for text in (config.slices or {}).values()))
    for name in (config.base_digest or {}).keys() - config.slices.keys() if config.slices else ():
        yield f"base_digest names {shown(name)}, which is not in the config's slices"


_TEXT, _NAMES, _RANGE = (str, type(None)), (list, set, str, type(None)), (list, int, type(None))
_KINDS: dict[str, tuple[type, ...]] = {  # of fields that PEFT does not check
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "task_type": _TEXT,
    "peft_version": _TEXT,
    "auto_mapping": (dict, type(None)),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": _RANGE,
    "layers_pattern": (list, str, type(None)),
    "modules_to_save": (list, type(None)),
    "trainable_token_indices": (list, dict, type(None)),
    "how_to_load": (str,),
    "inference_mode": (bool,),
    "init_weights": (bool,),
}


def kind_problems(config: SavedConfig) -> Iterator[str]:
    """Fields that hold another kind of value than theirs, in a config from a file."""
    for name, kinds in _KINDS.items():
        value = getattr(config, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            allowed = ", ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            yield f"{name}={shown(value)} is not one of: {allowed}"
        elif isinstance(value, str) and not is_clean(value):
            yield f"{name}={shown(value)} holds control characters"
        elif isinstance(value, list | set) and not all(map(_is_item(name), value)):
            yield f"{name}={shown(value)} holds what is no {'number' if _is_item(name) is _is_count else 'name'}"
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict) and not all(
        _is_name(name) and isinstance(rows, list) and all(map(_is_count, rows)) for name, rows in tokens.items()
    ):
        yield f"trainable_token_indices={shown(tokens)} is no mapping from embeddings to lists of rows"


def _is_item(field: str) -> Callable[[Any], bool]:
    return _is_count if field in ("layers_to_transform", "trainable_token_indices") else _is_name


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and is_clean(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
