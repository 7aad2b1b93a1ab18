"""An adapter of stacked experts is one like any other: saved, loaded, switched, merged, mixed, fused, refused."""

import copy
import gc
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload
from peft import PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import s2ft
from live import values
from mixtures import CONFIGS, SIZES, mixture, text
from s2ft import AdapterPool, S2FTConfig, S2FTError
from s2ft.adapters.inspection import summary
from s2ft.layer.block import S2FTBlock
from s2ft.layer.experts import Part
from s2ft.layer.linear import sliced_layers
from s2ft.serve.channels import channels

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
DOWN = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    torch.manual_seed(0)
    return mixture("mixtral", torch.float32)


def adapted(base: PreTrainedModel, seed: int = 0, **options: object) -> PeftModel:
    asked = {"target_parameters": EXPERTS, "ratios": 0.4, **options}
    config = S2FTConfig(seed=seed, init_weights=False, **asked)
    return get_peft_model(copy.deepcopy(base), config)


def logits(model: torch.nn.Module, tokens: torch.Tensor, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits


def test_the_files_are_those_of_any_slice(base: PreTrainedModel, tmp_path: Path) -> None:
    tuned, tokens = adapted(base), text()
    tuned.save_pretrained(tmp_path)
    adapter = s2ft.read_adapter(tmp_path)
    assert set(adapter.slices) == {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in EXPERTS}
    assert adapter.deltas[DOWN].shape == (32, len(adapter.slices[DOWN].indices))
    assert adapter.config.target_parameters is None
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again, tokens), logits(tuned, tokens))
    assert not torch.equal(logits(again, tokens), logits(base, tokens))
    direct = copy.deepcopy(base)
    direct.load_adapter(str(tmp_path))  # transformers' own loader
    assert torch.equal(logits(direct, tokens), logits(tuned, tokens))
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj.mul_(2)
    with pytest.raises(S2FTError, match=rf"made for another base.*the first is {re.escape(DOWN)}"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_come_back_bit_for_bit(family: str) -> None:
    model = mixture(family, torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    stacked = next(path for path, m in model.named_modules() if path.endswith(".experts") and hasattr(m, "down_proj"))
    parameter = f"{stacked}.down_proj"
    tuned = adapted(model, target_parameters=["experts.down_proj"])
    for _ in range(2):
        tuned.merge_adapter()
        assert not torch.equal(
            tuned.get_base_model().get_parameter(parameter.replace("experts.", "experts.base_layer.")),
            before[parameter],
        )
        tuned.unmerge_adapter()
        s2ft.switch(tuned, "default")
        s2ft.switch(tuned, None)
    tuned.set_adapter("default")
    with s2ft.in_place(tuned):
        pass
    plain = tuned.unload()
    assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters())
    assert type(plain.get_submodule(stacked)) is type(model.get_submodule(stacked))


def test_merged_and_switched_models_compute_what_the_adapter_does(base: PreTrainedModel) -> None:
    tuned, tokens = adapted(base), text()
    tuned.add_adapter(
        "other", S2FTConfig(ratios=0.2, seed=9, init_weights=False, target_modules=["down_proj", "o_proj"])
    )
    expected = {}
    for name in ("default", "other"):
        tuned.set_adapter(name)
        expected[name] = logits(tuned, tokens)
    for name in ("default", "other", "default"):
        s2ft.switch(tuned, name)
        torch.testing.assert_close(logits(tuned, tokens), expected[name], rtol=1e-4, atol=1e-4)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned, tokens), logits(base, tokens))
    tuned.set_adapter("other")
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), expected["other"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_each_row_has_its_own_adapter(family: str, tmp_path: Path) -> None:
    model, tokens = mixture(family, torch.float32), text(rows=4)
    tuned = adapted(model, target_parameters=["experts.down_proj"])
    tuned.add_adapter("other", S2FTConfig(ratios=0.3, seed=9, init_weights=False, target_parameters=EXPERTS))
    adapted(model, seed=5).save_pretrained(tmp_path / "pooled")
    pool = AdapterPool(tuned, tmp_path, device_bytes=1 << 20, host_bytes=0)
    tuned.eval()
    names = ["other", "__base__", "pooled", "default"]
    found = logits(tuned, tokens, adapter_names=names)
    for row, name in enumerate(names):
        own = logits(tuned, tokens[[row]], adapter_names=[name])
        torch.testing.assert_close(found[[row]], own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[[1]], logits(model, tokens[[1]]), rtol=1e-4, atol=1e-4)
    for row, name in ((0, "other"), (3, "default")):
        tuned.set_adapter(name)
        torch.testing.assert_close(found[[row]], logits(tuned, tokens[[row]]), rtol=1e-4, atol=1e-4)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "pooled").eval()
    torch.testing.assert_close(found[[2]], logits(loaded, tokens[[2]]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[[2]], logits(model, tokens[[2]]), rtol=1e-3, atol=1e-3)
    pool.close()


def test_a_pools_experts_run_where_the_model_is(base: PreTrainedModel, tmp_path: Path) -> None:
    """Device meta stands in for a GPU: a pool keeps channels in the host's memory."""
    adapted(base).save_pretrained(tmp_path / "pooled")
    tuned = adapted(base, seed=5).to("meta", torch.bfloat16)
    AdapterPool(tuned, tmp_path, device_bytes=1 << 20, host_bytes=0).bring(["pooled"])
    module = tuned.get_base_model().model.layers[0].mlp.experts
    x, there = torch.empty(6, 32, dtype=torch.bfloat16, device="meta"), torch.device("meta")
    parts = [Part(name, layer.pooled["pooled"]) for name, layer in module.slice_layers.items()]
    table = module._table(parts, there)
    assert {tensor.device for tensor in (table.channels, table.rows, *table.places)} == {there}
    assert {part.matrices(at, x.dtype).device for part, at in zip(parts, table.places, strict=True)} == {there}
    routed = [torch.zeros(6, 2, dtype=torch.int64, device="meta"), torch.empty(6, 2, device="meta")]
    with torch.no_grad():
        assert module._add(x, x, routed, ["pooled"]).shape == x.shape


def test_a_parked_adapter_of_experts_runs_where_the_tokens_are(base: PreTrainedModel) -> None:
    tuned = adapted(base).to("meta", torch.bfloat16)
    module = tuned.get_base_model().model.layers[0].mlp.experts
    for layer in module.slice_layers.values():
        layer.s2ft_block["default"] = S2FTBlock(layer.block("default").trained, 32)  # as `park` leaves it
    parts = [Part(name, layer.block("default")) for name, layer in module.slice_layers.items()]
    table = module._table(parts, torch.device("meta"))
    deltas = module._deltas(parts, table, torch.bfloat16)
    assert {delta.device.type for delta in deltas} == {"meta"}


def test_experts_that_accelerate_has_offloaded_run_alone_and_are_refused_by_name(base: PreTrainedModel) -> None:
    tuned, merged, tokens = adapted(base).eval(), adapted(base).eval(), text()
    merged.merge_adapter()
    before = values(tuned)
    for model in (tuned, merged):
        cpu_offload(model.get_base_model().model.layers[1].mlp.experts.base_layer, execution_device=torch.device("cpu"))
    with pytest.raises(S2FTError, match=r"layers\.1\.mlp\.experts\.\w+: its weight has no values here \(device meta"):
        tuned.merge_adapter()
    found = values(tuned)
    assert all(torch.equal(found[name], value) for name, value in before.items() if not found[name].is_meta)
    for options in ({}, {"adapter_names": ["default", "__base__"]}):
        with pytest.raises(S2FTError, match=r"gate_up_proj of MixtralExperts has no values here \(device meta"):
            logits(tuned, tokens, **options)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned, tokens), logits(base, tokens))
    expected = logits(merged, tokens)
    with pytest.raises(S2FTError, match="has no values here"):
        merged.unmerge_adapter()
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=1e-4, atol=1e-4)


