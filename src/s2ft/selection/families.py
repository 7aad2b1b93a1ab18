"""By which names attention and MLP blocks are known, and how heads lie in their layers: a family of models is added here.

This is the one place that knows names of model code; what is read off a model beside them is shapes and what modules compute.
One row for each way in which model code writes a block. A name is looked for among the module's children, a dotted one
goes through a child (BERT: `attention.self.query`); the first row that is all there is taken. Layers that share a name are
fused: they hold their parts one after the other, in the row's order, or so in each of several runs. What s2ft takes from a row
is then checked against the shapes (`selection/structure.py`), and in training in place against the model's own output
(`training/probe.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

OUTPUTS = (
    *("o_proj", "out_proj", "dense", "c_proj", "proj", "projection", "projection_layer", "output", "out", "o"),
    *("Wo", "wo", "out_lin", "to_out", "linear_out", "post_proj", "attention_out", "o_proj.linear", "output.dense"),
)
"""What model code calls o."""

BY_GROUP = "group"
"""The runs of a fused layer: one for each key-value head, with its query heads, itself, and its value."""


@dataclass(frozen=True)
class AttentionNames:
    """An attention block: heads are rows of q (their groups rows of k and v), and columns of o."""

    q: str | None
    k: str | None  # None, as v's: q alone is here, and the heads of another layer's keys and values are used
    v: str | None  # None: the keys are the values, too
    o: tuple[str, ...] = OUTPUTS  # any of these
    order: str = "qkv"  # of the parts of a fused layer
    runs: int | str = 1  # so many times a fused layer holds its parts, for a share of the heads each; or BY_GROUP
    latent: bool = False  # keys and values are expanded from a latent: sizes of their heads are read off the layers
    mixed: str | None = None  # why the rows of q, k and v cannot be told apart: only o is then read, by heads
    where: str | None = None  # an attribute that the module must have
    paired: bool = False  # heads h and h + half of them make one unit (differential attention)

    @property
    def needed(self) -> set[str]:
        """The layers that must be there, beside o."""
        return {name for name in (self.q, self.k, self.v) if name}


@dataclass(frozen=True)
class MLPNames:
    """An MLP: channels are rows of up (and of gate), and columns of down."""

    up: str
    down: str
    gate: str | None = None
    beside: tuple[str, ...] = ()  # other layers that must be there

    @property
    def needed(self) -> set[str]:
        """The layers that must be there."""
        return {self.up, self.down, self.gate or self.up, *self.beside}


@dataclass(frozen=True)
class MixerNames:
    """A mixer of tokens that is no attention: only the input channels of its last layer are read."""

    out: str
    beside: tuple[str, ...]  # other layers that must be there

    @property
    def needed(self) -> set[str]:
        """The layers that must be there."""
        return {self.out, *self.beside}


def fused(
    name: str, *o: str, order: str = "qkv", runs: int | str = 1, mixed: str | None = None, where: str | None = None
) -> AttentionNames:
    """q, k and v in one layer."""
    return AttentionNames(name, name, name, o, order=order, runs=runs, mixed=mixed, where=where)


ATTENTION = (
    AttentionNames("q_proj", "k_proj", "v_proj", where="lambda_q1", paired=True),  # DiffLlama
    AttentionNames("q_proj", "k_proj", "v_proj"),  # Llama, OPT, Phi, ViT, CLIP
    AttentionNames("query", "key", "value"),  # ALBERT
    AttentionNames("query_proj", "key_proj", "value_proj"),  # ProphetNet
    AttentionNames("q_lin", "k_lin", "v_lin"),  # DistilBERT, XLM
    AttentionNames("q_head", "k_head", "v_head"),  # Funnel
    AttentionNames("q", "k", "v"),  # T5, MPNet
    AttentionNames("wq", "wk", "wv"),
    AttentionNames("Wq", "Wk", "Wv"),  # CTRL
    AttentionNames("linear_q", "linear_k", "linear_v"),  # Conformer
    AttentionNames("project_q", "project_k", "project_v"),  # CPM-Ant
    AttentionNames("to_q", "to_kv", "to_kv"),  # Granite Speech
    AttentionNames("self.query", "self.key", "self.value"),  # BERT
    AttentionNames("self.query_proj", "self.key_proj", "self.value_proj"),  # DeBERTa-v2
    AttentionNames("attention.query", "attention.key", "attention.value"),  # Data2Vec, Q-Former
    AttentionNames("longformer_self_attn.query", "longformer_self_attn.key", "longformer_self_attn.value"),  # LED
    AttentionNames("q_proj.linear", "k_proj.linear", "v_proj.linear"),  # Moshi, towers of Gemma 4
    AttentionNames("q_attn", "c_attn", "c_attn"),  # GPT-2's cross-attention
    AttentionNames("q_proj", "kv_b_proj", "kv_b_proj", runs=BY_GROUP, latent=True),  # DeepSeek-V2-Lite
    AttentionNames("q_b_proj", "kv_b_proj", "kv_b_proj", runs=BY_GROUP, latent=True),  # DeepSeek, MiniCPM3
    fused("c_attn", "c_proj", where="multi_query", runs=BY_GROUP),  # GPTBigCode
    fused("c_attn", "c_proj"),  # GPT-2
    fused("qkv_proj", "o_proj"),  # Phi-3
    fused("qkv_proj", "out_proj", where="scale_attn", order="qvk", runs=4),  # CodeGen, as it was cut for four TPUs
    fused("qkv_proj", "out_proj", where="slope_rate", runs=BY_GROUP),  # MiniMax's linear attention
    fused("query_key_value", "dense", runs=BY_GROUP),  # GPT-NeoX, BLOOM, Falcon, Persimmon
    fused("self.in_proj", "output.dense", runs=BY_GROUP),  # DeBERTa
    fused("Wqkv", "out_proj", "Wo"),  # MPT, ModernBERT
    fused("qkv", *OUTPUTS),  # towers of Qwen-VL, SAM, BLIP
    fused("kv_b_proj", "o_proj", mixed="keys and values are expanded from a latent, and its queries are not known"),
    AttentionNames("q_proj", "k_proj", None),  # Gemma 4, where keys are values
)

SHARED_KEYS = AttentionNames("q_proj", None, None, mixed="its keys and values are those of another layer")
"""Layers of Gemma 3n and 4 that have a query of their own alone."""

HEAD_GATES = ("gate_proj", "g_proj", "output_gate")
"""A layer beside q, k and v whose rows scale what each head, or each of its channels, feeds into o."""

MLP = (
    MLPNames("up_proj", "down_proj", "gate_proj"),  # Llama
    MLPNames("up_proj.linear", "down_proj.linear", "gate_proj.linear"),  # towers of Gemma 4
    MLPNames("gate_up_proj", "down_proj", "gate_up_proj"),  # Phi-3
    MLPNames("w3", "w2", "w1"),
    MLPNames("input_linear", "output_linear", "input_linear"),  # Granite's shared expert
    MLPNames("wi_1", "wo", "wi_0"),  # T5 1.1
    MLPNames("Wi", "Wo", "Wi"),  # ModernBERT
    MLPNames("weights_in", "weights_out", "weights_in"),  # DINOv2, the giant one
    MLPNames("w_in.w_1", "w_out", "w_in.w_0"),  # CPM-Ant
    MLPNames("proj_up", "proj_down", "proj_up_gate"),  # xLSTM
    MLPNames("up_proj", "down_proj"),  # Nemotron
    MLPNames("c_fc", "c_proj"),  # GPT-2
    MLPNames("fc1", "fc2"),  # OPT, Phi, CLIP
    MLPNames("fc1", "fc2", "fc1"),  # Moshi, Moonshine
    MLPNames("fc_in", "fc_out"),  # GPT-J, CodeGen
    MLPNames("lin1", "lin2"),  # DistilBERT
    MLPNames("wi", "wo"),  # T5
    MLPNames("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon
    MLPNames("intermediate.dense", "output.dense"),  # BERT, whose MLP's layers are the block's own
    MLPNames("intermediate_query.dense", "output_query.dense"),  # Q-Former
    MLPNames("intermediate_dense", "output_dense"),  # wav2vec 2, Conformer
    MLPNames("intermediate", "output"),  # ProphetNet
    MLPNames("ffn", "ffn_output"),  # ALBERT
    MLPNames("layer_1", "layer_2"),  # XLNet
    MLPNames("linear_fc1", "linear_fc2"),  # towers of Qwen3-VL
    MLPNames("linear1", "linear2"),
    MLPNames("linear_1", "linear_2"),  # Funnel, LLaVA's projector
    MLPNames("dense1", "dense2"),  # Perceiver
    MLPNames("pwconv1", "pwconv2"),  # ConvNeXt
    MLPNames("ffw_layer_1.linear", "ffw_layer_2.linear"),  # audio tower of Gemma 4
    MLPNames("ffn.0", "ffn.2"),  # CTRL
    MLPNames("mlp.0", "mlp.2"),  # Qwen2-VL's merger
    MLPNames("key", "value", beside=("receptance",)),  # RWKV
)

MIXERS = (
    MixerNames("out_proj", ("in_proj",)),  # Mamba, and the mixers of Jamba, Bamba, Zamba, Nemotron-H, LFM2
    MixerNames("out_proj", ("in_proj_qkv",)),  # Qwen3.5
    MixerNames("out_proj", ("in_proj_qkvz",)),  # Qwen3-Next
    MixerNames("o_proj", ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj")),  # OLMo Hybrid
    MixerNames("out_proj", ("q", "k", "v", "ogate_preact")),  # xLSTM
    MixerNames("linear_out", ("linear_x", "linear_y")),  # RecurrentGemma
    MixerNames("output", ("key", "value", "receptance")),  # RWKV
    MixerNames("o_b_proj", ("q_b_proj", "kv_proj")),  # DeepSeek-V4, whose o goes through a latent
)

MIXER = "a mixer has states of its own beside its layers, so s2ft leaves its channels in their order"

ROUTER = re.compile(r"(^|\.)\w*(router|routing)\w*(\.|$)")
"""Paths of what sends tokens to experts, whose layers are trained only when they are named."""

HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
"""Attributes of an attention module that say how many channels a head has."""

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
"""Attributes that say how many heads there are."""

VALUE_SIZES = ("v_head_dim",)
"""Where a head's value, and with it what it feeds into o, has a size of its own."""

