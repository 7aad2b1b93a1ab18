"""A quantised layer that is frozen: its own kernel forward, the dequantised weight backward, and nothing saved in between.

    y = base(x)          as the library computes it            dL/dx = g W          W dequantised for the moment

Libraries save more than a frozen weight needs: bitsandbytes' int8 and torchao keep the layer's input, GPTQ and AWQ the
dequantised weight of every layer. Some give no gradient at all. Here the gradient is that of the dequantised layer by
construction; where activations are quantised too, their rounding passes it on unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from s2ft.layer.backprop import eager_grad
from s2ft.layer.dequantise import values_of, why_unreadable
from s2ft.layer.linears import is_quantised


class FrozenProduct(Function):
    """A frozen layer's output; saves nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [*, in_features]
        linear: nn.Module,
        product: Callable[[Tensor], Tensor],  # what runs the layer
    ) -> Tensor:  # [*, out_features]
        """Returns product(x)."""
        ctx.linear = linear
        return product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # grad: [*, out_features]
        """Returns grad W."""
        return grad @ values_of(ctx.linear).to(grad.dtype), None, None


def through_frozen(
    linear: nn.Module,
    product: Callable[[Tensor], Tensor],
    x: Tensor,  # [*, in_features]
) -> Tensor:  # [*, out_features]
    """product(x), which runs a linear layer; by `FrozenProduct` if that is quantised, frozen, and can be read."""
    if not eager_grad(x) or not is_quantised(linear) or why_not_frozen(linear):
        return product(x)
    y: Tensor = FrozenProduct.apply(x, linear, product)
    return y


def why_not_frozen(linear: nn.Module) -> str | None:
    """Why a quantised layer's own backward has to run."""
    if any(parameter.requires_grad for parameter in linear.parameters()):
        return "is trained itself"
    return why_unreadable(linear)
