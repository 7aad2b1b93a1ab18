"""PEFT's own methods as `--method peft:NAME`, and PaCA: what they train, how their size is found, what is refused."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from s2ft import S2FTError
from s2ft.finetune.lora import linears
from s2ft.finetune.methods import METHODS, find_method
from s2ft.finetune.options import parse_options
from s2ft.finetune.paca import equal_columns, paca_config
from s2ft.finetune.peft_methods import known_names, nearest_size
from s2ft.finetune.results import command_words
from s2ft.finetune.values import config_keys
from s2ft.runtime.models import empty_model
from s2ft.tuner.unloading import changes_base
from tiny_base import tiny_model
from tiny_runs import train, weights

pytestmark = pytest.mark.usefixtures("one_thread")

PATHS = {"model": "m", "data": "d", "output": "o", "learning_rate": 1e-3}
FITTING = {  # what a model as small as the tests' needs
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 40},
    "gralora": {"r": 4},
    "miss": {"r": 4},
    "psoft": {"r": 4},
    "road": {"group_size": 16},
    "shira": {"r": 2},
    "trainable_tokens": {"token_indices": [5, 6], "target_modules": ["embed_tokens"]},
    "vblora": {"vector_length": 16},
    "waveft": {"n_frequency": 40},
}


@pytest.fixture
def run(base, data, tmp_path):
    def call(method: str, output: str = "out", **options):
        settings = {
            "max_steps": 3,
            "gradient_accumulation": 1,
            "learning_rate": 1e-2,
            "log_every": 1,
            "precision": "fp32",
        }
        settings |= {"model": base, "data": data, "output": str(tmp_path / output)}
        return train(parse_options({"method": method, **settings, **options}))

    return call


def check_trains(run, base, name: str, keys: dict) -> None:
    """It learns, and what it leaves loads by PEFT alone to the same output."""
    result = run(f"peft:{name}", peft_config=keys)
    losses = [loss for _, loss in result.card["loss_curve"]]
    assert losses[-1] != losses[0]
    assert result.card["adapter"]["model_parameters"] == tiny_model().num_parameters()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.output).eval()
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    assert "import s2ft" not in (result.output / "README.md").read_text()


@pytest.mark.parametrize("name", ["miss", "shira", "beft", "ln_tuning"])
def test_a_method_of_pefts_trains_and_loads(run, base, name):
    check_trains(run, base, name, FITTING.get(name, {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", known_names())
def test_every_method_of_pefts_trains_and_loads(run, base, name):
    if name in NOT_HERE:
        pytest.skip(NOT_HERE[name])
    check_trains(run, base, name, FITTING.get(name, {}))


NOT_HERE = {
    "adamss": "needs scikit-learn",
    "trainable_tokens": "TRL refuses tokens of a head that shares their weights",
}


@pytest.mark.parametrize("name", ["lora", "miss", "boft", "c3a", "shira"])
def test_the_size_for_a_number_of_parameters_is_the_nearest(base, name):
    """Against every size, counted on a model with values."""
    method, wanted = find_method(f"peft:{name}"), random.randrange(1000, 4000)
    given = method.of_size(empty_model(base), wanted)["peft_config"]

    def count(size: int) -> int | None:
        try:
            model = get_peft_model(tiny_model(), method.config({method.size_key: size}))
        except ValueError:
            return None
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    counts = {size: found for size in (*range(1, 9), 16, 32) if (found := count(size)) is not None}
    nearest = min(abs(found - wanted) for found in counts.values())
    assert abs(count(given[method.size_key]) - wanted) == nearest


def test_a_size_that_is_given_or_that_a_method_lacks_stays(base):
    def given(keys):
        return parse_options({**PATHS, "method": "peft:miss", "peft_config": keys})

    model = empty_model(base)
    assert find_method("peft:miss").of_size(model, 500, given({"r": 7})) == {"peft_config": {"r": 7}}
    assert find_method("peft:ln_tuning").of_size(model, 500) == {}
    assert find_method("peft:miss").of_size(model, 640, given({"target_modules": ["o_proj"]}))["peft_config"]["r"] == 10


def test_sizes_are_tried_until_none_is_nearer():
    tried = []

    def count(size: int) -> int | None:
        tried.append(size)
        return None if size % 3 == 0 else 10 * size

    assert nearest_size(count, 52) == 4  # 6, between 4 and 8, is refused
    assert max(tried) == 8
    assert nearest_size(lambda size: 256, 10_000) == 1  # whatever the size
    assert nearest_size(lambda size: None, 10) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "peft:mis"}, r"method='peft:mis': it is none of PEFT's methods; did you mean peft:miss\?"),
        ({"method": "peft:prompt_tuning"}, "cannot be trained here: it trains tokens before the prompt"),
        ({"method": "peft:s2ft"}, "that is method=s2ft"),
        ({"method": "peft:adaption_prompt"}, "a forward that TRL's loss does not pass through"),
        ({"method": "peft:miss", "peft_config": "rank=4"}, "peft_config=rank=4: miss has no rank; it has bias"),
        ({"method": "peft:gralora", "peft_config": "r=5"}, "peft_config=r=5: r should be divisible by gralora_k"),
        ({"method": "peft:miss", "peft_config": "r"}, "peft_config='r': must be key=value"),
        (
            {"method": "peft:miss", "peft_config": "{target_modules: '*_proj'}"},
            r"peft_config: target_modules='\*_proj' is no regular expression: nothing to repeat",
        ),
        ({"method": "peft:miss", "peft_config": "{r: [}"}, "peft_config='{r: .}': is no YAML"),
        (
            {"method": "peft:miss", "learning_rate": None},
            "learning_rate is missing: none is known for method=peft:miss",
        ),
        (
            {"method": "peft:lora", "objective": "dpo", "peft_config": "bias=all"},
            "bias='all' changes the base, which objective='dpo' needs as its reference",
        ),
        (
            {"method": "peft:lora", "learning_rate": "auto", "peft_config": "init_lora_weights=pissa"},
            "init_lora_weights='pissa' changes the base at each of the short runs; give a rate",
        ),
        ({"method": "lora", "peft_config": "r=4"}, "is no option of method=lora; it belongs to peft:NAME"),
        ({"method": "peft:oft", "lora_rank": "4"}, "lora_rank='4' is no option of method=peft:oft"),
        ({"method": "best"}, rf"unknown; choose from {', '.join(METHODS)}, or peft:NAME"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(options, said):
    with pytest.raises(S2FTError, match=said):
        parse_options({**PATHS, **options})


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"bias": "all"},
        {"bias": "lora_only"},
        *({"init_lora_weights": how} for how in ("pissa", "pissa_niter_2", "olora", "gaussian", "orthogonal", "mica")),
    ],
)
def test_whether_a_method_leaves_the_base_as_it_was_is_known(keys):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_bias=True, **sizes)).eval()
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        before = base(ids).logits
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **keys)).eval()
        for parameter in model.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
        with model.disable_adapter():
            after = model(ids).logits
    assert torch.equal(before, after) == (changes_base(model.active_peft_config) is None)


@pytest.mark.parametrize("keys", [{"init_lora_weights": "pissa", "r": 4}, {"init_lora_weights": "olora", "r": 4}])
def test_the_base_is_asked_before_its_weights_are_others(run, base, keys):
    result = run("peft:lora", peft_config=keys, samples=2)
    plain = run("peft:lora", "plain", peft_config={"r": 4}, samples=2)
    asked, wanted = ([row["base"] for row in one.card["samples"]] for one in (result, plain))
    assert asked == wanted


def test_keys_are_read_as_yaml_reads_them():
    text = "r=4,bias=none,init_weights=false,target_modules=[q_proj,v_proj]"
    found = parse_options({**PATHS, "method": "peft:miss", "peft_config": text}).peft_config
    assert found == {"r": 4, "bias": "none", "init_weights": False, "target_modules": ["q_proj", "v_proj"]}
    assert parse_options({**PATHS, "method": "peft:miss", "peft_config": "{r: 4, bias: none}"}).peft_config["r"] == 4
    for one in ("1e-7", "0.0000001", "1E-07"):
        assert parse_options({**PATHS, "method": "peft:vera", "peft_config": f"d_initial={one}"}).peft_config == {
            "d_initial": 1e-7
        }


@pytest.mark.parametrize("keys", [{"d_initial": 1e-7}, {"target_modules": ".*[qv]_proj"}, {"r": 8, "bias": "none"}])
def test_keys_survive_the_command_line(keys):
    options = parse_options({**PATHS, "method": "peft:vera", "peft_config": {"d_initial": 0.5}})
    words = command_words(options.model_copy(update={"peft_config": keys}))
    assert config_keys(words[words.index("--peft-config") + 1]) == keys


def test_what_does_not_go_onto_a_model_is_refused_by_name(run, tmp_path):
    with pytest.raises(S2FTError, match=r"method='peft:miss' does not go onto this model: .*in_features"):
        run("peft:miss", peft_config={"r": 64})
    assert not (tmp_path / "out").exists()


# PaCA


def test_paca_trains_random_columns_of_each_layer(run, base):
    result = run("paca", paca_rank=3, max_steps=2, seed=random.randrange(1000))
    layers = linears(AutoModelForCausalLM.from_pretrained(base))
    slices = result.model.peft_config["default"].slices
    assert set(slices) == set(layers)
    assert result.card["adapter"]["trainable_parameters"] == 3 * sum(one.out_features for one in layers.values())
    assert len(set(slices.values())) > len(slices) // 2  # drawn for each layer by itself
    assert "import s2ft" in (result.output / "README.md").read_text()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.output).eval()
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.model.eval()(ids).logits)


def test_pacas_columns_follow_the_data_or_the_seed(run, data, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="s2ft")
    other = tmp_path / "other.json"
    other.write_text(Path(data).read_text().replace("sum", "result"))
    runs = [run("paca", name, paca_rank=3, max_steps=1, **options) for name, options in (
        ("a", {}), ("b", {}), ("c", {"data": str(other)}), ("d", {"seed": 0}))]  # fmt: skip
    one, again, others, zero = (each.model.peft_config["default"].slices for each in runs)
    assert one == again
    assert len({str(one), str(others), str(zero)}) == 3
    seed = runs[0].card["selection"]["seed"]
    assert f"training by PaCA, channels drawn by seed {seed}" in caplog.text
    assert runs[3].card["selection"] == {"strategy": "own", "seed": 0, "modules": len(zero)}


def test_paca_in_place_ends_in_the_weights_that_it_has_around_the_layer(run):
    results = [run("paca", layout, paca_rank=3, layout=layout, max_steps=2) for layout in ("in-place", "indexed")]
    left, right = (weights(result.output) for result in results)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-3, atol=1e-5)


def test_a_layer_of_paca_adds_its_columns():
    model = nn.Sequential(nn.Linear(13, 5, dtype=torch.float64))
    config = paca_config(model, rank=4, seed=random.randrange(1000))
    config.task_type, config.init_weights = None, False
    weight, bias, x = model[0].weight.clone(), model[0].bias.clone(), torch.randn(3, 13, dtype=torch.float64)
    adapted = get_peft_model(model, config)
    (block,) = (module for module in adapted.modules() if type(module).__name__ == "S2FTBlock")
    columns = block.indices.tolist()
    assert len(set(columns)) == 4
    wanted = x @ weight.T + bias + x[:, columns] @ block.weight.double().T
    torch.testing.assert_close(adapted(x), wanted, rtol=1e-6, atol=1e-8)


def test_pacas_columns_for_a_number_of_parameters():
    model, rank = tiny_model(), random.randrange(1, 9)
    parameters = sum(len(np.arange(layer.out_features)) * rank for layer in linears(model).values())
    assert equal_columns(model, parameters) == rank
    assert find_method("paca").of_size(model, parameters) == {"paca_rank": rank}
