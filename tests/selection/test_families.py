"""Names and layouts of further families: what is read is right, and what cannot be read is said."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from families import TWO_BLOCKS, VOCABULARY, tokens
from permuting import head_order, permute_projection
from s2ft import S2FTConfig, S2FTError, in_place, select
from s2ft.layer.linears import linear_layer
from s2ft.selection import families
from s2ft.selection.structure import find_structures
from s2ft.selection.units import Structure
from s2ft.selection.weight_scores import unit_weights
from s2ft.training.obstacles import find_obstacles

GPT = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 44, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
EXPERTS = {**TWO_BLOCKS, "num_key_value_heads": 2, "moe_intermediate_size": 20, "num_experts_per_tok": 2}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "d_kv": 10,
    "d_ff": 44,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0,
}
FALCON = {"alibi": False, "new_decoder_architecture": False, "attention_dropout": 0, "hidden_dropout": 0}
MLA = {"kv_lora_rank": 14, "q_lora_rank": None, "qk_rope_head_dim": 6, "qk_nope_head_dim": 8, "v_head_dim": 10}

COMPLETE: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**TWO_BLOCKS)),
    "distilbert": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(vocab_size=VOCABULARY, dim=24, hidden_dim=44, n_layers=2, n_heads=4)
    ),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**TWO_BLOCKS, pad_token_id=0, local_attention=4)
    ),
    "modernbert-decoder": lambda: hf.ModernBertDecoderForCausalLM(
        hf.ModernBertDecoderConfig(**TWO_BLOCKS, pad_token_id=0)
    ),
    "gpt2-cross": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT, **NO_DROPOUT, add_cross_attention=True)),
    "gpt-bigcode": lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**GPT, **NO_DROPOUT, multi_query=True)),
    "gpt-bigcode-mha": lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**GPT, **NO_DROPOUT, multi_query=False)),
    "codegen": lambda: hf.CodeGenForCausalLM(hf.CodeGenConfig(**{**GPT, "n_head": 8, "n_embd": 32}, rotary_dim=2)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TWO_BLOCKS)),
    "persimmon": lambda: hf.PersimmonForCausalLM(hf.PersimmonConfig(**{**TWO_BLOCKS, "hidden_size": 32})),
    "falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**TWO_BLOCKS, **FALCON, multi_query=False)),
    "falcon-multi-query": lambda: hf.FalconForCausalLM(hf.FalconConfig(**TWO_BLOCKS, **FALCON, multi_query=True)),
    "falcon-grouped": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**TWO_BLOCKS, **{**FALCON, "new_decoder_architecture": True}, num_kv_heads=2)
    ),
    "diffllama": lambda: hf.DiffLlamaForCausalLM(
        hf.DiffLlamaConfig(**{**TWO_BLOCKS, "num_attention_heads": 8}, num_key_value_heads=4, head_dim=6)
    ),
    "minicpm3": lambda: hf.MiniCPM3ForCausalLM(
        hf.MiniCPM3Config(**TWO_BLOCKS, num_key_value_heads=4, **{**MLA, "q_lora_rank": 12})
    ),
    "deepseek-v2": lambda: hf.DeepseekV2ForCausalLM(
        hf.DeepseekV2Config(
            **{**EXPERTS, "num_key_value_heads": 4},
            **MLA,
            n_routed_experts=4,
            n_shared_experts=2,
            first_k_dense_replace=1,
        )
    ),
    "qwen3-next": lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **EXPERTS,
            head_dim=8,
            num_experts=4,
            shared_expert_intermediate_size=12,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=6,
            linear_value_head_dim=6,
            layer_types=["linear_attention", "full_attention"],
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**TWO_BLOCKS, num_key_value_heads=2, num_local_experts=4)
    ),
    "granite-moe-hybrid": lambda: hf.GraniteMoeHybridForCausalLM(
        hf.GraniteMoeHybridConfig(
            **TWO_BLOCKS,
            num_key_value_heads=2,
            num_local_experts=0,
            shared_intermediate_size=12,
            mamba_n_heads=4,
            mamba_d_head=12,
            layer_types=["attention", "attention"],
        )
    ),
}
ORDERED: dict[str, Callable[[], PreTrainedModel]] = {  # a bias on positions knows the heads by their number
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "t5-gated": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=24, n_layer=2, n_head=4)),
    "mpt": lambda: hf.MptForCausalLM(
        hf.MptConfig(vocab_size=VOCABULARY, d_model=24, n_heads=4, n_layers=2, max_seq_len=64)
    ),
}
KINDS = {"mixtral": {"attention"}, **{family: {"mlp"} for family in ORDERED}}
PARTIAL: dict[str, Callable[[], PreTrainedModel]] = {  # only o is read, by heads
    "axk2": lambda: hf.AXK2ForCausalLM(
        hf.AXK2Config(**{**EXPERTS, "num_key_value_heads": 4}, **{**MLA, "q_lora_rank": 12}, n_routed_experts=4)
    ),
}


def built(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """In float64, with biases and norms that show when they are left behind."""
    model = make().to(torch.float64).eval()
    model.set_experts_implementation("eager")  # grouped products have no float64
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    x = tokens(2, 9)
    if model.config.is_encoder_decoder:
        return {"input_ids": x, "decoder_input_ids": tokens(2, 7)}
    if getattr(model.config, "add_cross_attention", False):
        return {"input_ids": x, "encoder_hidden_states": torch.randn(2, 5, 24, dtype=torch.float64)}
    return {"input_ids": x}


@pytest.mark.parametrize("family", [*COMPLETE, *ORDERED])
def test_a_complete_structure_can_be_permuted(family: str) -> None:
    model = built({**COMPLETE, **ORDERED}[family])
    given = inputs(model)
    before = model(**given).logits
    structures = [
        s for s in find_structures(model) if s.kind == "mlp" or (s.kind == "attention" and family in COMPLETE)
    ]
    assert {s.kind for s in structures} == KINDS.get(family, {"attention", "mlp"})
    for structure in structures:
        heads, groups = head_order(structure)
        for projection in structure.projections:
            permute_projection(model, projection, heads if projection.units == structure.units else groups)
    torch.testing.assert_close(model(**given).logits, before, rtol=1e-6, atol=1e-6)


def fed_by(model: PreTrainedModel, structure: Structure) -> list[set[tuple[str, int]]]:
    """For each head: the output channels of the layers below (module, channel) that reach what it feeds into o."""
    output = linear_layer(model.get_submodule(structure["o_proj"].module))
    names = {p.module for p in structure.projections if p.side == "out"} or {
        f"{structure.path}.{n}" for n in ("kv_b_proj", "qkv_proj", "c_attn", "query_key_value")
    }
    below = {name: module for name, module in model.named_modules() if name in names}
    kept: dict[str, torch.Tensor] = {}

    def keep_rows(name: str, rows: torch.Tensor) -> torch.Tensor:
        kept[name] = rows.detach().requires_grad_()
        return kept[name]

    hooks = [m.register_forward_hook(lambda _, __, y, name=name: keep_rows(name, y)) for name, m in below.items()]
    hooks.append(output.register_forward_pre_hook(lambda _, given: kept.update(heads=given[0])))
    model(**inputs(model))
    for hook in hooks:
        hook.remove()
    heads, width, found = kept.pop("heads"), structure["o_proj"].width, []
    for head in range(structure.units):
        part = heads[..., head * width : (head + 1) * width]
        gradients = torch.autograd.grad((part * torch.randn_like(part)).sum(), list(kept.values()), retain_graph=True)
        sums = zip(kept, (gradient.flatten(0, -2).abs().sum(0) for gradient in gradients), strict=True)
        found.append({(name, row) for name, total in sums for row in total.nonzero().flatten().tolist()})
    return found


@pytest.mark.parametrize("family", [*ORDERED, *COMPLETE])
def test_a_head_of_o_is_fed_by_its_rows_of_q_k_and_v_alone(family: str) -> None:
    model = built({**ORDERED, **COMPLETE}[family])
    for structure in [s for s in find_structures(model) if s.kind == "attention"]:
        for head, found in enumerate(fed_by(model, structure)):
            own = set()
            for p in [p for p in structure.projections if p.side == "out"]:
                own |= {(p.module, row) for row in p.grid[head * p.units // structure.units]}
            assert found == own


@pytest.mark.parametrize("family", ["gpt-neox", "falcon-grouped", "codegen", "minicpm3", "diffllama"])
def test_the_weights_of_a_head_are_its_rows_and_columns(family: str) -> None:
    model = built(COMPLETE[family])
    for projection in [p for s in find_structures(model) for p in s.projections]:
        weight = linear_layer(model.get_submodule(projection.module)).weight
        rows = weight if projection.side == "out" else weight.T
        expected = torch.stack([rows[torch.from_numpy(channels)] for channels in projection.grid])
        assert torch.equal(unit_weights(projection, model), expected)


@pytest.mark.parametrize("family", PARTIAL)
def test_where_q_k_and_v_lie_mixed_the_heads_of_o_are_still_heads(family: str) -> None:
    model = built(PARTIAL[family])
    attention = next(s for s in find_structures(model) if s.kind == "attention")
    assert [p.name for p in attention.projections] == ["o_proj"]
    assert attention.partial is not None
    sets = fed_by(model, attention)
    assert all(sets)
    assert len({len(rows) for rows in sets}) == 1
    assert len(set().union(*sets)) == sum(map(len, sets))  # no row feeds two heads: the units are whole heads


@pytest.mark.parametrize("family", PARTIAL)
def test_rows_that_are_no_heads_are_refused_with_the_reason(family: str) -> None:
    model = built(PARTIAL[family])
    with pytest.raises(
        S2FTError, match=r"no projection v_proj that s2ft can read; .*Not read: q, k and v are not read off"
    ):
        select(model, S2FTConfig(ratios={"v_proj": 0.5}))
    slices = select(model, S2FTConfig(ratios={"o_proj": 0.5, "down_proj": 0.5}, seed=0)).slices
    assert {chosen.side for chosen in slices.values()} == {"in"}


class _Odd(nn.Module):
    """An attention whose q cannot be read, beside an MLP that can."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        for name, rows in {"q_proj": 13, "k_proj": 8, "v_proj": 8, "o_proj": 8}.items():
            self.attn.add_module(name, nn.Linear(8, rows))
        self.attn.head_dim = 4
        self.mlp.up_proj, self.mlp.down_proj = nn.Linear(8, 40), nn.Linear(40, 8)


