"""The methods that S²FT is compared with: what each trains, leaves behind, resumes to, and refuses."""

import json
import logging
import random
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import FAMILIES, build, tokens
from live import same
from s2ft import S2FTError
from s2ft.finetune import galore
from s2ft.finetune.lisa import Lisa, draw, find_blocks
from s2ft.finetune.lora import equal_rank, lora_config, lora_targets
from s2ft.finetune.methods import METHODS
from s2ft.finetune.options import TrainOptions, parse_options, read_config, to_yaml, unasked
from s2ft.finetune.resume import Paused, check_whole
from tiny_runs import interrupt_at, skip_without, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")

PATHS = {"model": "m", "data": "d", "output": "o"}
WHOLE = ("full", "galore", "lisa")
OF_METHOD = {
    "full": {},
    "lora": {"lora_rank": 4, "lora_alpha": 8},
    "dora": {"lora_rank": 4, "lora_alpha": 8},
    "galore": {"galore_rank": 4},
    "lisa": {"lisa_layers": 1, "lisa_interval": 2},
}


def options_of(method: str, **options: Any) -> TrainOptions:
    """Six short steps, unless told otherwise."""
    skip_without(method)
    settings = {"max_steps": 6, "gradient_accumulation": 2, "learning_rate": 1e-2, "log_every": 1, "precision": "fp32"}
    return parse_options({"method": method, **settings, **OF_METHOD.get(method, {}), **options})


@pytest.fixture
def run(base, data, tmp_path):
    def call(method: str, output: str = "out", **options):
        paths = {"model": base, "data": data, "output": str(tmp_path / output)}
        return train(options_of(method, **{**paths, **options}))

    return call


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    """The usual run of a method, trained once for all tests."""

    @cache
    def call(method: str):
        return train(options_of(method, model=base, data=data, output=str(tmp_path_factory.mktemp(method) / "out")))

    return call


@pytest.mark.parametrize("method", WHOLE)
def test_a_base_whose_generation_config_samples_without_saying_so_is_saved(run, base, tmp_path, caplog, method):
    """As Llama 2's; transformers refuses it once the tokenizer's tokens are in it."""
    caplog.set_level(logging.INFO, logger="s2ft")
    shutil.copytree(base, tmp_path / "lax")
    lax = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
    (tmp_path / "lax" / "generation_config.json").write_text(json.dumps(lax))
    result = run(method, model=str(tmp_path / "lax"), max_steps=2, save_every=1)
    saved = json.loads((result.output / "generation_config.json").read_text())
    assert {name: saved[name] for name in ("temperature", "top_p", "do_sample")} == {
        "temperature": 0.6,
        "top_p": 0.9,
        "do_sample": True,
    }
    assert any("do_sample=True" in message for message in caplog.messages)


