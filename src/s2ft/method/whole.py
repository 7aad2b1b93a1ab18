"""Is an adapter's weight file whole? Looked at when its config is read, before anything is put into a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from s2ft.errors import S2FTError


def check_whole(folder: Path, modules: Iterable[str]) -> None:
    """Raises `S2FTError` if the weight file in `folder` is truncated or lacks the slice of one of `modules`.

    Only the file's header is read. A folder without the file (a config alone, a Hub name) is left to PEFT.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except SafetensorError as error:
        raise S2FTError(f"{path} is truncated or no safetensors file ({path.stat().st_size} bytes): {error}") from error
    for module in modules:
        for part in ("weight", "indices"):
            if not any(name.endswith(f"{module}.s2ft_block.{part}") for name in names):
                raise S2FTError(
                    f"{path} has no {part} for {module}, which its config names: not the adapter of this config"
                )