def test_an_unreadable_block_does_not_keep_the_others_from_training() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([_Odd(), _Odd()])})
    slices = select(model, S2FTConfig(ratios={"down_proj": 0.1}, seed=0)).slices
    assert {path: len(chosen.indices) for path, chosen in slices.items()} == {
        f"layers.{i}.mlp.down_proj": 4 for i in (0, 1)
    }
    with pytest.warns(
        UserWarning, match=r"layers\.\*\.attn \(2 Module, 592 parameters\): .*q_proj has 13 output channels"
    ):
        assert set(select(model, S2FTConfig(budget=0.05, seed=0)).slices) == set(slices)
    with pytest.raises(S2FTError, match=r"no projection o_proj .*attn.q_proj has 13 output channels; looked for 8"):
        select(model, S2FTConfig(ratios={"o_proj": 0.5, "down_proj": 0.1}))


@pytest.mark.parametrize(
    ("make", "ratios", "reason"),
    [
        (
            lambda: hf.LongcatFlashForCausalLM(
                hf.LongcatFlashConfig(
                    **{**EXPERTS, "num_key_value_heads": 4}, **{**MLA, "q_lora_rank": 12}, n_routed_experts=4
                )
            ),
            {"gate_proj": 0.5, "out_proj": 0.5},
            r"mlp\.experts \(\d \w+Experts, .* parameters\): LongcatFlashExperts runs its experts by code of its own",
        ),
        (
            lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2)),
            {"down_proj": 0.5},
            r"a mixer has states of its own",
        ),
    ],
    ids=["longcat", "mamba"],
)
def test_what_is_not_there_is_refused_with_what_is_left_out(make: Callable, ratios: object, reason: str) -> None:
    with pytest.raises(
        S2FTError, match=rf"has no projection .*(down|out)_proj that s2ft can read; .*Not read: .*{reason}"
    ):
        select(built(make), S2FTConfig(ratios=ratios))


