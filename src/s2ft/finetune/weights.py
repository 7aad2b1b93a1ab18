"""What each layer's change weighs beside the weight that it changes, for the report.

‖Δ‖ and ‖W‖, Frobenius norms. S²FT and LoRA hold their change; that of PEFT's other methods is read off a merged copy.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from s2ft.layer.linear import S2FTLinear
from s2ft.layer.linears import is_plain, layer_index, linear_layer
from s2ft.layer.sharding import gathered


def layer_changes(model: nn.Module, adapter: str = "default") -> list[dict[str, Any]]:
    """A row for each layer that `adapter` changes; its base's norm is None where the weight is packed or sharded."""
    rows = []
    for path, module in model.named_modules():
        delta = _delta(module, adapter)
        if delta is not None:
            name = path.removeprefix("base_model.model.")
            linear: Any = module.get_base_layer()
            base = _norm(linear.weight) if is_plain(linear) else None
            rows.append({"module": name, "layer": layer_index(name), "delta": _norm(delta), "base": base})
    return rows


def _delta(module: nn.Module, adapter: str) -> Tensor | None:  # [out, in], or the slice of it that changes
    """What the layer's weight changes by; None where that cannot be told, or there is no adapter."""
    if isinstance(module, S2FTLinear) and adapter in module.s2ft_block:
        return module.block(adapter).weight
    if isinstance(module, LoraLinear) and adapter in module.lora_A and adapter not in module.lora_variant:
        factors: list[Any] = [module.lora_A[adapter], module.lora_B[adapter]]
        first, second = (gathered(factor.weight).detach() for factor in factors)
        scale: float = module.scaling[adapter]
        return scale * (second @ first)
    return _merged_change(module, adapter) if isinstance(module, BaseTunerLayer) else None


def _merged_change(module: Any, adapter: str) -> Tensor | None:  # [out, in]
    """What merging a copy of the layer changes its weight by; None for what is no linear layer, or PEFT does not merge."""
    linear: Any = linear_layer(module)
    own = any(adapter in getattr(module, name, ()) for name in module.adapter_layer_names)
    if linear is None or not own or not is_plain(linear):
        return None
    base, merged = linear.weight, copy.deepcopy(module)
    try:
        merged.merge(adapter_names=[adapter])
    except Exception:  # each method refuses in its own way, and a report is no reason to lose a run
        return None
    change: Tensor = merged.get_base_layer().weight.detach().float() - base.detach().float()
    return change


def _norm(tensor: Tensor) -> float:  # of any shape
    return float(torch.linalg.vector_norm(gathered(tensor).detach(), dtype=torch.float32))
