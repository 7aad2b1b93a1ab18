"""PEFT's LoRA (exports/lora.py), within what vLLM serves: ranks up to 512, mixed, in buffers of `--max-lora-rank`."""

from __future__ import annotations

from s2ft.adapters.file import AdapterFile
from s2ft.exports.lora import most_channels, problems_of_engine
from s2ft.exports.lora import write_in_full as write  # whatever PEFT makes of it

__all__ = ["max_lora_rank", "problems", "write"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `vllm serve --max-lora-rank` takes."""

_TAKEN_WHOLE = ("classifier", "score")  # of the modules that are saved whole


def problems(adapter: AdapterFile) -> list[str]:
    """What vLLM cannot take."""
    found = problems_of_engine(adapter, "vllm", _TAKEN_WHOLE)
    most = max(adapter.slices, key=lambda module: len(adapter.slices[module].indices))
    count = len(adapter.slices[most].indices)
    if count > VLLM_RANKS[-1]:
        found.append(
            f"{most} has {count} channels, and vLLM serves a LoRA of rank {VLLM_RANKS[-1]} at most. Serve the merged model "
            "(`s2ft merge`), write the weights in place (`--to patch`), or train with smaller ratios"
        )
    return found


def max_lora_rank(adapter: AdapterFile) -> int | None:
    """The smallest `--max-lora-rank` that vLLM serves the adapter at; None where there is none."""
    return next((rank for rank in VLLM_RANKS if rank >= most_channels(adapter)), None)
