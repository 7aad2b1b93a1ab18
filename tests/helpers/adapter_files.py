"""Adapter folders that a test changes on purpose."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def edit(folder: Path, **fields: object) -> None:
    """Sets fields of the config."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Other tensors, without the checksums of those that were saved."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    edit(folder, checksums=None)


def flip(file: Path, place: int) -> None:
    """One bit."""
    data = bytearray(file.read_bytes())
    data[place] ^= 16
    file.write_bytes(data)
