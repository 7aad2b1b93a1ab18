"""Adapters for other engines: what is written where, and what is said about it.

    lora      a folder: PEFT's LoRA, lossless                       exports/lora.py
    vllm      the same, within what vLLM serves
    sglang    the same at one rank, with the partners SGLang wants
    gguf      a file: llama.cpp's LoRA                               exports/gguf.py
    patch     a file: the changed entries of the checkpoint          exports/patch.py

All that can be wrong is looked for before anything is written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2ft.adapters.checkpoint import Checkpoint, open_base
from s2ft.adapters.file import AdapterFile, open_adapter
from s2ft.common.errors import S2FTError
from s2ft.common.files import new_file, new_folder
from s2ft.common.outputs import Progress, bytes_of, check_free
from s2ft.exports.gguf import check_gguf, write_gguf
from s2ft.exports.lora import check_carried, max_lora_rank, write_lora
from s2ft.exports.patch import check_patch, write_patch

TARGETS = ("lora", "vllm", "sglang", "gguf", "patch")
_SUFFIX = {"gguf": ".gguf", "patch": ".safetensors"}  # the targets that are one file


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    target: str
    output: str
    modules: int
    most_channels: int  # in one module: the largest rank
    native_bytes: int
    exported_bytes: int
    max_lora_rank: (
        int | None
    )  # the smallest `--max-lora-rank` that vLLM serves it at; None where it is no LoRA for vLLM

    def facts(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


def export(
    adapter: str | Path, to: str, output: str | Path, base: str | None = None, progress: Progress = iter
) -> Exported:
    """Writes an adapter in the form that another engine takes, whole or not at all.

    Args:
        adapter: Folder of an S²FT adapter.
        to: `lora`, `vllm`, `sglang` (each a folder), `gguf` or `patch` (each a file).
        output: What to write; nothing may be there yet.
        base: Folder or Hub name of the base model; by default the one that the adapter names. Its configuration gives the
            layers' sizes; its weights are read for a patch, and compared with the adapter's digests where they are in
            the folder.
        progress: Goes through the modules; a progress bar, say.

    Raises:
        S2FTError: before anything is written, if the adapter is not whole, is for another base, or holds what the engine
            cannot take.

    Example:
        >>> export("nowhere", "onnx", "out")
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: to='onnx' is unknown; choose from lora, vllm, sglang, gguf, patch
    """
    if to not in TARGETS:
        raise S2FTError(f"to={to!r} is unknown; choose from {', '.join(TARGETS)}")
    output = Path(output)
    check_free(output, _SUFFIX.get(to))
    opened = open_adapter(adapter)
    _check_early(opened, to)
    checkpoint = open_base(opened, base, weights=to == "patch")
    _write(opened, checkpoint, to, output, progress)
    most = max(len(chosen.indices) for chosen in opened.slices.values())
    rank = max_lora_rank(opened) if to in ("lora", "vllm") else None
    return Exported(to, str(output), len(opened.slices), most, bytes_of(opened.folder), bytes_of(output), rank)


def _check_early(adapter: AdapterFile, to: str) -> None:
    """What needs no base to be found."""
    if to == "patch":
        check_patch(adapter)
    elif to != "gguf":
        check_carried(adapter, to)


def _write(adapter: AdapterFile, base: Checkpoint, to: str, output: Path, progress: Progress) -> None:
    if to == "gguf":
        check_gguf(adapter, base)
        with new_file(output) as file:
            write_gguf(adapter, base, file, progress)
    elif to == "patch":
        with new_file(output) as file:
            write_patch(adapter, base, file, progress)
    else:
        with new_folder(output) as folder:
            write_lora(adapter, base, to, folder, progress)
