"""One batch, forward and backward, before a run: how long it takes and what it keeps in memory.

    first       Trial.kept            bytes between forward and backward; on a GPU, at the peak
    then        Trial.milliseconds    the median of a few

Weights, gradients and random numbers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s2ft.runtime.memory import held_bytes, own_tensors, saved_bytes
from s2ft.runtime.timing import milliseconds

Batch = Mapping[str, Tensor]  # on the model's device
_TOKENS = ("input_ids", "chosen_input_ids", "rejected_input_ids")
Loss = Callable[[nn.Module, Batch], Tensor]


class Trial(NamedTuple):
    """What a batch took."""

    milliseconds: float
    tokens: int  # padding included
    kept: int  # bytes, gradients left out
    held: int  # bytes, before


def try_in_turns(
    loss: Loss,
    model: nn.Module,
    batch: Batch,
    contexts: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    rounds: int,
) -> dict[str, Trial]:
    """A trial in each context; in turns, so that whatever slows the machine slows all of them."""
    device = next(model.parameters()).device
    held, kept = held_bytes(device), dict[str, int]()
    times: dict[str, list[float]] = {name: [] for name in contexts}
    for name, context in contexts.items():
        with context():
            kept[name] = _kept(loss, model, batch, device)
    for _ in range(rounds):
        for name, context in contexts.items():
            with context():
                times[name].append(milliseconds(lambda: _forward_and_backward(loss, model, batch), device))
    tokens = sum(batch[name].numel() for name in _TOKENS if name in batch)
    return {name: Trial(median(times[name]), tokens, kept[name], held) for name in contexts}


def _kept(loss: Loss, model: nn.Module, batch: Batch, device: torch.device) -> int:
    if device.type != "cuda":
        with _untouched(model):
            return saved_bytes(lambda: loss(model, batch), own_tensors(model))
    _forward_and_backward(loss, model, batch)  # the first time, kernels allocate what stays
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _forward_and_backward(loss, model, batch)
    return max(0, torch.cuda.max_memory_allocated(device) - before - trained_bytes(model))


def trained_bytes(model: nn.Module) -> int:
    """Bytes of what is trained, and so of its gradients."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def _forward_and_backward(loss: Loss, model: nn.Module, batch: Batch) -> None:
    with _untouched(model):
        loss(model, batch).backward()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    with torch.random.fork_rng():  # dropout must not move the run's random numbers
        try:
            model.train()
            yield
        finally:
            model.train(was_training)
            model.zero_grad(set_to_none=True)
