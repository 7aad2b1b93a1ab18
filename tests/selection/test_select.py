"""Which channels are chosen: counts, nesting, groups, avoidance, seeds, and the errors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.llama.modeling_llama import LlamaAttention

from families import FAMILIES, build, tokens
from s2ft import S2FTConfig, S2FTError, select
from s2ft.format.choice import chosen_layers
from s2ft.format.slices import Slice
from s2ft.format.terms import STRATEGIES
from s2ft.selection.budget import shared, spread
from s2ft.selection.scores import score_units
from s2ft.selection.structure import find_structures


def heads(slices: dict[str, Slice], path: str, width: int, offset: int = 0) -> set[int]:
    return set(((slices[path].indices - offset) // width).tolist())


@given(st.lists(st.floats(0, 50), min_size=1, max_size=40))
def test_spread_keeps_the_running_total(shares: list[float]) -> None:
    counts = np.array(spread(shares))
    assert (counts >= 0).all()
    assert (np.abs(counts.cumsum() - np.cumsum(shares)) <= 0.5 + 1e-6).all()


@given(st.sets(st.integers(0, 200), min_size=1))
def test_a_slice_is_written_and_read_back(channels: set[int]) -> None:
    chosen = Slice("in", np.array(sorted(channels)))
    assert Slice.parse(str(chosen)).indices.tolist() == sorted(channels)
    assert Slice.parse(str(chosen)).side == "in"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "in",
        "in ",
        "up 3",
        "in 3,3",
        "in 5-4",
        "in 7,3",
        "in 1-4,4",
        "in -1",
        "in 1;2",
        "in a",
        "in 1.5",
        "in 0-99999999999",
    ],
)
def test_a_malformed_slice_is_refused(text: str) -> None:
    with pytest.raises(S2FTError, match="slice"):
        Slice.parse(text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_family_and_strategy_chooses_what_the_ratios_say(family: str, strategy: str) -> None:
    model, batches = build(family), [{"input_ids": tokens(2, 6)}]
    slices = select(model, S2FTConfig(ratios={"o_proj": 0.5, "down_proj": 0.25}, strategy=strategy), batches).slices
    assert len(slices) == 6
    for structure in find_structures(model):
        last = structure.projections[-1]
        chosen = slices[last.module]
        assert chosen.side == "in"
        assert len(np.unique(chosen.indices)) == (2 * last.width if structure.kind == "attention" else 11)


@pytest.mark.parametrize("subset", ["largest", "smallest"])
@pytest.mark.parametrize("strategy", ["weight", "activation", "product", "gradient"])
def test_the_chosen_units_have_the_extreme_scores(strategy: str, subset: str) -> None:
    model, batches = build("gemma3"), [{"input_ids": tokens(2, 6)}]
    structures = find_structures(model)
    scores = score_units(strategy, structures, model, batches)
    slices = select(model, S2FTConfig(ratios=0.25, strategy=strategy, subset=subset), batches).slices
    for structure in structures:
        last = structure.projections[-1]
        chosen = sorted(heads(slices, last.module, last.width))
        order = np.argsort(scores[structure.key], kind="stable")
        best = order[::-1] if subset == "largest" else order
        assert chosen == sorted(best[: len(chosen)].tolist())


@pytest.mark.parametrize("strategy", ["random", "weight"])
def test_fewer_units_lie_among_more_and_query_heads_in_the_chosen_groups(strategy: str) -> None:
    model = build("llama")  # 4 query heads of width 10, 2 groups
    ratios = {"q_proj": 0.5, "k_proj": 0.5, "v_proj": 0.5, "o_proj": 0.25, "up_proj": 0.5, "down_proj": 0.2}
    slices = select(model, S2FTConfig(ratios=ratios, strategy=strategy, seed=5)).slices
    for layer in range(3):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        groups = heads(slices, f"{attention}.k_proj", 10)
        assert groups == heads(slices, f"{attention}.v_proj", 10)
        assert {head // 2 for head in heads(slices, f"{attention}.q_proj", 10)} == groups
        assert heads(slices, f"{attention}.o_proj", 10) < heads(slices, f"{attention}.q_proj", 10)
        assert set(slices[f"{mlp}.down_proj"].indices) < set(slices[f"{mlp}.up_proj"].indices)


def test_a_query_head_is_chosen_on_o_by_itself() -> None:
    slices = select(build("llama-mqa"), S2FTConfig(ratios={"o_proj": 0.25}, seed=0)).slices
    assert [len(chosen.indices) for chosen in slices.values()] == [
        6,
        6,
        6,
    ]  # one head of four, though all share one group


def test_a_fused_layer_holds_one_slice_with_the_rows_of_each_projection() -> None:
    slices = select(build("phi3"), S2FTConfig(ratios={"q_proj": 0.25, "v_proj": 0.5}, seed=0)).slices
    for chosen in slices.values():
        assert chosen.side == "out"
        assert ((chosen.indices < 24).sum(), (chosen.indices >= 36).sum()) == (6, 6)


def test_same_seed_same_channels_other_seed_other_channels() -> None:
    model = build("qwen3")
    one, same, other = (select(model, S2FTConfig(ratios=0.25, seed=seed)).config.slices for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_without_a_seed_each_selection_is_fresh_and_its_seed_is_kept() -> None:
    model = build("qwen3")
    one, other = (select(model, S2FTConfig(ratios=0.25, strategy="random")).config for _ in range(2))
    assert one.slices != other.slices
    assert select(model, S2FTConfig(ratios=0.25, seed=one.seed)).config.slices == one.slices
    torch.manual_seed(3)
    first = select(model, S2FTConfig(ratios=0.25, strategy="random")).config.slices
    torch.manual_seed(3)
    assert select(model, S2FTConfig(ratios=0.25, strategy="random")).config.slices == first


def test_the_random_choice_is_fixed_across_machines() -> None:
    slices = select(build("llama"), S2FTConfig(ratios={"down_proj": 0.1}, seed=0)).config.slices
    assert slices == DOWN_AT_SEED_0


DOWN_AT_SEED_0 = {
    "model.layers.0.mlp.down_proj": "in 8,10,19,30",
    "model.layers.1.mlp.down_proj": "in 3,30,33-35",
    "model.layers.2.mlp.down_proj": "in 1,7,23,25",
}


def test_uniform_shares_are_spent_exactly_over_the_layers() -> None:
    slices = select(build("llama"), S2FTConfig(ratios={"o_proj": 0.4}, seed=0)).slices  # 1.6 heads a layer
    assert [len(chosen.indices) // 10 for chosen in slices.values()] == [2, 1, 2]


def test_global_allocation_ranks_over_the_whole_model() -> None:
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight.data *= 100
    config = S2FTConfig(ratios={"down_proj": 0.2}, strategy="weight", allocation="global")
    slices = select(model, config).slices
    assert list(slices) == ["model.layers.1.mlp.down_proj"]
    assert len(slices["model.layers.1.mlp.down_proj"].indices) == round(0.2 * 3 * 44)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "layers.0.self_attn.v_proj"]])
def test_global_allocation_ranks_blocks_with_and_without_groups_together(targets: list[str]) -> None:
    model = build("llama")
    sizes = {**model.config.to_dict(), "num_key_value_heads": 4}
    model.model.layers[1].self_attn = LlamaAttention(LlamaConfig(**sizes), 1).double()
    config = S2FTConfig(ratios=0.5, target_modules=targets, strategy="weight", allocation="global")
    slices = select(model, config).slices

    structures = [structure for structure in find_structures(model) if structure.kind == "attention"]
    scores, ranked, groups = score_units("weight", structures, model), [], []
    for structure in structures:
        grouped = np.array(scores[structure.key]).reshape(structure.groups, -1)
        by_group = targets[1] in f"{structure.path}.v_proj"
        heads = [(group.mean() if by_group else one, one) for group in grouped for one in group]
        ranked += [(*rank, structure.path, head) for head, rank in enumerate(heads)]
        groups += [(group.mean(), structure.path, number) for number, group in enumerate(grouped) if by_group]
    assert chosen_units(slices, "q_proj", 10) == {unit[2:] for unit in sorted(ranked)[-6:]}
    assert chosen_units(slices, "v_proj", 10) == {unit[1:] for unit in sorted(groups)[-len(groups) // 2 :]}


@pytest.mark.parametrize("subset", ["largest", "smallest"])
@pytest.mark.parametrize("strategy", ["weight", "lift", "saliency"])
def test_a_few_heads_of_v_and_o_beside_down_are_the_first_of_the_whole_model(strategy: str, subset: str) -> None:
    """Two groups of v, three heads of o within them, and 13 channels of down, wherever in the model their scores lie."""
    model, batches = build("llama", torch.float32), [{"input_ids": tokens(2, 9)}]
    ratios = {"v_proj": 2 / 6, "o_proj": 3 / 12, "down_proj": 13 / 132}
    config = S2FTConfig(ratios=ratios, strategy=strategy, subset=subset, allocation="global")
    slices = select(model, config, batches).slices

    structures = [structure for structure in find_structures(model) if structure.kind in ("attention", "mlp")]
    scores, sign = score_units(strategy, structures, model, batches), -1 if subset == "largest" else 1
    units = {s.path: sign * scores[s.key] for s in structures}
    down = sorted((score, path, unit) for path in units if "mlp" in path for unit, score in enumerate(units[path]))
    pairs = {path: found.reshape(2, 2) for path, found in units.items() if "attn" in path}  # [groups, heads of a group]
    groups = sorted((np.mean(heads), path, group) for path, found in pairs.items() for group, heads in enumerate(found))
    (_, path, first), (_, other, second) = groups[:2]
    third = 2 * second + int(np.argmin(pairs[other][second]))
    assert chosen_units(slices, "down_proj", 1) == {(path, unit) for _, path, unit in down[:13]}
    assert chosen_units(slices, "v_proj", 10) == {(path, first), (other, second)}
    assert chosen_units(slices, "o_proj", 10) == {(path, 2 * first), (path, 2 * first + 1), (other, third)}


def chosen_units(slices: dict[str, Slice], name: str, width: int) -> set[tuple[str, int]]:
    """(path of the block's attention or MLP, head or channel), over all layers."""
    paths = [path for path in slices if path.endswith(name)]
    return {(path.removesuffix(f".{name}"), unit) for path in paths for unit in heads(slices, path, width)}


def test_a_budget_is_split_evenly_over_o_and_down() -> None:
    model = build("llama", torch.float32)
    total = sum(p.numel() for p in model.parameters())
    tuned = get_peft_model(model, S2FTConfig(budget=0.1))
    by_name = {"o_proj": 0, "down_proj": 0}
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            by_name[next(p for p in by_name if p in name)] += parameter.numel()
    assert abs(by_name["down_proj"] - 0.05 * total) <= 24 / 2  # within half a channel of width 24
    assert abs(by_name["o_proj"] - 0.05 * total) <= 240 / 2  # within half a head of 10 × 24


@pytest.mark.parametrize(("trained", "heads_trained"), [(780, 2), (1000, 3), (1440, 3), (2400, 5)])
def test_a_budget_leaves_no_block_without_a_head(trained: int, heads_trained: int) -> None:
    """Three blocks, heads of 240 parameters: three heads where a tenth is left for down, else what half of the budget buys."""
    model = build("llama", torch.float32)
    slices = select(model, S2FTConfig(budget=trained / model.num_parameters(), seed=0)).slices
    count = {
        name: sum(len(s.indices) for path, s in slices.items() if path.endswith(name))
        for name in ("o_proj", "down_proj")
    }
    assert count["o_proj"] == 10 * heads_trained
    assert (sum(path.endswith("o_proj") for path in slices) == 3) == (heads_trained >= 3)
    left = trained / 2 if heads_trained in (2, 5) else trained - 720
    assert abs(24 * count["down_proj"] - left) <= 24 / 2


def test_a_total_that_rounding_has_made_smaller_still_gives_one_to_each() -> None:
    assert spread(shared(4 - 1e-10, [2, 2, 2, 16], with_one=True)) == [1, 1, 1, 1]
    assert spread(shared(22, [2, 2, 2, 16], with_one=True)) == [2, 2, 2, 16]
    assert min(shared(3.9, [2, 2, 2, 16], with_one=True)) < 0.5  # too little for all: as large as they are


@pytest.mark.parametrize("budget", [0.001, 0.002, 0.0025])
def test_a_block_with_few_heads_loses_none_to_one_with_many(budget: float) -> None:
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8, head_dim=4
    )
    model = LlamaForCausalLM(config)
    for layer, heads in zip(model.model.layers, (2, 2, 2, 16), strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, nn.Linear(32, 4 * heads, bias=False))
        layer.self_attn.o_proj = nn.Linear(4 * heads, 32, bias=False)
    slices = select(model, S2FTConfig(budget=budget, seed=0)).slices
    heads = [len(slices[f"model.layers.{index}.self_attn.o_proj"].indices) / 4 for index in range(4)]
    total = sum(heads)
    assert min(heads) >= 1
    assert heads[3] >= max(heads[:3])
    assert total == max(4, round(budget * model.num_parameters() / 2 / 128))


