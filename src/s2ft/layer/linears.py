"""Linear layers: which modules are, how their weights are laid out, and which block of the model they are in."""

from __future__ import annotations

import re
import sys
from typing import Any, cast

from torch import Tensor, nn

NO_VALUES = "has no values here (device meta: offloaded, or not loaded yet)"


def is_conv1d(module: object) -> bool:
    """Whether it is GPT-2's own linear layer. There is none before transformers has loaded the class, so this does not."""
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return kind is not None and isinstance(module, kind)


def linear_layer(module: nn.Module) -> nn.Module | None:
    """The linear layer that `module` is, or that it wraps as a PEFT layer; None if it is neither."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    is_known = isinstance(module, nn.Linear) or is_conv1d(module)
    is_linear = is_known or (
        hasattr(module, "in_features")
        and hasattr(module, "out_features")
        and any(isinstance(getattr(module, name, None), Tensor) for name in ("weight", "qweight"))
    )
    return module if is_linear else None


def features(module: Any) -> tuple[int, int]:
    """`(in_features, out_features)` of a linear layer; the weight of a Conv1D (GPT-2) is [in_features, out_features]."""
    if is_conv1d(module):
        shape = getattr(module.weight, "ds_shape", module.weight.shape)  # DeepSpeed ZeRO-3 keeps a part of the weight
        return int(shape[0]), int(shape[1])
    return int(module.in_features), int(module.out_features)


def is_plain(module: nn.Module) -> bool:
    """Whether the layer's weight is a plain tensor of its values: whole, and not packed, scaled or wrapped."""
    return why_not_plain(module) is None


def why_not_plain(module: nn.Module) -> str | None:
    """What the layer's weight is instead of a plain tensor of its values, such as "is quantised (Linear4bit)"."""
    weight = weight_of(module)
    if hasattr(weight, "ds_id"):
        return "is partitioned by DeepSpeed ZeRO-3"
    if _is_distributed(weight):
        return "is a DTensor, sharded over devices (FSDP2 or tensor parallel)"
    if _is_packed(weight):
        return f"is quantised ({type(module).__name__}), stored as {weight.dtype}"
    if type(weight.data) is not Tensor:  # its dtype and shape may be those of the dequantised values
        return f"is a {type(weight.data).__name__}, as quantisation libraries make them"
    if weight.numel() != features(module)[0] * features(module)[1]:
        return f"holds {weight.numel():,} of its values only (partitioned, as by FSDP, or packed)"
    return None


def is_quantised(module: nn.Module) -> bool:
    """Whether the layer's weight is stored in another form by a quantisation library; a part of a sharded one is not."""
    weight = weight_of(module)
    if hasattr(weight, "ds_id") or _is_distributed(weight):
        return False
    return _is_packed(weight) or type(weight.data) is not Tensor


def _is_distributed(weight: Tensor) -> bool:
    return type(weight.data).__name__ == "DTensor"


def _is_packed(weight: Tensor) -> bool:
    return not weight.is_floating_point() or weight.dtype.itemsize == 1 or hasattr(weight, "quant_state")


def weight_of(module: nn.Module) -> Tensor:  # [out_features, in_features]; of a Conv1D [in_features, out_features]
    """The layer's weight, as it is; GPTQ's and AWQ's layers call theirs `qweight`, in a shape of its own."""
    weight = getattr(module, "weight", None)
    return cast(Tensor, weight if isinstance(weight, Tensor) else module.qweight)


def weight_matrix(module: nn.Module) -> Tensor:  # [out_features, in_features], a view
    """The weight of a linear layer in the orientation of `nn.Linear`, sharing its storage.

    Of stacked experts (`layer/stacked.py`) it is [experts, out, in].
    """
    return as_matrix(module, weight_of(module))


def as_matrix(module: nn.Module, weight_like: Tensor) -> Tensor:  # [out_features, in_features], a view
    """A tensor shaped like the module's weight (itself, its gradient) in the orientation of `nn.Linear`."""
    return weight_like.mT if is_conv1d(module) or getattr(module, "is_transposed", False) else weight_like


def layer_stack(path: str) -> tuple[str, int] | None:
    """The list of blocks that `path` is in, and the index of its block there; None if it is in none.

    Example:
        >>> layer_stack("model.layers.3.mlp.down_proj")
        ('model.layers', 3)
    """
    match = re.match(r"(.*?)(?:^|\.)(\d+)(?:\.|$)", path)
    return (match[1], int(match[2])) if match else None


def layer_index(path: str) -> int | None:
    """The index of the block that `path` is in; None if it is in none."""
    place = layer_stack(path)
    return place[1] if place else None
