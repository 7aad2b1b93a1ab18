"""Several processes that train one model, as `accelerate launch` or `torchrun` start them: who leads, and how they agree.

The leading process writes and talks; what a process measures or draws for itself, all take from the leading one.
"""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather

from s2ft.errors import S2FTError, raise_together
from s2ft.work.options import PURE, TrainOptions

T = TypeVar("T")
SHARDING = {  # as launchers call it → what it does
    "FSDP": "FSDP keeps a part of each weight in each process",
    "DEEPSPEED": "DeepSpeed (ZeRO) keeps parts of the optimizer's state, gradients or weights in each process",
    "MEGATRON_LM": "Megatron-LM keeps parts of layers, or some layers, in each process",
    "PARALLELISM_CONFIG": "a parallelism config (tensor, context, sequence) splits layers or sequences over processes",
}


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
        value = broadcast_object_list([value])[0]
    return value


def anywhere(said: bool) -> bool:
    """Whether any process says so: all call this."""
    if process_count() > 1:
        said = bool(gather(torch.tensor([int(said)], device=PartialState().device)).any())
    return said


def check_processes(options: TrainOptions) -> None:
    """Raises `S2FTError` for what is not possible here, or in one process alone."""
    count = process_count()
    raise_together(
        f"{why}; s2ft train has each process hold and train the whole: launch with --multi_gpu instead"
        for name, why in SHARDING.items()
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"  # as accelerate asks
    )
    if count > 1 and options.evaluate is not None:
        raise S2FTError(
            f"evaluate={options.evaluate!r} needs one process, here are {count}; use `s2ft eval` afterwards"
        )
    if count > 1 and options.precision == PURE:
        raise S2FTError(
            f"precision={PURE!r} rounds by chance, so the weights of {count} processes would part; take auto, bf16 or fp32"
        )
