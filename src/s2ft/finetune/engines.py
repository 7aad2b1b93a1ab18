"""Training by an engine that divides a run's state among processes: FSDP2 and DeepSpeed ZeRO, through accelerate.

    one process, DDP    each process holds everything
    zero1, zero2        each holds a part of the optimizer's state, and of the gradients
    fsdp2, zero3        and of the weights: slices are computed beside their layers

accelerate and transformers set the engine up, by the launcher's variables (`runtime/processes.py`). What is here: how the model
is loaded for it, and what of a model is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from s2ft.common.errors import S2FTError
from s2ft.layer.block import S2FTBlock
from s2ft.layer.sharding import gathered
from s2ft.runtime.processes import ZERO, accelerate_uses, engine, is_divided


@contextmanager
def loading() -> Iterator[None]:
    """Around the loading of a model: as far as the engine can, each process keeps its part at once."""
    plugin: Any = None
    if engine() == "zero3":
        from accelerate.utils import DeepSpeedPlugin

        plugin = DeepSpeedPlugin()
        plugin.set_deepspeed_weakref()  # transformers looks for it, for as long as the plugin lives
    elif is_divided():
        PartialState(
            cpu=accelerate_uses("CPU")
        )  # the processes meet: with cpu_ram_efficient_loading only the first one reads the weights
    yield
    del plugin


def computes_in_bf16(dtype: torch.dtype) -> bool:
    """Whether the trainer is told of bf16 because of the engine: DeepSpeed casts the model to the dtype that it is told."""
    return engine() in ZERO and dtype == torch.bfloat16


def check_started(trainer: Any) -> None:
    """Raises `S2FTError` if accelerate took another engine than it was asked for."""
    if engine().startswith("fsdp") and not trainer.is_fsdp_enabled:
        raise S2FTError(
            f"the launcher asks for FSDP, which accelerate turns on for accelerators only, and this process runs on "
            f"{trainer.args.device}: it would train by DDP. Launch with --multi_gpu, or with DeepSpeed and DS_ACCELERATOR=cpu"
        )
    if engine() in ZERO and not trainer.is_deepspeed_enabled:
        raise S2FTError(
            f"the launcher asks for DeepSpeed, which accelerate did not turn on (use_cpu={trainer.args.use_cpu})"
        )


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, whole and on the CPU, with the indices beside it; all processes must call this.

    DeepSpeed's own fp32 copy, where it trains another dtype.
    """
    state = {name: _whole(value).cpu() for name, value in model.named_parameters() if value.requires_grad}
    blocks = ((path, module) for path, module in model.named_modules() if isinstance(module, S2FTBlock))
    state |= {f"{path}.indices": block.indices.cpu() for path, block in blocks}
    return {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in state.items()}


def _whole(parameter: Tensor) -> Tensor:
    if engine() in ZERO:
        from deepspeed.utils import safe_get_full_fp32_param

        copy: Tensor | None = safe_get_full_fp32_param(parameter)
        if copy is not None:
            return copy.detach()
    return gathered(parameter).detach()
