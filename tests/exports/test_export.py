"""An exported LoRA is the adapter: PEFT gives the same logits and tokens, engines get what they need, bad input nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, DeepseekV2Config, DeepseekV2ForCausalLM
from typer.testing import CliRunner

import s2ft
from adapter_files import WEIGHTS, edit, write_tensors
from exported import SIDES, load, load_base, save_adapter, save_base
from families import FAMILIES, tokens
from s2ft import S2FTError
from s2ft.adapters.checkpoint import Checkpoint
from s2ft.adapters.file import read_adapter
from s2ft.cli.app import app
from s2ft.exports.lora import factors
from s2ft.exports.targets import TARGETS
from s2ft.exports.vllm import VLLM_RANKS
from s2ft.format.slices import Slice


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """Module → ΔW, from a LoRA's files by PEFT's formula, in float64."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / WEIGHTS)
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = config["rank_pattern"].get(module, config["r"])
            assert len(a) == rank
            scale = config["alpha_pattern"].get(module, config["lora_alpha"]) / rank
            found[module] = scale * tensors[name.replace("lora_A", "lora_B")].double() @ a.double()
    return found


def expected(adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    """Module → ΔW, from the native files, in float64."""
    read, model = read_adapter(adapter), load_base(base)
    found = {}
    for module, chosen in read.slices.items():
        weight = model.get_submodule(module).weight
        weight = weight.T if type(model.get_submodule(module)).__name__ == "Conv1D" else weight
        found[module] = torch.zeros(weight.shape, dtype=torch.float64)
        at = (slice(None), chosen.indices) if chosen.side == "in" else chosen.indices
        found[module][at] = read.deltas[module].double()
    return found


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_the_same_logits_and_tokens(family: str, side: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family, torch.float64)
    adapter = save_adapter(tmp_path / "adapter", base, SIDES[side])
    s2ft.export(adapter, "lora", tmp_path / "lora")
    native, lora, batch = load(base, adapter), load(base, tmp_path / "lora"), tokens(3, 7)
    with torch.no_grad():
        ours, theirs = native(batch).logits, lora(batch).logits
        with native.disable_adapter():
            plain = native(batch).logits
    assert (ours - theirs).abs().max() < 1e-10 * ours.abs().max() < 1e-6 * (ours - plain).abs().max()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    written = native.generate(input_ids=batch, **options)
    assert torch.equal(written, lora.generate(input_ids=batch, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept_and_factors_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", dtype)
    adapter = save_adapter(tmp_path / "adapter", base, SIDES["both"])
    native = load_file(adapter / WEIGHTS)
    for name, tensor in native.items():
        if tensor.is_floating_point():
            native[name] = tensor.to(dtype)
    write_tensors(adapter, native)
    s2ft.export(adapter, "lora", tmp_path / "lora")
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora" / WEIGHTS).values()} == {dtype}
    found, wanted = dense(tmp_path / "lora"), expected(adapter, base)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[module], wanted[module]) for module in wanted)


def test_in_bf16_the_logits_agree_to_its_rounding(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, SIDES["both"])
    s2ft.export(adapter, "lora", tmp_path / "lora")
    native, lora, batch = load(base, adapter), load(base, tmp_path / "lora"), tokens(4, 9)
    with torch.no_grad():
        ours, theirs = native(batch).logits.float(), lora(batch).logits.float()
        with native.disable_adapter():
            plain = native(batch).logits.float()
    difference = torch.linalg.vector_norm(ours - theirs)
    assert difference < 0.03 * torch.linalg.vector_norm(ours)  # a few roundings of 2^-8
    assert difference < 0.1 * torch.linalg.vector_norm(ours - plain)


@pytest.mark.parametrize("side", ["in", "out"])
def test_factors_multiply_to_the_delta_on_odd_shapes(side: str) -> None:
    size, across = (int(torch.randint(1, 40, ())) for _ in range(2))
    count = int(torch.randint(1, size + 1, ()))
    indices = torch.randperm(size)[:count].sort().values
    delta = torch.randn((across, count) if side == "in" else (count, across))
    low = factors(Slice(side, indices.numpy().astype(np.int64)), delta, size)
    wanted = torch.zeros((across, size) if side == "in" else (size, across))
    wanted[(slice(None), indices) if side == "in" else indices] = delta
    assert low.a.shape[0] == low.b.shape[1] == count
    assert torch.equal(low.b @ low.a, wanted)


@pytest.mark.parametrize("name", ["lm_head", "head"])  # PEFT takes the end of a path
def test_whole_modules_and_token_rows_come_along(name: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama", torch.float64)
    extra = {"modules_to_save": [name], "trainable_token_indices": [4, 9]}
    adapter = save_adapter(tmp_path / "adapter", base, SIDES["input"], **extra)
    s2ft.export(adapter, "lora", tmp_path / "lora")
    native, lora, batch = load(base, adapter), load(base, tmp_path / "lora"), torch.tensor([[4, 9, 5, 4]])
    with torch.no_grad():
        torch.testing.assert_close(native(batch).logits, lora(batch).logits, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(native(batch).logits, load_base(base)(batch).logits, atol=0.1)


def test_vllm_keeps_mixed_ranks_and_says_the_smallest_maximum(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, SIDES["both"])
    done = s2ft.export(adapter, "vllm", tmp_path / "vllm")
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    counts = {module: len(chosen.indices) for module, chosen in read_adapter(adapter).slices.items()}
    assert config["rank_pattern"] == config["alpha_pattern"] == counts
    assert config["r"] == config["lora_alpha"] == max(counts.values()) == done.most_channels
    assert done.max_lora_rank == min(rank for rank in VLLM_RANKS if rank >= done.most_channels)
    same = {"rank_pattern": counts, "alpha_pattern": counts, "target_modules": sorted(counts), "task_type": "CAUSAL_LM"}
    read = LoraConfig.from_pretrained(str(tmp_path / "vllm"))
    wanted = LoraConfig(r=config["r"], lora_alpha=config["r"], inference_mode=True, **same)
    wanted.base_model_name_or_path = str(base)
    assert read == wanted
    assert done.native_bytes == sum(path.stat().st_size for path in adapter.iterdir())
    assert done.exported_bytes == sum(path.stat().st_size for path in (tmp_path / "vllm").iterdir())
    assert torch.equal(dense(tmp_path / "vllm")[module := next(iter(counts))], expected(adapter, base)[module])


def test_patterns_name_the_module_that_they_mean(tmp_path: Path) -> None:
    """Patterns are regular expressions for the ends of paths; PEFT must find each rank again."""
    base = save_base(tmp_path / "base", "gpt2")
    adapter = save_adapter(tmp_path / "adapter", base, {"o_proj": 0.25, "down_proj": 0.5, "v_proj": 0.5})
    s2ft.export(adapter, "vllm", tmp_path / "vllm")
    model = get_peft_model(load_base(base), LoraConfig.from_pretrained(str(tmp_path / "vllm")))
    for module, chosen in read_adapter(adapter).slices.items():
        assert model.base_model.model.get_submodule(module).r["default"] == len(chosen.indices)
        assert model.base_model.model.get_submodule(module).scaling["default"] == 1


@pytest.mark.parametrize("ratios", [{"v_proj": 0.5}, {"k_proj": 0.5, "up_proj": 0.3}, SIDES["both"]])
def test_sglang_gets_one_rank_and_whole_groups(ratios: dict[str, float], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, ratios, layers=[0, 2])
    done = s2ft.export(adapter, "sglang", tmp_path / "sglang")
    config = json.loads((tmp_path / "sglang" / "adapter_config.json").read_text())
    found, wanted = dense(tmp_path / "sglang"), expected(adapter, base)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["r"] == config["lora_alpha"] == done.most_channels
    for module in wanted:
        assert torch.equal(found[module], wanted[module])
    for module in found.keys() - wanted.keys():
        assert not found[module].any()
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        parents = [module.rpartition(".")[0] for module in wanted if module.endswith(group)]
        assert all(f"{parent}.{name}" in found for parent in parents for name in group)
    assert set(config["target_modules"]) == {module.rpartition(".")[2] for module in found}


def test_over_512_channels_are_refused_for_vllm_only(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 600, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "base", {"down_proj": 0.9})
    with pytest.raises(S2FTError, match=r"down_proj has 540 channels.*512 at most.*s2ft merge.*smaller ratios"):
        s2ft.export(adapter, "vllm", tmp_path / "vllm")
    assert not (tmp_path / "vllm").exists()
    assert s2ft.export(adapter, "lora", tmp_path / "lora").max_lora_rank is None


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "lora"])
def test_what_an_engine_cannot_carry_is_refused_by_name(target: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, 0.3, modules_to_save=["lm_head"])
    name = f"out{TARGETS[target].suffix or ''}"
    with pytest.raises(S2FTError, match="lm_head"):
        s2ft.export(adapter, target, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_what_peft_takes_for_experts_is_refused_for_peft_alone(tmp_path: Path) -> None:
    """DeepSeek's shared experts and dense blocks have the names that experts had in older checkpoints."""
    sizes = {"hidden_size": 24, "intermediate_size": 44, "moe_intermediate_size": 20, "num_hidden_layers": 2}
    latent = {"kv_lora_rank": 14, "q_lora_rank": 12, "qk_rope_head_dim": 6, "qk_nope_head_dim": 8, "v_head_dim": 10}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    base = tmp_path / "base"
    DeepseekV2ForCausalLM(DeepseekV2Config(vocab_size=61, **sizes, **latent, **heads)).save_pretrained(base)
    beside = {"exclude_modules": ["experts.down_proj"]}
    both = save_adapter(tmp_path / "both", base, {"o_proj": 0.5, "down_proj": 0.5}, **beside)
    with pytest.raises(
        S2FTError, match=r"PEFT takes model\.layers\.0\.mlp\..*down_proj of a LoRA on deepseek_v2 for one of"
    ):
        s2ft.export(both, "lora", tmp_path / "lora", base=str(base))
    assert not (tmp_path / "lora").exists()
    s2ft.export(both, "vllm", tmp_path / "vllm", base=str(base))
    heads_alone = save_adapter(tmp_path / "heads", base, {"q_proj": 0.5, "v_proj": 0.5, "o_proj": 0.5})
    s2ft.export(heads_alone, "lora", tmp_path / "lora", base=str(base))
    x = tokens(2, 7)
    expected_logits = load(base, heads_alone)(x).logits
    torch.testing.assert_close(load(base, tmp_path / "lora")(x).logits, expected_logits, rtol=1e-4, atol=1e-4)


def test_whatever_peft_would_rewrite_speaks_of_experts(tmp_path: Path) -> None:
    """Only then is PEFT asked, whose import takes seconds."""
    rewritten = [kind for kind, like in _MODEL_TO_CONVERSION_PATTERN.items() if like in _MOE_TARGET_MODULE_MAPPING]
    assert "deepseek_v2" in rewritten
    for kind in filter(CONFIG_MAPPING.__contains__, rewritten):
        (tmp_path / kind).mkdir()
        CONFIG_MAPPING[kind]().save_pretrained(tmp_path / kind)
        assert Checkpoint(tmp_path / kind, None).names_experts, kind
    save_base(tmp_path / "llama", "llama")
    assert not Checkpoint(tmp_path / "llama", None).names_experts


def test_what_no_lora_can_carry_is_refused_by_name(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, 0.3)
    write_tensors(adapter, {**load_file(adapter / WEIGHTS), "base_model.model.extra.weight": torch.ones(2)})
    with pytest.raises(S2FTError, match=r"extra\.weight' is neither a slice nor what the config declares"):
        s2ft.export(adapter, "lora", tmp_path / "lora")


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-40])


