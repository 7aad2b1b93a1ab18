"""What stands in the weight of a base layer: its own values, or slices of adapters on top of them.

    own ──hold──▶ own + V₁ ──hold──▶ own + V₁ + V₂      merged, switched: each adapter on top of those before it
    own ──set aside, write──▶ own + V ──write──▶ own + V′     in place: one slice, written anew whenever V has changed
     ◀────────────────── restore ──────────────────      the last first, by copy: bit for bit

Every slice in the weight has a `Stash` of the values that it replaced; no sum is ever undone by a subtraction. A weight that
another module reads too (a tied embedding) is left to that module: the layer gets a copy of its own for as long as something
stands in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(eq=False)
class Stash:
    """Channels of a weight matrix that an adapter's slice stands in, and the weight's own values there."""

    dim: int  # of the weight matrix [out_features, in_features], that channels lie along
    channels: Tensor  # [s], int64
    own: Tensor  # [out_features, s] for dim 1, [s, in_features] for dim 0
    start: int | None = None  # the first channel, where all lie side by side
    order: Tensor | None = None  # [s], int64, where they do so in another order: which one is at start, start + 1, ...

    def find_start(self) -> None:
        """Looks whether the channels lie side by side: writing and picking is faster then. Waits for a GPU."""
        first, last = int(self.channels.min()), int(self.channels.max())
        if last - first + 1 == len(self.channels):
            self.start = first
            self.order = None if bool((self.channels.diff() > 0).all()) else self.channels.argsort()

    @torch.no_grad()
    def write(self, weight: Tensor, delta: Tensor | None = None) -> None:
        """weight[channels] ← own + delta, or the own values alone.

        Args:
            weight: [out_features, in_features]. Autograd notices the write to a parameter, not that to its `data`.
            delta: Shaped like `own`, in any dtype and on any device.
        """
        if self.own.device != weight.device:
            self.apply(lambda kept: kept.to(weight.device))
        values = self.own if delta is None else add_delta(self.own, delta.detach().to(weight.device))
        if self.start is None:
            put_slice(weight, self.dim, self.channels, values.to(weight.dtype))
            return
        part = weight.narrow(self.dim, self.start, len(self.channels))
        part.copy_(values if self.order is None else values.index_select(self.dim, self.order))

    def pick(self, activations: Tensor, copy: bool = False) -> Tensor:  # [*, in_features] or [*, out_features] → [*, s]
        """activations[..., channels], a view where that is possible.

        Args:
            activations: What goes into the layer (dim 1), or comes out of it (dim 0).
            copy: Give a copy in any case, which does not keep the whole alive.
        """
        if self.start is None or self.order is not None:
            return activations.index_select(-1, self.channels)
        part = activations.narrow(-1, self.start, len(self.channels))
        return part.clone(memory_format=torch.contiguous_format) if copy else part

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Does to the tensors what `nn.Module.to` and its like do to the layer's."""
        self.channels, self.own = change(self.channels), change(self.own)
        self.order = None if self.order is None else change(self.order)


class BaseWeight:
    """Puts slices into a linear layer's weight, and takes all of them out again."""

    def __init__(self) -> None:
        self.adapters: tuple[str, ...] = ()  # that `hold` put there, in order; also those without a slice of this layer
        self.is_shared = False  # whether another module reads the weight too
        self._stashes: list[Stash] = []  # the last put last
        self._shared: nn.Parameter | None = (
            None  # the parameter that the other module reads, while the layer has a copy
        )

    @property
    def is_own(self) -> bool:
        """Whether the weight holds its own values."""
        return not self._stashes and self._shared is None

    def hold(self, linear: nn.Module, adapters: Mapping[str, Delta | None]) -> None:
        """Makes the weight hold the slices of these adapters, in this order, and no others.

        Args:
            linear: The layer that the weight is of.
            adapters: Name → slice; None where the adapter has none of this layer.

        Raises:
            S2FTError: if the weight cannot be written to. Whatever is raised, the weight has its own values again.
        """
        names = tuple(adapters)
        try:
            if names[: len(self.adapters)] != self.adapters:
                self.restore(linear)
            for name in names[len(self.adapters) :]:
                delta = adapters[name]
                if delta is not None:
                    self.put(linear, delta)
                self.adapters = (*self.adapters, name)
        except BaseException:
            self.restore(linear)
            raise

    def put(self, linear: nn.Module, delta: Delta) -> None:
        """Adds a slice to what the weight holds."""
        weight = plain_matrix(linear, "writing an adapter into it")
        values = delta.weight.data.to(weight.device, non_blocking=weight.is_cuda)  # from a GPU, waiting is a must
        channels = delta.indices.to(weight.device, non_blocking=weight.is_cuda)
        if self.is_shared and self.is_own:
            self._shared = shared = cast(nn.Parameter, linear.weight)
            linear.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
            weight = weight_matrix(linear).data
        self.set_aside(weight, delta.dim, channels).write(weight, values)

    def set_aside(self, weight: Tensor, dim: int, channels: Tensor) -> Stash:  # weight: [out_features, in_features]
        """The own values of these channels, which `restore` puts back: from here on others may be written there."""
        stash = Stash(dim, channels, take_slice(weight, dim, channels))
        self._stashes.append(stash)
        return stash

    def restore(self, linear: nn.Module) -> None:
        """The weight's own values again."""
        self.adapters = ()
        if self._shared is not None:
            present: Tensor = linear.weight  # type: ignore[assignment]
            self._shared.data = self._shared.data.to(present.device, present.dtype)
            linear.weight, self._shared = self._shared, None
            self._stashes.clear()
        while self._stashes:
            self._stashes[-1].write(weight_matrix(linear).data)
            self._stashes.pop()

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Does to the kept tensors what `nn.Module.to` and its like do to the layer's."""
        for stash in self._stashes:
            stash.apply(change)
        if self._shared is not None:
            self._shared.data = change(self._shared.data)


def plain_matrix(linear: nn.Module, what: str) -> Tensor:  # [out_features, in_features]
    """The weight's data, where it is a plain tensor; raises `S2FTError` with the reason where it is not."""
    reason = why_not_plain(linear)
    if reason is not None:
        raise S2FTError(f"the base layer's weight {reason}; {what} is possible on plain weights only")
    return weight_matrix(linear).data


def add_delta(base: Tensor, delta: Tensor) -> Tensor:
    """The sum in base's dtype, computed in float32 at least and rounded once.

    Example:
        >>> add_delta(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0**-8 + 2.0**-20])).item()  # 1 + 2**-7
        1.0078125
    """
    return (base + delta).to(base.dtype)  # two halves, too, are summed in float32 inside of torch


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
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if type(parameter.data) is Tensor and (address := parameter.data_ptr()):
                (shared if address in seen else seen).add(address)
    return shared


def _lies_in_columns(weight: Tensor, dim: int) -> bool:
    return weight.device.type == "cpu" and weight.stride(dim) == 1


def _every_entry(weight: Tensor, dim: int, indices: Tensor) -> Tensor:
    """The index of each entry of the slice, as `gather` and `scatter_` want it; no memory is taken."""
    if dim == 1:
        return indices.expand(weight.shape[0], -1)
    return indices[:, None].expand(-1, weight.shape[1])
