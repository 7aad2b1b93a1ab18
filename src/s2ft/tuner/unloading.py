"""What `unload` gives back: the base's own modules, also where an adapter has trained copies (`modules_to_save`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.utils import ModulesToSaveWrapper
from torch import nn


@contextmanager
def own_modules_back(base: nn.Module) -> Iterator[None]:
    """Around PEFT's unloading, which leaves the active adapter's copies in their place."""
    own = {path: one.original_module for path, one in base.named_modules() if isinstance(one, ModulesToSaveWrapper)}
    yield
    for path, module in own.items():
        above, _, name = path.rpartition(".")
        setattr(base.get_submodule(above), name, module)
