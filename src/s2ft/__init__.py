"""Structured sparse fine-tuning (S²FT) for language models, as a PEFT method.

Importing this package registers the method `S2FT` with PEFT and transformers; `README.md` maps the folders.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2ft.adapters.file import read_adapter
    from s2ft.adapters.fusion import fuse
    from s2ft.adapters.merge import merge
    from s2ft.common.errors import S2FTError
    from s2ft.exports.export import export
    from s2ft.exports.sync import sync
    from s2ft.format.config import S2FTConfig
    from s2ft.format.digest import any_base
    from s2ft.selection.select import Selection, select
    from s2ft.training.in_place import in_place
    from s2ft.training.rate import learning_rate
    from s2ft.tuner.model import S2FTModel
    from s2ft.tuner.pool import AdapterPool
    from s2ft.tuner.switching import switch

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
    "learning_rate",
    "merge",
    "read_adapter",
    "select",
    "switch",
    "sync",
]

_HOMES = {
    "AdapterPool": "tuner.pool",
    "S2FTConfig": "format.config",
    "S2FTError": "common.errors",
    "S2FTModel": "tuner.model",
    "Selection": "selection.select",
    "any_base": "format.digest",
    "export": "exports.export",
    "fuse": "adapters.fusion",
    "in_place": "training.in_place",
    "learning_rate": "training.rate",
    "merge": "adapters.merge",
    "read_adapter": "adapters.file",
    "select": "selection.select",
    "switch": "tuner.switching",
    "sync": "exports.sync",
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
    import_module("s2ft.tuner.model")  # registers the method
