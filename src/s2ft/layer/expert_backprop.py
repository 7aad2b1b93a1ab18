"""Partial back-propagation through stacked experts: what a slice of them saves for backward is as wide as the slice.

    Spread    x → each pair's channels            saves x where rows of gate and up are trained, else nothing but the routing
    Gate      act(gate) · up · routing weight     saves gate and up; the rest is computed again
    Collect   channels → y                        saves the channels, as a dense slice does
    InWeight  y → y, where it holds the slice     saves the channels alone

Frozen matrices are picked from the base's parameter, and picked again for backward, so that no copy of them is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from s2ft.layer.grouped import grouped_outer, grouped_product
from s2ft.layer.routing import Routing

Activation = Callable[[Tensor], Tensor]  # [pairs, rows of up] → [pairs, channels]


def pick(
    weights: Tensor,  # [experts, n, hidden]
    rows: Tensor | None,  # [experts, m], int64; None: all of them
    dtype: torch.dtype,
) -> Tensor:  # [experts, m, hidden]
    """Some rows of every expert's matrix."""
    if rows is None:
        return weights.to(dtype)
    return weights[torch.arange(len(rows), device=rows.device)[:, None], rows].to(dtype)


class Spread(Function):
    """Each pair's token times rows of its expert's matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [tokens, hidden]
        weights: Tensor,  # [experts, n, hidden]
        rows: Tensor | None,  # [experts, m], int64
        routing: Routing,
    ) -> Tensor:  # [pairs, m]
        """Returns x[tokens] Wᵀ."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights, rows)
        ctx.routing, ctx.dtype = routing, x.dtype
        return grouped_product(routing.gathered(x), pick(weights, rows, x.dtype).mT, routing.ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # grad: [pairs, m]
        """Returns the gradients of x, and of the weights where they are trained."""
        x, weights, rows = ctx.saved_tensors
        routing, grad = ctx.routing, grad.contiguous()
        grad_x = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_x = routing.summed(grouped_product(grad, pick(weights, rows, ctx.dtype), routing.ends))
        if ctx.needs_input_grad[1]:
            grad_weights = grouped_outer(grad, routing.gathered(x), routing.ends)
        return grad_x, grad_weights, None, None


class Gate(Function):
    """The activation of each pair's channels, times its routing weight."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,  # [pairs, rows of up]
        weights: Tensor | None,  # [pairs]
        activation: Activation,
    ) -> Tensor:  # [pairs, channels]
        """Returns activation(rows) · weights."""
        ctx.save_for_backward(rows, weights)
        ctx.activation = activation
        return _gated(rows, weights, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # grad: [pairs, channels]
        """Runs the activation again, and autograd through it."""
        rows, weights = (None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors)
        wanted = [t for t, needed in zip((rows, weights), ctx.needs_input_grad, strict=False) if needed]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(_gated(rows, weights, ctx.activation), wanted, grad))  # type: ignore[arg-type]
        first, second, _ = (next(found) if needed else None for needed in ctx.needs_input_grad)
        return first, second, None


def _gated(rows: Tensor, weights: Tensor | None, activation: Activation) -> Tensor:  # as in `Gate`
    channels = activation(rows)
    return channels if weights is None else channels * weights[:, None].to(channels.dtype)


class Collect(Function):
    """Adds each pair's channels times rows of its expert's matrix to its token."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # [tokens, hidden]
        channels: Tensor,  # [pairs, m]
        weights: Tensor,  # [experts, n, hidden]
        rows: Tensor | None,  # [experts, m], int64
        routing: Routing,
    ) -> Tensor:  # [tokens, hidden]
        """Returns y + the sum over each token's pairs of channels W."""
        ctx.save_for_backward(channels, weights, rows)
        ctx.routing = routing
        added = grouped_product(channels, pick(weights, rows, channels.dtype), routing.ends)
        return y + routing.summed(added).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_y: Tensor,  # [tokens, hidden]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        """Returns grad_y, and the gradients of the channels, and of the weights where they are trained."""
        channels, weights, rows = ctx.saved_tensors
        routing = ctx.routing
        grad = routing.gathered(grad_y.to(channels.dtype))
        grad_channels = grad_weights = None
        if ctx.needs_input_grad[1]:
            grad_channels = grouped_product(grad, pick(weights, rows, channels.dtype).mT, routing.ends)
        if ctx.needs_input_grad[2]:
            grad_weights = grouped_outer(channels, grad, routing.ends)
        return grad_y, grad_channels, grad_weights, None, None


class InWeight(Function):
    """Gives the deltas in the weight of down their gradient; y has what they add already."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # [tokens, hidden]
        channels: Tensor,  # [pairs, m]
        deltas: Tensor,  # [experts, m, hidden]
        routing: Routing,
        held: Tensor,  # the adapter's own values, which the weight holds
    ) -> Tensor:  # [tokens, hidden]
        """Returns y as it is."""
        ctx.save_for_backward(channels, held)
        ctx.routing = routing
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, Tensor, None, None]:  # grad_y: [tokens, hidden]
        """Returns grad_y as it is, and the gradient of the deltas."""
        channels, _ = ctx.saved_tensors  # raises if the deltas have changed since the forward pass
        grad = ctx.routing.gathered(grad_y.to(channels.dtype))
        return grad_y, None, grouped_outer(channels, grad, ctx.routing.ends), None, None
