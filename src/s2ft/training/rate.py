"""A learning rate for slices that Adam trains: `MOVE` × √(examples a step / `BATCH`) / √(channels of a slice × steps).

Adam moves a trained weight by about the learning rate in a step, and an output by the sum over the trained channels. Channels
and steps that do not all pull one way add up like the root of their number. So measured, the rates that are good on SmolLM2
and those of the S²FT paper are one number (docs/choosing.md). In a step of few examples most of a move is noise, so it has to
be smaller: by the root of their number, which is Adam's scaling with the batch (Malladi et al., arXiv 2205.10287).
"""

from __future__ import annotations

import math
from statistics import fmean

from torch import nn

from s2ft.common.errors import S2FTError
from s2ft.format.config import S2FTConfig
from s2ft.format.slices import Slice
from s2ft.layer.linear import S2FTLinear
from s2ft.layer.stacked import StackedLinear, linear_at

MOVE = 0.3  # learning rate × √(channels of a slice × steps), in steps of
BATCH = 16  # examples or more
RATES = (1e-5, 2e-2)  # lower and upper bound


def learning_rate(trained: nn.Module | S2FTConfig, steps: float, examples: float = BATCH) -> float:
    """The peak learning rate that `s2ft train` would take, for a loop of your own.

    Args:
        trained: A model with an S²FT adapter, or a config with its channels chosen, as `s2ft.select` returns it; for a model
            with stacked experts, give the model, which knows how many there are.
        steps: Optimizer steps of the whole run: epochs × examples / examples a step.
        examples: That an optimizer step sees, in all processes.

    Returns:
        0.3 × √(min(examples, 16) / 16) / √(channels of a slice × steps), the channels being the mean over the active slices;
        between 1e-5 and 2e-2, to two digits. For Adam and AdamW with a schedule that falls to zero.

    Raises:
        S2FTError: without slices, or for less than one step or example.

    Example:
        >>> import s2ft
        >>> s2ft.learning_rate(s2ft.S2FTConfig(slices={"layers.0.down_proj": "in 0-47"}), steps=150, examples=4)
        0.0018
    """
    if not steps >= 1:
        raise S2FTError(f"steps={steps!r}: a rate is for one optimizer step or more")
    if not examples >= 1:
        raise S2FTError(f"examples={examples!r}: a rate is for steps of one example or more")
    return rate_of(channels_of(trained), steps, examples)


def rate_of(channels: float, steps: float, examples: float) -> float:
    """The rule."""
    rate = MOVE * math.sqrt(min(examples, BATCH) / BATCH) / math.sqrt(channels * steps)
    return float(f"{min(max(rate, RATES[0]), RATES[1]):.2g}")


def channels_of(trained: nn.Module | S2FTConfig, base: nn.Module | None = None) -> float:
    """How many channels a slice has, on average; of stacked experts, those of one expert: routing weights add up to one.

    Args:
        trained: A model with an adapter, or a config.
        base: The model that a config is for, which knows how many experts there are.

    Raises:
        S2FTError: if there is no slice.
    """
    found = _in_config(trained, base) if isinstance(trained, S2FTConfig) else _in_model(trained)
    if not found:
        missing = "no chosen channels" if isinstance(trained, S2FTConfig) else "no active S²FT adapter"
        raise S2FTError(
            f"this {type(trained).__name__} has {missing}; give the model that get_peft_model or a trainer made with the "
            "config, or s2ft.select(model, config).config"
        )
    return fmean(found)


def _in_config(config: S2FTConfig, base: nn.Module | None) -> list[float]:
    slices = {path: Slice.parse(text) for path, text in (config.slices or {}).items()}
    return [len(trained.indices) / _experts(base, path) for path, trained in slices.items()]


def _experts(base: nn.Module | None, path: str) -> int:
    """How many experts a layer stacks."""
    linear = None if base is None else linear_at(base, path)
    return linear.experts.count if isinstance(linear, StackedLinear) else 1


def _in_model(model: nn.Module) -> list[float]:
    layers = [module for module in model.modules() if isinstance(module, S2FTLinear)]
    return [
        len(layer.block(name).indices) / layer.experts
        for layer in layers
        for name in layer.active_adapters
        if name in layer.s2ft_block
    ]
