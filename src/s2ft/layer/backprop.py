"""Partial back-propagation: the autograd functions around a frozen linear layer.

An adapter around the layer (`layer/linear.py`) takes a tap on its input and adds to its output. Each function saves the least
that its backward needs, and the slice's share of the input gradient is added to the layer's own, in place (S²FT paper, §3.3).
An adapter in the layer's weight (`layer/slot.py`) needs one function behind the output, which gives the slice its gradient.
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

from s2ft.layer.columns import add_columns

FROZEN = "FrozenProductBackward"  # the node of `layer/frozen.py`, which keeps no hold on its output


def times(
    x: Tensor,  # [*, n]
    delta: Tensor,  # [m, n]
) -> Tensor:  # [*, m]
    """Computes x Vᵀ as one product of matrices.

    `F.linear` multiplies an x of another layout as a batch, unless V is trained: the two round differently, so a loaded adapter
    would differ from the trained one in the last digit.
    """
    return F.linear(x, delta) if x.ndim <= 2 else F.linear(x.flatten(0, -2), delta).unflatten(0, x.shape[:-1])


class SelectTap(Function):
    """Selects the activations of a slice on the input side; saves the indices alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [*, in_features]
        indices: Tensor,  # [s], int64
    ) -> tuple[Tensor, Tensor]:  # [*, in_features], [*, s]
        """Returns x and x[..., indices]."""
        ctx.save_for_backward(indices)
        return x.view_as(x), x.index_select(-1, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_selected: Tensor) -> tuple[Tensor, None]:  # shaped like the outputs
        """Returns grad_x with grad_selected added at the indices, in place."""
        (indices,) = ctx.saved_tensors
        return add_columns(grad_x, indices, grad_selected), None


class ProjectTap(Function):
    """Multiplies the input with a slice on the output side; saves x, which the layer's neighbours save too, and V."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [*, in_features]
        delta: Tensor,  # [s, in_features]
    ) -> tuple[Tensor, Tensor]:  # [*, in_features], [*, s]
        """Returns x and x Vᵀ."""
        ctx.save_for_backward(x, delta)
        return x.view_as(x), times(x, delta)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_x: Tensor,  # [*, in_features]
        grad_product: Tensor,  # [*, s]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns grad_x + grad_product V, added in place, and dL/dV = grad_productᵀ x."""
        x, delta = ctx.saved_tensors
        rows = grad_product.reshape(-1, grad_product.shape[-1])
        grad_delta = rows.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[0]:
            grad_x = grad_x.contiguous()
            grad_x.view(-1, grad_x.shape[-1]).addmm_(rows, delta)
        return grad_x, grad_delta


class AddProduct(Function):
    """Adds a slice on the input side to the output; saves the selected activations and V."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # [*, out_features]
        selected: Tensor,  # [*, s]
        delta: Tensor,  # [out_features, s]
    ) -> Tensor:
        """Adds selected Vᵀ to y, in place."""
        ctx.save_for_backward(selected, delta)
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).addmm_(selected.view(-1, selected.shape[-1]), delta.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_y: Tensor,  # [*, out_features]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns grad_y, grad_y V, and dL/dV = grad_yᵀ selected."""
        selected, delta = ctx.saved_tensors
        rows = grad_y.reshape(-1, grad_y.shape[-1])
        grad_selected = (rows @ delta).view_as(selected) if ctx.needs_input_grad[1] else None
        grad_delta = rows.T @ selected.view(-1, selected.shape[-1]) if ctx.needs_input_grad[2] else None
        return grad_y, grad_selected, grad_delta


class AddAt(Function):
    """Adds a slice on the output side to the output; saves the indices alone."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # [*, out_features]
        product: Tensor,  # [*, s]
        indices: Tensor,  # [s], int64
    ) -> Tensor:
        """Adds the product to y[..., indices], in place."""
        ctx.save_for_backward(indices)
        ctx.mark_dirty(y)
        return add_columns(y, indices, product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:  # grad_y: [*, out_features]
        """Returns grad_y and grad_y[..., indices]."""
        (indices,) = ctx.saved_tensors
        return grad_y, grad_y.index_select(-1, indices), None


class SliceGradient(Function):
    """Gives the delta in a base weight its gradient; saves what the caller selected of the input, and V."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # [*, out_features]
        kept: Tensor,  # [*, s] selected activations (input side), or [*, in_features]
        delta: Tensor,  # [out_features, s] or [s, in_features]
        picks: Callable[[Tensor], Tensor] | None,  # output side: g → g[..., slot]
        before: Callable[[], None] | None,  # called ahead of backward, so that the slot holds the delta
        dirty: bool,  # y itself may be returned
    ) -> Tensor:
        """Returns y as it is."""
        ctx.save_for_backward(kept, delta)
        ctx.picks, ctx.before = picks, before
        if dirty:
            ctx.mark_dirty(y)
            return y
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_y: Tensor,  # [*, out_features]
    ) -> tuple[Tensor, None, Tensor, None, None, None]:
        """Returns grad_y as it is, and dL/dV = gᵀ kept, where g is grad_y or its part in the slot."""
        kept, delta = ctx.saved_tensors  # raises if the delta has changed since the forward pass
        if ctx.before is not None:
            ctx.before()
        grad = grad_y if ctx.picks is None else ctx.picks(grad_y)
        grad_delta = grad.reshape(-1, grad.shape[-1]).T @ kept.reshape(-1, kept.shape[-1])
        return grad_y, None, grad_delta.to(delta.dtype), None, None, None


class BeforeBackward(Function):
    """Calls `before` ahead of the backward pass of what made y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, before: Callable[[], None]) -> Tensor:  # y: any shape
        """Returns y as it is."""
        ctx.before = before
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:  # grad_y: shaped like y
        """Returns grad_y as it is."""
        ctx.before()
        return grad_y, None


def may_change(y: Tensor) -> bool:  # y: [*, out_features]
    """Whether the base layer's output may be added to in place.

    Not while a compiler runs, nor where another's own Function made it, nor where autograd refuses: quantised layers give a
    leaf that requires its gradient, or a view that was made inside a Function, without gradients, or of what is not in the
    graph.
    """
    if torch.compiler.is_compiling() or not y.is_contiguous():
        return False
    if isinstance(y.grad_fn, BackwardCFunction) and y.grad_fn.name() != FROZEN:
        return False
    if y.requires_grad and y.is_leaf:
        return False
    base = y._base  # noqa: SLF001 - torch does not say otherwise what a tensor is a view of
    return base is None or (_creation(y) == CreationMeta.DEFAULT and base.requires_grad == y.requires_grad)


def eager_grad(x: Tensor) -> bool:
    """Whether the taps pay: a compiler fuses by itself, and without a gradient there is nothing to add to."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled() and x.requires_grad


def stamp(tensor: Tensor) -> tuple[int, int]:
    """The tensor's address and version: equal while it is the same and was not written to, other than through its `data`."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch's only counter