MIXERS: dict[
    str, tuple[Callable[[], PreTrainedModel], set[str], int]
] = {  # the last layers of its mixers, their inputs
    "mamba": (
        lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, state_size=5)),
        {"backbone.layers.0.mixer.out_proj", "backbone.layers.1.mixer.out_proj"},
        48,
    ),
    "recurrent-gemma": (
        lambda: hf.RecurrentGemmaForCausalLM(
            hf.RecurrentGemmaConfig(**{**TWO_BLOCKS, "num_hidden_layers": 3}, lru_width=40, num_key_value_heads=1)
        ),
        {"model.layers.0.temporal_block.linear_out", "model.layers.1.temporal_block.linear_out"},
        40,
    ),
    "qwen3-next": (COMPLETE["qwen3-next"], {"model.layers.0.linear_attn.out_proj"}, 24),
}


@pytest.mark.parametrize("family", MIXERS)
def test_a_mixer_trains_the_input_side_of_its_last_layer_by_default(family: str) -> None:
    make, paths, channels = MIXERS[family]
    model = built(make)
    slices = select(model, S2FTConfig(ratios=0.25, seed=0)).slices
    mixers = {path: chosen for path, chosen in slices.items() if path in paths}
    assert set(mixers) == paths
    assert {(chosen.side, len(chosen.indices)) for chosen in mixers.values()} == {("in", channels // 4)}
    assert set(select(model, S2FTConfig(ratios={"out_proj": 0.25}, seed=0)).slices) == paths
    tuned = get_peft_model(model, S2FTConfig(ratios={"out_proj": 0.25}, seed=0, init_weights=False))
    with in_place(tuned) as layout:
        assert {(place.how, "a mixer has states" in place.reason) for place in layout.placements} == {
            ("gathered", True)
        }


def test_what_knows_berts_heads_beside_its_layers_keeps_their_order() -> None:
    """Nystromformer has a convolution with one kernel for each head; BERT has nothing, though its norm has their size."""
    for make, kept in (
        (
            lambda: hf.NystromformerForMaskedLM(hf.NystromformerConfig(**TWO_BLOCKS, conv_kernel_size=3)),
            "self.conv.weight",
        ),
        (COMPLETE["bert"], None),
    ):
        model = make()
        structures = find_structures(model)
        found, _, _ = find_obstacles(model, structures, live=False)
        unmovable = {p.module: found[p.module] for s in structures for p in s.projections if p.module in found}
        assert len(unmovable) == (0 if kept is None else 2 * 4)
        assert all(f"attention.{kept} has the size of its heads or channels" in reason for reason in unmovable.values())


def test_bert_by_target_modules_is_sliced_by_heads() -> None:
    config = S2FTConfig(
        ratios=0.5, target_modules=["query", "value", "dense"], exclude_modules=r".*(cls|pooler).*", seed=0
    )
    slices = select(built(COMPLETE["bert"]), config).slices
    for path, chosen in slices.items():
        if ".attention." not in path:
            continue
        assert chosen.side == ("in" if path.endswith("output.dense") else "out")
        heads = chosen.indices.reshape(-1, 6)
        assert (heads == heads[:, :1] // 6 * 6 + range(6)).all(), re.sub(r"\d", "*", path)


class _NewAttention(nn.Module):
    """A family that nobody has heard of: its layers' names are in no row."""

    def __init__(self, size: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim, self.heads = head_dim, heads
        for name in ("query_map", "key_map", "value_map"):
            self.add_module(name, nn.Linear(size, heads * head_dim, bias=False))
        self.back_map = nn.Linear(heads * head_dim, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, length, size], as is the result
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query_map, self.key_map, self.value_map)
        )
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.back_map(heads.transpose(1, 2).flatten(2))


class _NewMLP(nn.Module):
    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(size, channels), nn.Linear(channels, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, length, size], as is the result
        return self.narrow(torch.relu(self.wide(x)))


class _NewModel(hf.PreTrainedModel):
    config_class = hf.PreTrainedConfig

    def __init__(self, config: hf.PreTrainedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attend": _NewAttention(24, heads=4, head_dim=6), "mix": _NewMLP(24, 44)}) for _ in "ab"
        )

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:  # [batch, length] → [batch, length, size]
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block["attend"](x)
            x = x + block["mix"](x)
        return (x,)


def test_a_row_in_the_table_is_all_that_a_new_family_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its channels are chosen, nothing of it is left out, and it computes the same in place."""
    model = _NewModel(hf.PreTrainedConfig())
    assert find_structures(model) == []
    with pytest.raises(S2FTError, match=r"attend \(2 _NewAttention, .*\): its layers are known neither as"):
        select(model, S2FTConfig(ratios=0.5))
    names = families.AttentionNames("query_map", "key_map", "value_map", ("back_map",))
    monkeypatch.setattr(families, "ATTENTION", (*families.ATTENTION, names))
    monkeypatch.setattr(families, "MLP", (*families.MLP, families.MLPNames("wide", "narrow")))
    ratios = {"v_proj": 0.5, "o_proj": 0.25, "up_proj": 0.5, "down_proj": 0.25}
    selection = select(model, S2FTConfig(ratios=ratios, seed=0))
    layers = ("attend.value_map", "attend.back_map", "mix.wide", "mix.narrow")
    assert set(selection.slices) == {f"blocks.{block}.{name}" for block in "01" for name in layers}
    assert selection.left_out == ""
    tuned = get_peft_model(model, replace(selection.config, init_weights=False))
    x = tokens(2, 5)
    (before,) = tuned(x)
    with in_place(tuned) as layout:
        assert {place.how for place in layout.placements} == {"contiguous"}
        torch.testing.assert_close(tuned(x)[0], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [{"ratios": 0.5}, {"budget": 0.1}, {"target_modules": "all-linear", "ratios": 0.5}])
def test_a_model_without_a_linear_layer_is_named(config: dict[str, Any]) -> None:
    with pytest.raises(S2FTError, match="Embedding has no linear layer, and s2ft trains slices of linear layers"):
        select(nn.Embedding(4, 4), S2FTConfig(**config))
