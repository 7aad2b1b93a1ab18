"""The values of a quantised weight, a name for how it is quantised, and the plain model that a quantised one stands for.

bitsandbytes (through PEFT), torchao and optimum-quanto have functions for it. Of any other layer, GPTQ's and AWQ's among them,
the values are what it makes of the unit vectors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from s2ft.common.errors import S2FTError, raise_by_place
from s2ft.layer.linears import as_matrix, features, is_quantised, linear_layer, weight_of, why_not_plain
from s2ft.layer.sharding import read_matrix, why_not_readable

_GRID = ("quant_type", "qtype", "blocksize", "block_size", "_group_size", "axis")  # attributes that say how
_NOTES = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "_weight_conversions")
_PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit: whether it repacks its weight in evaluation
_HAS_UNIT_VECTORS: WeakKeyDictionary[nn.Module, bool] = (
    WeakKeyDictionary()
)  # asked once, since it takes a whole product


def why_unreadable(layer: nn.Module) -> str | None:
    """Why `values_of` cannot read the layer's weight, such as "is a DTensor"; None where it can."""
    if weight_of(layer).is_meta:
        return "has no values (device meta)"
    if not is_quantised(layer):
        return why_not_readable(layer)
    return None if _is_readable(layer) else why_not_plain(layer)


def _is_readable(layer: nn.Module) -> bool:
    """Of a quantised layer."""
    if not _is_known(layer) and layer not in _HAS_UNIT_VECTORS:
        _HAS_UNIT_VECTORS[layer] = dequantised(layer) is not None
    return _HAS_UNIT_VECTORS.get(layer, True)


def values_of(layer: nn.Module) -> Tensor:  # [out_features, in_features]
    """The layer's own values in floating point: its weight, gathered where it is sharded, dequantised where it is quantised.

    Raises:
        S2FTError: if they are not known: on device meta, or packed in a way that nobody can read.
    """
    if reason := why_unreadable(layer):
        raise S2FTError(f"the weight {reason}, and cannot be read")
    values = dequantised(layer) if is_quantised(layer) else read_matrix(layer, "reading it")
    assert values is not None  # or there would be a reason
    return values


def dequantised(layer: nn.Module) -> Tensor | None:  # [out_features, in_features], a copy
    """The values of a quantised layer; None if they are not known: on device meta, sharded, or packed in an unknown way.

    Their dtype is what the library computes in, where it says so.
    """
    weight: Any = weight_of(layer)
    if weight.is_meta or not is_quantised(layer):
        return None
    values: Tensor | None
    if not _is_known(layer):
        values = _of_unit_vectors(layer)
    elif hasattr(weight.data, "dequantize") and type(weight.data) is not Tensor:
        values = weight.dequantize()
    else:
        values = dequantize_bnb_weight(weight, getattr(layer, "state", None))
    inputs, outputs = features(layer)
    return values if values is not None and tuple(values.shape) == (outputs, inputs) else None


def _is_known(layer: nn.Module) -> bool:
    """Whether its library has a function that dequantises it as it is."""
    weight: Any = weight_of(layer)
    if type(weight).__name__ == "Params4bit":
        return weight.quant_state is not None and not _is_repacked(layer)
    is_int8 = type(weight).__name__ == "Int8Params" and hasattr(layer, "state")
    return is_int8 or type(weight.data).__module__.partition(".")[0] in ("torchao", "optimum")


@torch.no_grad()
def _of_unit_vectors(layer: nn.Module) -> Tensor | None:  # [out_features, in_features]
    """What the layer makes of each unit vector, without its bias: the columns of its weight. None if it takes none."""
    dtype = next((t.dtype for t in _tensors(layer) if t.is_floating_point() and t.itemsize > 1), torch.float32)
    bias = getattr(layer, "bias", None)
    layer.bias = None  # type: ignore[assignment]
    try:
        columns: Tensor = layer(torch.eye(features(layer)[0], dtype=dtype, device=weight_of(layer).device))
    except Exception:  # whatever a foreign kernel raises for a dtype or a device that it does not take
        return None
    finally:
        layer.bias = bias  # type: ignore[assignment]
    return columns.T.contiguous()


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    yield from layer.parameters(recurse=False)
    yield from layer.buffers(recurse=False)


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


def keep_trainable(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for the CPU, and unpacks those that it has repacked.

    Where the CPU multiplies bf16, a forward pass in evaluation mode and without gradients repacks the weight, rounds its scales
    to bf16, and from then on no gradient passes through the layer, in training mode either.
    """
    for module in model.modules():
        if getattr(module, _PACKS, False):
            setattr(module, _PACKS, False)
            if _is_repacked(module):
                module.state_dict()  # which unpacks it first


def _is_repacked(layer: nn.Module) -> bool:
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path → linear layer, of all that are quantised; below adapters too."""
    return {path: m for path, m in model.named_modules() if _is_quantised_linear(m)}


def _is_quantised_linear(module: nn.Module) -> bool:
    return linear_layer(module) is module and is_quantised(module)


def dequantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes a quantised model plain, layer by layer: each gets a linear layer with its dequantised values in `dtype`.

    Raises:
        S2FTError: before anything is changed, if a layer cannot be read.
    """
    found = quantised_layers(model)
    reasons = ((path, why_unreadable(layer)) for path, layer in found.items())
    raise_by_place((path, f"the weight {reason}, and cannot be read") for path, reason in reasons if reason)
    for path, layer in found.items():
        setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], _plain(layer, dtype))
    _forget_quantisation(model)


def _plain(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The layer as it was before: a Conv1D, where transformers notes that bitsandbytes' layer stands for one (GPT-2)."""
    values, bias = values_of(layer), getattr(layer, "bias", None)
    inputs, outputs = features(layer)
    with torch.device("meta"):
        is_conv1d = issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D)
        plain: nn.Module = Conv1D(outputs, inputs) if is_conv1d else nn.Linear(inputs, outputs, bias=bias is not None)
    plain.weight = nn.Parameter(as_matrix(plain, values.to(dtype)).contiguous(), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return plain.train(layer.training)


def _forget_quantisation(model: Any) -> None:
    """What transformers notes on a quantised model, which would be saved with it, or keep it from being moved and trained.

    Among it are the conversions that its weights were loaded by, which have no way back; the model's class has its own.
    """
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "quantization_config"):
            del module.config.quantization_config
        for name in _NOTES:
            vars(module).pop(name, None)
        if "is_quantized" in vars(module):
            module.is_quantized = False
