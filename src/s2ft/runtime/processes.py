"""Several processes that train one model, started by `accelerate launch` or `torchrun`.

Only rank 0, the leader, writes and logs; what is measured or drawn, all take from it. Which process this is can
be asked before torch is loaded, so slow imports are in the functions that communicate.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

ALONE, DDP = "one process", "ddp"
ZERO = ("zero1", "zero2", "zero3")
"""DeepSpeed's stages: each process holds a part of the optimizer's state; of the gradients, too; of the weights, too."""


def process_count() -> int:
    """The world size; known before the processes can communicate."""
    return _launched("WORLD_SIZE", alone=1)


def leads() -> bool:
    """Whether this process is rank 0, which writes and logs."""
    return _launched("RANK", alone=0) == 0


def _launched(name: str, alone: int) -> int:
    """A launcher's variable. Schedulers set some of them too: without LOCAL_RANK none counts, as in accelerate."""
    return int(os.environ[name]) if "LOCAL_RANK" in os.environ else alone


def engine() -> str:
    """What divides the work: `ALONE`, `DDP`, one of `ZERO`, "fsdp1", "fsdp2", or "fsdp2-sharded", whose checkpoints are parts.

    As accelerate reads it off its launcher's variables.
    """
    if accelerate_uses("FSDP"):
        is_sharded = os.environ.get("FSDP_STATE_DICT_TYPE", "").upper().startswith("SHARDED")
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}{'-sharded' if is_sharded else ''}"
    if accelerate_uses("DEEPSPEED"):
        return f"zero{_zero_stage()}"
    return DDP if process_count() > 1 else ALONE


def is_divided() -> bool:
    """Whether each process holds a part of each weight."""
    return engine().startswith("fsdp") or engine() == "zero3"


def is_managed() -> bool:
    """Whether an engine holds what is trained: FSDP or DeepSpeed."""
    return engine() not in (ALONE, DDP)


def accelerate_uses(name: str) -> bool:
    """Whether the launcher turned on one of accelerate's engines, such as FSDP."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def _zero_stage() -> int:
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def own_device() -> str:
    """Where this process runs a model: its accelerator, else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else f"{accelerator.type}:{_launched('LOCAL_RANK', alone=0)}"


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