def test_what_leaves_the_pool_leaves_memory(base: PreTrainedModel, tmp_path: Path) -> None:
    for seed in (1, 2):
        adapted(base, seed=seed).save_pretrained(tmp_path / f"user{seed}")
    tuned, tokens = adapted(base).eval(), text()
    room = (tmp_path / "user1" / "adapter_model.safetensors").stat().st_size
    pool = AdapterPool(tuned, tmp_path, device_bytes=room, host_bytes=0)
    logits(tuned, tokens, adapter_names=["user1", "__base__"])
    deltas = [weakref.ref(one.weight) for one in pool._device["user1"].values()]
    logits(tuned, tokens, adapter_names=["user2", "__base__"])
    gc.collect()
    assert pool.tier("user1") == "disk"
    assert not [delta for delta in deltas if delta() is not None]


def test_adapters_fuse_in_files_and_live(base: PreTrainedModel, tmp_path: Path) -> None:
    tuned, tokens = adapted(base), text()
    tuned.add_adapter("other", S2FTConfig(ratios=0.4, seed=3, init_weights=False, target_parameters=EXPERTS))
    tuned.add_weighted_adapter(["default", "other"], [0.5, 0.25], "both")
    tuned.set_adapter("both")
    live = logits(tuned, tokens)
    tuned.save_pretrained(tmp_path)
    s2ft.fuse([tmp_path, tmp_path / "other"], [0.5, 0.25], output=tmp_path / "fused")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "fused").eval()
    assert torch.equal(logits(again, tokens), live)
    weight = base.get_parameter(DOWN)
    deltas = {
        n: sliced_layers(tuned.get_base_model(), n)[DOWN].get_delta_weight(n) for n in ("default", "other", "both")
    }
    assert deltas["both"].shape == weight.shape
    torch.testing.assert_close(deltas["both"], 0.5 * deltas["default"] + 0.25 * deltas["other"])


