"""`s2ft train` on a GPU: runs, resumed runs, every method, and what the card says."""

import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from live import logits
from on_gpu import IS_CUDA, distance, error, random_tokens
from s2ft.adapters.file import read_adapter
from s2ft.finetune.methods import METHODS
from s2ft.finetune.options import parse_options
from s2ft.finetune.train import train
from tiny_runs import interrupt_at, skip_without, weights


@pytest.fixture
def run(base, data, tmp_path):
    """Trains for six short steps, unless told otherwise."""

    def call(output: str = "out", **options):
        settings = {"max_steps": 6, "gradient_accumulation": 2, "learning_rate": 1e-2, "log_every": 1, "train_seed": 3}
        settings |= {"model": base, "data": data, "output": str(tmp_path / output)}
        settings |= {} if "method" in options else {"ratios": 0.25}
        return train(parse_options({**settings, **options}))

    return call


def test_a_run_takes_the_gpu_and_says_so(run, base):
    result = run()
    assert result.card["loss_curve"][-1][1] < result.card["loss_curve"][0][1] - 0.05
    kinds = {parameter.requires_grad: parameter.dtype for parameter in result.model.parameters()}
    text = (result.output / "run.md").read_text()
    if IS_CUDA:
        has_bf16 = torch.cuda.get_device_capability()[0] >= 8
        assert kinds == {True: torch.float32, False: torch.bfloat16 if has_bf16 else torch.float32}
        assert {parameter.device.type for parameter in result.model.parameters()} == {"cuda"}
        assert result.card["training"]["peak_memory_of"] == "GPU"
        assert 0 < result.card["training"]["peak_memory_bytes"] < 2**30  # the GPU's, not that of the process
        assert torch.cuda.get_device_name() in result.card["environment"]["gpu"]
        assert "CUDA SM" in text
        assert torch.cuda.get_device_name() in text
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=kinds[False])
    loaded = PeftModel.from_pretrained(plain, result.output).eval()
    ids = random_tokens(2, 12).to(result.model.device)
    assert error(logits(result.model.eval(), ids), logits(loaded, ids.cpu())) < 0.05


@pytest.mark.parametrize(
    "options",
    [{}, {"packing": True, "max_length": 64}, {"layout": "indexed"}, {"precision": "pure-bf16"}, {"holdout": 4}],
    ids=["padded", "packed", "indexed", "bf16 alone", "held out"],
)
def test_a_resumed_run_ends_where_the_whole_one_does(run, tmp_path, monkeypatch, options):
    options = {"layout": "in-place", **options}
    if "holdout" in options:
        options["validate_every"] = 3
    whole = run("whole", save_every=3, **options)
    interrupt_at(monkeypatch, 3)
    paused = run("paused", save_every=50, **options)
    assert paused.interrupted
    monkeypatch.undo()
    resumed = run("paused", save_every=50, resume=True, **options)
    assert not resumed.interrupted
    assert resumed.card["training"]["resumed_from"] == "checkpoint-3"
    ends = {name: folder.output for name, folder in {"whole": whole, "resumed": resumed}.items()}
    assert distance(deltas(ends["resumed"]), deltas(ends["whole"])) < 0.02
    assert read_adapter(ends["whole"]).config.slices == read_adapter(ends["resumed"]).config.slices


@pytest.mark.parametrize("options", [{"layout": "in-place"}, {"method": "lora"}, {"method": "full"}])
def test_the_memory_that_is_foreseen_is_near_what_is_taken(run, options):
    training = run(batch_size=4, **options).card["training"]
    assert training["estimated_seconds"] > 0
    if IS_CUDA:
        assert 0.7 < training["estimated_memory_bytes"] / training["peak_memory_bytes"] < 1.5


def deltas(folder):
    return {name: value for name, value in weights(folder).items() if name.endswith("weight")}


def test_gradient_checkpointing_gives_the_same_weights(run):
    plain = run("plain", max_steps=2, precision="fp32", layout="in-place")
    less = run("less", max_steps=2, precision="fp32", layout="in-place", gradient_checkpointing=True)
    assert distance(deltas(less.output), deltas(plain.output)) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(run, method):
    skip_without(method)
    result = run(method=method, **({"ratios": 0.25} if method == "s2ft" else {}))
    losses = [loss for _, loss in result.card["loss_curve"]]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("strategy", ["activation", "gradient"])
def test_channels_are_calibrated_on_the_training_data(run, strategy):
    result = run(strategy=strategy, max_steps=1, calibration=0.2)
    assert result.card["selection"] == {"strategy": strategy, "subset": "largest", "modules": 4}
