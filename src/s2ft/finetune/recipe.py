"""Batch and learning rate where they are not given, each with its reason.

    examples, epochs       →  examples a step      for about 100 steps, at most the paper's 64
    channels, steps        →  learning rate        `training/rate.py`

A warning where both together will hardly move the model.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from peft import PeftConfig
from torch import nn

from s2ft.common.errors import S2FTError
from s2ft.finetune.arguments import total_steps
from s2ft.finetune.methods import find_method
from s2ft.finetune.objectives import OBJECTIVES
from s2ft.finetune.options import AT_ONCE, PAPER, PAPER_STEP, TrainOptions
from s2ft.format.config import S2FTConfig
from s2ft.runtime.processes import process_count
from s2ft.training.rate import BATCH, MOVE, channels_of, rate_of

ENOUGH_STEPS = 100
NOT_ADAM = "; measured with AdamW, so give learning_rate for another optimizer"
LEAST_MOVE = MOVE / 10  # below which little was seen to be learned
FEWEST_STEPS, FEW_STEPS = 10, 50  # of S²FT, and of the other methods, whose rates do not follow the run


class Settled(NamedTuple):
    """Options with batch or rate filled in, and the reason."""

    options: TrainOptions
    reason: str


def settle_batch(options: TrainOptions, rows: int) -> Settled:
    """Fills in `batch_size` and `gradient_accumulation` where they are not given.

    Args:
        rows: Of the training data: examples, or what packing or sampling makes of them.

    Raises:
        S2FTError: if a step would not hold all rows that belong together.
    """
    objective = OBJECTIVES[options.objective]
    group = objective.rows(options)
    wanted = math.ceil(_wanted_step(options, rows) / group) * group
    size, accumulation = options.batch_size, options.gradient_accumulation
    if size is None:
        most = AT_ONCE if accumulation is not None else max(1, min(AT_ONCE, wanted // process_count()))
        size = max(objective.fewest_rows, most if group == 1 else math.gcd(group, AT_ONCE))
    if accumulation is None:
        accumulation = max(1, wanted // (size * process_count()))
    settled = options.model_copy(update={"batch_size": size, "gradient_accumulation": accumulation})
    if examples_a_step(settled) % group:
        raise S2FTError(
            f"a step has {examples_a_step(settled)} rows (batch_size={size}, gradient_accumulation={accumulation}), which is "
            f"no multiple of {objective.grouped}={group}; give batch_size and gradient_accumulation that make one"
        )
    return Settled(settled, _batch_reason(options, rows, examples_a_step(settled)))


def examples_a_step(options: TrainOptions) -> int:
    """Of an optimizer step, in all processes; with the batch settled."""
    assert options.batch_size is not None
    assert options.gradient_accumulation is not None
    return options.batch_size * options.gradient_accumulation * process_count()


def _wanted_step(options: TrainOptions, rows: int) -> int:
    """Examples that a step should see: a power of two."""
    if options.recipe == PAPER:
        return PAPER_STEP
    seen = max(1.0, options.epochs * rows / ENOUGH_STEPS)
    return min(PAPER_STEP, 1 << int(math.log2(seen)))


def _batch_reason(options: TrainOptions, rows: int, step: int) -> str:
    kind = "rows" if options.packing else "examples"
    text = f"{step} {kind if step > 1 else kind[:-1]} a step"
    if options.batch_size is not None and options.gradient_accumulation is not None:
        return f"{text}, as asked"
    if options.recipe == PAPER:
        return f"{text}, as in the paper"
    if options.max_steps is not None:
        return f"{text}: {options.max_steps:,} steps, as asked"
    return f"{text}: {rows:,} {kind} in {options.epochs:g} epochs are {math.ceil(rows / step * options.epochs):,} steps"


def settle_rate(options: TrainOptions, rows: int, channels: float | None) -> Settled:
    """Fills in `learning_rate` where it is not given, or is to be found by short runs, which begin there.

    Args:
        options: With their batch settled.
        rows: Of the training data.
        channels: From `mean_channels`.
    """
    if isinstance(options.learning_rate, float):
        return Settled(options, "as asked")
    if options.recipe == PAPER or channels is None:
        rate, reason = find_method(options.method).learning_rate, "the paper's, for commonsense"
    else:
        steps, step = planned_steps(options, rows), examples_a_step(options)
        rate = rate_of(channels, steps, step)
        seen = "" if step >= BATCH else f" of {step} example{'s' if step > 1 else ''}"
        reason = f"for {steps:,} steps{seen} and {channels:.0f} channels in a slice"
        reason += "" if _is_adam(options) else NOT_ADAM
    share = OBJECTIVES[options.objective].rate
    reason += "" if share == 1 else f"; times {share:g}, as TRL's own default for {options.objective} to that for sft"
    return Settled(options.model_copy(update={"learning_rate": share * rate}), reason)


def planned_steps(options: TrainOptions, rows: int) -> int:
    """Optimizer steps of a run whose batch is settled."""
    return total_steps(options, math.ceil(rows / ((options.batch_size or 1) * process_count())))


def mean_channels(config: PeftConfig | None, base: nn.Module | None = None) -> float | None:
    """How many channels a slice of a resolved config has in `base`, on average; None where nothing is sliced."""
    return channels_of(config, base) if isinstance(config, S2FTConfig) else None


def _is_adam(options: TrainOptions) -> bool:
    return "adam" in options.optim


def too_short(options: TrainOptions, steps: int, channels: float | None) -> str | None:
    """A warning if the run is too short to change the model noticeably, else None."""
    assert isinstance(options.learning_rate, float)
    few = steps < (FEW_STEPS if channels is None else FEWEST_STEPS)
    if channels is not None and _is_adam(options):
        few |= options.learning_rate * math.sqrt(channels * steps) < LEAST_MOVE * OBJECTIVES[options.objective].rate
    if not few:
        return None
    run = f"{steps} {'step' if steps == 1 else 'steps'} at a rate of {options.learning_rate:g}"
    return f"{run} will hardly move the model: give {_longer(options)}, or {_higher(options, steps, channels)}"


def _longer(options: TrainOptions) -> str:
    """How to make more steps."""
    if options.max_steps is not None:
        return f"more steps than max_steps={options.max_steps}"
    step = examples_a_step(options)
    fewer = f", fewer examples a step than {step} (batch_size, gradient_accumulation)" if step > 1 else ""
    return f"more epochs than {options.epochs:g}{fewer}"


def _higher(options: TrainOptions, steps: int, channels: float | None) -> str:
    """What to do about the rate."""
    assert isinstance(options.learning_rate, float)
    rule = 0.0
    if channels is not None and _is_adam(options):
        rule = OBJECTIVES[options.objective].rate * rate_of(channels, steps, examples_a_step(options))
    return "a higher learning_rate" + (f": the rule's is {rule:g}" if rule > options.learning_rate else "")
