"""Adapters fused on files alone: no base model, no GPU, one module in memory at a time beside the result.

    A/  adapter_config.json  adapter_model.safetensors  ┐
    B/  adapter_config.json  adapter_model.safetensors  ┴→  checks → report of overlap → one folder of the same format

The arithmetic is `adapters/combination.py`'s, which live models use too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from s2ft.adapters.combination import DENSITY, Combination, combine
from s2ft.adapters.file import open_adapter
from s2ft.adapters.overlap import Overlap, overlaps
from s2ft.common.errors import S2FTError
from s2ft.common.files import new_folder
from s2ft.common.outputs import check_free
from s2ft.format.checksum import note
from s2ft.format.names import delta_name, indices_name


@dataclass(frozen=True, eq=False)
class Fusion:
    """Adapters that can be fused; nothing is computed or written before it is asked for."""

    combination: Combination

    @cached_property
    def overlaps(self) -> list[Overlap]:
        """Where the adapters meet, and the interference to expect: one row for each module and pair."""
        return overlaps(self.combination)

    def tensors(self) -> dict[str, Tensor]:
        """The fused weight file: each module's delta and channels, and what the adapters keep beside."""
        tensors = self.combination.others()
        for module, chosen in self.combination.slices.items():
            tensors[delta_name(module)] = self.combination.delta(module).contiguous()
            tensors[indices_name(module)] = torch.from_numpy(chosen.indices)
        return tensors

    def save(self, output: str | Path) -> Path:
        """Writes the adapter into the folder `output`, whole or not at all.

        Raises:
            S2FTError: if the folder holds an adapter already, or a fused delta is too large for its dtype.
        """
        output = Path(output)
        check_free(output)
        tensors = self.tensors()
        with new_folder(output) as aside:
            save_file(tensors, aside / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            note(self.combination.config, tensors)
            self.combination.config.save_pretrained(str(aside))
        return output


def fuse(
    adapters: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    method: str = "sum",
    density: float = DENSITY,
    seed: int = 0,
    output: str | Path | None = None,
) -> Fusion:
    """Fuses adapter folders into one adapter. Their files are checked now; their deltas are read when they are needed.

    Args:
        adapters: Folders of S²FT adapters of one base.
        weights: One number for each; 1 for all by default, which adds disjoint skills unchanged.
        method: What happens on channels that several adapters hold: `sum`, `ties` or `dare`.
        density: The share of those entries that `ties` and `dare` keep.
        seed: Of the entries that `dare` drops.
        output: Write the result into this folder at once; else `Fusion.save` does.

    Raises:
        S2FTError: if a folder is no whole adapter, or the adapters cannot be fused; then nothing is written.

    Example:
        >>> fuse(["nowhere"])
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: nowhere holds no adapter: there is no adapter_config.json
    """
    if isinstance(adapters, str | Path):
        raise S2FTError(f"adapters={str(adapters)!r} is one folder; give a list of folders")
    if output is not None:
        check_free(Path(output))
    fusion = Fusion(combine([open_adapter(folder) for folder in adapters], weights, method, density, seed))
    if output is not None:
        fusion.save(output)
    return fusion
