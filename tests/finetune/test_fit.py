"""`s2ft plan`: its formula beside a measured model, and what it says of machines that are large or small."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from s2ft import S2FTConfig
from s2ft.finetune.fit import RESERVED, WAYS, Sizes, best, fit, fits, measure
from s2ft.finetune.machines import Machine
from s2ft.runtime.memory import own_tensors, saved_bytes

Run = Callable[..., tuple[int, str, str]]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
SIZES |= {"num_key_value_heads": 2}
LENGTH = 32
WAY = {way.engine: way for way in WAYS}


@pytest.mark.parametrize("classes", [(LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def test_the_formula_is_what_a_small_model_takes(classes: tuple[type, type]) -> None:
    config, build = classes
    tuning = S2FTConfig(ratios={"o_proj": 0.5, "up_proj": 0.2, "down_proj": 0.2}, strategy="random", seed=0)
    model = get_peft_model(build(config(**SIZES)).bfloat16(), tuning)
    with torch.device("meta"):
        empty = build(config(**SIZES)).bfloat16()
    sizes = measure(empty, tuning, LENGTH)
    expected = fit(sizes, WAY["one process"], 1, 2, LENGTH, checkpointing=False, quantised=None)

    ids = torch.randint(96, (2, LENGTH))
    backbone = model.get_base_model().model
    kept = saved_bytes(lambda: backbone(input_ids=ids, use_cache=False).last_hidden_state, own_tensors(model))
    copies = sum(
        2 * p.numel() for p in model.parameters() if p.requires_grad
    )  # of the deltas, which the plan counts apart
    assert kept - copies == pytest.approx(expected.activations, rel=0.05)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moments = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.numel() > 1)
    assert expected.optimizer == moments
    assert expected.gradients == sum(p.grad.nbytes for p in trained)
    assert expected.deltas == sum(p.nbytes for p in trained) + copies
    assert expected.weights == sum(p.nbytes for p in model.parameters() if not p.requires_grad)


def sizes() -> Sizes:
    return Sizes(
        7_000_000, 6_000_000, 200_000, 800_000, 100_000, blocks=31, width=64, vocabulary=10, activations=1_000_000
    )


def test_engines_divide_what_they_divide() -> None:
    one, ddp, zero2, fsdp2 = (
        fit(sizes(), WAY[name], 4, 2, 8, checkpointing=False, quantised=None)
        for name in ("one process", "ddp", "zero2", "fsdp2")
    )
    assert (one.weights, ddp.weights, zero2.weights) == (14e6, 14e6, 14e6)
    assert fsdp2.weights == 14e6 / 4 + 2 * (2 * 200_000 + 800_000)
    assert (one.gradients, ddp.gradients, zero2.gradients, fsdp2.gradients) == (4e5, 8e5, 1e5, 1e5)
    assert (one.optimizer, ddp.optimizer, zero2.optimizer, fsdp2.optimizer) == (8e5, 8e5, 2e5, 2e5)
    assert (one.deltas, ddp.deltas, zero2.deltas, fsdp2.deltas) == (6e5, 6e5, 6e5, 3e5)
    assert one.total == one.weights + one.deltas + one.gradients + one.optimizer + one.activations + one.head + RESERVED
    checked = fit(sizes(), WAY["fsdp2"], 4, 2, 8, checkpointing=True, quantised=None)
    assert checked.activations == pytest.approx(2 * (2 * 31 * 64 * 8 + 1e6 / 31))
    packed = fit(sizes(), WAY["ddp"], 4, 2, 8, checkpointing=False, quantised="nf4")
    assert packed.weights == 2 * 1e6 + 6e6 * (0.5 + 4 / 64)


def test_whole_weights_and_no_recomputation_come_first() -> None:
    found = list(fits(sizes(), Machine(4, RESERVED + 20e6), 8))
    taken = best(found)
    assert (taken.engine, taken.checkpointing, taken.batch_size) == ("ddp", False, 2)
    found = list(fits(sizes(), Machine(4, RESERVED + 8e6), 8))
    assert best(found).engine == "fsdp2"
    assert best(list(fits(sizes(), Machine(4, RESERVED), 8))) is None
    assert {one.engine for one, _ in fits(sizes(), Machine(1, 80e9), 8)} == {"one process"}


@pytest.fixture
def config(tmp_path: Path) -> str:
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_the_command_says_what_to_run(s2ft: Run, tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["plan", "--model", config, "--gpus", "2x24G", "--max-length", "16", "--json", str(tmp_path / "plan.json")]
    code, out, _ = s2ft(*given)
    assert code == 0
    assert (
        "accelerate launch --config_file examples/distributed/ddp.yaml --num_processes 2 -m s2ft.cli.app train" in out
    )
    assert "comes with the source" not in out
    monkeypatch.chdir(tmp_path)
    assert "Its config file comes with the source of s2ft, in examples/distributed" in s2ft(*given)[1]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["chosen"]["engine"] == "ddp"
    assert plan["chosen"]["command"].endswith("--max-length 16 --batch-size 64")
    assert {row["engine"] for row in plan["rows"]} == {"ddp", "zero2", "fsdp2", "zero3"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--gpus", "1x2G"], "--gpus='1x2G' is too small: the least is 2.5 GB on each device"),
        (["--gpus", "80G"], "--gpus='80G' must be a number of devices and the memory of each, such as 8x80G"),
        (["--gpus", "1x80G", "--max-length", "0"], "--max-length='0' must be 1 or more"),
        (["--gpus", "1x80G", "--budget", "2"], "budget=2.0"),
    ],
)
def test_what_cannot_be_planned_is_said(s2ft: Run, config: str, given: list[str], message: str) -> None:
    code, _, err = s2ft("plan", "--model", config, *given)
    assert code == 2
    assert message in " ".join(err.split())
