"""What the weight of a base layer holds: its own values, or these plus slices of adapters.

    own ──hold──▶ own + V₁ ──hold──▶ own + V₁ + V₂            merged, switched: adapters are added one after the other
    own ──set aside, write──▶ own + V ──write──▶ own + V′     in place: one slice, written again whenever V has changed
     ◀────────────────────── restore ──────────────────────   by copy, the last first: bit for bit

Each slice in the weight has a `Stash` of the values that it replaced; a sum is never undone by a subtraction. If another
module uses the weight too (a tied embedding), it keeps the original: the layer gets a copy while it holds adapters.

A quantised weight is never written to, since rounding it anew would change other channels too: what it should hold is
noted, and the layer computes it beside (`is_beside`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from s2ft.format.slices import put, take
from s2ft.layer.block import S2FTBlock
from s2ft.layer.columns import add_delta, lies_in_columns, put_slice, take_columns, take_slice
from s2ft.layer.linears import is_quantised, weight_matrix, weight_of
from s2ft.layer.sharding import Part, gathered, written

_PART = 1 << 19  # bytes: sums larger than that malloc gets from the system anew each time, page by page
_ENTRIES = 1 << 16  # for each thread, in columns that are read and written at once: their cache lines are 4 MB


@dataclass(eq=False)
class Stash:
    """The channels of a weight matrix where an adapter's slice is written, and the weight's own values there."""

    dim: int  # the dimension of the weight matrix [out_features, in_features] that `channels` index
    channels: Tensor  # [s], int64
    own: Tensor  # [out_features, s] for dim 1, [s, in_features] for dim 0
    start: int | None = None  # the lowest channel, if they are contiguous
    order: Tensor | None = None  # [s], int64, if they are contiguous but not sorted: what sorts them
    rows: int | None = None  # of `own` that hold values, while it is filled from the first on; None: all

    def find_start(self) -> None:
        """Finds out whether the channels are contiguous, which makes `write` and `pick` faster. Waits for the device."""
        first, last = int(self.channels.min()), int(self.channels.max())
        if last - first + 1 == len(self.channels):
            self.start = first
            self.order = None if bool((self.channels.diff() > 0).all()) else self.channels.argsort()

    @torch.no_grad()
    def write(self, weight: Tensor, delta: Tensor | None = None) -> None:
        """Sets weight[channels] to own + delta, or to the own values.

        Args:
            weight: [out_features, in_features]. Autograd notices a write to a parameter, but not to its `data`.
            delta: Shaped like `own`, of any dtype and on any device.
        """
        if self.own.device != weight.device:
            self.apply(lambda kept: kept.to(weight.device))
        delta = None if delta is None else delta.detach().to(weight.device)
        if self.start is None:
            self._put(weight, delta)
            return
        part = weight.narrow(self.dim, self.start, len(self.channels))
        is_plain = self.order is None and weight.dtype == self.own.dtype and not torch.compiler.is_compiling()
        if delta is not None and is_plain:
            torch.add(self.own, delta, out=part)  # as `add_delta`, in one operation
            return
        values = self.own if delta is None else add_delta(self.own, delta)
        part.copy_(values if self.order is None else values.index_select(self.dim, self.order))

    def _put(self, weight: Tensor, delta: Tensor | None) -> None:
        """Writes channels that are not contiguous."""
        own, channels = self.own, self.channels
        if self.rows is not None:
            weight, own = weight[: self.rows], own[: self.rows]
        if delta is None:
            put_slice(weight, self.dim, channels, own.to(weight.dtype))
        elif own.nbytes <= _PART or weight.ndim != 2 or weight.device.type != "cpu":
            put_slice(weight, self.dim, channels, add_delta(own, delta).to(weight.dtype))
        else:
            rows = max(1, _PART // (own.itemsize * own.shape[1]))
            for start in range(0, len(own), rows):
                part = slice(start, start + rows)
                values = add_delta(own[part], delta[part]).to(weight.dtype)
                into, at = (weight[part], channels) if self.dim == 1 else (weight, channels[part])
                put_slice(into, self.dim, at, values)

    @torch.no_grad()
    def read(self, weight: Tensor) -> Tensor:  # [out_features, in_features] → shaped like `own`
        """A copy of what the channels hold now."""
        return take(weight, self.dim, self.channels)

    @torch.no_grad()
    def put_back(self, weight: Tensor, held: Tensor) -> None:  # [out_features, in_features], from `read`
        """Sets the channels to what they held."""
        put(weight, self.dim, self.channels, held)

    def pick(self, activations: Tensor, copy: bool = False) -> Tensor:  # [*, in_features] or [*, out_features] → [*, s]
        """Returns activations[..., channels], as a view if the channels are contiguous and sorted.

        Args:
            activations: The layer's input (dim 1), or output (dim 0).
            copy: Return a copy in any case, so that the whole need not stay in memory.
        """
        if self.start is None or self.order is not None:
            return activations.index_select(-1, self.channels)
        part = activations.narrow(-1, self.start, len(self.channels))
        return part.clone(memory_format=torch.contiguous_format) if copy else part

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes the tensors as `nn.Module.to` and the like change the layer's."""
        self.channels, self.own = change(self.channels), change(self.own)
        self.order = None if self.order is None else change(self.order)


