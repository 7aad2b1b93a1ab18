"""An adapter as files: channels and deltas in the base checkpoint's own coordinates.

    adapter_config.json          the resolved `S2FTConfig`: every module's slice, and a digest of the base weights
                                 that it changes
    adapter_model.safetensors    base_model.model.{module}.s2ft_block.weight    the delta: [out, s] on the input side,
                                                                                [s, in] on the output side
                                 base_model.model.{module}.s2ft_block.indices   its s channels, ascending
                                 and whatever PEFT keeps beside (modules_to_save, trainable tokens)

PEFT writes and loads these files. Here they are read without any base model, and checked: nothing in them is trusted. How
tensors are named: `format/names.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from s2ft.common.errors import S2FTError
from s2ft.format.folder import CONFIG_FILE, WEIGHTS_FILE
from s2ft.format.names import delta_name, is_base_copy, is_slice_part
from s2ft.format.saved import SavedConfig
from s2ft.format.slices import Slice
from s2ft.format.weight_file import WeightFile

if TYPE_CHECKING:
    from s2ft.format.config import S2FTConfig


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory, without its base model."""

    folder: Path
    saved: SavedConfig
    slices: dict[str, Slice]  # module → its trained channels
    deltas: dict[str, Tensor]  # module → [out_features, s] on the input side, [s, in_features] on the output side
    others: dict[str, Tensor]  # what PEFT keeps beside, under the file's own names

    @cached_property
    def config(self) -> S2FTConfig:
        """The config as one of PEFT's, which is imported for it."""
        from s2ft.format.config import S2FTConfig

        return S2FTConfig.of(self.saved)

    @property
    def parameters(self) -> int:
        """How many weights the adapter changes."""
        return sum(delta.numel() for delta in self.deltas.values())

    @property
    def file_bytes(self) -> int:
        """Size on disk, config included."""
        return sum((self.folder / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """An adapter that stays on disk: it is checked, and its tensors are read one module at a time."""

    folder: Path
    config: SavedConfig
    slices: dict[str, Slice]  # module → its trained channels
    shapes: dict[str, tuple[int, ...]]  # module → shape of its delta
    kept: tuple[str, ...]  # names of what PEFT keeps beside
    tensors: Mapping[str, Tensor]  # all of the file's, each read when it is asked for

    @property
    def name(self) -> str:
        """The folder, for messages."""
        return str(self.folder)

    def delta(self, module: str) -> Tensor:  # [out_features, s] on the input side, [s, in_features] on the output side
        """The module's delta, from the disk."""
        return self.tensors[delta_name(module)]

    def base(self, other: str | None = None) -> tuple[str, str | None]:
        """The folder or Hub name of its base, and the revision; of `other`, named in its place, no revision is known.

        Raises:
            S2FTError: if neither the config nor `other` names one.
        """
        own = self.config.base_model_name_or_path
        name = str(other or own or "")
        if not name:
            raise S2FTError(f"{self.folder} does not say which base it is for; name it with base=")
        return name, self.config.revision if name == own else None

    def others(self) -> dict[str, Tensor]:
        """What PEFT keeps beside the slices, under the file's own names, from the disk."""
        return {name: self.tensors[name] for name in self.kept}


def read_adapter(folder: str | Path) -> Adapter:
    """Reads an adapter folder into memory, and checks it.

    Raises:
        S2FTError: if a file is missing, truncated, of another method, or contradicts the config; or a value is not finite,
            or not what was saved.
    """
    folder = Path(folder)
    config, weights = _checked(folder)
    slices = _slices(config)
    deltas = {module: weights[delta_name(module)] for module in slices}
    return Adapter(folder, config, slices, deltas, {name: weights[name] for name in _kept(config, weights)})


def open_adapter(folder: str | Path) -> AdapterFile:
    """Checks an adapter folder as `read_adapter` does, and keeps none of its tensors in memory."""
    folder = Path(folder)
    config, weights = _checked(folder)
    headers, slices = weights.headers(), _slices(config)
    shapes = {module: headers[delta_name(module)].shape for module in slices}
    return AdapterFile(folder, config, slices, shapes, _kept(config, weights), weights)


def _checked(folder: Path) -> tuple[SavedConfig, WeightFile]:
    return SavedConfig.from_folder(folder), WeightFile(folder)


def _slices(config: SavedConfig) -> dict[str, Slice]:
    return {module: Slice.parse(text) for module, text in (config.slices or {}).items()}


def _kept(config: SavedConfig, weights: WeightFile) -> tuple[str, ...]:
    """Names of what PEFT keeps beside the slices."""
    return tuple(name for name in weights if not is_slice_part(name) and not is_base_copy(name, config.slices))
