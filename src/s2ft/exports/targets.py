"""What an adapter can be exported to: a row for each target, from which the command line, its help and errors follow.

The work is in the module of the row's name, `exports/NAME.py`, which is imported when it is asked for (help does without
torch): a `Writer`. A new target is such a module, its row here, and its test.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from s2ft.common.errors import S2FTError

if TYPE_CHECKING:
    from pathlib import Path

    from s2ft.adapters.checkpoint import Checkpoint
    from s2ft.adapters.file import AdapterFile
    from s2ft.common.outputs import Progress


class Writer(Protocol):
    """The two functions of a target's module."""

    def problems(self, adapter: AdapterFile) -> Iterable[str]:
        """What of the adapter the target cannot take; asked before a base is looked for."""

    def write(self, adapter: AdapterFile, base: Checkpoint, output: Path, progress: Progress) -> None:
        """Writes `output`: a file, or into an empty folder. It gets its name when all is written.

        Raises:
            S2FTError: if adapter and base are more than the target can take; nothing is left then.
        """


@dataclass(frozen=True)
class Target:
    """A form that adapters are written in."""

    taker: str  # for whom, in words
    suffix: str | None = None  # of the file that is written; None: a folder
    reads_weights: bool = False  # of the base, beside its configuration
    is_for_vllm: bool = False  # the result says at which `--max-lora-rank` vLLM serves it


TARGETS = {
    "lora": Target("PEFT", is_for_vllm=True),
    "vllm": Target("vLLM", is_for_vllm=True),
    "sglang": Target("SGLang"),
    "gguf": Target("llama.cpp", ".gguf"),
    "patch": Target("updating a checkpoint in place", ".safetensors", reads_weights=True),
}


def find_target(name: str) -> tuple[Target, Writer]:
    """The row of a target, and its module.

    Raises:
        S2FTError: if there is none of that name.

    Example:
        >>> find_target("onnx")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: to='onnx' is unknown; choose from lora, vllm, ...
    """
    if name not in TARGETS:
        raise S2FTError(f"to={name!r} is unknown; choose from {', '.join(TARGETS)}")
    return TARGETS[name], cast("Writer", import_module(f"s2ft.exports.{name}"))
