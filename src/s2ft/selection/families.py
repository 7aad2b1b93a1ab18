"""By which names attention and MLP blocks are known, and how heads lie in their layers: a family of models is added here.

This is the one place that knows names of model code; what is read off a model beside them is shapes and what modules compute.
One row for each way in which model code writes a block. A name is looked for among the module's children, a dotted one
goes through a child (BERT: `attention.self.query`); the first row that is all there is taken. Layers that share a name are
fused: they hold their parts one after the other, in the row's order. What s2ft takes from a row is then checked against the
shapes (`selection/structure.py`), and in training in place against the model's own output (`training/probe.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

BY_HEAD = "each head's query, key and value lie together in its rows, which are no heads of q, k or v"

NOT_STACKED = (
    "its rows are not q, k and v one after the other (CodeGen: q, v, k of a quarter of the heads; MiniMax: by head)"
)


@dataclass(frozen=True)
class AttentionNames:
    """An attention block: heads are rows of q (their groups rows of k and v), and columns of o."""

    q: str
    k: str
    v: str
    o: tuple[str, ...]  # any of these
    mixed: str | None = None  # why the rows of q, k and v cannot be told apart: only o is then read, by heads
    where: tuple[str, object] | None = None  # an attribute of the module that must have this value


@dataclass(frozen=True)
class MLPNames:
    """An MLP: channels are rows of up (and of gate), and columns of down."""

    up: str
    down: str
    gate: str | None = None


def fused(name: str, *o: str, mixed: str | None = None, where: tuple[str, object] | None = None) -> AttentionNames:
    """q, k and v in one layer."""
    return AttentionNames(name, name, name, o, mixed, where)


ATTENTION = (
    AttentionNames("q_proj", "k_proj", "v_proj", ("o_proj", "out_proj", "dense", "c_proj", "Wo")),  # Llama, OPT, Phi
    AttentionNames("q_lin", "k_lin", "v_lin", ("out_lin",)),  # DistilBERT
    AttentionNames("wq", "wk", "wv", ("wo",)),
    AttentionNames("q", "k", "v", ("o",)),  # T5
    AttentionNames("self.query", "self.key", "self.value", ("output.dense",)),  # BERT
    AttentionNames("self.query_proj", "self.key_proj", "self.value_proj", ("output.dense",)),  # DeBERTa-v2
    AttentionNames("q_attn", "c_attn", "c_attn", ("c_proj",)),  # GPT-2's cross-attention
    fused("c_attn", "c_proj", mixed=BY_HEAD, where=("multi_query", False)),  # GPTBigCode with a key for each head
    fused("c_attn", "c_proj"),  # GPT-2, GPTBigCode with one key
    fused("qkv_proj", "o_proj"),  # Phi-3
    fused("qkv_proj", "out_proj", mixed=NOT_STACKED),  # CodeGen, MiniMax's linear attention
    fused("query_key_value", "dense", mixed=BY_HEAD),  # GPT-NeoX, BLOOM, Falcon
    fused("Wqkv", "out_proj"),  # MPT
    fused("Wqkv", "Wo"),  # ModernBERT
    fused("kv_b_proj", "o_proj", mixed="keys and values are expanded from a latent, and lie together by head"),  # MLA
)

MLP = (
    MLPNames("up_proj", "down_proj", "gate_proj"),  # Llama
    MLPNames("gate_up_proj", "down_proj", "gate_up_proj"),  # Phi-3
    MLPNames("w3", "w2", "w1"),
    MLPNames("input_linear", "output_linear", "input_linear"),  # Granite's shared expert
    MLPNames("wi_1", "wo", "wi_0"),  # T5 1.1
    MLPNames("Wi", "Wo", "Wi"),  # ModernBERT
    MLPNames("up_proj", "down_proj"),  # Nemotron
    MLPNames("c_fc", "c_proj"),  # GPT-2
    MLPNames("fc1", "fc2"),  # OPT, Phi, CLIP
    MLPNames("fc_in", "fc_out"),  # GPT-J, CodeGen
    MLPNames("lin1", "lin2"),  # DistilBERT
    MLPNames("wi", "wo"),  # T5
    MLPNames("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon
    MLPNames("intermediate.dense", "output.dense"),  # BERT, whose MLP's layers are the block's own
)

HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
"""Attributes of an attention module that say how many channels a head has."""

VALUE_SIZES = ("v_head_dim",)
"""Where a head's value, and with it what it feeds into o, has a size of its own."""

HEAD_NORMS = {"q_norm": "q_proj", "k_norm": "k_proj"}
"""Norms over the channels of all heads of a projection: a permutation of the heads takes them along."""

SHARED_NORM = re.compile(r"^\w*(norm|ln)\w*\.(weight|bias)$")
"""Weights of one norm that every head goes through, by their path in the attention module; not a list of norms."""

POSITIONS = re.compile(r"(^|\.)(masked_)?(bias|mask)$")
"""Buffers over positions, of which there may be as many as channels."""

ACTIVATIONS = ("act_fn", "activation_fn", "act")
"""What an MLP calls its activation."""

RMS_NORM = "RMSNorm"
"""How the names of classes end that may be an RMSNorm; what they compute decides (`training/lean.py`)."""

NORM_EPSILONS = ("variance_epsilon", "eps")
"""What an RMSNorm calls its ε."""


def attention_names(module: nn.Module, linears: dict[str, nn.Module]) -> tuple[AttentionNames, str] | None:
    """The row that `module` is written by, and the name of its o."""
    for row in ATTENTION:
        output = next((name for name in row.o if name in linears), None)
        fits = row.where is None or getattr(module, row.where[0], None) == row.where[1]
        if output is not None and fits and {row.q, row.k, row.v} <= set(linears):
            return row, output
    return None


def mlp_names(linears: dict[str, nn.Module]) -> MLPNames | None:
    """The row that the module with these linear layers is written by."""
    return next((row for row in MLP if {row.up, row.down, row.gate or row.up} <= set(linears)), None)


def dotted_names() -> dict[str, set[str]]:
    """Child → the names that go through it."""
    names = {name for row in ATTENTION for name in (row.q, row.k, row.v, *row.o)}
    names |= {name for row in MLP for name in (row.up, row.down, row.gate or row.up)}
    dotted = sorted(name for name in names if "." in name)
    return {child: {n for n in dotted if n.startswith(f"{child}.")} for child in {n.partition(".")[0] for n in dotted}}


def looked_for() -> str:
    """What blocks are known by, in words.

    Example:
        >>> looked_for()[:56]
        'an attention block by its layer q_proj, q_lin, wq, q, se'
    """
    attention = ", ".join(dict.fromkeys(row.q for row in ATTENTION))
    mlp = ", ".join(dict.fromkeys(row.down for row in MLP))
    return f"an attention block by its layer {attention} (and their partners), an MLP by its layer {mlp}"
