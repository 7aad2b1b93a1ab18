"""The adapter file: indices and deltas in the base checkpoint's own coordinates.

    adapter_config.json          the resolved `S2FTConfig`: every module's slice, and a digest of the base weights
                                 that it changes
    adapter_model.safetensors    base_model.model.{module}.s2ft_block.weight    the delta: [out, s] on the input side,
                                                                                [s, in] on the output side
                                 base_model.model.{module}.s2ft_block.indices   its s channels, ascending
                                 and whatever PEFT keeps beside (modules_to_save, trainable tokens)

PEFT writes and loads these files; here they are read without any base model, and checked: nothing in them is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import s2ft.method.tuner  # noqa: F401 - PEFT reads a config by its method, which this registers
from s2ft.errors import S2FTError, raise_together
from s2ft.method.config import S2FTConfig
from s2ft.method.digest import digest_parts
from s2ft.method.slices import Slice, all_finite

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


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """An adapter that stays on disk: checked whole, its tensors read one module at a time."""

    folder: Path
    config: S2FTConfig
    slices: dict[str, Slice]  # module → its trained channels
    shapes: dict[str, tuple[int, ...]]  # module → shape of its delta
    kept: tuple[str, ...]  # names of what PEFT keeps beside

    @property
    def name(self) -> str:
        """The folder, for messages."""
        return str(self.folder)

    def delta(self, module: str) -> Tensor:  # [out_features, s] on the input side, [s, in_features] on the output side
        """The module's delta, from the disk."""
        return self._read(delta_name(module))

    def others(self) -> dict[str, Tensor]:
        """What PEFT keeps beside, under the file's own names, from the disk."""
        return {name: self._read(name) for name in self.kept}

    def _read(self, name: str) -> Tensor:
        with safe_open(self.folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def delta_name(module: str) -> str:
    """The name of the module's delta in the weight file."""
    return f"{_PREFIX}{module}{_BLOCK}weight"


def indices_name(module: str) -> str:
    """The name of the module's channels in the weight file."""
    return f"{_PREFIX}{module}{_BLOCK}indices"


def read_adapter(folder: str | Path) -> Adapter:
    """Reads an adapter folder and checks that it is whole.

    Raises:
        S2FTError: if a file is missing, truncated, of another method, or contradicts the config; or a delta is not
            finite.
    """
    folder = Path(folder)
    config, slices = _read_config(folder)
    tensors = load_file(_weights(folder))
    _check(folder, slices, tensors)
    deltas = {module: tensors[delta_name(module)] for module in slices}
    others = {name: tensor for name, tensor in tensors.items() if _BLOCK not in name}
    return Adapter(folder, config, slices, deltas, others)


def open_adapter(folder: str | Path) -> AdapterFile:
    """Checks an adapter folder as `read_adapter` does, and keeps none of its tensors in memory."""
    folder = Path(folder)
    config, slices = _read_config(folder)
    with safe_open(_weights(folder), framework="pt") as file:
        names = _OneByOne(file)
        _check(folder, slices, names)
        shapes = {module: tuple(file.get_slice(delta_name(module)).get_shape()) for module in slices}
    return AdapterFile(folder, config, slices, shapes, tuple(name for name in names if _BLOCK not in name))


class _OneByOne(Mapping[str, Tensor]):
    """The tensors of an open safetensors file, each read when it is asked for."""

    def __init__(self, file: safe_open) -> None:
        self._file, self._names = file, tuple(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_config(folder: Path) -> tuple[S2FTConfig, dict[str, Slice]]:
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
    raise_together(f"{path}: {problem}" for problem in _field_problems(config))
    if not isinstance(config.slices, dict) or not config.slices:
        raise S2FTError(f"{path} names no slices; was it saved before the adapter was made?")
    slices = {module: Slice.parse(text) for module, text in config.slices.items()}
    for module, text in (config.base_digest or {}).items():
        if module not in slices:
            raise S2FTError(f"{path}: base_digest names {module}, which is not in the config's slices")
        digest_parts(text, slices[module])
    return config, slices


_TEXT, _NAMES = (str, type(None)), (list, set, str, type(None))
_KINDS: dict[str, tuple[type, ...]] = {  # of fields that PEFT takes as they come
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "task_type": _TEXT,
    "auto_mapping": (dict, type(None)),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": (list, type(None)),
    "trainable_token_indices": (list, dict, type(None)),
}


def _field_problems(config: S2FTConfig) -> Iterator[str]:
    for name, kinds in _KINDS.items():
        value = getattr(config, name)
        if not isinstance(value, kinds):
            allowed = ", ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            yield f"{name}={str(value)[:60]!r} is not one of: {allowed}"


def _weights(folder: Path) -> Path:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise S2FTError(f"{folder} holds no adapter weights: there is no {path.name}")
    return path


def _check(folder: Path, slices: dict[str, Slice], tensors: Mapping[str, Tensor]) -> None:
    """Every slice has its delta and its channels, all of them sound, and there is no delta beside."""
    raise_together(problem for module, chosen in slices.items() for problem in _problems(tensors, module, chosen))
    known = {name for module in slices for name in (delta_name(module), indices_name(module))}
    unknown = sorted(name for name in tensors if _BLOCK in name and name not in known)
    raise_together([f"{folder}: {unknown[0]} is not in the config's slices"] if unknown else [])


def _problems(tensors: Mapping[str, Tensor], module: str, chosen: Slice) -> list[str]:
    weight, channels = delta_name(module), indices_name(module)
    missing = [name for name in (weight, channels) if name not in tensors]
    if missing:
        return [f"{missing[0]} is missing, which the config's slices imply"]
    delta, indices = tensors[weight], tensors[channels]
    if delta.dtype not in _DTYPES or not delta.numel():
        return [f"{weight} is {delta.dtype} of shape {list(delta.shape)}; expected one of {_DTYPES}"]
    if indices.dtype != torch.int64 or not torch.equal(indices, torch.from_numpy(chosen.indices)):
        return [f"{channels} differs from the config's slice {str(chosen)!r}"]
    if delta.dim() != 2 or delta.shape[1 if chosen.side == "in" else 0] != len(chosen.indices):
        return [f"{weight} has shape {list(delta.shape)}; the slice {str(chosen)!r} has {len(indices)} channels"]
    return [] if all_finite(delta) else [f"{weight} holds values that are not finite"]
