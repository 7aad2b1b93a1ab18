"""The methods of the training benchmark, each set up on a frozen bf16 base and taken down again.

    floor    the frozen base: forward, and gradients down to the embeddings' output. No method that trains something in
             every block can do less.
    others   as in `finetune/baselines.py`, with as many trainable parameters as S²FT where a method has a choice

Rivals get their cheapest setting: bf16 weights, gradients and optimizer states, no dropout, torch's fused AdamW. The
deltas of S²FT are fp32, as always. `AS_TRAINED` holds rivals as they are usually run, and as `s2ft train` runs them: what
they train is fp32 too, under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from s2ft.finetune.baselines import equal_rank, lora_config
from s2ft.finetune.galore import galore_optimizer
from s2ft.finetune.lisa import Lisa
from s2ft.format.config import S2FTConfig
from s2ft.selection.select import select
from s2ft.training.in_place import enter, in_place
from s2ft.training.lean import lean
from s2ft.tuner.model import S2FTModel  # noqa: F401 - PEFT knows the method from here on

LEARNING_RATE = 1e-6  # random weights must stay finite; what a step costs does not depend on it
GALORE_RANK, LISA_LAYERS, LISA_INTERVAL = 128, 2, 20  # as `s2ft train` has them


@dataclass
class Contestant:
    """One method on one model, ready to take steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    autocast: bool = False  # compute in bf16 what is kept in fp32
    begin: Callable[[int], None] = lambda step: None  # before each step, with its number
    steps: int = 0

    @property
    def trainable(self) -> int:
        """Trainable parameters; LISA's at this step."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def step(self, ids: Tensor) -> None:  # [batch, length], int64
        """Forward, loss, backward, optimizer."""
        self.begin(self.steps)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model(**self._inputs(ids), labels=ids).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.steps += 1

    def body(self, ids: Tensor) -> Tensor:  # [batch, length] → a number
        """The model without its loss head: the sum of the last hidden states."""
        whole = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        assert isinstance(whole, PreTrainedModel)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast):
            hidden: Tensor = getattr(whole, whole.base_model_prefix)(**self._inputs(ids)).last_hidden_state
        return hidden.sum()

    def _inputs(self, ids: Tensor) -> dict[str, Any]:
        if self.optimizer is not None:
            return {"input_ids": ids, "use_cache": False}
        embed = self.model.get_input_embeddings()  # type: ignore[operator]
        return {"inputs_embeds": embed(ids).detach().requires_grad_(), "use_cache": False}


Prepare = Callable[[PreTrainedModel, int], AbstractContextManager[Contestant]]
"""From a frozen base and a number of trainable parameters to a contestant; leaves a frozen base, its weights maybe changed."""


@contextmanager
def floor(base: PreTrainedModel, parameters: int) -> Iterator[Contestant]:
    """Nothing is trained."""
    yield Contestant(base)


@contextmanager
def full(base: PreTrainedModel, parameters: int, fp32: bool = False) -> Iterator[Contestant]:
    """Everything is trained."""
    with _thawed(base), _in_fp32(base) if fp32 else nullcontext():
        yield Contestant(base, _adamw(base), fp32)


@contextmanager
def galore(base: PreTrainedModel, parameters: int) -> Iterator[Contestant]:
    """Everything is trained, by GaLore's optimizer."""
    with _thawed(base):
        yield Contestant(base, galore_optimizer(base, GALORE_RANK, LEARNING_RATE))


@contextmanager
def lisa(base: PreTrainedModel, parameters: int) -> Iterator[Contestant]:
    """Embeddings, head and two blocks are trained."""
    schedule = Lisa(LISA_LAYERS, LISA_INTERVAL, seed=0)
    schedule.check(base)
    with _thawed(base):
        optimizer = _adamw(base)
        yield Contestant(base, optimizer, begin=partial(schedule.switch, base, optimizer))


@contextmanager
def lora(base: PreTrainedModel, parameters: int, dora: bool = False, fp32: bool = False) -> Iterator[Contestant]:
    """PEFT's LoRA on all linear layers, with the rank that trains as many parameters."""
    rank = equal_rank(base, parameters, dora)
    with _adapted(base, lora_config(rank, 2 * rank, dora=dora), autocast_adapter_dtype=fp32) as model:
        yield Contestant(model, _adamw(model), fp32)


@contextmanager
def s2ft(
    base: PreTrainedModel,
    parameters: int,
    layers: str | None = None,
    coupled: bool | None = None,  # None: o and down; else up and down, with the same channels or with different ones
    inside: Callable[[nn.Module], AbstractContextManager[Any]] = in_place,
) -> Iterator[Contestant]:
    """S²FT inside the layout that `s2ft train` takes."""
    config = _config(base, parameters, layers, coupled)
    with _adapted(base, config) as model, inside(model):
        yield Contestant(model, _adamw(model))


def _config(base: PreTrainedModel, parameters: int, layers: str | None, coupled: bool | None) -> S2FTConfig:
    share = parameters / base.num_parameters()
    if coupled is None:
        return S2FTConfig(budget=share, layers=layers, seed=0, task_type="CAUSAL_LM")
    up, down = (
        select(base, S2FTConfig(budget=share / 2, layers=layers, target_modules=[name], seed=seed)).config
        for name, seed in (("up_proj", 0), ("down_proj", 0 if coupled else 1))
    )
    return replace(down, slices={**(up.slices or {}), **(down.slices or {})}, target_modules=["up_proj", "down_proj"])


@contextmanager
def _indexed_lean(model: nn.Module) -> Iterator[None]:
    patches = lean(model)
    try:
        yield
    finally:
        patches.undo()


@contextmanager
def _entered(model: nn.Module, **parts: bool) -> Iterator[None]:
    layout = enter(model, **parts)
    try:
        yield
    finally:
        layout.leave()


METHODS: dict[str, Prepare] = {
    "floor": floor,
    "full": full,
    "lora": lora,
    "dora": partial(lora, dora=True),
    "galore": galore,
    "lisa": lisa,
    "s2ft": s2ft,
}

AS_TRAINED: dict[str, Prepare] = {
    "full": partial(full, fp32=True),
    "lora": partial(lora, fp32=True),
    "dora": partial(lora, dora=True, fp32=True),
}

UPPER_HALF: dict[str, Prepare] = {"last:50%": partial(s2ft, layers="last:50%")}

ABLATION: dict[str, Prepare] = {
    "in place": s2ft,
    "in place, gathered": partial(s2ft, inside=partial(_entered, permute=False)),
    "in place, not lean": partial(s2ft, inside=partial(_entered, activations=False)),
    "indexed, lean": partial(s2ft, inside=_indexed_lean),
    "indexed": partial(s2ft, inside=nullcontext),
    "up and down, coupled": partial(s2ft, coupled=True),
    "up and down, independent": partial(s2ft, coupled=False),
}


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


@contextmanager
def _thawed(base: PreTrainedModel) -> Iterator[None]:
    base.requires_grad_(True)
    try:
        yield
    finally:
        base.zero_grad(set_to_none=True)
        base.requires_grad_(False)


@contextmanager
def _in_fp32(base: PreTrainedModel) -> Iterator[None]:
    base.float()
    try:
        yield
    finally:
        base.bfloat16()


@contextmanager
def _adapted(base: PreTrainedModel, config: Any, **options: Any) -> Iterator[PeftModel]:
    model = get_peft_model(base, config, **options)
    try:
        yield model
    finally:
        model.unload()
