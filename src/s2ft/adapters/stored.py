"""Where the channels of a slice lie in the tensors of a checkpoint.

    a linear layer     one tensor, [out, in] or (GPT-2) [in, out]
    stacked experts    one tensor [experts, out, in], transposed or not; or a tensor for each expert and projection, as in
                       most checkpoints: experts.3.w2.weight, experts.3.up_proj.weight

Which tensors those are, transformers says by its own conversion: a tensor that has each channel's number in its place, of the
shape of the parameter but two wide across the channels (older versions drop dimensions of one), is converted to the form of the
checkpoint, and read there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s2ft.format.slices import Slice
from s2ft.layer.linears import features, is_conv1d
from s2ft.layer.stacked import StackedLinear, linear_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Place:
    """The part of a slice that lies in one tensor of a checkpoint."""

    tensor: str  # its name
    shape: list[int]
    across: int  # the dimension that each channel goes through as a whole
    at: tuple[Tensor, ...]  # [n] each: the channels' place along the other dimensions
    picked: Tensor  # [n], which of the slice's channels they are

    def read(self, tensor: Tensor) -> Tensor:  # of `shape` → [n, across]
        """The channels' values."""
        return tensor.movedim(self.across, -1)[self.at]

    def write(self, tensor: Tensor, rows: Tensor) -> None:  # of `shape`; [n, across]
        """Sets the channels' values."""
        tensor.movedim(self.across, -1)[self.at] = rows

    @property
    def positions(self) -> Tensor:  # [n, across], int64
        """Where each value lies in the flattened tensor."""
        strides = torch.empty(self.shape, device="meta").stride()
        others = [stride for dim, stride in enumerate(strides) if dim != self.across]
        starts = sum(at * stride for at, stride in zip(self.at, others, strict=True))
        return torch.as_tensor(starts)[:, None] + strides[self.across] * torch.arange(self.shape[self.across])


def channel_numbers(model: PreTrainedModel, module: str, side: str, converted: bool) -> dict[str, Tensor]:
    """Tensor of a checkpoint → the numbers of the channels that lie there; one wide across them.

    Args:
        converted: As transformers saves it; else as the model has it.
    """
    linear = linear_at(model, module)
    assert linear is not None
    inputs, outputs = features(linear)
    sliced = 1 if side == "in" else 0
    numbers = torch.arange(inputs if side == "in" else outputs, device="cpu")
    if is_conv1d(linear) or getattr(linear, "is_transposed", False):
        sliced = 1 - sliced
    if isinstance(linear, StackedLinear):
        name, numbers, across = module, numbers.view(linear.experts.count, -1), 2 - sliced
    else:
        name, across = f"{module}.weight", 1 - sliced
    if not converted:
        return {name: numbers.unsqueeze(across)}
    from transformers.core_model_loading import revert_weight_conversion  # here, since it takes seconds to import

    twice = torch.stack([numbers, numbers], across)
    return {there: _once(found) for there, found in revert_weight_conversion(model, {name: twice}).items()}


def _once(numbers: Tensor) -> Tensor:  # two wide along one dimension → one wide
    twice = (dim for dim in reversed(range(numbers.ndim)) if numbers.shape[dim] == 2)
    across = next(dim for dim in twice if numbers.select(dim, 0).equal(numbers.select(dim, 1)))
    return numbers.narrow(across, 0, 1)


def plain_numbers(name: str, shape: Sequence[int], side: str) -> dict[str, Tensor]:
    """As `channel_numbers`, of a linear layer whose weight is stored as [out, in] under its own name."""
    sliced = 1 if side == "in" else 0
    return {name: torch.arange(shape[sliced], device="cpu").unsqueeze(1 - sliced)}


def places(
    numbers: Mapping[str, Tensor],  # as of `channel_numbers`, by the checkpoint's names
    trained: Slice,
    across: int,  # how long each channel is
) -> list[Place]:
    """Where the channels of a slice lie, by tensors; tensors without any are left out."""
    found = []
    for name, inside in numbers.items():
        wide = next(dim for dim in reversed(range(inside.ndim)) if inside.shape[dim] == 1)
        held = torch.isin(inside.squeeze(wide), trained.channels)
        at = held.nonzero(as_tuple=True)
        if held.any():
            picked = torch.searchsorted(trained.channels, inside.squeeze(wide)[at])
            shape = [across if dim == wide else size for dim, size in enumerate(inside.shape)]
            found.append(Place(name, shape, wide, at, picked))
    return found
