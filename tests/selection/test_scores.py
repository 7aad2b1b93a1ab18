"""Scores against plain loops over heads and channels, in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ZambaConfig,
    ZambaForCausalLM,
)

from families import FAMILIES, build, tokens
from s2ft import S2FTConfig, S2FTError, select, switch
from s2ft.layer.linears import linear_layer, weight_matrix
from s2ft.selection import weight_scores
from s2ft.selection.scores import SCORES, score_units
from s2ft.selection.structure import find_structures
from s2ft.selection.units import Projection, Structure
from s2ft.selection.weight_scores import random_scores


def unit_of(structure: Structure, projection: Projection, unit: int) -> slice:
    """The channels in `projection` of the structure's unit: a query head's are those of its group on k and v."""
    own = unit * projection.units // structure.units
    start = projection.offset + own * projection.width
    return slice(start, start + projection.width)


def squares_by_loop(structure: Structure, matrices: dict[str, Tensor]) -> np.ndarray:
    """Module → a matrix [out, in] shaped like its weight; the squared norm of each unit's part of all of them."""
    total = np.zeros(structure.units)
    for projection in structure.projections:
        matrix = matrices[projection.module].double()
        for unit in range(structure.units):
            part = unit_of(structure, projection, unit)
            total[unit] += float((matrix[part] if projection.side == "out" else matrix[:, part]).square().sum())
    return total


