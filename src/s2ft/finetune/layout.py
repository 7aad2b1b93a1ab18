"""Which layout a run trains in: the faster one on this machine, for this model and batch; and why.

    in place    the slice lives in the base weight (`training/in_place.py`); activations save the least
    indexed     the slice is computed around the layer

Both are tried on a batch of the run. In place takes less memory, so it is taken unless it is slower.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from s2ft.common.errors import S2FTError
from s2ft.finetune.trial import Batch, Loss, Trial, try_in_turns
from s2ft.layer.dequantise import quantised_layers
from s2ft.layer.linear import S2FTLinear
from s2ft.training.in_place import in_place

ROUNDS = 3  # of both; one round tells how long the only one takes
TIE = 1.02  # in place may take this much longer, since it saves memory
AUTO, IN_PLACE, INDEXED = "auto", "in-place", "indexed"


class Chosen(NamedTuple):
    """A layout, why, and what a batch takes in it."""

    layout: str
    reason: str
    trial: Trial | None  # None: not tried


def choose_layout(loss: Loss, model: nn.Module, batch: Batch, wanted: str) -> Chosen:
    """For `auto`, `in-place` or `indexed`. Trying changes neither weights, nor gradients, nor random numbers.

    Args:
        loss: Of a batch, as training computes it.
        model: Outside of `in_place`.
        batch: One of the run's.
        wanted: What the options say.
    """
    obstacle = _obstacle(model) if wanted == AUTO else None
    if wanted != AUTO or obstacle:
        name, reason = (INDEXED, f"indexed: {obstacle}") if obstacle else (wanted, f"{wanted}, as asked")
        return Chosen(name, reason, _try(loss, model, batch, [name], rounds=1)[name])
    trials = _try(loss, model, batch, [IN_PLACE, INDEXED], ROUNDS)
    ours, other = (trials[name].milliseconds for name in (IN_PLACE, INDEXED))
    tried = f"{ours:.1f} ms forward and backward in place, {other:.1f} ms indexed"
    if ours <= TIE * other:
        return Chosen(IN_PLACE, f"in place: {tried}", trials[IN_PLACE])
    return Chosen(INDEXED, f"indexed: {tried}", trials[INDEXED])


def untried(model: nn.Module, wanted: str) -> Chosen:
    """For runs of which no batch can be tried: in place where that is possible, unless something else is wanted."""
    if wanted != AUTO:
        return Chosen(wanted, f"{wanted}, as asked", None)
    obstacle = _obstacle(model)
    return Chosen(INDEXED, f"indexed: {obstacle}", None) if obstacle else Chosen(IN_PLACE, "in place, untried", None)


def layout(model: nn.Module, name: str) -> Any:
    """The context to train in."""
    return in_place(model) if name == IN_PLACE else nullcontext()


def brief_layout(model: nn.Module, wanted: str) -> Any:
    """The context for a run that is too short to try layouts for: in place where that is possible."""
    return layout(model, untried(model, wanted).layout)


def _try(loss: Loss, model: nn.Module, batch: Batch, names: list[str], rounds: int) -> dict[str, Trial]:
    return try_in_turns(loss, model, batch, {name: partial(layout, model, name) for name in names}, rounds)


def _obstacle(model: nn.Module) -> str | None:
    """Why in place is impossible or would change nothing; None if it is worth timing."""
    layers = [module for module in model.modules() if isinstance(module, S2FTLinear)]
    if any(type(layer.weight.data).__name__ == "DTensor" for layer in layers):
        return "the weights are sharded"
    try:
        with in_place(model) as entered:
            changes = bool(quantised_layers(model)) or any(place.how != "added" for place in entered.placements)
            reasons = sorted({place.reason for place in entered.placements})
    except S2FTError as error:
        return str(error)
    return None if changes else "; ".join(reasons)
