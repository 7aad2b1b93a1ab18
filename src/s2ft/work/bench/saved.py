"""How much does autograd keep between forward and backward?

    saved bytes = Σ size of every distinct storage that a node of the graph saved, without the model's own tensors

Every tensor that is saved, by a function of torch or by one of ours, passes through a hook. A view counts with the whole
storage that it keeps alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def saved_bytes(forward: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """The bytes that the graph of `forward()` keeps for backward, storages of `own` left out.

    Example:
        >>> import torch
        >>> x, weight = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        >>> saved_bytes(lambda: (x * weight).exp().sum(), own=[weight])  # x, and the output of exp; 4 bytes each number
        24
    """
    left_out = {_storage(tensor) for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in left_out:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # without its graph, which would hold itself

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # alive until the count: a freed storage's place could be taken by another
    total = sum(kept.values())
    del output
    return total


def own_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers of `model`."""
    return list(chain(model.parameters(), model.buffers()))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
