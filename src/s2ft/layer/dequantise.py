"""The values of a quantised weight, and a name for how it is quantised; used by digests.

For bitsandbytes (through PEFT), torchao and optimum-quanto.
"""

from __future__ import annotations

import re
from typing import Any

from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from s2ft.layer.linears import features, weight_of

_GRID = ("quant_type", "qtype", "blocksize", "block_size", "_group_size", "axis")  # attributes that say how


def dequantised(layer: nn.Module) -> Tensor | None:  # [out_features, in_features], a copy
    """The layer's weight in floating point; None if that is not known: on device meta, sharded, or packed in another way."""
    weight: Any = layer.weight
    if weight.is_meta or getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return None
    kind, library = type(weight).__name__, type(weight.data).__module__.partition(".")[0]
    values: Tensor | None = None
    if (kind == "Params4bit" and weight.quant_state is not None) or (kind == "Int8Params" and hasattr(layer, "state")):
        values = dequantize_bnb_weight(weight, getattr(layer, "state", None))
    elif library in ("torchao", "optimum"):
        values = weight.dequantize()
    inputs, outputs = features(layer)
    return values if values is not None and tuple(values.shape) == (outputs, inputs) else None


def grid(layer: nn.Module) -> str:
    """A name for how the weight is quantised, equal for layers that one library quantised in the same way.

    Example:
        >>> grid(nn.Linear(2, 2))
        'Parameter'
    """
    weight = weight_of(layer)
    sources = (weight, getattr(weight, "quant_state", None))
    words = [
        str(getattr(source, name)) for source in sources for name in _GRID if getattr(source, name, None) is not None
    ]
    return re.sub(r"[^\w.]+", "-", "-".join([type(weight).__name__, *words])).strip("-")
