"""Channels that are exchanged while a run trains (`reselect`): those that moved least stay as they are, others train instead.

    stage 0         the channels of the budget            train from the start
    stages 1, 2 …   half as many each, next in the rank   train from turn 1, 2, … on, from a delta of zeros
    turn k          as many channels of each projection as stage k has stop: those that moved least since the last turn

The adapter holds the channels of all stages from the start; a mask over the gradients says which train. So nothing moves at a
turn but the mask: layouts, optimizer and files are those of any run, and what has stopped keeps its delta bit for bit. There
are never more trained parameters than the budget's, but the adapter has (1 + turns / 2) times as many channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from s2ft.common.errors import S2FTError
from s2ft.format.config import S2FTConfig
from s2ft.format.slices import Slice
from s2ft.layer.block import S2FTBlock
from s2ft.layer.linear import sliced_layers

SHARE = 0.5  # of the channels of the budget: what a turn exchanges
WITHIN = 2 / 3  # of the steps: where the last turn takes place

Slices = dict[str, Slice]  # module → channels


def widened(config: S2FTConfig, selections: Sequence[Slices]) -> S2FTConfig:
    """A resolved config with the channels of all selections.

    Args:
        config: Of the first selection.
        selections: Each with about the channels of the one before, and more.
    """
    slices: Slices = {}
    for path, new in (item for selection in selections for item in selection.items()):
        old = slices.get(path)
        slices[path] = new if old is None else Slice(new.side, np.union1d(old.indices, new.indices))
    modules = set(slices) if config.target_modules == set(selections[0]) else config.target_modules
    return replace(config, slices={path: str(chosen) for path, chosen in slices.items()}, target_modules=modules)


@dataclass(eq=False)
class Gate:
    """Which channels of one block train."""

    block: S2FTBlock
    stage: Tensor  # [s], int64: where each channel comes from
    trains: Tensor  # [s], bool
    before: Tensor  # the delta at the last turn
    handle: RemovableHandle | None = None  # of the mask

    @staticmethod
    def install(block: S2FTBlock, path: str, selections: Sequence[Slices]) -> Gate:
        """Lets the channels of the first selection train."""
        chosen = [np.isin(block.trained.indices, s[path].indices if path in s else []) for s in selections]
        stage = torch.from_numpy(np.argmax(chosen, axis=0)).to(block.weight.device)
        gate = Gate(block, stage, stage == 0, block.weight.detach().clone())
        gate.handle = block.weight.register_hook(lambda gradient: gradient.masked_fill(gate.wide(~gate.trains), 0))
        return gate

    def wide(self, mask: Tensor) -> Tensor:  # [s] → [1, s] or [s, 1]
        """A mask of channels as one of the delta."""
        return mask.unsqueeze(1 - self.block.dim)

    def moved(self) -> Tensor:  # [s], float32
        """How far each channel has moved since the last turn; infinitely, where it does not train."""
        change = self.block.weight.detach().float() - self.before.float()
        moves: Tensor = torch.linalg.vector_norm(change, dim=1 - self.block.dim)
        return moves.where(self.trains, torch.inf)

    def exchange(self, stopped: Tensor, number: int, optimizer: Optimizer) -> None:
        """These channels [s] (bool) stop, and those of stage `number` start."""
        delta = self.block.weight
        self.trains = (self.trains & ~stopped) | (self.stage == number)
        self.before = delta.detach().clone()
        for value in optimizer.state.get(delta, {}).values():
            if isinstance(value, Tensor) and value.shape == delta.shape:
                value.masked_fill_(self.wide(~self.trains), 0)


class Reselect(TrainerCallback):
    """Exchanges channels at even distances.

    Args:
        selections: The channels of stage 0, of stages 0 and 1, and so on: module → channels.
    """

    def __init__(self, selections: Sequence[Slices]) -> None:
        self.selections, self.gates = selections, dict[tuple[str, int], list[Gate]]()
        self.turns: dict[int, int] = {}  # step → number of the turn

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Raises `S2FTError` if the run has fewer steps than turns."""
        assert model is not None
        times = len(self.selections) - 1
        self.turns = {round(WITHIN * state.max_steps * turn / times): turn for turn in range(1, times + 1)}
        if len(self.turns) < times or 0 in self.turns:
            raise S2FTError(
                f"reselect={times} is too much for {state.max_steps} steps; give at most half as many turns"
            )
        for path, layer in sliced_layers(model, "default").items():
            block, name = layer.block("default"), path.removeprefix("base_model.model.")
            gate = Gate.install(block, name, self.selections)
            across = block.weight.shape[1 - block.dim]
            self.gates.setdefault((path.rpartition(".")[2], across), []).append(gate)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Exchanges channels if it is time."""
        if number := self.turns.get(state.global_step):
            assert optimizer is not None
            for gates in self.gates.values():
                _turn(gates, number, optimizer)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the masks away."""
        for gate in self._gates():
            if gate.handle is not None:
                gate.handle.remove()

    @property
    def trained_at_once(self) -> int:
        """Parameters that train between two turns."""
        return sum(int(gate.trains.sum()) * gate.block.weight.shape[1 - gate.block.dim] for gate in self._gates())

    def _gates(self) -> Iterator[Gate]:
        return chain.from_iterable(self.gates.values())


def _turn(gates: Sequence[Gate], number: int, optimizer: Optimizer) -> None:
    """Stops as many channels of one projection, in all layers, as stage `number` has."""
    moved = torch.cat([gate.moved() for gate in gates])
    count = sum(int((gate.stage == number).sum()) for gate in gates)
    stopped = torch.zeros_like(moved, dtype=torch.bool)
    stopped[moved.argsort(stable=True)[:count]] = True
    sizes = [len(gate.stage) for gate in gates]
    for gate, part in zip(gates, stopped.split(sizes), strict=True):
        gate.exchange(part, number, optimizer)
