"""Whether a run can start: its inputs, its output, and what several processes support; checked before torch is loaded."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from s2ft.common.errors import S2FTError, gathered, raise_together
from s2ft.common.outputs import check_place
from s2ft.finetune.hub import check_push
from s2ft.finetune.inputs import input_problems
from s2ft.finetune.methods import find_method
from s2ft.finetune.options import TrainOptions
from s2ft.finetune.trackers import check_trackers
from s2ft.format.terms import PURE
from s2ft.runtime.processes import process_count

SHARDING = {  # accelerate's name → what it does
    "FSDP": "FSDP keeps a part of each weight in each process",
    "DEEPSPEED": "DeepSpeed (ZeRO) keeps parts of the optimizer's state, gradients or weights in each process",
    "MEGATRON_LM": "Megatron-LM keeps parts of layers, or some layers, in each process",
    "PARALLELISM_CONFIG": "a parallelism config (tensor, context, sequence) splits layers or sequences over processes",
}


def check_run(options: TrainOptions) -> None:
    """Raises `S2FTError` with all that is wrong as far as can be said without loading anything."""
    problems = gathered(
        find_method(options.method).check,
        partial(check_processes, options),
        partial(check_place, options.output),
        partial(check_push, options.push_to_hub),
        partial(check_trackers, options.report_to or []),
    )
    problems += input_problems(options.model_dump())
    if problems and (options.resume or Path(options.output).exists()):
        from s2ft.finetune.resume import check_output  # asked in any case, once no other run writes there

        problems += gathered(partial(check_output, options))
    raise_together(problems)


def check_processes(options: TrainOptions) -> None:
    """Raises `S2FTError` for sharded training, and for options that need a single process."""
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
