"""What `find_structures` says is coupled is coupled: permuting both sides of a structure leaves the model's output
unchanged.
"""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from families import FAMILIES, build, tokens
from permuting import head_order, permute_projection
from s2ft import S2FTError
from s2ft.selection.structure import find_structures, read_structures


@pytest.mark.parametrize("family", FAMILIES)
def test_permuting_a_structure_on_both_sides_leaves_the_output_unchanged(family: str) -> None:
    model, x = build(family), tokens(2, 12)
    before = model(x).logits
    for structure in find_structures(model):
        heads, groups = head_order(structure)
        for projection in structure.projections:
            permute_projection(model, projection, heads if projection.units == structure.units else groups)
    torch.testing.assert_close(model(x).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_permuting_one_side_alone_changes_the_output(family: str, kind: str) -> None:
    model, x = build(family), tokens(2, 12)
    before = model(x).logits
    structure = next(s for s in find_structures(model) if s.kind == kind)
    last = structure.projections[-1]
    permute_projection(model, last, torch.arange(last.units).flip(0))
    assert (model(x).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_has_both_structures_with_the_sizes_of_the_config(family: str) -> None:
    model = build(family)
    config = model.config
    found = find_structures(model)
    assert [s.kind for s in found] == ["attention", "mlp"] * 3
    assert [s.layer for s in found] == [0, 0, 1, 1, 2, 2]
    attention, mlp = found[:2]
    assert attention.units == attention["o_proj"].units == attention["q_proj"].units == config.num_attention_heads
    assert attention.groups == attention["k_proj"].units == getattr(config, "num_key_value_heads", 4)
    assert mlp.units == 44
    assert {p.name for p in mlp.projections} >= {"up_proj", "down_proj"}


def test_fused_projections_lie_one_after_the_other() -> None:
    attention, mlp = find_structures(build("phi3"))[:2]
    assert [attention[name].offset for name in ("q_proj", "k_proj", "v_proj")] == [0, 24, 36]
    assert [mlp[name].offset for name in ("gate_proj", "up_proj")] == [0, 44]


def test_head_dim_of_the_module_wins_over_the_config() -> None:
    model = build("llama")  # hidden 24, four heads of 10
    assert find_structures(model)[0]["o_proj"].width == 10


class _Attention(nn.Module):
    def __init__(self, head_dim: int | None, k_features: int = 8) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(16, 16),
            nn.Linear(16, k_features),
            nn.Linear(16, 8),
            nn.Linear(16, 16),
        )
        if head_dim:
            self.head_dim = head_dim


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (
            _Attention(None),
            "attn has the projections of an attention block, but no size of a head: looked for head_dim",
        ),
        (_Attention(5), "attn: attn.o_proj.in_features is 16, which is no multiple of head_dim = 5"),
        (
            _Attention(4, k_features=12),
            "attn: the number of query heads is 4, which is no multiple of the number of key-value heads = 3",
        ),
        (_Attention(4, k_features=16), "attn.v_proj has 8 output channels; looked for 16"),
    ],
)
def test_an_unreadable_block_is_named_with_what_was_looked_for(attention: nn.Module, message: str) -> None:
    model = nn.ModuleDict({"attn": attention})
    with pytest.raises(S2FTError, match=message):
        find_structures(model)
    assert read_structures(model).structures == []


def test_a_model_on_meta_is_read_too() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=2))
    assert [s.units for s in find_structures(model)] == [12, 3072, 12, 3072]
