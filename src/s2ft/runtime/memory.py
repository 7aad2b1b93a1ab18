"""How much does autograd keep between forward and backward, and this process at all?

    saved bytes = Σ size of every distinct storage that a node of the graph saved, without the model's own tensors

Every tensor that is saved, by a function of torch or by one of ours, passes through a hook. A view counts with the whole
storage that it keeps alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakSet

import psutil  # comes with accelerate
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_RESET, _PEAK_OF_MEMORY = Path("/proc/self/clear_refs"), "5"  # proc(5)


def saved_bytes(forward: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """The bytes that the graph of `forward()` keeps for backward, storages of `own` left out.

    Example:
        >>> import torch
        >>> x, weight = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        >>> saved_bytes(lambda: (x * weight).exp().sum(), own=[weight])  # x, and the output of exp; 4 bytes each number
        24
    """
    left_out = {_address(part) for tensor in own for part in _parts(tensor)}
    kept: WeakSet[_Saved] = WeakSet()  # weak: what a part of the graph saved is dropped with that part

    def pack(tensor: Tensor) -> _Saved | Tensor:  # of any shape
        if tensor.layout is not torch.strided:  # a sparse one has no storage of its own; its indices are not counted
            return tensor
        saved = _Saved(tensor.detach())  # without its graph, or the graph would keep itself alive
        kept.add(saved)
        return saved

    with saved_tensors_hooks(pack, _unpack):
        output = forward()  # keeps the graph alive until the count
    sizes = {_address(part): part.untyped_storage().nbytes() for saved in kept for part in _parts(saved.tensor)}
    del output
    return sum(size for storage, size in sizes.items() if storage not in left_out)


def _unpack(saved: _Saved | Tensor) -> Tensor:  # as it was packed
    return saved.tensor if isinstance(saved, _Saved) else saved


class _Saved:
    """A tensor for as long as the graph holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def own_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers of `model`, but for sparse ones, which have no storage."""
    return [tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.layout is torch.strided]


def _parts(tensor: Any) -> Iterator[Tensor]:
    """The plain tensors that hold what `tensor` stands for: codes and scales, where a quantisation library wraps them."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _address(tensor: Tensor) -> int:
    """What tells storages apart: on device meta, where none has an address, the object, which lives as long as the storage."""
    storage = tensor.untyped_storage()
    return id(storage) if tensor.is_meta else int(storage.data_ptr())


def peak_of(run: Callable[[], object], device: torch.device) -> int | None:
    """What a call takes at its peak beside what is held before: on a GPU of torch's tensors, else of resident memory.

    None where the system keeps no peak that can be reset (it is Linux that does). In a process that was started with
    MALLOC_MMAP_THRESHOLD_=262144, large blocks go back to the system when they are freed; else holes between others count, too.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _RESET.write_text(_PEAK_OF_MEMORY)
    except OSError:
        return None
    _give_back()
    _RESET.write_text(_PEAK_OF_MEMORY)
    before = _peak()
    run()
    return _peak() - before


def _give_back() -> None:
    """Gives memory that is free, but still resident, back to Linux; a call that used it would seem to take none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _peak() -> int:
    """The most memory that was resident since the reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def held_bytes(device: torch.device) -> int:
    """What this process holds now: on a GPU torch's tensors there, else its resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
