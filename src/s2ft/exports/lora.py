"""An adapter as a LoRA: exact, because one of its two factors only picks channels.

    input side (o, down)      ΔW[:, idx] = V     B = V [out, s],          A = one-hot [s, in],  A[j, idx[j]] = 1
    output side (q, ..., up)  ΔW[idx, :] = V     B = one-hot [out, s],    A = V [s, in],        B[idx[j], j] = 1

Ones and zeros are exact in every dtype, and `lora_alpha = r` makes the scale 1 in every engine, so ΔW = B A holds bit for bit.
Engines that want more than PEFT's format begin from here: exports/vllm.py, exports/sglang.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from s2ft.adapters.checkpoint import Checkpoint
from s2ft.adapters.file import AdapterFile
from s2ft.common.errors import raise_together
from s2ft.common.files import write_json
from s2ft.common.outputs import Progress
from s2ft.format.folder import CONFIG_FILE, WEIGHTS_FILE
from s2ft.format.names import PREFIX, is_token_rows
from s2ft.format.slices import Slice


@dataclass(frozen=True, eq=False)
class LowRank:
    """The two factors of one layer, ΔW = B A."""

    a: Tensor  # [r, in_features]
    b: Tensor  # [out_features, r]

    def widened(self, rank: int) -> LowRank:
        """The same ΔW at a larger rank: zeros in both factors."""
        more = rank - len(self.a)
        return LowRank(torch.nn.functional.pad(self.a, (0, 0, 0, more)), torch.nn.functional.pad(self.b, (0, more)))


def factors(
    trained: Slice,
    delta: Tensor,  # [out_features, s] on the input side, [s, in_features] on the output side
    size: int,  # channels of the sliced side
) -> LowRank:
    """The slice as a LoRA, in the dtype of the delta.

    Example:
        >>> import numpy as np
        >>> low = factors(Slice("in", np.array([0, 2])), torch.tensor([[5.0, 7.0]]), 3)
        >>> (low.b @ low.a).tolist()
        [[5.0, 0.0, 7.0]]
    """
    indices = torch.from_numpy(trained.indices)
    one_hot = torch.zeros(len(indices), size, dtype=delta.dtype)
    one_hot[torch.arange(len(indices)), indices] = 1
    return LowRank(one_hot, delta) if trained.side == "in" else LowRank(delta, one_hot.T)


def problems(adapter: AdapterFile) -> list[str]:
    """None: PEFT's LoRA carries all that an adapter may hold."""
    return []


def problems_of_engine(adapter: AdapterFile, engine: str, takes_whole: Collection[str] = ()) -> list[str]:
    """What an engine does not take of PEFT's LoRA: whole modules, but for `takes_whole`, and single token embeddings."""
    found = []
    whole = [name for name in adapter.config.modules_to_save or [] if name not in takes_whole]
    if whole:
        found.append(f"modules_to_save={whole}: {engine} takes no whole modules beside a LoRA; use `s2ft merge`")
    if any(map(is_token_rows, adapter.kept)):
        found.append(f"trainable_token_indices: {engine} takes no single token embeddings; use --to lora, and PEFT")
    return found


def most_channels(adapter: AdapterFile) -> int:
    """The most channels of one module: the largest rank of the adapter as a LoRA."""
    return max(len(trained.indices) for trained in adapter.slices.values())


def write(adapter: AdapterFile, base: Checkpoint, output: Path, progress: Progress) -> None:
    """Writes a PEFT LoRA into the folder `output`, if PEFT would read all of it."""
    raise_together(_misread(adapter, base))
    write_in_full(adapter, base, output, progress)


def write_in_full(adapter: AdapterFile, base: Checkpoint, output: Path, progress: Progress) -> None:
    """Writes a LoRA in PEFT's format, whatever PEFT makes of it."""
    low = low_ranks(adapter, base, progress)
    save_lora(adapter, base, low, sorted(low), output)


def _misread(adapter: AdapterFile, base: Checkpoint) -> Iterator[str]:
    """Modules that PEFT takes for experts by their names: it rewrites LoRAs of older checkpoints, where those had them."""
    if not base.names_experts:
        return
    from peft import LoraConfig  # here, since their import takes seconds
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    modules = sorted(adapter.slices)
    config = LoraConfig(target_modules=list(modules))
    try:
        convert_peft_config_for_transformers(config, base.model, None)
        misread = sorted(set(modules) - set(config.target_modules or ()))
    except ValueError:  # it finds one of two projections that it would fuse
        misread = modules
    if misread:
        yield (
            f"PEFT takes {misread[0]} of a LoRA on {base.model.config.model_type} for one of its experts, and would load "
            "nothing there; use `s2ft merge`, or --to patch"
        )


def low_ranks(adapter: AdapterFile, base: Checkpoint, progress: Progress) -> dict[str, LowRank]:
    """Module → its slice as a LoRA."""
    low: dict[str, LowRank] = {}
    for module in progress(list(adapter.slices)):
        trained = adapter.slices[module]
        low[module] = factors(trained, adapter.delta(module), base.sliced_size(module, trained.side))
    return low


def save_lora(
    adapter: AdapterFile, base: Checkpoint, low: Mapping[str, LowRank], target_modules: list[str], folder: Path
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`; what else the adapter holds comes along."""
    tensors = dict(adapter.others())
    for module, pair in low.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = pair.b.contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(folder / CONFIG_FILE, _config(adapter, base, low, target_modules), sort_keys=True)


def _config(
    adapter: AdapterFile, base: Checkpoint, low: Mapping[str, LowRank], target_modules: list[str]
) -> dict[str, Any]:
    """PEFT's `LoraConfig` as it saves it: what is not given here stays at PEFT's default."""
    ranks = {module: len(pair.a) for module, pair in low.items()}
    most = max(ranks.values())
    # The longest path first: patterns match the ends of paths, and the first match counts
    mixed = {module: ranks[module] for module in sorted(ranks, key=len, reverse=True)}
    pattern = {} if set(ranks.values()) == {most} else mixed
    return {
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": target_modules,
        "modules_to_save": adapter.config.modules_to_save,
        "trainable_token_indices": adapter.config.trainable_token_indices,
        "fan_in_fan_out": all(base.is_transposed(module) for module in low),
        "task_type": adapter.config.task_type,
        "base_model_name_or_path": adapter.config.base_model_name_or_path,
        "revision": adapter.config.revision,
        "inference_mode": True,
    }