def test_a_generation_config_that_cannot_be_saved_is_refused_before_training(run, base, tmp_path):
    shutil.copytree(base, tmp_path / "lax")
    (tmp_path / "lax" / "generation_config.json").write_text(json.dumps({"length_penalty": 0.5}))
    with pytest.raises(S2FTError, match=r"would not save its generation config: .*length_penalty"):
        run("full", model=str(tmp_path / "lax"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", OF_METHOD)
def test_a_run_lowers_the_loss_and_what_it_leaves_loads(trained, base, method):
    result = trained(method)
    losses = [loss for _, loss in result.card["loss_curve"]]
    assert losses[-1] < losses[0] - 0.05
    source = str(result.output) if method in WHOLE else base
    loaded = AutoModelForCausalLM.from_pretrained(source)
    if method in WHOLE:
        assert AutoTokenizer.from_pretrained(source)("1+1").input_ids == result.tokenizer("1+1").input_ids
    else:
        loaded = PeftModel.from_pretrained(loaded, result.output)
    ids = tokens(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, result.model.eval()(ids).logits, rtol=0, atol=0)
        assert not torch.allclose(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits, atol=1e-3)


@pytest.mark.parametrize("method", OF_METHOD)
def test_the_folder_says_how_it_was_made_and_how_it_is_used(trained, method):
    result = trained(method)
    names = {path.name for path in result.output.iterdir()}
    assert names >= {"README.md", "run.json", "run.md", "run.yaml", "loss.png"}
    kind = "model" if method in WHOLE else "adapter"
    assert ("config.json" in names, "adapter_config.json" in names) == (kind == "model", kind == "adapter")
    section = result.card[kind]
    assert section["bytes"] == sum(path.stat().st_size for path in result.output.glob("*.safetensors"))
    count = sum(p.numel() for p in result.model.parameters() if p.requires_grad)
    assert section["trainable_parameters"] == count
    readme = (result.output / "README.md").read_text()
    assert METHODS[method].title in readme
    assert "import s2ft" not in readme
    assert f"{count:,} of the model's {section['model_parameters']:,}" in readme
    assert parse_options(read_config(str(result.output / "run.yaml"))).method == method
    words = shlex.split(result.card["command"])
    assert words[:2] == ["s2ft", "train"]
    assert not {f"--{name.replace('_', '-')}" for name in unasked(parse_options({**PATHS, "method": method}))} & {
        *words
    }


@pytest.mark.parametrize("method", ["lora"])  # the others, with held-out examples: test_holdout.py
def test_a_resumed_run_ends_in_the_same_weights(run, trained, monkeypatch, method):
    whole = trained(method)
    interrupt_at(monkeypatch, 3)
    paused = run(method, "paused")
    assert paused.interrupted
    assert not same(weights(paused.output), weights(whole.output))
    monkeypatch.undo()
    resumed = run(method, "paused", resume=True)
    assert not resumed.interrupted
    assert same(weights(resumed.output), weights(whole.output))
    assert resumed.card["loss_curve"] == whole.card["loss_curve"]


def test_the_seed_decides_where_an_adapter_starts(run):
    first, again, other = (
        run("lora", name, max_steps=1, train_seed=seed) for name, seed in zip("abc", (3, 3, 4), strict=True)
    )
    assert same(weights(first.output), weights(again.output))
    assert not same(weights(first.output), weights(other.output))


@pytest.mark.parametrize("method", ["full", "galore"])
def test_every_weight_moves(run, base, method):
    after, before = weights(run(method, max_steps=2).output), weights(Path(base))
    assert after.keys() == before.keys()
    assert not any(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("method", WHOLE)
def test_what_is_trained_is_fp32_and_what_is_written_has_the_dtype_of_the_base(
    run, base, tmp_path, monkeypatch, method
):
    stored = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained(stored)
    AutoTokenizer.from_pretrained(base).save_pretrained(stored)
    interrupt_at(monkeypatch, 2)
    result = run(method, model=str(stored), precision="bf16")
    assert {tensor.dtype for tensor in weights(result.output).values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(result.output / "checkpoint-2").values()} == {torch.float32}
    assert result.card["training"]["precision"] == "bf16, as asked; fp32 weights under bf16 autocast"
    assert result.card["loss_curve"][-1][1] < result.card["loss_curve"][0][1]
    monkeypatch.undo()
    assert not run(method, model=str(stored), precision="bf16", resume=True).interrupted


def test_an_adapter_is_fp32_on_a_bf16_base(run):
    result = run("lora", precision="bf16", max_steps=2)
    kinds = {parameter.requires_grad: parameter.dtype for parameter in result.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize("method", ["full", "lisa"])
def test_gradient_checkpointing_gives_the_same_weights(run, method):
    plain, checkpointed = run(method, "a", max_steps=3), run(method, "b", max_steps=3, gradient_checkpointing=True)
    left, right = weights(plain.output), weights(checkpointed.output)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-5)


# LISA


def test_lisa_moves_the_drawn_blocks_and_what_is_outside_of_them(run, base):
    result = run("lisa", max_steps=2, train_seed=7, weight_decay=0.1)
    after, before = weights(result.output), weights(Path(base))
    ((_, drawn),) = draw([("model.layers", 0), ("model.layers", 1)], 1, seed=7, period=0)
    for name in before:
        frozen = f"model.layers.{1 - drawn}." in name
        assert torch.equal(after[name], before[name]) == frozen, name


def test_lisa_equals_a_new_adamw_on_the_drawn_blocks_of_each_period():
    model, reference = build("qwen3"), build("qwen3")
    reference.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    lisa = Lisa(layers=1, interval=3, seed=5)
    ids = tokens(9, 2, 7)
    others = [p for name, p in reference.named_parameters() if ".layers." not in name]
    outside = torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1)
    for step, batch in enumerate(ids):
        lisa.switch(model, optimizer, step)
        if step % 3 == 0:
            drawn = draw([("model.layers", index) for index in range(3)], 1, seed=5, period=step // 3)
            ((_, index),) = drawn
            inside = torch.optim.AdamW(reference.model.layers[index].parameters(), lr=1e-2, weight_decay=0.1)
        for net, steppers in ((model, [optimizer]), (reference, [outside, inside])):
            net(batch, labels=batch).loss.backward()
            for stepper in steppers:
                stepper.step()
            net.zero_grad()
    for (name, left), right in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12, msg=name)
    held = {id(parameter) for parameter in optimizer.state}
    assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_lisa_draws_different_blocks_evenly():
    blocks = [("layers", index) for index in range(6)]
    draws = [draw(blocks, 2, seed=0, period=period) for period in range(600)]
    assert all(len(drawn) == 2 for drawn in draws)
    for block in blocks:
        assert 140 < sum(block in drawn for drawn in draws) < 260  # 200 expected, 5 deviations


def test_lisa_finds_the_blocks_of_every_family():
    for family in FAMILIES:
        model = build(family)
        blocks = find_blocks(model)
        assert len(blocks) == 3
        inside = {id(parameter) for parameters in blocks.values() for parameter in parameters}
        embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        assert not inside & embeddings
        assert all(id(parameter) in inside for name, parameter in model.named_parameters() if "mlp" in name)


# LoRA


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dora", [False, True])
def test_the_equal_rank_is_the_nearest_that_peft_has(family, dora):
    wanted = random.randrange(500, 20_000)
    rank = equal_rank(build(family, torch.float32), wanted, dora)

    def distance(rank: int) -> int:
        model = get_peft_model(build(family, torch.float32), lora_config(rank, rank, dora=dora))
        return abs(sum(p.numel() for p in model.parameters() if p.requires_grad) - wanted)

    near = [distance(other) for other in (rank - 1, rank, rank + 1) if other > 0]
    assert distance(rank) == min(near)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_adapts_q_k_v_up_and_down(family):
    model = build(family, torch.float32)
    adapted = get_peft_model(model, lora_config(2, 4, targets=lora_targets(model)))
    names = {name.split(".lora_A")[0].split(".", 5)[-1] for name, _ in adapted.named_parameters() if "lora_A" in name}
    leaves = {name.rpartition(".")[2] for name in names}
    expected = {
        "phi3": {"qkv_proj", "gate_up_proj", "down_proj"},
        "gpt2": {"c_attn", "c_fc", "c_proj"},
    }.get(family, {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"})
    assert leaves == expected
    if family == "gpt2":
        assert not any("attn.c_proj" in name for name in names)


def test_a_model_that_cannot_be_read_gets_lora_on_all_linear_layers():
    assert lora_targets(nn.Sequential(nn.Linear(2, 2))) == "all-linear"


# What is refused


@pytest.mark.parametrize("method", METHODS)
def test_options_of_other_methods_are_refused_by_name_and_together(method):
    values = {"ratios": 0.5, "strategy": "random", "calibration": 0.5, "lora_rank": 4, "galore_rank": 4}
    values |= {"lisa_layers": 1, "optim": "sgd", "target_modules": "q_proj"}
    foreign = [name for name in values if name not in METHODS[method].options]
    with pytest.raises(S2FTError) as caught:
        parse_options({**PATHS, "method": method, **values})
    for name in values:
        said = f"{name}={values[name]!r} is no option of method={method}; it belongs to" in str(caught.value)
        assert said == (name in foreign)
    assert parse_options({**PATHS, "method": method, **{n: v for n, v in values.items() if n not in foreign}})


def test_a_foreign_option_is_reported_beside_other_problems():
    with pytest.raises(S2FTError, match="2 problems") as caught:
        parse_options({**PATHS, "method": "lora", "ratios": "0.5", "epochs": 0})
    assert "ratios='0.5' is no option of method=lora; it belongs to s2ft" in str(caught.value)


def test_an_unknown_method_is_refused():
    with pytest.raises(S2FTError, match="method='lore': unknown; choose from s2ft, full, lora, dora"):
        parse_options({**PATHS, "method": "lore"})


@pytest.mark.parametrize("method", METHODS)
def test_options_survive_their_yaml(tmp_path, method):
    options = parse_options({**PATHS, "method": method, "epochs": 2})
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(options))
    assert parse_options(read_config(str(path))) == options


def test_without_galore_torch_its_method_is_refused_before_anything_is_written(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(galore, "find_spec", lambda name: None)
    options = parse_options({"method": "galore", "model": base, "data": data, "output": str(tmp_path / "out")})
    with pytest.raises(S2FTError, match=r"galore-torch; install it with: pip install 's2ft\[baselines\]'"):
        train(options)
    assert not (tmp_path / "out").exists()


def test_lisa_with_more_layers_than_the_model_has_is_refused(run, tmp_path):
    with pytest.raises(S2FTError, match="lisa_layers=3 is more than the 2 blocks"):
        run("lisa", lisa_layers=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj,z_proj", None),
        ("z_proj,y_proj", r"target_modules=\['y_proj', 'z_proj'\] match none of the linear layers .*q_proj"),
        ("mlp,q_proj", r"matches model\.layers\.0\.mlp, a LlamaMLP; name linear layers"),
        ("(", r"target_modules='\(' is no regular expression"),
        ("all-linear", None),
    ],
)
def test_targets_that_lora_cannot_adapt_are_refused(run, tmp_path, targets, message):
    if message is None:
        run("lora", target_modules=targets, max_steps=1)
        return
    with pytest.raises(S2FTError, match=message):
        run("lora", target_modules=targets)
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_resumed_by_another_method(run, monkeypatch):
    interrupt_at(monkeypatch, 2)
    run("full")
    monkeypatch.undo()
    with pytest.raises(S2FTError, match=r"method='lora', but .*checkpoint-2 was made with method='full'"):
        run("lora", resume=True)


def test_a_model_in_parts_is_whole_only_with_all_of_them(run, monkeypatch):
    interrupt_at(monkeypatch, 2)
    checkpoint = run("full").output / "checkpoint-2"
    (checkpoint / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(checkpoint.parent).config)
    model.save_pretrained(checkpoint, max_shard_size="60KB")
    parts = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(parts) > 1
    check_whole(Paused.read(checkpoint), is_model=True)
    parts[0].write_bytes(parts[0].read_bytes()[:50])
    with pytest.raises(S2FTError, match=f"{parts[0].name} is damaged"):
        check_whole(Paused.read(checkpoint), is_model=True)
    parts[0].unlink()
    with pytest.raises(S2FTError, match=f"incomplete: it has no {parts[0].name}"):
        check_whole(Paused.read(checkpoint), is_model=True)
