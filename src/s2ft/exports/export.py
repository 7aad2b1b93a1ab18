"""Adapters for other engines: `export`. What there is to export to: exports/targets.py.

All that can be wrong is looked for before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s2ft.adapters.checkpoint import Checkpoint, open_base
from s2ft.adapters.file import AdapterFile, open_adapter
from s2ft.common.errors import raise_together
from s2ft.common.files import new_file, new_folder
from s2ft.common.outputs import Progress, bytes_of, check_free
from s2ft.exports.lora import most_channels
from s2ft.exports.targets import find_target
from s2ft.exports.vllm import max_lora_rank


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
        to: `lora`, `vllm`, `sglang` (each a folder), `gguf` or `patch` (each a file): a name in
            `s2ft.exports.targets.TARGETS`.
        output: What to write; nothing may be there yet.
        base: Folder or Hub name of the base model; by default the one that the adapter names. Its configuration gives the
            layers' sizes; its weights are read for a patch, and compared with the adapter's digests where they are in
            the folder.
        progress: Goes through the modules; a progress bar, say.

    Raises:
        S2FTError: before anything is written, if the adapter is not whole, is for another base, or holds what the engine
            cannot take.
    """
    target, writer = find_target(to)
    output = Path(output)
    check_free(output, target.suffix)
    opened = open_adapter(adapter)
    raise_together(writer.problems(opened))
    checkpoint = open_base(opened, base, weights=target.reads_weights)
    if not target.reads_weights:
        raise_together(_of_experts(opened, checkpoint, to))
    with (new_file if target.suffix else new_folder)(output) as aside:
        writer.write(opened, checkpoint, aside, progress)
    rank = max_lora_rank(opened) if target.is_for_vllm else None
    sizes = bytes_of(opened.folder), bytes_of(output)
    return Exported(to, str(output), len(opened.slices), most_channels(opened), *sizes, rank)


def _of_experts(adapter: AdapterFile, base: Checkpoint, to: str) -> Iterator[str]:
    for module in adapter.slices:
        if base.is_stacked(module):
            yield f"{module} is a slice of stacked experts, not written for {to!r}; use `s2ft merge`, or --to patch"