HEAD_NORMS = {"q_norm": "q_proj", "k_norm": "k_proj"}
"""Norms over the channels of all heads of a projection: a permutation of the heads takes them along."""

BEFORE_HEADS = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_a_proj")
"""What lies before a latent, and knows nothing of heads, whatever its size."""

SHARED_NORM = re.compile(r"^\w*(norm|ln)\w*\.(weight|bias)$")
"""Weights of one norm that every head goes through, by their path in the attention module; not a list of norms."""

POSITIONS = re.compile(r"(^|\.)((masked_)?(bias|mask)|embed_positions)$")
"""Buffers over positions, of which there may be as many as channels."""

ACTIVATIONS = ("act_fn", "activation_fn", "act")
"""What an MLP calls its activation."""

RMS_NORM = "RMSNorm"
"""How the names of classes end that may be an RMSNorm; what they compute decides (`training/lean.py`)."""

NORM_EPSILONS = ("variance_epsilon", "eps")
"""What an RMSNorm calls its ε."""


def attention_names(module: nn.Module, linears: Collection[str]) -> tuple[AttentionNames, str] | None:
    """The row that `module` is written by, and the name of its o."""
    for row in (*ATTENTION, SHARED_KEYS):
        output = next((name for name in row.o if name in linears), None)
        fits = row.where is None or any(hasattr(part, row.where) for part in (module, *module.children()))
        if output is not None and fits and row.needed <= set(linears):
            return row, output
    return None


def mlp_names(linears: Collection[str]) -> Iterator[MLPNames]:
    """The rows that a module with these linear layers may be written by."""
    return (row for row in MLP if row.needed <= set(linears))


def mixer_names(linears: Collection[str]) -> MixerNames | None:
    """The row that a mixer with these linear layers is written by."""
    return next((row for row in MIXERS if row.needed <= set(linears)), None)


def dotted_names() -> dict[str, set[str]]:
    """Child → the names that go through it."""
    rows = (*ATTENTION, *MLP, *MIXERS)
    names = {name for row in rows for name in row.needed} | {name for row in ATTENTION for name in row.o}
    dotted = sorted(name for name in names if "." in name)
    return {child: {n for n in dotted if n.startswith(f"{child}.")} for child in {n.partition(".")[0] for n in dotted}}


def looked_for() -> str:
    """What blocks are known by, in words.

    Example:
        >>> looked_for()[:56]
        'an attention block by its layer q_proj, query, query_pro'
    """
    attention = ", ".join(dict.fromkeys(row.q for row in ATTENTION if row.q))
    mlp = ", ".join(dict.fromkeys(row.down for row in MLP))
    return f"an attention block by its layer {attention} (and their partners), an MLP by its layer {mlp}"
