"""LISA: full tuning of a few random blocks at a time (arXiv 2403.17919), as a callback of transformers' Trainer.

    every `interval` steps:  γ of the L blocks are drawn  →  trained;  the other L - γ are frozen
    always trained:          what lies outside the blocks: embeddings, final norm, head

A block that is frozen has no gradient, so no optimizer of torch moves it, and its optimizer state is dropped: memory is
that of γ blocks, and AdamW starts anew when the block is drawn again. The draw follows from seed and step alone, so a
resumed run draws what the uninterrupted one would have.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from s2ft.common.errors import S2FTError
from s2ft.layer.linears import layer_stack

Block = tuple[str, int]  # the list of blocks, and the place in it


def find_blocks(model: nn.Module) -> dict[Block, list[nn.Parameter]]:
    """The parameters of each block of `model`; those outside of all blocks are left out.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
        >>> {block: len(parameters) for block, parameters in find_blocks(model).items()}
        {('layers', 0): 2, ('layers', 1): 2}
    """
    blocks: dict[Block, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        place = layer_stack(name)
        if place is not None:
            blocks.setdefault(place, []).append(parameter)
    return blocks


def draw(blocks: Sequence[Block], count: int, seed: int, period: int) -> set[Block]:
    """The blocks that are trained in this period: `count` different ones, always the same for a seed and a period.

    Example:
        >>> blocks = [("layers", index) for index in range(8)]
        >>> draw(blocks, 2, seed=0, period=3) == draw(blocks, 2, seed=0, period=3)
        True
    """
    return set(random.Random(f"{seed}, {period}").sample(list(blocks), count))


class Lisa(TrainerCallback):
    """Freezes and thaws the blocks of the trainer's model; `switch` does so in a loop without a trainer."""

    def __init__(self, layers: int, interval: int, seed: int) -> None:
        self.layers, self.interval, self.seed = layers, interval, seed
        self.period: int | None = None

    def check(self, model: nn.Module) -> None:
        """Raises `S2FTError` if the model has too few blocks."""
        count = len(find_blocks(model))
        if self.layers > count:
            raise S2FTError(f"lisa_layers={self.layers} is more than the {count} blocks of the model")

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Switches where a period begins."""
        assert model is not None
        assert optimizer is not None
        self.switch(model, optimizer, state.global_step)

    def switch(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Trains the blocks of the period that `step` lies in, and nothing else of the blocks."""
        if self.period == step // self.interval:
            return
        self.period = step // self.interval
        blocks = find_blocks(model)
        drawn = draw(list(blocks), self.layers, self.seed, self.period)
        for block, parameters in blocks.items():
            for parameter in parameters:
                parameter.requires_grad_(block in drawn)
                if block not in drawn:
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)
