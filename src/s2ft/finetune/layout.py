"""Which layout a run trains in: the faster one on this machine, for this model and batch; and why.

    in place    the slice lives in the base weight (`training/in_place.py`); activations save the least
    indexed     the slice is computed around the layer

Both are timed on a batch of the run, forward and backward, in turns. In place takes less memory, so it is taken unless it is
slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.common.errors import S2FTError
from s2ft.layer.linear import S2FTLinear
from s2ft.runtime.timing import milliseconds
from s2ft.training.in_place import in_place

ROUNDS = 3  # after one to warm up
TIE = 1.02  # in place may take this much longer, since it saves memory
AUTO, IN_PLACE, INDEXED = "auto", "in-place", "indexed"

Batch = Mapping[str, Tensor]


def choose_layout(model: nn.Module, batch: Batch, wanted: str) -> tuple[str, str]:
    """`(layout, reason)` for `auto`, `in-place` or `indexed`.

    Timing changes neither weights, nor gradients, nor the state of the random number generators.
    """
    if wanted != AUTO:
        return wanted, f"{wanted}, as asked"
    if obstacle := _obstacle(model):
        return INDEXED, f"indexed: {obstacle}"
    times: dict[str, list[float]] = {IN_PLACE: [], INDEXED: []}
    device = next(model.parameters()).device
    for _ in range(1 + ROUNDS):
        for name, taken in times.items():
            with in_place(model) if name == IN_PLACE else nullcontext():
                taken.append(milliseconds(lambda: _forward_and_backward(model, batch), device))
    ours, other = (median(times[name][1:]) for name in (IN_PLACE, INDEXED))
    tried = f"{ours:.1f} ms forward and backward in place, {other:.1f} ms indexed"
    return (IN_PLACE, f"in place: {tried}") if ours <= TIE * other else (INDEXED, f"indexed: {tried}")


def layout(model: nn.Module, name: str) -> Any:
    """The context to train in."""
    return in_place(model) if name == IN_PLACE else nullcontext()


def _obstacle(model: nn.Module) -> str | None:
    """Why in place is impossible or would change nothing; None if it is worth timing."""
    layers = [module for module in model.modules() if isinstance(module, S2FTLinear)]
    if any(type(layer.weight.data) is not Tensor for layer in layers):
        return "the weights are sharded"
    try:
        with in_place(model) as entered:
            held = [place for place in entered.placements if place.how != "added"]
            reasons = sorted({place.reason for place in entered.placements})
    except S2FTError as error:
        return str(error)
    return None if held else "; ".join(reasons)


def _forward_and_backward(model: nn.Module, batch: Batch) -> None:
    was_training = model.training
    with torch.random.fork_rng():  # dropout must not move the run's random numbers
        try:
            model.train()(**batch).loss.backward()
        finally:
            model.train(was_training)
            model.zero_grad(set_to_none=True)
