"""Models whose linear layers are quantised, by the libraries that are installed and by a stand-in for them."""

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Grid(Tensor):
    """Like torchao's and quanto's: dtype and shape of the values it stands for, integers inside, and few operations."""

    @staticmethod
    def __new__(cls, values: Tensor, levels: int = 16) -> "Grid":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, requires_grad=False)

    def __init__(self, values: Tensor, levels: int = 16) -> None:
        self.block_size = levels
        self.scale = values.abs().amax(1, keepdim=True) / levels
        self.codes = (values / self.scale).round().to(torch.int8)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    def dequantize(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            x, weight, *bias = args
            return func(x, weight.dequantize(), *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return args[0]
        raise NotImplementedError(f"{cls.__name__}: {func}")


Grid.__module__ = "torchao.stand_in"


def _linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    found = [
        (m, name, child) for m in model.modules() for name, child in m.named_children() if isinstance(child, nn.Linear)
    ]
    return [row for row in found if row[1] != "lm_head"]


def stand_in(model: nn.Module, levels: int = 16) -> nn.Module:
    """Each row on its own grid of so many levels on each side of zero."""
    for _, _, linear in _linears(model):
        linear.weight = nn.Parameter(Grid(linear.weight.data, levels), requires_grad=False)
    return model


def library(name: str) -> Any:
    """A library of quantised layers; where it is missing the test is skipped, and fails by `make test-quantised`."""
    return importlib.import_module(name) if os.environ.get("S2FT_TEST_QUANTISED") else pytest.importorskip(name)


def _bitsandbytes(model: nn.Module, kind: str) -> nn.Module:
    bnb = library("bitsandbytes").nn
    for parent, name, linear in _linears(model):
        sizes, has_bias, weight = (linear.in_features, linear.out_features), linear.bias is not None, linear.weight.data
        if kind == "int8":
            layer = bnb.Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False)
            layer.weight = bnb.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.Linear4bit(*sizes, bias=has_bias, quant_type=kind, compute_dtype=weight.dtype)
            layer.weight = bnb.Params4bit(weight.clone(), requires_grad=False, quant_type=kind)
        layer.bias = linear.bias
        setattr(parent, name, layer.to("cpu"))
    return model


def _torchao(model: nn.Module) -> nn.Module:
    quantization = library("torchao.quantization")
    chosen = {linear for _, _, linear in _linears(model)}
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, _: module in chosen)
    return model


def _quanto(model: nn.Module, kind: str) -> nn.Module:
    quanto = library("optimum.quanto")
    quanto.quantize(model, weights=getattr(quanto, kind), exclude="lm_head")
    quanto.freeze(model)
    return model


QUANTISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "stand-in": stand_in,
    "nf4": lambda model: _bitsandbytes(model, "nf4"),
    "fp4": lambda model: _bitsandbytes(model, "fp4"),
    "int8": lambda model: _bitsandbytes(model, "int8"),
    "torchao": _torchao,
    "quanto-int8": lambda model: _quanto(model, "qint8"),
    "quanto-int4": lambda model: _quanto(model, "qint4"),
}