def test_what_is_shown_of_an_adapter(base: PreTrainedModel, tmp_path: Path) -> None:
    adapted(base).save_pretrained(tmp_path)
    rows = {row["module"]: row for row in summary(s2ft.read_adapter(tmp_path), base)["rows"]}
    assert rows[DOWN]["in_place"] == "gathered"
    assert rows["model.layers.0.mlp.experts.gate_up_proj"]["in_place"] == "added"
    sizes = {row["module"]: (row["side"], row["size"]) for row in channels(tmp_path, base)}
    assert sizes[DOWN] == ("in", 4 * 24)
    assert sizes["model.layers.0.mlp.experts.gate_up_proj"] == ("out", 4 * 48)


def test_an_expert_that_is_not_there_is_refused(base: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(
        S2FTError, match=r"names 'experts.4.down_proj'; the experts of model.layers.0.mlp.experts are 0 to 3"
    ):
        get_peft_model(copy.deepcopy(base), S2FTConfig(target_parameters=["experts.4.down_proj"]))
    adapted(base).save_pretrained(tmp_path)
    fewer = AutoModelForCausalLM.from_config(type(base.config)(**{**base.config.to_dict(), "num_local_experts": 2}))
    with pytest.raises(
        S2FTError, match=r"changes channel \d+ \(expert 3; there are experts 0 to 1\) of model.layers.0.mlp"
    ):
        PeftModel.from_pretrained(fewer, tmp_path)
    with pytest.raises(
        S2FTError, match=r"target_parameters=\['experts.down_proj'\] and target_modules='.\*o_proj', a pattern"
    ):
        S2FTConfig(target_parameters=["experts.down_proj"], target_modules=".*o_proj")


@pytest.mark.parametrize("family", CONFIGS)
def test_files_merge_to_what_the_live_model_merges_to(family: str, tmp_path: Path) -> None:
    """Most checkpoints hold a tensor for each expert, and call it otherwise."""
    model = mixture(family, torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    ratios = {"up_proj": 0.3, "down_proj": 0.4}
    tuned = adapted(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16),
        target_parameters=None,
        ratios=ratios,
        allocation="global",
    )
    tuned.save_pretrained(tmp_path / "adapter")
    s2ft.merge(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "base"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    s2ft.export(tmp_path / "adapter", "patch", tmp_path / "patch.safetensors", base=str(tmp_path / "base"))
    expected = tuned.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    stored, merged = (
        {k: v for f in (tmp_path / n).glob("*.safetensors") for k, v in load_file(f).items()}
        for n in ("base", "merged")
    )
    patch = load_file(tmp_path / "patch.safetensors")
    for name in {key.rpartition(".")[0] for key in patch}:
        stored[name].view(-1)[patch[f"{name}.indices"].long()] = patch[f"{name}.values"]
    assert all(torch.equal(tensor, merged[name]) for name, tensor in stored.items())
    mixture(family, torch.bfloat16).save_pretrained(tmp_path / "other")
    with pytest.raises(S2FTError, match="made for another base"):
        s2ft.merge(tmp_path / "adapter", tmp_path / "twice", base=str(tmp_path / "other"))


def test_exports_that_hold_no_experts_are_refused_before_anything_is_written(
    base: PreTrainedModel, tmp_path: Path
) -> None:
    base.save_pretrained(tmp_path / "base")
    adapted(base).save_pretrained(tmp_path / "adapter")
    for to in ("lora", "vllm", "sglang", "gguf"):
        with pytest.raises(
            S2FTError, match=rf"experts.down_proj is a slice of stacked experts, not written for '{to}'"
        ):
            s2ft.export(
                tmp_path / "adapter",
                to,
                tmp_path / "out.gguf" if to == "gguf" else tmp_path / "out",
                base=str(tmp_path / "base"),
            )
        assert not list(tmp_path.glob("out*"))


def test_slices_of_experts_are_no_lora_and_said_to_be_none(base: PreTrainedModel) -> None:
    """PEFT would take the stack for one matrix."""
    tuned = adapted(base, target_parameters=["experts.down_proj"])
    for name in ("default", "other"):
        if name == "other":
            tuned.add_adapter(name, S2FTConfig(ratios=0.2, target_parameters=EXPERTS))
        with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*ExpertSlice"):
            convert_to_lora(tuned, rank=8, adapter_name=name)
    dense = get_peft_model(copy.deepcopy(base), S2FTConfig(ratios=0.25, target_modules=["o_proj"]))
    assert dense.supports_lora_conversion()


@pytest.mark.parametrize(
    "hold",
    [lambda tuned: tuned.merge_adapter(), lambda tuned: s2ft.switch(tuned, "default")],
    ids=["merged", "switched"],
)
def test_base_weights_are_not_loaded_over_an_adapter_that_stands_in_them(
    hold: Callable[[PeftModel], None], base: PreTrainedModel
) -> None:
    tuned = adapted(base).eval()
    inside = tuned.get_base_model()
    state = {name: tensor.clone() for name, tensor in inside.state_dict().items()}
    hold(tuned)
    before = {name: tensor.clone() for name, tensor in inside.state_dict().items()}
    experts = inside.model.layers[0].mlp.experts
    own = {name: tensor for name, tensor in experts.state_dict().items() if name.startswith("base_layer.")}
    for module, given in ((tuned.base_model, {f"model.{name}": state[name] for name in state}), (experts, own)):
        with pytest.raises(S2FTError, match="loading base weights is not possible while"):
            module.load_state_dict(given, strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in inside.state_dict().items())
    slices = {name: tensor for name, tensor in state.items() if "s2ft_block" in name}
    inside.load_state_dict(slices, strict=False)
    tuned.set_adapter("default")
    tuned.unmerge_adapter()
    inside.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in inside.state_dict().items())


def deltas_like_weights(tuned: PeftModel) -> PeftModel:
    """Deltas so large that a token with another row's adapter shows."""
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            parameter.mul_(20 if "s2ft_block" in name else 1)
    return tuned.eval()


FLATTENED = {
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(
        **SIZES, moe_intermediate_size=20, shared_expert_intermediate_size=28, num_experts=4, num_experts_per_tok=2
    ),
    "llama4": CONFIGS["llama4"],
    "opt": lambda: hf.OPTConfig(
        vocab_size=62, hidden_size=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    ),
}


@pytest.mark.parametrize("family", FLATTENED)
def test_layers_that_see_rows_flattened_to_tokens_give_each_row_its_own_adapter(family: str) -> None:
    """Dense layers of shared experts, and OPT's, beside each adapter by itself; in generation, too."""
    model = AutoModelForCausalLM.from_config(FLATTENED[family]()).eval()
    flattened = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ("shared_expert" in path or path.endswith((".fc1", ".fc2")))
    ]
    tuned = get_peft_model(model, S2FTConfig(ratios=0.4, seed=0, init_weights=False, target_modules=flattened))
    tuned.add_adapter("other", S2FTConfig(ratios=0.2, seed=9, init_weights=False, target_modules=flattened[:-1]))
    deltas_like_weights(tuned)
    names, tokens = ["other", "__base__", "default", "other"], text(rows=4)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for beams in (1, 2):
        found = tuned.generate(input_ids=tokens, adapter_names=names, num_beams=beams, **options)
        for row, name in enumerate(names):
            with tuned.disable_adapter() if name == "__base__" else nullcontext(tuned.set_adapter(name)):
                alone = tuned.generate(input_ids=tokens, num_beams=beams, **options)
            assert torch.equal(found[row], alone[row])
    found = logits(tuned, tokens, adapter_names=names)
    for row, name in enumerate(names):
        with tuned.disable_adapter() if name == "__base__" else nullcontext(tuned.set_adapter(name)):
            torch.testing.assert_close(found[row], logits(tuned, tokens)[row], rtol=1e-4, atol=1e-4)
    swapped = logits(tuned, tokens, adapter_names=names[1:] + names[:1])
    assert not torch.allclose(found[0], swapped[0], rtol=1e-2, atol=1e-2)