def test_a_budget_that_no_other_can_take_the_place_of_is_refused_without_one() -> None:
    """One head is more than half of the model that is reached, and down has nothing to take the other half."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    with pytest.raises(
        S2FTError, match=r"of the 2 units of o_proj rounds to zero, and \S+ is not right for all projections"
    ):
        select(LlamaForCausalLM(config), S2FTConfig(budget=1e-5))


def test_the_default_trains_one_percent_of_o_and_down() -> None:
    slices = select(build("mistral"), S2FTConfig(seed=0)).slices
    assert {path.rpartition(".")[2] for path in slices} <= {"o_proj", "down_proj"}


@pytest.mark.parametrize(
    ("layers", "expected"), [("last:50%", {2, 3}), ("first:1", {0}), ("1-2", {1, 2}), ([0, -1], {0, 3}), (2, {2})]
)
def test_layers_are_restricted(layers: object, expected: set[int]) -> None:
    assert chosen_layers(layers, 4) == expected


def test_layers_restrict_the_selection() -> None:
    slices = select(build("gpt2"), S2FTConfig(ratios=0.5, layers="last:1", seed=0)).slices
    assert set(slices) == {"transformer.h.2.attn.c_proj", "transformer.h.2.mlp.c_proj"}


def test_avoid_takes_what_other_adapters_left(tmp_path: Path) -> None:
    ratios = {"o_proj": 0.5, "down_proj": 0.4}
    first = get_peft_model(build("llama"), S2FTConfig(ratios=ratios, seed=0))
    first.save_pretrained(tmp_path)
    taken = first.peft_config["default"].slices
    config = select(build("llama"), S2FTConfig(ratios=ratios, seed=0, avoid=[str(tmp_path)])).config
    assert set(config.slices) == set(taken)
    for path, text in config.slices.items():
        assert not set(Slice.parse(text).indices) & set(Slice.parse(taken[path]).indices)
    first.add_adapter("next", S2FTConfig(ratios=ratios, seed=0, avoid=["default"]))
    assert first.peft_config["next"].slices == config.slices
    with pytest.raises(S2FTError, match=r"avoid leaves 26 units of down_proj in a layer that is to train 40"):
        select(build("llama"), S2FTConfig(ratios={"down_proj": 0.9}, seed=0, avoid=[str(tmp_path)]))


def test_avoid_keeps_the_sides_of_a_layer_apart() -> None:
    path = "model.layers.0.mlp.down_proj"
    model = get_peft_model(build("llama"), S2FTConfig(slices={path: "in 0-9"}, target_modules=[path]))
    model.add_adapter("b", S2FTConfig(slices={path: "out 0-3,12"}, target_modules=[path]))
    for avoid in (["default", "b"], ["b", "default"]):
        config = S2FTConfig(ratios=34 / 44, target_modules=[path], strategy="weight", avoid=avoid)
        assert str(select(model, config).slices[path]) == "in 10-43"


@pytest.mark.parametrize("seed", range(5))
def test_avoiding_one_projection_keeps_the_others_coupled(seed: int) -> None:
    model = get_peft_model(build("llama"), S2FTConfig(ratios={"v_proj": 0.5, "down_proj": 0.3}, seed=seed))
    ratios = {"v_proj": 0.5, "o_proj": 0.25, "up_proj": 0.3, "down_proj": 0.3}
    slices = select(model, S2FTConfig(ratios=ratios, seed=seed, avoid=["default"])).slices
    for layer in range(3):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        groups = heads(slices, f"{attention}.v_proj", 10)
        assert {head // 2 for head in heads(slices, f"{attention}.o_proj", 10)} <= groups
        assert slices[f"{mlp}.up_proj"].indices.tolist() == slices[f"{mlp}.down_proj"].indices.tolist()


def test_a_config_used_twice_on_a_base_chooses_the_same_channels() -> None:
    config = S2FTConfig(budget=0.05, seed=1)
    model = get_peft_model(build("llama"), config)
    model.add_adapter("again", config)
    blocks = [module.s2ft_block for module in model.modules() if hasattr(module, "s2ft_block")]
    assert all(torch.equal(block["default"].indices, block["again"].indices) for block in blocks)


def test_layers_count_the_models_blocks_not_the_targets() -> None:
    with pytest.raises(S2FTError, match="last"):
        select(build("llama"), S2FTConfig(ratios=0.5, layers="last:4"))
    excluded = ["model.layers.2.self_attn.o_proj", "model.layers.2.mlp.down_proj"]
    config = S2FTConfig(ratios=0.5, layers="last:2", exclude_modules=excluded, seed=0)
    assert {path.split(".")[2] for path in select(build("llama"), config).slices} == {"1"}


def test_an_adapted_model_is_read_like_its_base() -> None:
    config = S2FTConfig(ratios={"q_proj": 0.5, "down_proj": 0.2}, seed=3)
    expected = select(build("phi3"), config).config.slices
    assert select(get_peft_model(build("phi3"), S2FTConfig(ratios=0.5)), config).config.slices == expected


def test_avoid_must_name_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for name in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(S2FTError, match="avoid names"):
            select(build("llama"), S2FTConfig(ratios=0.5, avoid=[name]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ratios": {"o_proj": 0.01}},
            r"ratio 0.01 of the 12 units of o_proj rounds to zero; the smallest ratio that trains one is 0.0417",
        ),
        (
            {"budget": 1e-6},
            r"2 problems:\n.*budget=1e-06 of the 12 units of o_proj rounds to zero; the smallest budget",
        ),
        ({"layers": "0-99999999999"}, r"names layer 99999999999; the model has layers 0 to 2"),
        (
            {"ratios": {"o_proj": 0.5, "up_proj": 0.5}, "target_modules": ["o_proj"]},
            r"ratios names up_proj, but target_modules",
        ),
        ({"budget": 0.9}, r"budget=0.9 gives o_proj .* parameters to train, but it has"),
        ({"ratios": 0.5, "target_modules": ["nothing"]}, r"Target modules not found .* target_modules=\{'nothing'\}"),
        ({"ratios": 0.5, "layers": [7]}, r"layers=\[7\] names layer 7; the model has layers 0 to 2"),
        (
            {"ratios": 0.5, "target_modules": ["embed_tokens"]},
            r"target_modules matches model.embed_tokens, a Embedding",
        ),
    ],
)
def test_what_cannot_be_met_is_refused(options: dict, message: str) -> None:
    with pytest.raises(S2FTError, match=message):
        select(build("llama"), S2FTConfig(**options))


@pytest.mark.parametrize("given", ["ratio", "budget"])
@pytest.mark.parametrize("layers", ["first:1", "first:2", "first:3"])
def test_the_smallest_that_is_named_trains_and_what_rounds_to_it_does_not(layers: str, given: str) -> None:
    """0.0105 must not be called 0.01 when 0.01 is what was given."""
    model = build("llama")

    def config(value: float) -> S2FTConfig:
        return S2FTConfig(layers=layers, **{"ratios": {"down_proj": value}} if given == "ratio" else {"budget": value})

    def smallest(value: float) -> float:
        with pytest.raises(S2FTError) as caught:
            select(model, config(value))
        return max(
            float(number) for number in re.findall(rf"smallest {given} that trains one is (\S+)", str(caught.value))
        )

    named = smallest(1e-5)
    assert select(model, config(named)).slices
    just_below = named * (1 - 1e-2)
    assert just_below < smallest(just_below) == named


def test_what_a_lora_config_takes_is_answered_with_what_is_given_here() -> None:
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "use_rslora": True, "init_lora_weights": "gaussian"}
    with pytest.raises(TypeError) as caught:
        S2FTConfig(**lora, ratio=0.5, eva_config=None, nonsense=1)  # type: ignore[call-arg]
    assert isinstance(caught.value, S2FTError)
    lines = str(caught.value).split("\n")
    parts = ["r=8: S²FT has no rank; how much is trained is `ratios`", "`budget`"]
    parts += [
        "lora_alpha=16: there is no scale",
        "lora_dropout=0.1: there is no dropout",
        "use_rslora=True: there is no scale",
    ]
    parts += ["init_lora_weights='gaussian': give `init_weights`", "ratio=0.5: no such option; did you mean ratios?"]
    parts += ["eva_config=None: an option of LoRA that S²FT does not have", "nonsense=1: no such option"]
    assert len(lines) == 9
    for part in parts:
        assert part in str(caught.value)


def test_a_config_file_of_a_newer_version_is_read_with_a_warning(tmp_path: Path) -> None:
    """PEFT leaves out what it does not know, by the words of the error."""
    S2FTConfig(ratios=0.5).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_the_future": 1, "another": 2}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['another', 'of_the_future'\]"):
        assert S2FTConfig.from_pretrained(str(tmp_path)).ratios == 0.5


def test_a_layer_that_its_owner_never_runs_is_refused_by_name() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8))
    unrun = "head.attention.out_proj"
    with pytest.raises(
        S2FTError, match=rf"target_modules matches {unrun}, whose nn\.MultiheadAttention reads its weight"
    ):
        select(model, S2FTConfig(ratios=0.5, target_modules=["out_proj"]))
    named = select(model, S2FTConfig(ratios=0.5, target_modules=["out_proj"], exclude_modules=[unrun], seed=0))
    assert list(named.slices) == ["encoder.layers.0.self_attn.out_proj"]
    everything = select(model, S2FTConfig(ratios=0.5, target_modules="all-linear", seed=0)).slices
    assert unrun not in everything
    assert "head.mlp.fc2" in everything


def test_a_model_without_known_blocks_is_refused_with_what_was_looked_for() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        S2FTError,
        match=r"Sequential has no projection o_proj, out_proj, down_proj that .*s2ft knows an attention block by its",
    ):
        select(model, S2FTConfig(ratios=0.5))
    assert select(model, S2FTConfig(ratios=0.5, target_modules=["0"], seed=0)).slices["0"].side == "in"


@pytest.mark.parametrize(
    ("options", "problems"),
    [
        ({"ratios": 1.5}, ["ratios=1.5 is outside (0, 1]"]),
        ({"ratios": 0, "budget": -1}, ["ratios=0 is outside", "budget=-1 is outside", "both given"]),
        (
            {"ratios": {"x_proj": 0.1, "o_proj": 2}},
            ["'x_proj', which is unknown; choose from q_proj", "ratios['o_proj']=2"],
        ),
        (
            {"strategy": "best", "subset": "some", "allocation": "odd"},
            ["strategy='best'", "subset='some'", "allocation='odd'"],
        ),
        ({"layers": "half", "seed": -1}, ["layers='half'", "seed=-1"]),
        ({"ratios": float("nan")}, ["ratios=nan"]),
        ({"ratios": True}, ["ratios=True"]),
        ({"layers": [0], "layers_to_transform": [0]}, ["both given"]),
        ({"seed": True, "avoid": 3, "slices": ["a"]}, ["seed=True", "avoid=3", "slices is not a mapping"]),
    ],
)
def test_all_problems_of_a_config_come_at_once(options: dict, problems: list[str]) -> None:
    with pytest.raises(S2FTError) as error:
        S2FTConfig(**options)
    assert all(problem in str(error.value) for problem in problems)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.02, 1), st.integers(0, 2**40))
def test_the_share_trained_is_the_ratio(ratio: float, seed: int) -> None:
    slices = select(_MODEL, S2FTConfig(ratios={"down_proj": ratio}, seed=seed)).slices
    assert abs(sum(len(chosen.indices) for chosen in slices.values()) - ratio * 3 * 44) <= 0.5 + 1e-6


_MODEL = build("qwen2")