def tamper(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(tensor for name, tensor in tensors.items() if name.endswith("weight")).view(-1)[5] = torch.nan
    write_tensors(folder, tensors)


def rename(folder: Path, old: str, new: str) -> None:
    """The same adapter, with another path for its modules in the config and in the file."""
    config = json.loads((folder / "adapter_config.json").read_text())
    edit(folder, slices={name.replace(old, new): text for name, text in config["slices"].items()}, base_digest=None)
    write_tensors(folder, {name.replace(old, new): t for name, t in load_file(folder / WEIGHTS).items()})


def lengthen(folder: Path) -> None:
    """Channel 99 of 40."""
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / "adapter_config.json").read_text())
    for module in config["slices"]:
        name = f"base_model.model.{module}.s2ft_block.indices"
        tensors[name][-1] = 99
        config["slices"][module] = str(Slice("in", tensors[name].numpy()))
    write_tensors(folder, tensors)
    edit(folder, slices=config["slices"], base_digest=None)


DAMAGE = {
    "truncated": truncate,
    "not finite": tamper,
    "peft_type is 'LORA'": lambda folder: edit(folder, peft_type="LORA"),
    "no linear layer of this model": lambda folder: rename(folder, "self_attn", "cross_attn"),
    r"changes model\.layers\.\.\./\.\./secret": lambda folder: rename(folder, "layers.", "layers.../../secret."),
    "changes channel 99": lengthen,
    "base='nowhere/at/all'": lambda folder: edit(folder, base_model_name_or_path="nowhere/at/all"),
    "does not say which base": lambda folder: edit(folder, base_model_name_or_path=None),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_bad_adapters_are_refused_before_anything_is_written(message: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, {"o_proj": 0.5})
    DAMAGE[message](adapter)
    for target, name in (("lora", "out"), ("gguf", "out.gguf"), ("patch", "out.safetensors")):
        with pytest.raises(S2FTError, match=message):
            s2ft.export(adapter, target, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("target", ["lora", "patch"])
def test_another_base_is_refused_unless_told_otherwise(target: str, tmp_path: Path) -> None:
    base, other = save_base(tmp_path / "base", "llama"), save_base(tmp_path / "other", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, 0.3)
    output = tmp_path / ("out" if target == "lora" else "out.safetensors")
    with pytest.raises(S2FTError, match="made for another base"):
        s2ft.export(adapter, target, output, base=str(other))
    assert not output.exists()
    with s2ft.any_base():
        assert s2ft.export(adapter, target, output, base=str(other)).modules == 6


def test_a_base_without_weights_is_enough_for_a_lora(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2")
    adapter = save_adapter(tmp_path / "adapter", base, SIDES["both"])
    (tmp_path / "sizes").mkdir()
    shutil.copy(base / "config.json", tmp_path / "sizes")
    s2ft.export(adapter, "lora", tmp_path / "a")
    s2ft.export(adapter, "lora", tmp_path / "b", base=str(tmp_path / "sizes"))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    with pytest.raises(S2FTError, match="never unpickles"):
        s2ft.export(adapter, "patch", tmp_path / "c.safetensors", base=str(tmp_path / "sizes"))


def test_an_index_without_its_shards_is_enough_for_a_lora(tmp_path: Path) -> None:
    """What comes of a large model on the Hub: its JSON files."""
    base = save_base(tmp_path / "base", "qwen2", max_shard_size="8KB")
    adapter = save_adapter(tmp_path / "adapter", base, SIDES["both"])
    (tmp_path / "sizes").mkdir()
    for file in base.glob("*.json"):
        shutil.copy(file, tmp_path / "sizes")
    assert (tmp_path / "sizes" / "model.safetensors.index.json").is_file()
    s2ft.export(adapter, "lora", tmp_path / "a")
    s2ft.export(adapter, "lora", tmp_path / "b", base=str(tmp_path / "sizes"))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("to", "output", "message"),
    [
        ("onnx", "out", "to='onnx' is unknown; choose from lora, vllm"),
        ("lora", "full", "holds files already"),
        ("lora", "full/file", "is a file; name a folder"),
        ("lora", "full/file/out", "is a file, not a folder"),
        ("gguf", "out.bin", "must be a file that ends in .gguf"),
        ("patch", "full/file.safetensors", "exists already"),
    ],
)
def test_outputs_are_looked_at_first(to: str, output: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    for name in ("file", "file.safetensors"):
        (tmp_path / "full" / name).write_text("mine")
    with pytest.raises(S2FTError, match=message):
        s2ft.export("nowhere", to, tmp_path / output)
    assert {path.read_text() for path in (tmp_path / "full").iterdir()} == {"mine"}


def test_the_command_line_writes_and_says_what(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "adapter", base, {"o_proj": 0.5})
    arguments = ["export", str(adapter), "--to", "vllm", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "facts.json")])
    assert result.exit_code == 0, result.output
    assert "--max-lora-rank 32" in result.output
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["max_lora_rank"] == 32
    assert facts["most_channels"] == 20
    assert facts["exported_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert isinstance(CliRunner().invoke(app, arguments).exception, S2FTError)  # there already
