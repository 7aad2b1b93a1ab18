"""The adapter file: indices and deltas in the base checkpoint's own coordinates.

    adapter_config.json          the resolved `S2FTConfig`: every module's slice, and a digest of the base weights it
    changes adapter_model.safetensors    base_model.model.{module}.s2ft_block.weight    the delta: [out, s] input side,
    [s, in] output side
                                 base_model.model.{module}.s2ft_block.indices   its s channels, ascending
                                 and whatever PEFT keeps beside (modules_to_save, trainable tokens)

PEFT writes and loads these files; here they are read without any base model, and checked: nothing in them is trusted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from s2ft.errors import S2FTError, raise_together
from s2ft.method.config import S2FTConfig
from s2ft.method.slices import Slice

_PREFIX = "base_model.model."
_BLOCK = ".s2ft_block."
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory, without its base model."""

    folder: Path
    config: S2FTConfig
    slices: dict[str, Slice]  # module → its trained channels
    deltas: dict[str, Tensor]  # module → [out_features, s] on the input side, [s, in_features] on the output side
    others: dict[str, Tensor]  # what PEFT keeps beside, under the file's own names

    @property
    def parameters(self) -> int:
        """How many weights the adapter changes."""
        return sum(delta.numel() for delta in self.deltas.values())

    @property
    def file_bytes(self) -> int:
        """Size on disk, config included."""
        return sum((self.folder / name).stat().st_size for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))


def read_adapter(folder: str | Path) -> Adapter:
    """Reads an adapter folder and checks that it is whole.

    Raises:
        S2FTError: if a file is missing, truncated, of another method, or contradicts the config; or a delta is not
            finite.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder / SAFETENSORS_WEIGHTS_NAME)
    slices = {path: Slice.parse(text) for path, text in (config.slices or {}).items()}
    raise_together(problem for path, chosen in slices.items() for problem in _problems(tensors, path, chosen))
    deltas = {path: tensors.pop(_key(path, "weight")) for path in slices}
    others = {name: tensor for name, tensor in tensors.items() if _BLOCK not in name}
    unknown = sorted(set(tensors) - set(others) - {_key(path, "indices") for path in slices})
    raise_together([f"{folder}: {unknown[0]} is not in the config's slices"] if unknown else [])
    return Adapter(folder, config, slices, deltas, others)


def _read_config(folder: Path) -> S2FTConfig:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise S2FTError(f"{folder} holds no adapter: there is no {CONFIG_NAME}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise S2FTError(f"{path} is not JSON: {error}") from error
    method = fields.get("peft_type") if isinstance(fields, dict) else None
    if method != "S2FT":
        raise S2FTError(f"{path} is not an S2FT adapter: its peft_type is {method!r}")
    try:
        config = S2FTConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise S2FTError(f"{folder}: {error}") from error
    if not isinstance(config.slices, dict) or not config.slices:
        raise S2FTError(f"{path} names no slices; was it saved before the adapter was made?")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise S2FTError(f"{path.parent} holds no adapter weights: there is no {path.name}")
    return load_file(path)


def _problems(tensors: dict[str, Tensor], path: str, chosen: Slice) -> list[str]:
    delta, indices = tensors[_key(path, "weight")], tensors[_key(path, "indices")]
    if delta.dtype not in _DTYPES or not delta.numel():
        return [f"{_key(path, 'weight')} is {delta.dtype} of shape {list(delta.shape)}; expected one of {_DTYPES}"]
    if not torch.equal(indices, torch.from_numpy(chosen.indices)):
        return [f"{_key(path, 'indices')} differs from the config's slice {str(chosen)!r}"]
    if delta.dim() != 2 or delta.shape[1 if chosen.side == "in" else 0] != len(chosen.indices):
        return [
            f"{_key(path, 'weight')} has shape {list(delta.shape)}; the slice {str(chosen)!r} has {len(indices)} channels"
        ]
    return [] if delta.isfinite().all() else [f"{_key(path, 'weight')} holds values that are not finite"]


def _key(path: str, part: str) -> str:
    return f"{_PREFIX}{path}{_BLOCK}{part}"