def base(model: nn.Module, path: str) -> nn.Module:
    return linear_layer(model.get_submodule(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_is_the_norm_of_everything_that_belongs_to_the_unit(family: str) -> None:
    model = build(family)
    structures = find_structures(model)
    scores = score_units("weight", structures, model)
    for structure in structures:
        weights = {p.module: weight_matrix(base(model, p.module)).detach() for p in structure.projections}
        np.testing.assert_allclose(scores[structure.key], np.sqrt(squares_by_loop(structure, weights)), rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_is_the_root_mean_square_over_tokens_that_are_no_padding(family: str) -> None:
    model = build(family)
    structures = find_structures(model)
    batches = [{"input_ids": tokens(3, 7), "attention_mask": torch.ones(3, 7)} for _ in range(2)]
    batches[1]["attention_mask"][:, 5:] = 0
    seen: dict[str, list[Tensor]] = {
        s["o_proj" if s.kind == "attention" else "down_proj"].module: [] for s in structures
    }
    hooks = [base(model, path).register_forward_pre_hook(lambda _, x, p=path: seen[p].append(x[0])) for path in seen]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    scores = score_units("activation", structures, model, batches)
    for structure in structures:
        projection = structure.projections[-1]
        kept = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen[projection.module], batches, strict=True)])
        mean = kept.double().square().mean(0).view(structure.units, -1).sum(1)
        np.testing.assert_allclose(scores[structure.key], mean.sqrt().numpy(), rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_the_norm_over_batches_and_touches_nothing(family: str) -> None:
    model = build(family).train()
    structures = find_structures(model)
    batches = [{"input_ids": tokens(2, 6)} for _ in range(3)]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    scores = score_units("gradient", structures, model, batches)
    assert model.training
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(
        torch.equal(parameter, before[name]) and parameter.grad is None for name, parameter in model.named_parameters()
    )
    expected = {s.key: np.zeros(s.units) for s in structures}
    for batch in batches:
        model.zero_grad()
        model.eval()(**batch, labels=batch["input_ids"]).loss.backward()
        for s in structures:
            gradients = {}
            for p in s.projections:
                layer = base(model, p.module)
                gradients[p.module] = (
                    layer.weight.grad
                    if weight_matrix(layer).shape == layer.weight.shape and not _conv(layer)
                    else layer.weight.grad.T
                )
            expected[s.key] += squares_by_loop(s, gradients)
    for name, squares in expected.items():
        np.testing.assert_allclose(scores[name], np.sqrt(squares), rtol=1e-4)


def test_the_gradient_of_a_weight_that_blocks_share_is_that_of_each_of_them() -> None:
    """Zamba's hybrid blocks are modules of their own with one block's parameters."""
    config = ZambaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip
    model = ZambaForCausalLM(config).eval()
    structures, batch = find_structures(model), {"input_ids": tokens(2, 6)}
    scores = score_units("gradient", structures, model, [batch])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for s in structures:
        gradients = {p.module: base(model, p.module).weight.grad for p in s.projections}
        np.testing.assert_allclose(scores[s.key], np.sqrt(squares_by_loop(s, gradients)), rtol=1e-4)
    first, second = (f"model.layers.{number}.shared_transf.feed_forward:mlp" for number in (1, 3))
    assert np.array_equal(scores[first], scores[second])


def _conv(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Linear)


@pytest.mark.parametrize("family", FAMILIES)
def test_lift_is_the_norm_of_the_units_part_of_the_low_rank_weights(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_scores, "LIFT_RANK", 1 / 5)  # of these small weights, more than rank 1
    model = build(family)
    structures = find_structures(model)
    scores = score_units("lift", structures, model)
    for structure in structures:
        total = np.zeros(structure.units)
        for p in structure.projections:
            weight = weight_matrix(base(model, p.module)).detach()
            part = slice(p.offset, p.offset + p.units * p.width)  # of a fused layer, this projection's part alone
            weight = weight[part] if p.side == "out" else weight[:, part]
            low = low_rank(weight, round(min(weight.shape) / 5))
            for unit in range(structure.units):
                channels = unit_of(structure, p, unit)
                own = slice(channels.start - p.offset, channels.stop - p.offset)
                total[unit] += float((low[own] if p.side == "out" else low[:, own]).square().sum())
        np.testing.assert_allclose(scores[structure.key], np.sqrt(total), rtol=1e-6)


def low_rank(weight: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def test_lift_has_rank_1_at_least_and_128_at_a_width_of_4096() -> None:
    weight = torch.randn(9, 14, dtype=torch.float64)
    got = weight_scores._low_rank_squares(weight, along=0)
    torch.testing.assert_close(got, low_rank(weight, 1).square().sum(0))
    assert round(weight_scores.LIFT_RANK * 4096) == 128


@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_is_the_first_order_effect_of_the_unit_on_the_loss(family: str) -> None:
    model = build(family)
    structures = find_structures(model)
    batches = [{"input_ids": tokens(2, 6)} for _ in range(3)]
    flags = [p.requires_grad for p in model.parameters()]
    scores = score_units("saliency", structures, model, batches)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    for structure in structures:
        squares = np.zeros(structure.units)
        for unit in range(structure.units):
            squares[unit] = sum(slope(model, structure, unit, batch) ** 2 for batch in batches)
        np.testing.assert_allclose(scores[structure.key], np.sqrt(squares), rtol=1e-4, atol=1e-9)


def slope(model: nn.Module, structure: Structure, unit: int, batch: dict[str, Tensor]) -> float:
    """d loss / d s where the unit's activations are scaled by s, at s = 1."""
    projection = structure.projections[-1]
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def scaled(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        factors = torch.ones(args[0].shape[-1], dtype=torch.float64)
        factors[unit_of(structure, projection, unit)] = 0
        return (args[0] * (factors + (1 - factors) * scale),)

    hook = base(model, projection.module).register_forward_pre_hook(scaled)
    loss = model(**batch, labels=batch["input_ids"]).loss
    hook.remove()
    return float(torch.autograd.grad(loss, scale)[0])


def test_saliency_does_not_depend_on_padding() -> None:
    model = build("llama")
    structures, x = find_structures(model), tokens(1, 6)
    padded = {"input_ids": torch.nn.functional.pad(x, (0, 9)), "attention_mask": torch.arange(15)[None] < 6}
    plain = score_units("saliency", structures, model, [{"input_ids": x}])
    for name, scores in score_units("saliency", structures, model, [padded]).items():
        np.testing.assert_allclose(scores, plain[name], rtol=1e-4)


def test_gradients_are_never_held_together() -> None:
    model = build("llama")
    structures = find_structures(model)
    weights = [base(model, p.module).weight for s in structures for p in s.projections]
    held: list[int] = []
    hooks = [w.register_hook(lambda _: held.append(sum(w.grad is not None for w in weights))) for w in weights]
    score_units("gradient", structures, model, [{"input_ids": tokens(2, 6)}])
    for hook in hooks:
        hook.remove()
    assert len(held) == len(weights)
    assert max(held) == 0  # each is gone before the next one comes


def test_product_is_weight_times_activation() -> None:
    model = build("qwen2")
    structures = find_structures(model)
    batches = [{"input_ids": tokens(2, 6)}]
    weight, activation, product = (
        score_units(s, structures, model, batches) for s in ("weight", "activation", "product")
    )
    for name, scores in product.items():
        np.testing.assert_allclose(scores, weight[name] * activation[name], rtol=1e-6)


def test_activation_sums_do_not_depend_on_how_the_data_is_batched() -> None:
    model = build("mistral")
    structures, x = find_structures(model), tokens(6, 8)
    whole = score_units("activation", structures, model, [{"input_ids": x}])
    parts = score_units("activation", structures, model, ({"input_ids": part} for part in x.split(2)))
    for name in whole:
        np.testing.assert_allclose(whole[name], parts[name], rtol=1e-5)


def test_padding_does_not_count_where_a_model_flattens_its_tokens() -> None:
    model = OPTForCausalLM(
        OPTConfig(vocab_size=61, hidden_size=24, ffn_dim=32, num_hidden_layers=1, num_attention_heads=4)
    )
    structures, x = find_structures(model.eval()), tokens(1, 6)
    padded = {"input_ids": torch.nn.functional.pad(x, (0, 20), value=1), "attention_mask": torch.arange(26)[None] < 6}
    plain = score_units("activation", structures, model, [{"input_ids": x, "attention_mask": torch.ones(1, 6)}])
    for name, scores in score_units("activation", structures, model, [padded]).items():
        np.testing.assert_allclose(scores, plain[name], rtol=1e-4)


SEQ_TO_SEQ = {
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
            **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
            vocab_size=61, d_model=24, pad_token_id=1,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=24, d_kv=6, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("told", ["labels", "decoder_attention_mask"])
@pytest.mark.parametrize("length", [8, 5], ids=["as long as the encoder's", "shorter"])
@pytest.mark.parametrize("family", SEQ_TO_SEQ)
def test_an_encoder_and_its_decoder_have_each_their_own_padding(family: str, length: int, told: str) -> None:
    model = SEQ_TO_SEQ[family]().eval()
    structures, x, y = find_structures(model), tokens(2, 8), tokens(2, length)
    kept = torch.arange(length).expand(2, length) < 3
    batch, alone = {"input_ids": x, "attention_mask": torch.arange(8).expand(2, 8) < 6}, {"input_ids": x[:, :6]}
    if told == "labels":
        batch, alone = {**batch, "labels": y.masked_fill(~kept, -100)}, {**alone, "labels": y[:, :3].contiguous()}
    else:
        batch |= {"decoder_input_ids": y, "decoder_attention_mask": kept}
        alone |= {"decoder_input_ids": y[:, :3]}
    plain = score_units("activation", structures, model, [alone])
    for name, scores in score_units("activation", structures, model, [batch]).items():
        np.testing.assert_allclose(scores, plain[name], rtol=1e-4)


def test_a_decoder_that_reads_the_encoders_input_has_its_padding() -> None:
    model = SEQ_TO_SEQ["bart"]().eval()
    structures, x = find_structures(model), tokens(2, 8)
    plain = score_units("activation", structures, model, [{"input_ids": x[:, :6]}])
    padded = {"input_ids": x, "attention_mask": torch.arange(8).expand(2, 8) < 6}
    for name, scores in score_units("activation", structures, model, [padded]).items():
        np.testing.assert_allclose(scores, plain[name], rtol=1e-4)


def test_the_mask_of_a_text_is_not_that_of_an_image_of_as_many_patches() -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=61, **sizes),
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8),  # 5 tokens with that of the class
        image_token_index=60,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    tower = [s for s in find_structures(model) if "vision" in s.path]
    text = torch.tensor([[60, 60, 60, 60, 5]])  # a token for each patch
    batch = {"input_ids": text, "pixel_values": torch.randn(1, 3, 16, 16)}
    plain = score_units("activation", tower, model, [batch])
    masked = {**batch, "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
    for name, scores in score_units("activation", tower, model, [masked]).items():
        np.testing.assert_allclose(scores, plain[name], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["weight", "activation", "product", "gradient", "lift", "saliency"])
def test_scoring_leaves_the_weights_alone(strategy: str, dtype: torch.dtype) -> None:
    model = build("gpt2", dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    score_units(strategy, find_structures(model), model, [{"input_ids": tokens(1, 5)}])
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_batch_that_is_no_mapping_is_refused() -> None:
    model = build("gpt2")
    with pytest.raises(S2FTError, match="a batch is a str"):
        score_units("gradient", find_structures(model), model, {"input_ids": tokens(1, 5)})


def test_random_scores_are_the_same_on_every_machine() -> None:
    assert random_scores(0, "model.layers.0.mlp:mlp", 4).tolist() == pytest.approx(RANDOM_AT_SEED_0, abs=0)
    assert not np.array_equal(random_scores(0, "a", 9), random_scores(1, "a", 9))
    assert not np.array_equal(random_scores(0, "a", 9), random_scores(0, "b", 9))


RANDOM_AT_SEED_0 = [0.6667022705078125, 0.4143293499946594, 0.02960294485092163, 0.6239460706710815]


def test_random_scores_are_uniform() -> None:
    scores = random_scores(3, "mlp", 20_000)
    assert 0 <= scores.min() < 0.001
    assert 0.999 < scores.max() < 1
    assert abs(scores.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(scores[1:], scores[:-1])[0, 1]) < 0.03


@pytest.mark.parametrize("strategy", ["activation", "product", "gradient", "saliency"])
def test_without_data_the_error_says_what_to_call(strategy: str) -> None:
    model = build("gpt2")
    with pytest.raises(S2FTError, match=rf"strategy='{strategy}' needs data: call s2ft.select"):
        score_units(strategy, find_structures(model), model)
    with pytest.raises(S2FTError, match="holds no batch"):
        score_units(strategy, find_structures(model), model, [])


def test_weights_that_are_not_finite_are_refused() -> None:
    model = build("gpt2")
    model.transformer.h[1].mlp.c_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(S2FTError, match="not finite"):
        score_units("weight", find_structures(model), model)


def test_weights_on_meta_are_refused() -> None:
    model = build("gpt2").to("meta")
    with pytest.raises(S2FTError, match=r"has no values \(device meta\)"):
        score_units("weight", find_structures(model), model)


@pytest.mark.parametrize("strategy", ["activation", "product", "gradient", "saliency"])
def test_what_the_data_never_reaches_is_named_and_not_scored_alike(strategy: str) -> None:
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 61}
    model = GPT2LMHeadModel(GPT2Config(**sizes, add_cross_attention=True)).eval()
    batches = [{"input_ids": tokens(2, 6)}]
    config = S2FTConfig(ratios=0.5, strategy=strategy)
    with pytest.raises(S2FTError, match=r"2 problems:\n.*h\.0\.crossattention never runs on the calibration data"):
        select(model, config, batches)
    without = replace(config, target_modules=r".*\.(attn|mlp)\.c_proj")
    assert len(select(model, without, batches).slices) == 4


def test_channels_are_drawn_where_no_strategy_is_named() -> None:
    """By the seed, or by one that torch draws; no weight is read; what was chosen is in the config."""
    model = build("llama", torch.float32)
    given = {"open": {"seed": 3}, "random": {"seed": 3, "strategy": "random"}, "weight": {"strategy": "weight"}}
    chosen = {name: select(model, S2FTConfig(ratios=0.3, **options)).config for name, options in given.items()}
    assert chosen["open"].slices == chosen["random"].slices != chosen["weight"].slices
    assert [config.strategy for config in chosen.values()] == ["random", "random", "weight"]
    empty = build("llama", torch.float32).to("meta")
    torch.manual_seed(5)
    one, other = (select(empty, S2FTConfig(ratios=0.3)).config for _ in range(2))
    assert one.strategy == other.strategy == "random"
    assert one.slices != other.slices
    assert select(model, S2FTConfig(ratios=0.3, seed=one.seed)).config.slices == one.slices


def test_processes_that_cannot_communicate_yet_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter may be made before the group of processes is."""
    model = build("llama", torch.float32)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert select(model, S2FTConfig(ratios=0.3)).config.seed != 0, "a scheduler's variable, not a launcher's"
    found = []
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        torch.manual_seed(rank)
        found.append(select(model, S2FTConfig(ratios=0.3)).config)
    assert found[0].slices == found[1].slices
    assert [one.seed for one in found] == [0, 0]


@pytest.mark.parametrize(("name", "value"), [("subset", "smallest"), ("allocation", "global")])
def test_an_order_without_a_score_is_refused(name: str, value: str) -> None:
    model = build("llama", torch.float32)
    config = S2FTConfig(ratios=0.3, **{name: value})
    with pytest.raises(S2FTError, match=f"{name}='{value}' goes by scores, .* give strategy, such as 'weight'"):
        select(model, config)
    for named in ({"strategy": "weight"}, {"seed": 1}):
        assert select(model, replace(config, **named)).slices
    own = select(model, config, scores=lambda structures, *_: {one.key: range(one.units) for one in structures})
    assert own.config.strategy == "own"


def scores_chosen_by(model: nn.Module, strategy: str) -> dict[str, Any]:
    """What `select` ranks by on one batch."""
    found: dict[str, Any] = {}

    def noted(*args: Any) -> dict[str, Any]:
        found.update(SCORES[strategy].scorer(*args))
        return found

    select(model, S2FTConfig(ratios=0.5), [{"input_ids": torch.arange(3, 15).view(2, 6)}], scores=noted)
    return found


STATES: dict[str, Callable[[PeftModel], Any]] = {
    "active": lambda model: None,
    "merged": lambda model: model.merge_adapter(),
    "switched": lambda model: switch(model, "default"),
    "switched off": lambda model: switch(model, None),
}


def large(model: PeftModel) -> PeftModel:
    """All that its adapter holds changes what the model computes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) if parameter.requires_grad else parameter)
    return model.eval()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("strategy", ["activation", "product", "gradient", "saliency"])
def test_scores_are_those_of_the_base_whatever_an_adapter_does(strategy: str, state: str) -> None:
    base = build("llama")
    expected = scores_chosen_by(base, strategy)
    model = large(get_peft_model(base, S2FTConfig(ratios={"q_proj": 0.5, "up_proj": 0.5, "down_proj": 0.5})))
    STATES[state](model)
    trains, x = [p.requires_grad for p in model.parameters()], tokens(2, 5)
    before = model(x).logits
    found = scores_chosen_by(model, strategy)
    for key, scores in expected.items():
        np.testing.assert_allclose(found[key], scores, rtol=1e-6)
    assert torch.equal(model(x).logits, before)
    assert [p.requires_grad for p in model.parameters()] == trains


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kept", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": list(range(3, 15))}])
def test_scores_are_those_of_the_base_beside_what_an_adapter_keeps_whole(kept: dict[str, Any], merged: bool) -> None:
    base = build("llama")
    expected = scores_chosen_by(base, "gradient")
    model = large(get_peft_model(base, S2FTConfig(ratios=0.5, **kept)))
    if merged:
        model.merge_adapter()
    trains, x = [p.requires_grad for p in model.parameters()], tokens(2, 5)
    before = model(x).logits
    found = scores_chosen_by(model, "gradient")
    for key, scores in expected.items():
        np.testing.assert_allclose(found[key], scores, rtol=1e-6)
    assert torch.equal(model(x).logits, before)
    assert [p.requires_grad for p in model.parameters()] == trains
