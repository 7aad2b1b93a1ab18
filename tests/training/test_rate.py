"""The learning rate for slices: the rule, from a config or a live model, and what is refused."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

import s2ft
from families import build
from s2ft import S2FTConfig, S2FTError
from s2ft.finetune.options import parse_options
from s2ft.finetune.train import train


@pytest.mark.usefixtures("one_thread")
def test_the_rate_of_a_trainers_model_is_that_of_s2ft_train(base, data, tmp_path):
    paths = {"model": base, "data": data, "output": str(tmp_path / "out")}
    run = train(parse_options({**paths, "ratios": 0.25, "epochs": 0.3, "layout": "indexed"}))
    steps, examples = run.card["training"]["steps"], run.card["options"]["batch_size"]
    assert examples < 16, "a step of few examples has a lower rate"
    assert s2ft.learning_rate(run.model, steps, examples) == run.card["training"]["learning_rate"]


def test_only_active_slices_count_and_a_config_says_the_same():
    """Half the channels of `down` in "default", few in "other"; the rule is written out here."""
    model = get_peft_model(build("llama", torch.float32), S2FTConfig(target_modules=["down_proj"], ratios=0.5))
    model.add_adapter("other", S2FTConfig(target_modules=["down_proj"], ratios=0.1))
    blocks = [module.s2ft_block for module in model.modules() if hasattr(module, "s2ft_block")]
    for name in ("default", "other"):
        model.set_adapter(name)
        channels = sum(block[name].weight.shape[1] for block in blocks) / len(blocks)
        expected = pytest.approx(0.3 / math.sqrt(channels * 400), rel=0.05)  # two digits
        assert s2ft.learning_rate(model, 400) == s2ft.learning_rate(model.peft_config[name], 400) == expected


@pytest.mark.parametrize(("steps", "rate"), [(1, 0.02), (56.25, 0.02), (225, 0.01), (1e12, 1e-5)])
def test_it_has_bounds(steps, rate):
    assert s2ft.learning_rate(S2FTConfig(slices={"a": "in 0-2", "b": "out 7-11"}), steps) == rate


@pytest.mark.parametrize(("examples", "share"), [(1, 0.25), (4, 0.5), (9, 0.75), (16, 1), (64, 1)])
def test_steps_of_few_examples_have_a_lower_rate(examples, share):
    config = S2FTConfig(slices={"a": "in 0-24"})
    assert s2ft.learning_rate(config, 900, examples) == pytest.approx(0.002 * share)


@pytest.mark.parametrize(
    ("trained", "steps", "message"),
    [
        (lambda: S2FTConfig(slices={"a": "in 0"}), 0, "steps=0: a rate is for one optimizer step or more"),
        (lambda: S2FTConfig(slices={"a": "in 0"}), math.nan, "steps=nan: a rate is for one"),
        (lambda: S2FTConfig(ratios=0.1), 9, r"this S2FTConfig has no chosen channels; give the model .* s2ft\.select"),
        (lambda: build("llama"), 9, "this LlamaForCausalLM has no active S²FT adapter; give the model that get_peft"),
        (
            lambda: get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])),
            9,
            "this PeftModel has no active",
        ),
    ],
)
def test_without_slices_or_steps_it_is_refused(trained, steps, message):
    with pytest.raises(S2FTError, match=message):
        s2ft.learning_rate(trained(), steps)
