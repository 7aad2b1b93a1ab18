"""How long does choosing channels take at the shape of LLaMA2-7B? Floor: reading the scored weights once.

All layers share one layer's random weights, so that the model fits a small machine. A layer (0.4 GB) is far larger than
any cache, so sharing does not make it faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from s2ft.format.config import S2FTConfig
from s2ft.lab.bench.report import Report
from s2ft.lab.registry import TellShare
from s2ft.lab.shapes import LLAMA2_7B
from s2ft.layer.linears import weight_matrix
from s2ft.runtime.timing import milliseconds, spread
from s2ft.selection.select import select
from s2ft.selection.structure import find_structures

RATIOS = {"o_proj": 0.052, "down_proj": 0.02}  # the paper's


def bench_selection(
    repeats: int = 5, shape: dict[str, int] | None = None, tell: TellShare = lambda done: None
) -> Report:
    """Times `select` with the strategies that need no data, beside one pass over the same weights."""
    shape = shape or LLAMA2_7B
    model = shared_layers(shape)
    runs: dict[str, Callable[[], Any]] = {
        "floor": lambda: read_once(model),
        "random": lambda: select(model, S2FTConfig(ratios=RATIOS, strategy="random", seed=0)),
        "weight": lambda: select(model, S2FTConfig(ratios=RATIOS, strategy="weight")),
    }
    rows: list[dict[str, Any]] = []
    for name, run in runs.items():
        rows.append({"strategy": name, **spread(_times(run, repeats), "ms")})
        tell(len(rows) / len(runs))
    return Report(settings={"shape": shape, "dtype": "bfloat16", "ratios": RATIOS, "repeats": repeats}, rows=rows)


def shared_layers(shape: dict[str, int]) -> LlamaForCausalLM:
    """A bf16 Llama whose blocks all hold the first block's weights; embeddings have no values."""
    with torch.device("meta"):
        model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**shape, dtype="bfloat16")).bfloat16()
    first, *others = model.model.layers
    first.to_empty(device="cpu")
    for parameter in first.parameters():
        nn.init.normal_(parameter, std=0.02)
    for layer in others:
        for name, parameter in first.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(owner), leaf, parameter)
    return model


def read_once(model: nn.Module) -> None:
    """Touches every weight of every structure, 8 bytes at a time."""
    for structure in find_structures(model):
        for projection in structure.projections:
            weight_matrix(model.get_submodule(projection.module)).detach().view(torch.int64).max()


def _times(run: Callable[[], Any], repeats: int) -> list[float]:
    """In ms; a first call warms up."""
    return [milliseconds(run) for _ in range(1 + repeats)][1:]
