"""Partial back-propagation: the autograd functions around a frozen linear layer.

What is added around the layer (see `layer/linear.py`): a tap on its input, an addition to its output. Each saves the least
that its backward needs, and the slice's share of the input gradient is added onto the layer's own, in place (S²FT paper,
§3.3). What lives in its weight (see `layer/slot.py`): a node behind its output, which gives the slice its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._autograd import CreationMeta
from torch._C._autograd import _get_creation_meta as _creation
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction, once_differentiable


class SelectTap(Function):
    """x → (x, x[..., idx]); backward scatters the second gradient onto the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        return x.view_as(x), x.index_select(-1, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_selected: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad_x.index_add_(-1, indices, grad_selected), None


class ProjectTap(Function):
    """x → (x, x Vᵀ); backward adds the product's input gradient onto the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, delta)
        return x.view_as(x), F.linear(x, delta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_product: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, delta = ctx.saved_tensors
        rows = grad_product.reshape(-1, grad_product.shape[-1])
        grad_delta = rows.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[0]:
            grad_x = grad_x.contiguous()
            grad_x.view(-1, grad_x.shape[-1]).addmm_(rows, delta)
        return grad_x, grad_delta


class AddProduct(Function):
    """y += selected Vᵀ, in place; keeps `selected` and V."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, selected: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(selected, delta)
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).addmm_(selected.view(-1, selected.shape[-1]), delta.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        selected, delta = ctx.saved_tensors
        rows = grad_y.reshape(-1, grad_y.shape[-1])
        grad_selected = (rows @ delta).view_as(selected) if ctx.needs_input_grad[1] else None
        grad_delta = rows.T @ selected.view(-1, selected.shape[-1]) if ctx.needs_input_grad[2] else None
        return grad_y, grad_selected, grad_delta


class AddAt(Function):
    """y[..., idx] += product, in place; keeps neither."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, product: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.mark_dirty(y)
        return y.index_add_(-1, indices, product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad_y, grad_y.index_select(-1, indices), None


class SliceGradient(Function):
    """y → y. Backward gives the delta its gradient, after `before` has made sure that the slot holds it."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # [*, out_features]
        kept: Tensor,  # [*, s] selected activations (input side), or [*, in_features]
        delta: Tensor,
        picks: Callable[[Tensor], Tensor] | None,  # output side: g → g[..., slot]
        before: Callable[[], None] | None,
        dirty: bool,
    ) -> Tensor:
        ctx.save_for_backward(kept, delta)
        ctx.picks, ctx.before = picks, before
        if dirty:
            ctx.mark_dirty(y)
            return y
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        kept, delta = ctx.saved_tensors  # raises if the delta has changed since the forward pass
        if ctx.before is not None:
            ctx.before()
        grad = grad_y if ctx.picks is None else ctx.picks(grad_y)
        grad_delta = grad.reshape(-1, grad.shape[-1]).T @ kept.reshape(-1, kept.shape[-1])
        return grad_y, None, grad_delta.to(delta.dtype), None, None, None


class BeforeBackward(Function):
    """y → y. Calls `before` ahead of the backward pass of what made y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, before: Callable[[], None]) -> Tensor:
        ctx.before = before
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        ctx.before()
        return grad_y, None


def may_change(y: Tensor) -> bool:
    """Whether the base layer's output may be added to in place: not where a hook's own Function made it, or a compiler runs.

    Nor where autograd refuses, as with what quantised layers give: a leaf that requires its gradient, or a view that was
    made inside a Function, without gradients, or of what has no part in the graph.
    """
    if torch.compiler.is_compiling() or not y.is_contiguous() or isinstance(y.grad_fn, BackwardCFunction):
        return False
    if y.requires_grad and y.is_leaf:
        return False
    base = y._base
    return base is None or (_creation(y) == CreationMeta.DEFAULT and base.requires_grad == y.requires_grad)


def eager_grad(x: Tensor) -> bool:
    """Whether the taps pay: a compiler fuses by itself, and without a gradient there is nothing to add to."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled() and x.requires_grad


def stamp(tensor: Tensor) -> tuple[int, int]:
    """Where the tensor lies and how often it was written to; writes to its `data` are not counted."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