def test_experts_that_a_router_calls_one_by_one_are_refused_in_a_mixed_batch_before_anything_runs() -> None:
    config = hf.NllbMoeConfig(
        **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_sparse_step", "decoder_sparse_step"), 1),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
        vocab_size=62, d_model=32, num_experts=2,
    )  # fmt: skip
    model = hf.NllbMoeForConditionalGeneration(config).eval()
    tuned = get_peft_model(model, S2FTConfig(ratios=0.3, target_modules=r".*experts\.expert_1\.fc2"))
    tuned.add_adapter("attention", S2FTConfig(ratios=0.5, target_modules=["out_proj"]))
    tuned.eval()
    tokens, ran = text(), []
    model.register_forward_pre_hook(lambda *_: ran.append(True))
    path = "model.encoder.layers.0.ffn.experts.expert_1.fc2"
    with pytest.raises(
        S2FTError, match=re.escape(f"{path}: is called with tokens that cannot be told to be of this or that row")
    ):
        tuned(tokens, decoder_input_ids=tokens, adapter_names=["default", "__base__"])
    assert not ran
    tuned(tokens, decoder_input_ids=tokens, adapter_names=["attention", "__base__"])


TIME_FIRST = {
    "xlnet": lambda: hf.XLNetModel(hf.XLNetConfig(vocab_size=62, d_model=32, n_layer=1, n_head=4, d_inner=40)),
    "fsmt": lambda: hf.FSMTModel(
        hf.FSMTConfig(
            **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
            **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 40),
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
            langs=["en", "de"], src_vocab_size=62, tgt_vocab_size=61, d_model=32,
        )
    ),
    "longformer": lambda: hf.LongformerModel(
        hf.LongformerConfig(
            vocab_size=62, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40, attention_window=4
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", TIME_FIRST)
def test_layers_that_see_time_first_are_refused_in_a_batch_of_as_many_rows_as_tokens(family: str) -> None:
    model = TIME_FIRST[family]().eval()
    tuned = get_peft_model(model, S2FTConfig(ratios=0.5, seed=0, init_weights=False, target_modules="all-linear"))
    tuned.add_adapter("other", S2FTConfig(ratios=0.5, seed=1, init_weights=False, target_modules="all-linear"))
    tuned.eval()
    with pytest.raises(S2FTError, match=r"is called with \[length, rows, features\]"):
        tuned(text(rows=4)[:, :4], adapter_names=["default", "other", "default", "__base__"])


def test_a_list_of_experts_that_its_block_runs_is_refused_by_name() -> None:
    """As many tokens as rows reach the expert here, so that their number alone would not show it."""

    class Mixture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32, bias=False) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x.reshape(-1, x.shape[-1])
            return x + torch.cat([self.experts[0](tokens[:2]), self.experts[1](tokens[2:])]).view_as(x)

    model = AutoModelForCausalLM.from_config(hf.LlamaConfig(**SIZES))
    model.model.layers[0].mlp = Mixture()
    tuned = get_peft_model(model, S2FTConfig(ratios=0.3, target_modules=r".*experts\.0")).eval()
    with pytest.raises(S2FTError, match=r"^model\.layers\.0\.mlp\.experts\.0 is called with tokens that cannot"):
        logits(tuned, text(rows=2), adapter_names=["default", "__base__"])
