"""An adapter as a LoRA: exact, because one of its two factors only picks channels.

    input side (o, down)      ΔW[:, idx] = V     B = V [out, s],          A = one-hot [s, in],  A[j, idx[j]] = 1
    output side (q, ..., up)  ΔW[idx, :] = V     B = one-hot [out, s],    A = V [s, in],        B[idx[j], j] = 1

Ones and zeros are exact in every dtype, and `lora_alpha = r` makes the scale 1 in every engine, so ΔW = B A holds bit for bit.
What an engine needs beyond PEFT's format is its *profile*:

    vllm     ranks up to 512, buffers of --max-lora-rank for each; takes mixed ranks (`rank_pattern`)
    sglang   one rank for all (it ignores `rank_pattern`): filled up with zeros; it reads k and v beside q and up beside gate,
             and drops them where q or gate is not there: zero factors take the missing places
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from s2ft.adapters.checkpoint import Checkpoint
from s2ft.adapters.file import AdapterFile
from s2ft.common.errors import raise_together
from s2ft.common.outputs import Progress
from s2ft.format.names import PREFIX, is_of_module, is_token_rows
from s2ft.format.slices import Slice
from s2ft.layer.linears import features, linear_layer

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` takes."""

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # SGLang holds these in one layer
_VLLM_WHOLE = ("classifier", "score")  # the modules that vLLM takes whole


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
    chosen: Slice,
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
    indices = torch.from_numpy(chosen.indices)
    one_hot = torch.zeros(len(indices), size, dtype=delta.dtype)
    one_hot[torch.arange(len(indices)), indices] = 1
    return LowRank(one_hot, delta) if chosen.side == "in" else LowRank(delta, one_hot.T)


def check_carried(adapter: AdapterFile, profile: str) -> None:
    """Raises `S2FTError` if the adapter holds what a LoRA of this profile cannot carry."""
    raise_together([*_foreign(adapter), *_refused(adapter, profile)])


def max_lora_rank(adapter: AdapterFile) -> int | None:
    """The smallest `--max-lora-rank` that vLLM serves the adapter at; None where there is none."""
    most = _most(adapter)
    return next((rank for rank in VLLM_RANKS if rank >= most), None)


def write_lora(adapter: AdapterFile, base: Checkpoint, profile: str, folder: Path, progress: Progress) -> None:
    """Writes a PEFT LoRA into `folder`: `adapter_config.json` and `adapter_model.safetensors`."""
    low: dict[str, LowRank] = {}
    for module in progress(list(adapter.slices)):
        chosen = adapter.slices[module]
        low[module] = factors(chosen, adapter.delta(module), base.sliced_size(module, chosen.side))
    if profile == "sglang":
        low = _with_partners(low, base)
        low = {module: pair.widened(_most(adapter)) for module, pair in low.items()}
    tensors = dict(adapter.others())
    for module, pair in low.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = pair.b.contiguous()
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    _config(adapter, base, low, profile).save_pretrained(str(folder))


def _config(adapter: AdapterFile, base: Checkpoint, low: dict[str, LowRank], profile: str) -> LoraConfig:
    ranks = {module: len(pair.a) for module, pair in low.items()}
    most = max(ranks.values())
    # The longest path first: patterns match the ends of paths, and the first match counts
    mixed = {module: ranks[module] for module in sorted(ranks, key=len, reverse=True)}
    pattern = {} if set(ranks.values()) == {most} else mixed
    last_names = sorted({module.rpartition(".")[2] for module in low})
    return LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=last_names if profile == "sglang" else sorted(low),
        modules_to_save=adapter.config.modules_to_save,
        trainable_token_indices=adapter.config.trainable_token_indices,
        fan_in_fan_out=all(base.is_transposed(module) for module in low),
        task_type=adapter.config.task_type,
        base_model_name_or_path=adapter.config.base_model_name_or_path,
        revision=adapter.config.revision,
        inference_mode=True,
    )


def _most(adapter: AdapterFile) -> int:
    return max(len(chosen.indices) for chosen in adapter.slices.values())


def _foreign(adapter: AdapterFile) -> list[str]:
    """What lies in the file beside the slices, and neither PEFT's LoRA nor we know."""
    whole = adapter.config.modules_to_save or []
    return [
        f"{name} is neither a slice nor in modules_to_save={whole}; a LoRA cannot carry it"
        for name in adapter.kept
        if not is_token_rows(name) and not is_of_module(name, whole)
    ]


def _refused(adapter: AdapterFile, profile: str) -> list[str]:
    if profile == "lora":
        return []
    found = []
    whole = [name for name in adapter.config.modules_to_save or [] if profile != "vllm" or name not in _VLLM_WHOLE]
    if whole:
        found.append(f"modules_to_save={whole}: {profile} takes no whole modules beside a LoRA; use `s2ft merge`")
    if any(map(is_token_rows, adapter.kept)):
        found.append(f"trainable_token_indices: {profile} takes no single token embeddings; use --to lora, and PEFT")
    most = max(adapter.slices, key=lambda module: len(adapter.slices[module].indices))
    count = len(adapter.slices[most].indices)
    if profile == "vllm" and count > VLLM_RANKS[-1]:
        found.append(
            f"{most} has {count} channels, and vLLM serves a LoRA of rank {VLLM_RANKS[-1]} at most. Serve the merged model "
            "(`s2ft merge`), write the weights in place (`--to patch`), or train with smaller ratios"
        )
    return found


def _with_partners(low: dict[str, LowRank], base: Checkpoint) -> dict[str, LowRank]:
    """Zero factors for the projections that SGLang holds in one layer with those that are there."""
    filled = dict(low)
    for module in low:
        parent, _, name = module.rpartition(".")
        group = next((group for group in _TOGETHER if name in group), ())
        for partner in (f"{parent}.{other}" for other in group):
            linear = linear_layer(base.model.get_submodule(partner)) if _is_there(base, partner) else None
            if partner not in filled and linear is not None:
                inputs, outputs = features(linear)
                dtype = low[module].a.dtype
                filled[partner] = LowRank(torch.zeros(1, inputs, dtype=dtype), torch.zeros(outputs, 1, dtype=dtype))
    return filled


def _is_there(base: Checkpoint, module: str) -> bool:
    try:
        base.model.get_submodule(module)
    except AttributeError:
        return False
    return True
