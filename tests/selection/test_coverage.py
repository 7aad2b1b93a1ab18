"""A budget is a share of what is reached, of experts and of the rest; what is left out is named, with the reason."""

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import build
from s2ft import S2FTConfig, S2FTError, Selection, select
from s2ft.finetune.options import TrainOptions
from s2ft.finetune.results import parameters
from s2ft.finetune.train import train
from s2ft.layer import stacked
from s2ft.selection.coverage import parameter_counts
from s2ft.selection.towers import _tower_configs, towers
from tiny_base import byte_tokenizer

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
}


def on_meta(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def quietly(model: nn.Module, **options: Any) -> Selection:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return select(model, S2FTConfig(seed=0, **options))


def share(selection: Selection, model: nn.Module, name: str) -> tuple[int, float]:
    """Parameters that a projection trains, and which fraction of its channels that is."""
    chosen = {path: len(s.indices) for path, s in selection.slices.items() if path.endswith(name)}
    chosen = {path: count for path, count in chosen.items() if ".experts." not in path}
    shapes = {path: model.get_submodule(path).weight.shape for path in chosen}
    every = [module.in_features for path, module in model.named_modules() if path.endswith(name)]
    return sum(count * shapes[path][0] for path, count in chosen.items()), sum(chosen.values()) / sum(every)


@pytest.mark.parametrize(
    ("config", "experts", "heads"),
    [
        (hf.MixtralConfig(), 32 * 8, 0.0303),
        (
            hf.Qwen3MoeConfig(
                num_hidden_layers=48, moe_intermediate_size=768, num_experts=128, num_key_value_heads=4, head_dim=128
            ),
            48 * 128,
            0.0384,
        ),
        (hf.GptOssConfig(num_hidden_layers=24, num_local_experts=32), 24 * 32, 0.0638),
        (hf.OlmoeConfig(intermediate_size=1024), 16 * 64, 0.0703),
    ],
    ids=["mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "olmoe-1b-7b"],
)
def test_beside_experts_one_percent_is_of_what_is_reached(config: Any, experts: int, heads: float) -> None:
    model = on_meta(config)
    stacked = sum(p.numel() for name, p in model.named_parameters() if re.search(r"experts\.\w+_proj$", name))
    reached = sum(p.numel() for p in model.parameters()) - stacked
    selection = quietly(model)
    trained, fraction = share(selection, model, "o_proj")
    assert abs(trained - 0.01 * reached) <= config.hidden_size * model.model.layers[0].self_attn.head_dim / 2
    assert fraction == pytest.approx(heads, abs=5e-5)
    channels = sum(len(s.indices) for path, s in selection.slices.items() if path.endswith("experts.down_proj"))
    assert channels == pytest.approx(0.01 * stacked / config.hidden_size, abs=0.51)
    assert f"down_proj: {channels:,} of " in selection.trained
    assert f" of {experts:,} experts in {config.num_hidden_layers} layers" in selection.trained
    assert selection.left_out == ""


def test_a_users_own_targets_beside_experts_are_counted_alike() -> None:
    model = on_meta(hf.MixtralConfig(num_hidden_layers=2))
    assert quietly(model, target_modules=["o_proj", "down_proj"]).config.slices == quietly(model).config.slices


def test_latent_attention_and_shared_experts_share_the_budget() -> None:
    config = hf.DeepseekV2Config(
        num_hidden_layers=4, hidden_size=2048, moe_intermediate_size=1408, n_shared_experts=2, num_attention_heads=16
    )
    model = on_meta(config)
    selection = quietly(model)
    stacked = sum(p.numel() for name, p in model.named_parameters() if re.search(r"experts\.\w+$", name))
    half = 0.005 * (sum(p.numel() for p in model.parameters()) - stacked)
    assert abs(share(selection, model, "o_proj")[0] - half) <= 128 * 2048 / 2
    assert abs(share(selection, model, "down_proj")[0] - half) <= 2048 / 2
    assert selection.left_out == ""


def test_what_few_blocks_of_a_hybrid_have_gets_their_share_alone() -> None:
    model = on_meta(hf.BambaConfig(num_hidden_layers=8, attn_layer_indices=[3], vocab_size=1000))
    selection = quietly(model)
    target = 0.01 * sum(p.numel() for p in model.parameters()) / 16  # 1 attention, 7 mixers, 8 MLPs
    assert abs(share(selection, model, "self_attn.o_proj")[0] - target) <= 4096 * 128 / 2
    assert abs(share(selection, model, "mamba.out_proj")[0] - 7 * target) <= 4096 / 2
    assert abs(share(selection, model, "down_proj")[0] - 8 * target) <= 4096 / 2
    assert selection.left_out == ""


def test_dense_models_count_whole_and_say_what_trains() -> None:
    selection = select(build("llama"), S2FTConfig(budget=0.1, seed=0))
    assert selection.left_out == ""
    assert re.fullmatch(
        r"o_proj: \d of 12 heads \([\d.]+%\) of 3 layers; down_proj: \d+ of 132 channels \([\d.]+%\) of 3 layers",
        selection.trained,
    )


def stubborn(model: PreTrainedModel) -> PreTrainedModel:
    """Its experts are no longer what s2ft reads."""
    for module in model.modules():
        if hasattr(module, "has_gate"):
            module.has_post_expert_norm = True
    return model


def test_get_peft_model_says_once_what_trains_and_what_does_not() -> None:
    model = stubborn(hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        tuned = get_peft_model(model, S2FTConfig(ratios=0.5, seed=0))
        tuned.add_adapter("again", S2FTConfig(ratios=0.5, seed=0))
    (text,) = [str(w.message) for w in seen if "S²FT" in str(w.message)]
    assert re.match(
        r"S²FT trains o_proj: 4 of 8 heads \(50%\) of 2 layers; left out: .*Experts.*: .* a norm behind", text
    )


def test_a_training_run_says_at_its_start_what_trains_and_what_does_not(
    tmp_path: Path, data: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacked, "_why_unreadable", lambda module: f"{type(module).__name__} is odd")
    sizes = {
        **SMALL,
        "vocab_size": 258,
        "hidden_size": 64,
        "intermediate_size": 64,
    }  # grouped products want multiples of 8
    base = tmp_path / "base"
    config = hf.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, pad_token_id=0, eos_token_id=1)
    hf.MixtralForCausalLM(config).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    options = {
        "model": str(base),
        "data": [data],
        "output": str(tmp_path / "run"),
        "limit": 8,
        "epochs": 1,
        "budget": 0.05,
    }
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, logger="s2ft"):
        warnings.simplefilter("ignore")
        train(TrainOptions(**options, max_length=32))
    lines = [record.getMessage() for record in caplog.records]
    said = next(
        index for index, line in enumerate(lines) if line.startswith("trained: o_proj: 3 of 8 heads (37.5%) of 2")
    )
    assert re.search(
        r"^left out: model\.layers\.\*\.mlp\.experts \(2 MixtralExperts, .*: MixtralExperts is odd", lines[said + 1]
    )
    assert said < next(index for index, line in enumerate(lines) if line.startswith("training by S²FT"))


LLAVA = {
    "text_config": hf.LlamaConfig(**SMALL),
    "vision_config": hf.CLIPVisionConfig(**VISION, patch_size=8),
    "vision_feature_layer": -1,
}


def _qwen(kind: str) -> PreTrainedModel:
    config = getattr(hf, f"{kind}Config")(
        text_config={**SMALL, "num_key_value_heads": 2},
        vision_config={"depth": 2, "hidden_size": 48, "intermediate_size": 80, "num_heads": 4, "out_hidden_size": 32},
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


VISION_MODELS = {
    "llava": lambda: hf.LlavaForConditionalGeneration(hf.LlavaConfig(**LLAVA)),
    "qwen2.5-vl": lambda: _qwen("Qwen2_5_VL"),
    "qwen3-vl": lambda: _qwen("Qwen3VL"),
}


@pytest.mark.parametrize("family", VISION_MODELS)
def test_a_tower_is_left_as_it_is_unless_it_is_named(family: str) -> None:
    with torch.device("meta"):
        model = VISION_MODELS[family]()
    (tower,) = towers(model)
    selection = quietly(model, budget=0.05)
    assert {path.rpartition(".")[2] for path in selection.slices} == {"o_proj", "down_proj"}
    assert not any(path.startswith(tower) for path in selection.slices)
    assert selection.left_out.startswith(f"left out: {tower} (1 ")
    assert "to train it, give targets, or name its layers in target_modules" in selection.left_out
    reached = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(tower))
    assert abs(share(selection, model, "language_model.layers.0.mlp.down_proj")[0] * 2 - 0.025 * reached) <= 2 * 32
    chosen = quietly(model, ratios=0.5, targets="vision")
    assert chosen.slices
    assert all(path.startswith(tower) for path in chosen.slices)
    assert {s.side for s in chosen.slices.values()} == {"in"}
    everything = set(quietly(model, ratios=0.5, targets="all").slices)
    assert everything == set(chosen.slices) | set(quietly(model, ratios=0.5, targets="language").slices)
    assert set(quietly(model, ratios=0.5, targets="language").slices) == set(quietly(model, ratios=0.5).slices)
    both = {"targets": "vision", "target_modules": ["down_proj", "fc2", "linear_fc2"]}
    assert all(path.startswith(tower) for path in quietly(model, ratios=0.5, **both).slices)
    named = quietly(model, ratios=0.5, target_modules=rf".*{tower.rpartition('.')[2]}.*(fc2|down_proj)")
    assert all(path.startswith(tower) for path in named.slices)
    assert named.left_out == ""


def test_a_part_that_the_model_does_not_have_is_refused_by_name() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vit = hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=16, patch_size=8))
    with pytest.raises(S2FTError, match="targets='vision': LlamaForCausalLM has no vision tower; it has no towers"):
        select(build("llama"), S2FTConfig(ratios=0.5, targets="vision"))
    with pytest.raises(S2FTError, match=r"targets='audio': .* has no audio tower; it has language, vision"):
        select(VISION_MODELS["llava"](), S2FTConfig(ratios=0.5, targets="audio"))
    with pytest.raises(
        S2FTError, match="targets='language': ViTForImageClassification has no language model; it reads"
    ):
        select(vit, S2FTConfig(ratios=0.5, targets="language"))
    with pytest.raises(S2FTError, match="targets='visual' is unknown; choose from language, vision, audio, all"):
        S2FTConfig(targets="visual")
    assert select(vit, S2FTConfig(ratios=0.5, targets="vision", seed=0)).slices.keys() == (
        select(vit, S2FTConfig(ratios=0.5, seed=0)).slices.keys()
    )


