"""PEFT's LoRA (exports/lora.py), as SGLang reads it.

It ignores `rank_pattern`: every module is filled up with zeros to one rank. It reads k and v beside q and up beside gate, and
drops them where q or gate is not there: zero factors take the missing places. It looks for modules by their last names.
"""

from __future__ import annotations

from pathlib import Path

import torch

from s2ft.adapters.checkpoint import Checkpoint
from s2ft.adapters.file import AdapterFile
from s2ft.common.outputs import Progress
from s2ft.exports.lora import LowRank, low_ranks, most_channels, problems_of_engine, save_lora
from s2ft.layer.linears import features, linear_layer

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what SGLang holds in one layer


def problems(adapter: AdapterFile) -> list[str]:
    """What SGLang cannot take."""
    return problems_of_engine(adapter, "sglang")


def write(adapter: AdapterFile, base: Checkpoint, output: Path, progress: Progress) -> None:
    """Writes a LoRA for SGLang into the folder `output`."""
    low = _with_partners(low_ranks(adapter, base, progress), base)
    wide = {module: pair.widened(most_channels(adapter)) for module, pair in low.items()}
    save_lora(adapter, base, wide, sorted({module.rpartition(".")[2] for module in wide}), output)


def _with_partners(low: dict[str, LowRank], base: Checkpoint) -> dict[str, LowRank]:
    """Zero factors for the projections that SGLang holds in one layer with those that are there."""
    modules = dict(base.model.named_modules())
    filled = dict(low)
    for module in low:
        parent, _, name = module.rpartition(".")
        group = next((group for group in _TOGETHER if name in group), ())
        for partner in (f"{parent}.{other}" for other in group):
            linear = linear_layer(modules[partner]) if partner in modules else None
            if partner not in filled and linear is not None:
                inputs, outputs = features(linear)
                dtype = low[module].a.dtype
                filled[partner] = LowRank(torch.zeros(1, inputs, dtype=dtype), torch.zeros(outputs, 1, dtype=dtype))
    return filled
