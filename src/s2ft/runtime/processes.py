"""Several processes that train one model, started by `accelerate launch` or `torchrun`.

Only rank 0, the leader, writes and logs; what is measured or drawn, all take from it. Which process this is can
be asked before torch is loaded, so slow imports are in the functions that communicate.
"""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")


def process_count() -> int:
    """The world size; known before the processes can communicate."""
    return _launched("WORLD_SIZE", alone=1)


def leads() -> bool:
    """Whether this process is rank 0, which writes and logs."""
    return _launched("RANK", alone=0) == 0


def _launched(name: str, alone: int) -> int:
    """A launcher's variable. Schedulers set some of them too: without LOCAL_RANK none counts, as in accelerate."""
    return int(os.environ[name]) if "LOCAL_RANK" in os.environ else alone


def as_leader(value: T) -> T:
    """Rank 0's value, in every process; all must call this."""
    if process_count() > 1:
        from accelerate.utils import broadcast_object_list

        value = broadcast_object_list([value])[0]
    return value


def anywhere(said: bool) -> bool:
    """Whether it is true in any process; all must call this."""
    if process_count() > 1:
        import torch
        from accelerate import PartialState
        from accelerate.utils import gather

        said = bool(gather(torch.tensor([int(said)], device=PartialState().device)).any())
    return said


def wait_for_all() -> None:
    """Waits until every process has come here."""
    if process_count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