class BaseWeight:
    """Adds slices to a linear layer's weight, and restores it."""

    def __init__(self) -> None:
        self.adapters: tuple[str, ...] = ()  # added by `hold`, in order; also those without a slice of this layer
        self.is_shared = False  # another module uses the weight too
        self.is_beside = False  # the weight is quantised, and the layer adds the slices of `adapters` to its output
        self._stashes: list[Stash] = []  # in the order of writing
        self._shared: nn.Parameter | None = None  # the original, while the layer has a copy of a shared weight

    @property
    def is_own(self) -> bool:
        """Whether the weight holds its own values."""
        return not self._stashes and self._shared is None

    def hold(self, linear: nn.Module, adapters: Mapping[str, S2FTBlock | None]) -> None:
        """Makes the weight hold the slices of exactly these adapters, added in this order.

        Args:
            linear: The base layer.
            adapters: Name → slice, or None if the adapter has no slice of this layer.

        Raises:
            S2FTError: if the weight cannot be written to. Whatever is raised, the weight has its own values again.
        """
        names = tuple(adapters)
        try:
            if names[: len(self.adapters)] != self.adapters:
                self.restore(linear)
            self.is_beside = bool(names) and is_quantised(linear)
            for name in names[len(self.adapters) :]:
                block = adapters[name]
                if block is not None and not self.is_beside:
                    self.put(linear, block)
                self.adapters = (*self.adapters, name)
        except BaseException:
            self.restore(linear)
            raise

    def put(self, linear: nn.Module, block: S2FTBlock) -> None:
        """Adds a slice to what the weight holds; where the weight is sharded, to this process's part of it."""
        values = gathered(block.weight).detach()
        with written(linear) as part:
            device = part.matrix.device
            values = values.to(device, non_blocking=device.type == "cuda")  # to the CPU, a copy must be waited for
            channels = block.indices.to(device, non_blocking=device.type == "cuda")
            if self.is_shared and self.is_own:
                self._shared = shared = cast(nn.Parameter, linear.weight)
                linear.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
                part = Part(weight_matrix(linear).data)
            channels, values = part.of(block.dim, channels, values)
            if block.dim == 1 and lies_in_columns(part.matrix, 1):
                self._add_columns(part.matrix, channels, values)
            else:
                self.set_aside(part.matrix, block.dim, channels).write(part.matrix, values)

    def _add_columns(self, weight: Tensor, channels: Tensor, delta: Tensor) -> None:
        """Sets columns aside and adds to them, some rows at a time, so that writing finds in the caches what was read."""
        rows, size = weight.shape[0], channels.shape[0]
        own = weight.new_empty(rows, size)
        stash = Stash(1, channels, own, rows=0)
        self._stashes.append(stash)
        step = max(1, torch.get_num_threads() * _ENTRIES // max(1, size))
        done = 0
        for part, kept, added in _in_parts(step, weight, own, delta):
            take_columns(part, channels, kept)
            stash.rows = done = done + part.shape[0]  # from here on, `restore` puts these rows back
            put_slice(part, 1, channels, add_delta(kept, added))
        stash.rows = None

    def set_aside(self, weight: Tensor, dim: int, channels: Tensor) -> Stash:  # weight: [out_features, in_features]
        """Stashes the values of these channels, so that others may be written there until `restore` puts them back."""
        stash = Stash(dim, channels, take_slice(weight, dim, channels))
        self._stashes.append(stash)
        return stash

    def restore(self, linear: nn.Module) -> None:
        """Gives the weight its own values back."""
        self.adapters, self.is_beside = (), False
        if self._shared is not None:
            present = weight_of(linear)
            self._shared.data = self._shared.data.to(present.device, present.dtype)
            linear.weight, self._shared = self._shared, None
            self._stashes.clear()
        while self._stashes:
            with written(linear) as part:
                self._stashes[-1].write(part.matrix)
            self._stashes.pop()

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes the stashed tensors as `nn.Module.to` and the like change the layer's."""
        for stash in self._stashes:
            stash.apply(change)
        if self._shared is not None:
            self._shared.data = change(self._shared.data)


def shared_weights(model: nn.Module) -> set[int]:
    """The addresses (`data_ptr()`) of the parameters that several modules of the model share."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if type(parameter.data) is Tensor and (address := parameter.data_ptr()):
                (shared if address in seen else seen).add(address)
    return shared


def _in_parts(step: int, *matrices: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """So many rows of each at a time; as they are where one part is enough, since a view takes as long as a small slice."""
    if matrices[0].shape[0] <= step:
        return [matrices]
    return zip(*(matrix.split(step) for matrix in matrices), strict=True)
