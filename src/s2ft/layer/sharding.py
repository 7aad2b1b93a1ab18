"""Weights of which each process holds a part: DTensors (FSDP2, tensor parallelism), and what DeepSpeed ZeRO-3 partitions.

    read     `gathered(tensor)`    all of its values in every process, for one tensor at a time
    write    `written(linear)`     a `Part` of the weight matrix: this process's shard, or, with ZeRO-3, the whole
             `Part.of(slice)`      what of a slice falls into it

Gathering is collective: every process has to ask for the same tensors in the same order. Nothing here holds more than one
layer's weight whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.integrations import is_fsdp_enabled
from transformers.pytorch_utils import Conv1D

from s2ft.common.errors import S2FTError
from s2ft.layer.linears import as_matrix, weight_matrix, weight_of, why_not_plain

T = TypeVar("T")


def is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 holds the parameter, whose own storage is mostly empty."""
    return hasattr(tensor, "ds_id")


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor, or of the parameter."""
    return isinstance(tensor, DTensor) or isinstance(tensor.data, DTensor) or is_partitioned(tensor)


def can_gather(tensor: Tensor) -> bool:
    """Whether `gathered` can give the tensor's values."""
    return not is_partitioned(tensor) or find_spec("deepspeed") is not None


def gathered(tensor: Tensor) -> Tensor:
    """All values of a tensor, in every process; a tensor that is whole is returned as it is."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if is_partitioned(tensor):
        with _whole(tensor):
            return tensor.data.clone()
    return tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, sharing its storage; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """Whole values, sharded as `tensor` is; nothing is sent, since every process has them."""
    if not isinstance(tensor, DTensor) or isinstance(values, DTensor):
        return values
    values = values.to(tensor.device)
    return distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)


def read_matrix(linear: nn.Module, what: str) -> Tensor:  # [out_features, in_features]
    """All values of a linear layer's weight, in the orientation of `nn.Linear`; raises `S2FTError` if it is not plain."""
    if reason := why_not_readable(linear):
        raise S2FTError(f"the base layer's weight {reason}; {what} is possible on plain weights only")
    return as_matrix(linear, gathered(weight_of(linear)).detach())


def why_not_readable(linear: nn.Module) -> str | None:
    """What keeps a weight's values from being read, in parts at least; None where nothing does."""
    weight = weight_of(linear)
    return None if is_sharded(weight) and can_gather(weight) else why_not_plain(linear)


def is_loaded_once() -> bool:
    """Whether only the first process has read the weights (accelerate's `cpu_ram_efficient_loading`)."""
    return bool(is_fsdp_enabled())


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in every process; all must call this.

    Raises:
        S2FTError: in every process, if it is raised there.
    """
    made: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            made = [make(), None]
        except S2FTError as error:
            made = [None, str(error)]
    distributed.broadcast_object_list(made)
    if made[1] is not None:
        raise S2FTError(made[1])
    result: T = made[0]
    return result


def reshard(model: nn.Module) -> None:
    """Frees whole copies that FSDP2 keeps after a pass, so that weights are the shards, which are what is kept."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass(frozen=True)
class Part:
    """What this process holds of a weight matrix."""

    matrix: Tensor  # [out_features, in_features], or a range of its rows or columns
    dim: int | None = None  # of the range; None: the matrix is whole
    start: int = 0  # of the range

    def of(
        self,
        dim: int,
        channels: Tensor,  # [s], int64, along `dim` of the whole matrix
        values: Tensor,  # [out_features, s] for dim 1, [s, in_features] for dim 0
    ) -> tuple[Tensor, Tensor]:
        """The channels and values of a slice that fall into this part; channels count from its start."""
        if self.dim is None:
            return channels, values
        stop = self.start + self.matrix.shape[self.dim]
        if dim != self.dim:
            return channels, values.narrow(self.dim, self.start, stop - self.start)
        here = ((channels >= self.start) & (channels < stop)).nonzero().squeeze(1)
        return channels[here] - self.start, values.index_select(dim, here)


def why_not_writable(linear: nn.Module) -> str | None:
    """What keeps a weight from being written to, in this process's part of it at least; None where nothing does."""
    weight = weight_of(linear).data
    if isinstance(weight, DTensor) and sum(isinstance(placement, Shard) for placement in weight.placements) > 1:
        return "is sharded along several dimensions of a mesh"
    if isinstance(weight, DTensor) and weight.ndim != 2:
        return "is a stack of experts, sharded over devices"
    return why_not_readable(linear)


def everywhere(linear: nn.Module, holds: bool) -> bool:
    """Whether it holds in every process, where each has a part of the weight; all must call this."""
    weight = weight_of(linear)
    if not is_sharded(weight):
        return holds
    said = torch.tensor(int(holds), device=weight.device)
    distributed.all_reduce(said, distributed.ReduceOp.MIN)
    return bool(said)


def written(linear: nn.Module, what: str = "writing an adapter into it") -> AbstractContextManager[Part]:
    """The part of the weight that may be written to; with ZeRO-3 all processes must write the same to the whole.

    Raises:
        S2FTError: if the weight cannot be written to.
    """
    if why_not_plain(linear) is None:  # at once, since asking further takes as long as writing a small slice
        return nullcontext(Part(weight_matrix(linear).data))
    return _written_part(linear, what)


@contextmanager
def _written_part(linear: nn.Module, what: str) -> Iterator[Part]:
    reason = why_not_writable(linear)
    if reason is not None:
        raise S2FTError(f"the base layer's weight {reason}; {what} is possible on plain weights only")
    weight = weight_of(linear)
    if is_partitioned(weight):
        with _whole(weight, changed=True):
            yield Part(weight_matrix(linear).data)
    elif isinstance(weight.data, DTensor):
        yield _shard(linear, weight.data)


def _shard(linear: nn.Module, weight: DTensor) -> Part:
    matrix = as_matrix(linear, weight.to_local())
    sides = [placement.dim for placement in weight.placements if isinstance(placement, Shard)]
    if not sides:
        return Part(matrix)
    (side,) = sides
    along = [Shard(0) if isinstance(placement, Shard) else placement for placement in weight.placements]
    places = distribute_tensor(
        torch.arange(weight.shape[side], device=weight.device), weight.device_mesh, along, src_data_rank=None
    ).to_local()
    return Part(matrix, 1 - side if isinstance(linear, Conv1D) else side, int(places[0]) if len(places) else 0)


@contextmanager
def _whole(parameter: Tensor, changed: bool = False) -> Iterator[None]:
    """The parameter of ZeRO-3 with all its values; what is written to it is kept, if `changed`."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if changed else None):
        yield
