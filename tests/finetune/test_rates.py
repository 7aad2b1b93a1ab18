"""A learning rate for each slice: AdamW's steps at that rate in both layouts, and a run that goes on keeps the rates."""

import math

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from families import build
from live import layers, same
from s2ft import S2FTConfig, S2FTError
from s2ft.finetune.options import parse_options
from s2ft.finetune.rates import rate_factors
from s2ft.finetune.trainer import Flow
from tiny_runs import interrupt_at, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")

RATE, STEPS, BETAS, EPSILON = 1e-2, 4, (0.9, 0.95), 1e-8
RATIOS = {"v_proj": 0.5, "o_proj": 0.25, "up_proj": 0.4, "down_proj": 0.1}


@pytest.fixture
def run(base, data, tmp_path):
    def call(output: str = "out", **options):
        settings = {"max_steps": STEPS, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": RATE}
        settings |= {"ratios": RATIOS, "warmup_steps": 0, "precision": "fp32", "log_every": 1}
        return train(
            parse_options({"model": base, "data": data, "output": str(tmp_path / output), **settings, **options})
        )

    return call


def wanted(base: str, model: torch.nn.Module, by: str) -> dict[str, float]:
    """Name of the delta → its factor, from the files of the base and the adapter's indices alone."""
    values = AutoModelForCausalLM.from_pretrained(base).state_dict()
    sizes = {}
    for name, indices in model.named_buffers():
        if name.endswith(".default.indices"):
            path = name.removeprefix("base_model.model.").removesuffix(".s2ft_block.default.indices")
            weight = values[f"{path}.weight"]
            is_input = path.rpartition(".")[2] in ("o_proj", "down_proj")
            own = weight[:, indices] if is_input else weight[indices]
            sizes[name.removesuffix("indices") + "weight"] = {
                "one": 1.0,
                "channels": len(indices) ** -0.5,
                "inputs": own.shape[1] ** -0.5,
                "norm": own.pow(2).mean().sqrt().item(),
            }[by]
    mean = math.exp(sum(map(math.log, sizes.values())) / len(sizes))
    return {name: size / mean for name, size in sizes.items()}


def adamw(gradients: list[torch.Tensor], rates: list[float]) -> torch.Tensor:
    """Loshchilov and Hutter's algorithm 2 from zeros, without decay, in float64."""
    delta = first = second = torch.zeros_like(gradients[0], dtype=torch.float64)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient.double()
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient.double() ** 2
        mean, spread = first / (1 - BETAS[0] ** step), (second / (1 - BETAS[1] ** step)).sqrt()
        delta = delta - rate * mean / (spread + EPSILON)
    return delta


@pytest.mark.parametrize("layout", ["in-place", "indexed"])
@pytest.mark.parametrize("by", ["one", "channels", "inputs", "norm"])
def test_each_slice_steps_by_adamw_at_a_rate_of_its_own(run, base, monkeypatch, by, layout):
    gradients = {}

    def note(self, args, state, control, model, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                gradients.setdefault(name, []).append(parameter.grad.cpu().clone())

    monkeypatch.setattr(Flow, "on_pre_optimizer_step", note)
    model = run(slice_rates=by, layout=layout, schedule="linear").model
    factors = wanted(base, model, by)
    assert factors.keys() == gradients.keys()
    assert (len(set(factors.values())) == 1) == (by == "one")
    for name, factor in factors.items():
        rates = [RATE * factor * (1 - step / STEPS) for step in range(STEPS)]
        expected = adamw(gradients[name], rates)
        torch.testing.assert_close(model.get_parameter(name).double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "pure-bf16"])
def test_a_resumed_run_keeps_the_rates(run, monkeypatch, precision):
    options = {"slice_rates": "norm", "precision": precision, "layout": "in-place"}
    whole = run("whole", **options)
    interrupt_at(monkeypatch, 2)
    assert run("paused", **options).interrupted
    monkeypatch.undo()
    with pytest.raises(S2FTError, match=r"slice_rates='one', but .* was made with slice_rates='norm'"):
        run("paused", resume=True, **{**options, "slice_rates": "one"})
    resumed = run("paused", resume=True, **options)
    assert same(weights(resumed.output), weights(whole.output))


def test_a_slice_of_zeros_has_no_norm():
    model = get_peft_model(build("llama"), S2FTConfig(ratios=0.25, seed=0))
    layer = layers(model)[1]
    layer.get_base_layer().weight.data.zero_()
    with pytest.raises(
        S2FTError, match=r"slice_rates='norm': the base weight of \S+ is zero in the slice; choose another"
    ):
        rate_factors(model, "default", "norm")
    assert set(rate_factors(model, "default", "channels")) == {layer.block("default").weight for layer in layers(model)}