def test_a_speech_model_keeps_its_encoder_and_its_projector() -> None:
    """Parts whose name says nothing of vision or audio; and a language model that is made of parts itself."""
    speech = hf.GraniteSpeechConfig()
    assert _tower_configs(speech) == dict.fromkeys(
        (type(speech.encoder_config), type(speech.projector_config)), "projector"
    )
    assert _tower_configs(hf.BltConfig()) == {}
    assert _tower_configs(hf.LlamaConfig()) == {}


class _Packed(nn.Module):
    """A quantised linear layer as libraries make them: half a byte for each weight, in a parameter or a buffer."""

    def __init__(self, linear: nn.Linear, as_buffer: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        if as_buffer:
            self.register_buffer("weight", packed)
        else:
            self.weight = nn.Parameter(packed, requires_grad=False)


@pytest.mark.parametrize("as_buffer", [False, True])
def test_a_budget_on_packed_weights_is_that_of_the_plain_ones(as_buffer: bool) -> None:
    plain, packed = build("qwen2"), build("qwen2")
    for module in list(packed.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                bare = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device="meta")
                quantised = _Packed(bare, as_buffer)
                if child.bias is not None:
                    quantised.bias = child.bias
                setattr(module, name, quantised)
    config = S2FTConfig(budget=0.05, seed=0)
    assert select(packed, config).config.slices == select(plain, config).config.slices
    every = sum(p.numel() for p in plain.parameters())
    assert sum(parameter_counts(packed).values()) == every
    for model in (plain, packed):  # what the run card says
        tuned = get_peft_model(model, S2FTConfig(ratios={"o_proj": 0.5}, modules_to_save=["lm_head"], seed=0))
        assert parameters(tuned) == (3 * 24 * 12 + tuned.lm_head.original_module.weight.numel(), every)


def test_a_budget_on_partitioned_parameters_is_that_of_the_whole_ones() -> None:
    """As DeepSpeed's ZeRO-3 leaves them: nothing in this process, the whole size beside."""
    for family in ("llama", "gpt2"):
        whole, parted = build(family), build(family)
        for parameter in parted.parameters():
            parameter.ds_id, parameter.ds_numel, parameter.ds_shape = id(parameter), parameter.numel(), parameter.shape
            parameter.data = torch.empty(0, dtype=parameter.dtype)
        config = S2FTConfig(budget=0.05, seed=0)
        assert select(parted, config).config.slices == select(whole, config).config.slices
        with pytest.raises(S2FTError, match=r"weight of .* is partitioned by DeepSpeed ZeRO-3; the strategies weight"):
            select(parted, S2FTConfig(budget=0.05, strategy="weight"))
        assert get_peft_model(parted, S2FTConfig(budget=0.05, seed=0)).peft_config["default"].base_digest is None


def test_a_copy_that_is_kept_whole_does_not_raise_the_budget() -> None:
    config = S2FTConfig(budget=0.05, seed=0)
    expected = select(build("llama"), config).config.slices
    tuned = get_peft_model(build("llama"), S2FTConfig(ratios=0.5, modules_to_save=["lm_head"]))
    assert select(tuned, config).config.slices == expected


def test_a_model_that_is_wrapped_already_is_refused_by_that_name() -> None:
    lora = LoraConfig(r=2, target_modules=["o_proj"])
    tuned = get_peft_model(build("llama"), lora)
    with pytest.raises(S2FTError, match=r"a PeftModel with adapters already: default \(LORA\)\. .*merge_and_unload"):
        get_peft_model(tuned, S2FTConfig(ratios=0.5))
    assert tuned.peft_config == {"default": lora}
