"""Layers that tensor parallelism splits: each process has a range of a layer's input channels (o, down) or of its outputs.

    input side    x[..., idx]   each process has the channels of its range; all get the others'   backward: each takes its own
    output side   x Vᵀ          each process has all of it, and adds the channels of its range    backward: all get the others'

So the delta V is whole in every process, and so is its gradient, the same everywhere: optimizers, clipping, files and merging
need to know nothing of the split. What is sent is as wide as the slice, [*, s], once for each layer and pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, distributed, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from s2ft.common.errors import S2FTError
from s2ft.format.slices import Indices, Slice
from s2ft.layer.linears import features, is_quantised, weight_of
from s2ft.layer.stacked import linear_at


@dataclass(frozen=True)
class Share:
    """The channels of a layer's sliced side that this process has."""

    start: int
    stop: int
    group: ProcessGroup  # of the processes that have the others

    def within(self, channels: Indices) -> slice:  # [s], sorted
        """Which entries of a slice are of these channels: a range of them, or none."""
        first, last = np.searchsorted(channels, [self.start, self.stop])
        return slice(int(first), int(last))

    def gather(self, own: Tensor, channels: Indices) -> Tensor:  # [*, own channels] → [*, s]
        """The activations of all channels of a slice, in every process."""
        gathered: Tensor = _Gather.apply(own, self.within(channels), len(channels), self.group)
        return gathered

    def take(self, whole: Tensor, channels: Indices) -> Tensor:  # [*, s] → [*, own channels]
        """This process's part of what a slice adds to the output."""
        taken: Tensor = _Take.apply(whole, self.within(channels), self.group)
        return taken


class _Gather(Function):
    """Every process's columns, in every process; saves nothing."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, within: slice, size: int, group: ProcessGroup) -> Tensor:
        """Returns [*, size]."""
        ctx.within = within
        return _summed(own, within, size, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # grad: [*, size], alike in all processes
        """Returns the own columns."""
        return grad[..., ctx.within].contiguous(), None, None, None


class _Take(Function):
    """The own columns of what all processes have; saves nothing."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, within: slice, group: ProcessGroup) -> Tensor:
        """Returns [*, own columns]."""
        ctx.within, ctx.size, ctx.group = within, whole.shape[-1], group
        return whole[..., within].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # grad: [*, own columns]
        """Returns every process's columns."""
        return _summed(grad, ctx.within, ctx.size, ctx.group), None, None


def _summed(own: Tensor, within: slice, size: int, group: ProcessGroup) -> Tensor:  # [*, own columns] → [*, size]
    """Exact: each column is one process's value and the others' zeros."""
    columns = own.new_zeros(*own.shape[:-1], size)
    columns[..., within] = own
    distributed.all_reduce(columns, group=group)
    return columns


def share_of(
    linear: nn.Module,
    dim: int,  # of the weight matrix, along which the slice has its channels
    activations: Tensor,  # [*, channels]: the layer's input (dim 1) or output (dim 0)
) -> Share | None:
    """This process's share of the sliced side; None where the activations have all channels.

    A unit of FSDP2 has its weights whole while it runs, so none of its layers has a share.

    Raises:
        S2FTError: if the activations are DTensors.
    """
    weight = weight_of(linear)
    if not isinstance(weight, DTensor):
        return None
    if isinstance(activations, DTensor):
        raise S2FTError("the layer is given a DTensor; s2ft goes with plain tensors between layers (use_local_output)")
    size = features(linear)[1 - dim]
    axis = next((axis for axis, placement in enumerate(weight.placements) if placement == Shard(dim)), None)
    if axis is None or activations.shape[-1] == size:
        return None
    mesh = weight.device_mesh
    most = -(-size // mesh.size(axis))  # as `torch.chunk` splits
    start = min(mesh.get_local_rank(axis) * most, size)
    return Share(start, start + activations.shape[-1], mesh.get_group(axis))


def not_computed(model: nn.Module, slices: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The modules whose slices cannot be computed as tensor parallelism splits the model, each with the reason."""
    devices = getattr(model, "tp_size", None) or 1
    for path, text in slices.items() if devices > 1 else ():
        linear = linear_at(model, path)
        reason = None if linear is None else _why_not_computed(linear, Slice.parse(text))
        if reason is not None:
            yield path, f"the layer {reason}, in a model that tensor parallelism splits over {devices} devices"


def _why_not_computed(linear: nn.Module, trained: Slice) -> str | None:
    weight = weight_of(linear).data
    if is_quantised(linear):
        return "is quantised"
    if weight.ndim != 2:
        return "is a stack of experts"
    splits = [placement for placement in getattr(weight, "placements", ()) if not placement.is_replicate()]
    if all(split == Shard(trained.dim) for split in splits):
        return None
    if all(split == Shard(1 - trained.dim) for split in splits):
        return f"is split on the other side than the slice, which is of its {trained.side}put channels"
    return f"is split in another way ({', '.join(map(str, splits))})"


def agree(linear: nn.Module, values: Tensor) -> None:
    """Gives random values of the first process to all, where each has a part of the layer's weight."""
    if isinstance(weight_of(linear), DTensor):
        distributed.broadcast(values, 0)
