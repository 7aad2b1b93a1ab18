"""GaLore: full tuning with Adam's moments kept in a low-rank projection of the gradient (arXiv 2403.03507).

    G ≈ P Pᵀ G;   Adam runs on Pᵀ G;   W -= lr · scale · P · Adam(Pᵀ G);   P from an SVD of G, renewed every 200 steps

The optimizer is galore-torch's, set up by transformers. What is here: the layers that it is for, its import, and what a
checkpoint needs, since its state holds the projections as objects.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from s2ft.common.errors import S2FTError
from s2ft.layer.linears import layer_stack

OPTIM = "galore_adamw"


def import_galore() -> type:
    """Makes transformers able to import galore-torch; returns the class of its projections.

    Raises:
        S2FTError: if the package is not installed.
    """
    if find_spec("galore_torch") is None:
        raise S2FTError(
            "method='galore' needs the package galore-torch; install it with: pip install 's2ft[baselines]'"
        )
    with _eight_bit_left_out():
        from galore_torch.galore_projector import GaLoreProjector
    projector: type = GaLoreProjector
    return projector


@contextmanager
def _eight_bit_left_out() -> Iterator[None]:
    """galore-torch imports bitsandbytes (CUDA) for an 8-bit optimizer, which is not used here: it may be missing."""
    if find_spec("bitsandbytes") is not None:
        yield
        return
    names = ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer")
    empty = {name: ModuleType(name) for name in names}
    empty[names[-1]].Optimizer2State = object  # type: ignore[attr-defined]
    sys.modules.update(empty)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def galore_arguments(model: nn.Module, rank: int) -> dict[str, Any]:
    """What `TrainingArguments` need: the optimizer, its rank, and the linear layers inside the blocks."""
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and layer_stack(name)]
    if not targets:
        raise S2FTError(
            f"method='galore' projects the gradients of linear layers; {type(model).__name__} has none in blocks"
        )
    return {"optim": OPTIM, "optim_target_modules": targets, "optim_args": f"rank={rank}"}


def readable_projections() -> AbstractContextManager[Any]:
    """While it is open, a checkpoint may hold projections besides tensors and plain values."""
    return torch.serialization.safe_globals([import_galore()])


class PlaceProjections(TrainerCallback):
    """Puts the projections of a checkpoint, which were read onto the CPU, beside their parameters."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Moves them, once the checkpoint has been read."""
        assert optimizer is not None
        for parameter, values in optimizer.state.items():
            projector = values.get("projector")
            if projector is not None and projector.ortho_matrix is not None:
                projector.ortho_matrix = projector.ortho_matrix.to(parameter.device)
