"""Switching a live model between its adapters: slices are copied into the base weights, and back.

    switch(model, "a")  →  switch(model, "b")  →  switch(model, None)        no adapter costs anything per token
         W + ΔWa                W + ΔWb                 W, bit for bit

A switch moves s columns or rows of each adapted weight: 2 s d numbers out and in, where LoRA computes and adds d².
"""

from __future__ import annotations

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from s2ft.common.errors import S2FTError, raise_by_place, raise_together
from s2ft.format.slices import all_finite
from s2ft.layer.adapted import (
    AdaptedLayer,
    adapted_layers,
    mark_shared,
    not_loaded,
    require_own,
    switch_layers,
    turns_of,
)
from s2ft.layer.backprop import stamp
from s2ft.layer.block import S2FTBlock
from s2ft.layer.linear import S2FTLinear, sliced_layers
from s2ft.layer.sharding import gathered, is_sharded, reshard


def switch(model: nn.Module, adapter: str | None) -> None:
    """Makes `model` run one of its loaded adapters at no cost per token; None makes it run its base.

    The adapter's slices are written into the base weights, after the adapter before is taken out, bit for bit. Quantised
    weights are not written to: there the slices are added to the layer's output, at their cost per token.
    `model.set_adapter(name)` ends the switched state: adapters run, train and mix beside the base again.

    Args:
        model: A PeftModel, or any model that adapters were put into; compiled ones too.
        adapter: The name of a loaded S²FT adapter. Its deltas may lie on another device than the model (see `park`).

    Raises:
        S2FTError: before any weight is touched, if the name is not loaded, the adapter's values are not finite, or adapters
            are merged. Whatever else is raised half-way, the model is as it was before.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from s2ft import S2FTConfig
        >>> sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
        >>> model = get_peft_model(base, S2FTConfig(ratios=0.25, init_weights=False))
        >>> weight = base.model.layers[0].mlp.down_proj.weight
        >>> before = weight.clone()
        >>> switch(model, "default")
        >>> torch.equal(weight, before)
        False
        >>> switch(model, None)
        >>> torch.equal(weight, before)
        True
    """
    with turns_of(model).alone():
        layers = adapted_layers(model)
        if not layers:
            raise S2FTError(f"{type(model).__name__} holds no S²FT adapter; load one before switching")
        require_own(model, "switching", allowed=["switched"])
        reshard(model)
        _refuse(model, layers, adapter)
        mark_shared(model)
        switch_layers(layers, adapter)


def park(model: nn.Module, adapter: str) -> None:
    """Moves a loaded adapter's deltas to the host's memory, pinned where there is a GPU: `switch` takes them from there.

    `model.set_adapter(adapter)` brings them back beside the base.

    Raises:
        S2FTError: if the name is not loaded.
    """
    with turns_of(model).alone():
        layers = adapted_layers(model)
        raise_together(not_loaded([adapter], _loaded(layers)))
        for block in (layer.block(adapter) for layer in sliced_layers(model, adapter).values()):
            for tensor in (block.weight, block.indices):
                host = tensor.data.cpu()
                tensor.data = host.pin_memory() if torch.cuda.is_available() else host
            block.is_parked = True


def _refuse(model: nn.Module, layers: list[AdaptedLayer], adapter: str | None) -> None:
    if adapter is None:
        return
    sliced = sliced_layers(model, adapter)
    raise_together(not_loaded([] if sliced else [adapter], _loaded(layers)))
    whole = [path for path, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    if whole:
        raise S2FTError(
            f"{whole[0]} is kept whole by an adapter (modules_to_save, trainable_token_indices), and `switch` writes slices "
            "only: use `set_adapter` on this model"
        )
    problems = ((path, _layer_problem(layer, adapter)) for path, layer in sliced.items())
    raise_by_place((path, problem) for path, problem in problems if problem)


def _layer_problem(layer: S2FTLinear, adapter: str) -> str | None:
    block = layer.block(adapter)
    if layer.weight.is_meta or block.weight.is_meta:
        return f"no values here, the base's or those of {adapter!r} (device meta: offloaded, or not loaded yet)"
    if problem := layer.why_unwritable([adapter]):
        return problem
    return None if _is_finite(block) else f"the adapter {adapter!r} holds values that are not finite; nothing changed"


def _is_finite(block: S2FTBlock) -> bool:
    """Whether the delta is finite; checked again only after it was changed, since on a GPU the check waits for it."""
    delta = block.weight
    if is_sharded(delta):
        return all_finite(gathered(delta))
    if delta.is_inference() or block.finite_at != stamp(delta):  # writes to an inference tensor are not counted
        if not all_finite(delta):
            return False
        block.finite_at = stamp(delta)
    return True


def _loaded(layers: list[AdaptedLayer]) -> dict[str, None]:
    return dict.fromkeys(name for layer in layers for name in layer.s2ft_block)
