"""What stands in the weight of a base layer: its own values, or slices of adapters on top of them.

    own ──put──▶ own + V₁ ──put──▶ own + V₁ + V₂          each put keeps the entries that it replaces
     ◀───────────────── restore ─────────────────          the last put first, by copy: bit for bit

No sum is ever undone by a subtraction. A weight that another module reads too (a tied embedding) is left to that module: the
layer gets a copy of its own for as long as something stands in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from s2ft.common.errors import S2FTError
from s2ft.layer.linears import weight_matrix, why_not_plain

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Delta(Protocol):
    """One adapter's slice of the layer (`S2FTBlock`)."""

    weight: nn.Parameter
    indices: Tensor  # [s], int64

    @property
    def dim(self) -> int:
        """The dimension of the weight matrix that `indices` select along."""


class BaseWeight:
    """Puts slices into a linear layer's weight, and takes all of them out again."""

    def __init__(self) -> None:
        self._replaced: list[
            tuple[int, Tensor, Tensor]
        ] = []  # dimension, channels, what stood there; the last put last
        self._shared: nn.Parameter | None = None  # the parameter that the layer has in common with another module

    @property
    def is_own(self) -> bool:
        """Whether the weight holds its own values."""
        return not self._replaced and self._shared is None

    def put(self, linear: nn.Module, delta: Delta, is_shared: bool) -> None:
        """Adds a slice to what the weight holds.

        Args:
            is_shared: Whether another module reads the weight too.
        """
        weight = plain_matrix(linear, "writing an adapter into it")
        values = delta.weight.data.to(weight.device, non_blocking=weight.is_cuda)  # from a GPU, waiting is a must
        indices = delta.indices.to(weight.device, non_blocking=weight.is_cuda)
        if is_shared and self.is_own:
            self._shared = shared = cast(nn.Parameter, linear.weight)
            linear.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
            weight = weight_matrix(linear).data
        before = take_slice(weight, delta.dim, indices)
        after = add_delta(before, values)
        self._replaced.append((delta.dim, indices, before))  # before the weight changes: from here on it can be undone
        put_slice(weight, delta.dim, indices, after)

    def restore(self, linear: nn.Module) -> None:
        """The weight's own values again."""
        if self._shared is not None:
            present: Tensor = linear.weight  # type: ignore[assignment]
            self._shared.data = self._shared.data.to(present.device, present.dtype)
            linear.weight, self._shared = self._shared, None
            self._replaced.clear()
        while self._replaced:
            dim, indices, before = self._replaced[-1]
            weight = weight_matrix(linear).data
            put_slice(weight, dim, indices.to(weight.device), before.to(weight.device, weight.dtype))
            self._replaced.pop()

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """What `nn.Module.to` and its like do to the layer's tensors is done to the kept ones too."""
        self._replaced = [(dim, change(indices), change(before)) for dim, indices, before in self._replaced]
        if self._shared is not None:
            self._shared.data = change(self._shared.data)


def plain_matrix(linear: nn.Module, what: str) -> Tensor:  # [out_features, in_features]
    """The weight's data, where it is a plain tensor; raises `S2FTError` with the reason where it is not."""
    reason = why_not_plain(linear)
    if reason is not None:
        raise S2FTError(f"the base layer's weight {reason}; {what} is possible on plain weights only")
    return weight_matrix(linear).data


def add_delta(base: Tensor, delta: Tensor) -> Tensor:
    """base + delta in base's dtype, summed in float32 at least and rounded once."""
    exact = torch.promote_types(torch.promote_types(base.dtype, delta.dtype), torch.float32)
    return (base.to(exact) + delta.to(exact)).to(base.dtype)


def take_slice(weight: Tensor, dim: int, indices: Tensor) -> Tensor:  # weight: [out_features, in_features]
    """A copy of the weight's channels `indices`. Columns on a CPU go by `gather` of integers: up to twice as fast."""
    if not _lies_in_columns(weight, dim):
        return weight.index_select(dim, indices)
    bits = _INTEGERS[weight.itemsize]
    return weight.view(bits).gather(dim, _every_entry(weight, dim, indices)).view(weight.dtype)


def put_slice(weight: Tensor, dim: int, indices: Tensor, values: Tensor) -> None:
    """`weight.index_copy_(dim, indices, values)`; columns on a CPU go by `scatter_` of integers, up to twice as fast."""
    if _lies_in_columns(weight, dim):
        bits = _INTEGERS[weight.itemsize]
        weight.view(bits).scatter_(dim, _every_entry(weight, dim, indices), values.view(bits))
    else:
        weight.index_copy_(dim, indices, values)


def shared_weights(model: nn.Module) -> set[int]:
    """Addresses of the weights that several modules of the model read; `data_ptr()` tells whether one is among them."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and type(parameter.data) is Tensor and (address := parameter.data_ptr()):
                (shared if address in seen else seen).add(address)
    return shared


def _lies_in_columns(weight: Tensor, dim: int) -> bool:
    return weight.device.type == "cpu" and weight.stride(dim) == 1


def _every_entry(weight: Tensor, dim: int, indices: Tensor) -> Tensor:
    """The index of each entry of the slice, as `gather` and `scatter_` want it; no memory is taken."""
    if dim == 1:
        return indices.expand(weight.shape[0], -1)
    return indices[:, None].expand(-1, weight.shape[1])
