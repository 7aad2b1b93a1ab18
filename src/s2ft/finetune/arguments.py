"""`TrainOptions` → the config of TRL's trainer; steps and warm-up, which depend on the data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from s2ft.common.errors import S2FTError
from s2ft.finetune.objectives import OBJECTIVES
from s2ft.finetune.options import ADAM_BETAS, LONGEST, WARMUP, DataOptions, TrainOptions
from s2ft.finetune.trackers import NONE
from s2ft.runtime.models import positions
from s2ft.runtime.processes import ZERO, engine


def trainer_config(
    options: TrainOptions, /, *, max_length: int, autocast: bool = False, **of_method: Any
) -> TrainingArguments:
    """The settings of the objective's trainer, with those of the method.

    Batch and rate must be settled (`finetune/recipe.py`); a rate that is not yet is set before the trainer is made.
    S²FT needs no autocast: the base is loaded in the dtype that it runs in and the deltas are fp32.
    """
    trainer = OBJECTIVES[options.objective].trainer_class()
    settings = {**_settings(options), **trainer.settings(options, max_length)}
    on_cpu = {"use_cpu": True} if autocast and not torch.accelerator.is_available() else {}  # transformers asks for it
    # accelerate looks for a way to communicate on accelerators, or where it may not use them, which turns DeepSpeed off
    backend = {"ddp_backend": "gloo"} if engine() in ZERO and not torch.accelerator.is_available() else {}
    return trainer.config_class(**{**settings, "bf16": autocast, **on_cpu, **backend, **of_method})


def _settings(options: TrainOptions) -> dict[str, Any]:
    assert options.batch_size is not None
    assert options.gradient_accumulation is not None
    rate = {"learning_rate": options.learning_rate} if isinstance(options.learning_rate, float) else {}
    return {
        **rate,
        "output_dir": options.output,
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation,
        "lr_scheduler_type": options.schedule,
        "optim": options.optim,
        "adam_beta1": ADAM_BETAS[0],
        "adam_beta2": ADAM_BETAS[1],
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.clip,
        "gradient_checkpointing": options.gradient_checkpointing,
        "seed": options.train_seed,
        "logging_steps": options.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_steps": options.save_every,
        "report_to": options.report_to or NONE,
        "run_name": Path(options.output).name,  # in trackers
        "disable_tqdm": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **(_holdout_settings(options) if options.holdout is not None else {}),
    }


def _holdout_settings(options: TrainOptions) -> dict[str, Any]:
    """When the held-out loss is measured; `finetune/holdout.py` says how.

    transformers keeps the best weights among its checkpoints, so there is one at each measurement; `Flow` leaves out those
    before the first.
    """
    return {
        "eval_strategy": "steps",
        "eval_steps": options.validate_every,
        "save_steps": options.validate_every,
        "load_best_model_at_end": True,  # by the lowest loss
    }


def longest(options: DataOptions, model: PreTrainedModel) -> int:
    """`max_length`, or what the model can take.

    Raises:
        S2FTError: if more is asked for than the model has positions.
    """
    most = positions(model)
    if options.max_length is None:
        return min(LONGEST, most or LONGEST)
    if most is not None and options.max_length > most:
        raise S2FTError(f"max_length={options.max_length} is more than the {most} positions of the model; lower it")
    return options.max_length


def total_steps(options: TrainOptions, batches: int) -> int:
    """Optimizer steps of a run with `batches` batches in an epoch."""
    per_epoch = max(1, math.ceil(batches / (options.gradient_accumulation or 1)))
    return options.max_steps or math.ceil(options.epochs * per_epoch)


def warmup_steps(options: TrainOptions, steps: int) -> int:
    """The paper's 100 steps, but at most a tenth of the run: a small data set must get out of its warm-up.

    Example:
        >>> options = TrainOptions(model="m", data="d.json", output="o")
        >>> warmup_steps(options, 50), warmup_steps(options, 8000)
        (5, 100)
    """
    return min(WARMUP, steps // 10) if options.warmup_steps is None else options.warmup_steps
