"""What each layer's change weighs beside the weight that it changes, for the report.

‖Δ‖ and ‖W‖, Frobenius norms, for S²FT and for LoRA, whose change is a sum added to a weight
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from s2ft.layer.linear import S2FTLinear
from s2ft.layer.linears import is_plain, layer_index
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
    """What is added to the layer's weight; None where there is no such sum, as with DoRA, or no adapter."""
    if isinstance(module, S2FTLinear) and adapter in module.s2ft_block:
        return module.block(adapter).weight
    if isinstance(module, LoraLinear) and adapter in module.lora_A and adapter not in module.lora_variant:
        factors: list[Any] = [module.lora_A[adapter], module.lora_B[adapter]]
        first, second = (gathered(factor.weight).detach() for factor in factors)
        scale: float = module.scaling[adapter]
        return scale * (second @ first)
    return None


def _norm(tensor: Tensor) -> float:  # of any shape
    return float(torch.linalg.vector_norm(gathered(tensor).detach(), dtype=torch.float32))
