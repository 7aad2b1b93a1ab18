"""An adapter as a sparse patch of the base checkpoint: which entries change, and what they become.

    {tensor}.indices   [n], flat positions in the checkpoint's tensor, ascending; int32, or int64 where that is too small
    {tensor}.values    [n], the new values, in the tensor's dtype

Values are absolute, so applying a patch twice is applying it once, and the result is the merged model bit for bit:

    state[tensor].view(-1)[indices.long()] = values

vLLM takes such patches for weight updates in place (checkpoint names, flat int32 indices); there is then no adapter at all,
and no cost per token.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from s2ft.adapters.checkpoint import Checkpoint
from s2ft.adapters.file import AdapterFile
from s2ft.adapters.merge import merged_rows
from s2ft.common.outputs import Progress


def problems(adapter: AdapterFile) -> list[str]:
    """What the adapter holds beside slices."""
    return [f"{name}: a patch holds slices alone; use `s2ft merge`" for name in adapter.kept]


def write(adapter: AdapterFile, base: Checkpoint, output: Path, progress: Progress) -> None:
    """Writes the patch into one safetensors file."""
    tensors: dict[str, Tensor] = {}
    for module in progress(list(adapter.slices)):
        trained, delta = adapter.slices[module], adapter.delta(module)
        for place in base.places(module, trained):
            weight = base.tensor(place.tensor)
            flat, order = place.positions.flatten().sort()
            small = weight.numel() <= torch.iinfo(torch.int32).max
            tensors[f"{place.tensor}.indices"] = flat.to(torch.int32 if small else torch.int64)
            tensors[f"{place.tensor}.values"] = merged_rows(place, weight, trained, delta).flatten()[order]
    save_file(tensors, output, metadata={"format": "s2ft-patch"})
