"""What PEFT's `unload` gives back: the base's own modules, also where an adapter has trained copies (`modules_to_save`).

What an adapter has written into the base itself stays there: `changes_base` says of which kinds that is so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from torch import nn

RESIDUAL = ("pissa", "olora", "corda", "loftq")  # ways for LoRA to start from parts of the weights


@contextmanager
def own_modules_back(base: nn.Module) -> Iterator[None]:
    """Around PEFT's unloading, which leaves the active adapter's copies in their place."""
    own = {path: one.original_module for path, one in base.named_modules() if isinstance(one, ModulesToSaveWrapper)}
    yield
    for path, module in own.items():
        above, _, name = path.rpartition(".")
        setattr(base.get_submodule(above), name, module)


def changes_base(config: PeftConfig) -> str | None:
    """The key of a config by which the base is another one while the adapter is disabled; None where it is not.

    Biases are trained in their place; a start from parts of the weights leaves the base's layers what remains of them.
    """
    if str(getattr(config, "init_lora_weights", "")).lower().startswith(RESIDUAL):
        return "init_lora_weights"
    return "bias" if getattr(config, "bias", "none") != "none" else None
