"""Structured sparse fine-tuning (S²FT) for language models, as a PEFT method.

Importing this package makes PEFT and transformers know the method `S2FT`; `README.md` maps the modules.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2ft.adapter.export import export
    from s2ft.adapter.file import read_adapter
    from s2ft.adapter.fusion import fuse
    from s2ft.adapter.merge import merge
    from s2ft.adapter.pool import AdapterPool
    from s2ft.adapter.switching import switch
    from s2ft.errors import S2FTError
    from s2ft.method.config import S2FTConfig
    from s2ft.method.digest import any_base
    from s2ft.method.in_place import in_place
    from s2ft.method.selection import Selection, select
    from s2ft.method.tuner import S2FTModel

__all__ = [
    "AdapterPool",
    "S2FTConfig",
    "S2FTError",
    "S2FTModel",
    "Selection",
    "any_base",
    "export",
    "fuse",
    "in_place",
    "merge",
    "read_adapter",
    "select",
    "switch",
]

_HOMES = {
    "AdapterPool": "adapter.pool",
    "S2FTConfig": "method.config",
    "S2FTError": "errors",
    "S2FTModel": "method.tuner",
    "Selection": "method.selection",
    "any_base": "method.digest",
    "export": "adapter.export",
    "fuse": "adapter.fusion",
    "in_place": "method.in_place",
    "merge": "adapter.merge",
    "read_adapter": "adapter.file",
    "select": "method.selection",
    "switch": "adapter.switching",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("s2ft")
    if name not in _HOMES:
        raise AttributeError(f"module 's2ft' has no attribute {name!r}")
    return getattr(import_module(f"s2ft.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if "s2ft_command" not in sys.modules:  # the command line answers before torch and PEFT are there: s2ft_command
    import_module("s2ft.method.tuner")  # registers the method
