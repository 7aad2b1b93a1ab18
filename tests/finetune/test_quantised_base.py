"""`s2ft train` on quantised bases; runs need bitsandbytes (`make test-quantised`)."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from trl import SFTConfig, SFTTrainer

from quantised import library
from s2ft import S2FTConfig, S2FTError
from s2ft.finetune.launch import check_base, check_run
from s2ft.finetune.options import TrainOptions, parse_options
from s2ft.finetune.trainer import _keep_fp32
from s2ft.layer.dequantise import quantised_layers
from s2ft.layer.linear import S2FTLinear
from s2ft.runtime.models import load_model, load_tokenizer
from tiny_base import tiny_model
from tiny_runs import interrupt_at, train

BASE = "src/s2ft/demo/base"


def options(folder: Path, **more: Any) -> TrainOptions:
    examples = [{"instruction": f"say {n}", "input": "", "output": f"{n} and {n}"} for n in range(12)]
    (folder / "data.json").write_text(json.dumps(examples))
    settings = {"model": BASE, "data": str(folder / "data.json"), "output": str(folder / "out"), "max_steps": 4}
    quick = {"batch_size": 2, "gradient_accumulation": 1, "log_every": 1, "learning_rate": 0.02, "precision": "fp32"}
    return parse_options({**settings, **quick, **more})


@pytest.mark.parametrize("method", ["full", "galore", "lisa"])
def test_methods_that_train_the_weights_are_refused(method: str) -> None:
    asked = TrainOptions(model=BASE, data=["d"], output="o", method=method, quantize="nf4")
    with pytest.raises(S2FTError, match=rf"method='{method}' trains the weights, .* \(nf4\); take s2ft, or lora"):
        check_base(asked)


def test_an_unknown_quantisation_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(S2FTError, match=r"quantize='int3': unknown; choose from nf4, fp4, int8"):
        options(tmp_path, quantize="int3")


def test_everything_is_said_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2ft.runtime.quantisation.find_spec", lambda name: None)
    with pytest.raises(S2FTError, match=r"(?s)2 problems.*quantize='nf4' needs.*optim='paged_adamw_8bit' needs"):
        check_run(options(tmp_path, quantize="nf4", optim="paged_adamw_8bit"))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("s2ft", {"quantize": "nf4"}),
        ("s2ft", {"quantize": "int8", "optim": "paged_adamw_8bit", "layout": "in-place"}),
        (
            "s2ft",
            {
                "quantize": "nf4",
                "optim": "adamw_8bit",
                "gradient_checkpointing": True,
                "holdout": 4,
                "validate_every": 2,
            },
        ),
        ("lora", {"quantize": "nf4", "learning_rate": 0.001}),
    ],
)
def test_a_run_trains_and_its_adapter_fits_the_plain_base(method: str, more: dict[str, Any], tmp_path: Path) -> None:
    library("bitsandbytes")
    result = train(options(tmp_path, method=method, **more))
    losses = [loss for _, loss in result.card["loss_curve"]]
    assert losses[-1] < losses[0]
    assert result.card["options"]["quantize"] == more["quantize"]
    assert len(quantised_layers(result.model)) == 28
    blocks = [module for module in result.model.modules() if isinstance(module, S2FTLinear)]
    assert all(layer.block("default").weight.dtype == torch.float32 for layer in blocks)  # whatever TRL cast it to
    PeftModel.from_pretrained(load_model(BASE, torch.float32), tmp_path / "out")


@pytest.mark.parametrize("autocast", [True, False])
def test_what_trl_casts_to_bf16_is_trained_in_fp32(autocast: bool) -> None:
    """Without autocast, a factor of LoRA in fp32 could not be multiplied by a base's bf16."""
    base = tiny_model().to(torch.bfloat16)
    for config, kept in (
        (S2FTConfig(ratios=0.25), torch.float32),
        (LoraConfig(r=2, target_modules=["q_proj"]), torch.float32 if autocast else torch.bfloat16),
    ):
        model = get_peft_model(copy.deepcopy(base), config)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.bfloat16()
        _keep_fp32(model, by_autocast=autocast)
        assert {parameter.dtype for parameter in trained} == {kept}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_run_that_is_resumed_ends_where_it_would_have_without_the_pause(tmp_path: Path) -> None:
    library("bitsandbytes")
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = train(options(whole, quantize="nf4", save_every=2, layout="indexed")).model.state_dict()
    paused = options(tmp_path, quantize="nf4", save_every=2, layout="indexed")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 2)
        assert train(paused).interrupted
    found = train(paused.model_copy(update={"resume": True})).model.state_dict()
    for name in [name for name in found if "s2ft_block" in name]:
        torch.testing.assert_close(found[name], expected[name])


def test_plain_trl_trains_after_prepare_model_for_kbit_training(tmp_path: Path) -> None:
    library("bitsandbytes")
    model = prepare_model_for_kbit_training(load_model(BASE, torch.bfloat16, "nf4"))
    data = Dataset.from_list([{"prompt": f"say {n}", "completion": f" {n} and {n}"} for n in range(8)])
    arguments = SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=0.05, report_to="none", use_cpu=True,
        logging_steps=1, bf16=True, optim="paged_adamw_8bit",
    )  # fmt: skip
    config = S2FTConfig(budget=0.02, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model, arguments, train_dataset=data, processing_class=load_tokenizer(BASE), peft_config=config
    )
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.bfloat16}  # TRL's cast
    trainer.train()
    assert all(parameter.any() for parameter in trained)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
