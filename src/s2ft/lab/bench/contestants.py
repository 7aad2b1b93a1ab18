"""The methods of the training benchmark, each set up on a frozen base and taken down again.

    floor    the frozen base: forward, and gradients down to the embeddings' output. No method that trains something in
             every block can do less.
    s2ft     inside the layout that `s2ft train` takes; variants of it are in `ABLATION` and `UPPER_HALF`
    rivals   the other methods of `finetune/methods.py`, with as many trainable parameters where a method has a choice

On a mixture of experts, `ON_EXPERTS` are S²FT and LoRA on the same parameters: the experts' down.

Rivals get their cheapest setting: weights, gradients and optimizer states in the base's dtype, no dropout, torch's fused
AdamW; on a quantised base, LoRA is QLoRA. The deltas of S²FT are fp32, as always. `AS_TRAINED` holds rivals as they are usually
run, and as `s2ft train` runs them: what they train is fp32 too, under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from s2ft.finetune.head import small_tiles
from s2ft.finetune.methods import METHODS
from s2ft.finetune.options import TrainOptions
from s2ft.format.config import S2FTConfig
from s2ft.selection.select import select
from s2ft.training.in_place import enter, in_place
from s2ft.training.lean import lean
from s2ft.tuner.model import S2FTModel  # noqa: F401 - PEFT knows the method from here on

LEARNING_RATE = 1e-6  # small, so that random weights stay finite; a step costs the same at any rate


@dataclass
class Contestant:
    """One method on one model, ready to take steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    autocast: bool = False  # compute in bf16 what is kept in fp32
    begin: Callable[[int], None] = lambda step: None  # before each step, with its number
    steps: int = 0
    chunked: bool = False  # inside `chunked_head`

    @property
    def trainable(self) -> int:
        """Trainable parameters; LISA's at this step."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def step(self, ids: Tensor) -> None:  # [batch, length], int64
        """Forward, loss, backward, optimizer."""
        self.begin(self.steps)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast):
            head = {"fused_lm_head": True} if self.chunked else {}
            loss = self.model(**self._inputs(ids), labels=ids, **head).loss
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

    def _inputs(self, ids: Tensor) -> dict[str, Any]:  # [batch, length]
        if self.optimizer is not None:
            return {"input_ids": ids, "use_cache": False}
        embed = self.model.get_input_embeddings()  # type: ignore[operator]
        return {"inputs_embeds": embed(ids).detach().requires_grad_(), "use_cache": False}


@contextmanager
def chunked_head(base: PreTrainedModel) -> Iterator[None]:
    """Gives the model TRL's head, as `s2ft train` does: the loss without all logits at once, by `fused_lm_head=True`."""
    add_fused_lm_head(base)
    try:
        with small_tiles():
            yield
    finally:
        del base.forward  # it stands on the object, before the class's own


Prepare = Callable[[PreTrainedModel, int], AbstractContextManager[Contestant]]
"""From a frozen base and a number of trainable parameters to a contestant; leaves a frozen base, its weights maybe changed."""


@contextmanager
def floor(base: PreTrainedModel, parameters: int) -> Iterator[Contestant]:
    """Nothing is trained."""
    yield Contestant(base)


@contextmanager
def rival(base: PreTrainedModel, parameters: int, name: str, fp32: bool = False) -> Iterator[Contestant]:
    """A method of `s2ft train` with its usual options, but sized to train `parameters` where it has a choice.

    Args:
        name: Of the method.
        fp32: Keeps what is trained in fp32 and computes in bf16.
    """
    method = METHODS[name]
    method.check()
    options = TrainOptions(model="m", data=["d"], output="o", method=name, **method.of_size(base, parameters))
    config = method.peft_config(options, base, None)
    if isinstance(config, LoraConfig):
        config.lora_dropout = 0.0
    setup = _thawed(base, fp32) if config is None else _adapted(base, config, autocast_adapter_dtype=fp32)
    with setup as model:
        arguments = TrainingArguments(
            "unused", learning_rate=LEARNING_RATE, report_to="none", **method.arguments(options, base)
        )
        optimizer = _optimizer(model, arguments)
        callbacks, state, control = method.callbacks(options, base), TrainerState(), TrainerControl()

        def begin(step: int) -> None:
            state.global_step = step
            for callback in callbacks:
                callback.on_step_begin(arguments, state, control, model=model, optimizer=optimizer)

        yield Contestant(model, optimizer, fp32, begin)


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


DOWN_OF_EXPERTS = "experts.down_proj"


@contextmanager
def s2ft_on_experts(
    base: PreTrainedModel,
    parameters: int,
    inside: Callable[[nn.Module], AbstractContextManager[Any]] = in_place,
) -> Iterator[Contestant]:
    """S²FT on the experts' down."""
    config = S2FTConfig(ratios=parameters / _size_on_experts(base), target_parameters=[DOWN_OF_EXPERTS], seed=0)
    with _adapted(base, config) as model, inside(model):
        yield Contestant(model, _adamw(model))


@contextmanager
def lora_on_experts(base: PreTrainedModel, parameters: int) -> Iterator[Contestant]:
    """PEFT's LoRA on the experts' down, by `target_parameters`: its rank for every expert."""
    shapes = [parameter.shape for name, parameter in base.named_parameters() if name.endswith(DOWN_OF_EXPERTS)]
    rank = max(1, round(parameters / sum(count * (rows + columns) for count, rows, columns in shapes)))
    config = LoraConfig(r=rank, target_modules=[], target_parameters=[DOWN_OF_EXPERTS])
    with _adapted(base, config, autocast_adapter_dtype=False) as model:
        yield Contestant(model, _adamw(model))


def _size_on_experts(base: PreTrainedModel) -> int:
    return sum(parameter.numel() for name, parameter in base.named_parameters() if name.endswith(DOWN_OF_EXPERTS))


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


RIVALS = [name for name in METHODS if name != "s2ft"]

CONTESTANTS: dict[str, Prepare] = {
    "floor": floor,
    **{name: partial(rival, name=name) for name in RIVALS},
    "s2ft": s2ft,
}

ON_EXPERTS: dict[str, Prepare] = {"floor": floor, "lora": lora_on_experts, "s2ft": s2ft_on_experts}

BESIDE_EXPERTS: dict[str, Prepare] = {"indexed": partial(s2ft_on_experts, inside=nullcontext)}

ON_QUANTISED: dict[str, Prepare] = {"floor": floor, "qlora": partial(rival, name="lora"), "s2ft": s2ft}

AS_TRAINED: dict[str, Prepare] = {name: partial(rival, name=name, fp32=True) for name in ("full", "lora", "dora")}

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


def _optimizer(model: nn.Module, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """AdamW, or the optimizer that transformers' Trainer makes of the method's arguments."""
    if arguments.optim_target_modules is None:
        return _adamw(model)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer: torch.optim.Optimizer = kind(settings.pop("params"), **settings)
    return optimizer


@contextmanager
def _thawed(base: PreTrainedModel, fp32: bool) -> Iterator[PreTrainedModel]:
    dtype = base.dtype
    base.requires_grad_(True)
    if fp32:
        base.float()
    try:
        yield base
    finally:
        base.zero_grad(set_to_none=True)
        base.requires_grad_(False)
        base.to(dtype)


@contextmanager
def _adapted(base: PreTrainedModel, config: Any, **options: Any) -> Iterator[PeftModel]:
    model = get_peft_model(base, config, **options)
    try:
        yield model
    finally:
        model.unload()
