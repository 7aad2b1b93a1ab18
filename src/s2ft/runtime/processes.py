"""Several processes that train one model, as `accelerate launch` or `torchrun` start them: who leads, and how they agree.

The leading process writes and talks; what a process measures or draws for itself, all take from the leading one. Who leads is
asked before torch is loaded, so what is slow to import is imported where processes talk to each other.
"""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")


def process_count() -> int:
    """How many there are; known before they can talk to each other."""
    return _launched("WORLD_SIZE", alone=1)


def leads() -> bool:
    """Whether this is the process that writes and talks."""
    return _launched("RANK", alone=0) == 0


def _launched(name: str, alone: int) -> int:
    """What a launcher says. Schedulers set some of its variables too: without LOCAL_RANK none counts, as in accelerate."""
    return int(os.environ[name]) if "LOCAL_RANK" in os.environ else alone


def as_leader(value: T) -> T:
    """The leading process's value, in every process: all call this."""
    if process_count() > 1:
        from accelerate.utils import broadcast_object_list

        value = broadcast_object_list([value])[0]
    return value


def anywhere(said: bool) -> bool:
    """Whether any process says so: all call this."""
    if process_count() > 1:
        import torch
        from accelerate import PartialState
        from accelerate.utils import gather

        said = bool(gather(torch.tensor([int(said)], device=PartialState().device)).any())
    return said


def wait_for_all() -> None:
    """Until every process has come here."""
    if process_count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
