"""PaCA: columns of every linear layer but the head, drawn at random, as an adapter of S²FT.

    y = W x + V x[S]        S: `rank` random columns, other ones in each layer; V: trained

S²FT draws whole heads and channels, the same for all layers that share them; PaCA draws each layer's columns by themselves.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from s2ft.finetune.lora import linears
from s2ft.format.config import S2FTConfig
from s2ft.format.slices import Slice
from s2ft.format.terms import OWN
from s2ft.layer.linears import features


def paca_config(model: nn.Module, rank: int, seed: int, task_type: str = "CAUSAL_LM") -> S2FTConfig:
    """A config that names the columns; a layer with fewer than `rank` is trained whole."""
    drawn, slices = np.random.default_rng(seed), {}
    for path, layer in linears(model).items():
        width = features(layer)[0]
        columns = drawn.choice(width, size=min(rank, width), replace=False)
        slices[path] = str(Slice("in", np.sort(columns)))
    return S2FTConfig(slices=slices, target_modules=set(slices), strategy=OWN, seed=seed, task_type=task_type)


def equal_columns(model: nn.Module, parameters: int) -> int:
    """The number of columns (at least 1) that trains about so many parameters.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
        >>> equal_columns(LlamaForCausalLM(config), 5 * (4 * 16 + 24 + 24 + 16))
        5
    """
    return max(1, round(parameters / sum(features(layer)[1] for layer in linears(model).values())))
