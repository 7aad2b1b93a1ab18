"""Merging into quantised bases on files, against the live model."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from live import logits
from quantised import library
from s2ft import S2FTConfig, S2FTError
from s2ft.cli.app import app
from s2ft.layer.dequantise import quantised_layers
from s2ft.runtime.merging import has_quantised_base, merge_quantised
from s2ft.runtime.models import load_model

BASE = "src/s2ft/demo/base"


def trained(folder: Path, quantize: str | None, **options: object) -> tuple[Path, torch.Tensor]:
    """An adapter of the embedded base, and the logits that it gives there."""
    base = load_model(BASE, torch.bfloat16, quantize)
    torch.manual_seed(1)
    made = get_peft_model(base, S2FTConfig(budget=0.02, init_weights=False, task_type="CAUSAL_LM", **options)).eval()
    made.save_pretrained(folder)
    return folder, logits(made, torch.arange(3, 40)[None])


def test_a_plain_base_is_told_from_a_quantised_one(tmp_path: Path) -> None:
    adapter, _ = trained(tmp_path / "adapter", None)
    assert not has_quantised_base(adapter, BASE)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert has_quantised_base(adapter, str(tmp_path / "packed"))


def test_what_cannot_be_done_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = trained(tmp_path / "adapter", None)
    with pytest.raises(S2FTError, match=r"requantize=True needs quantize, one of nf4"):
        merge_quantised(adapter, tmp_path / "out", BASE, None, requantize=True)
    monkeypatch.setattr("s2ft.runtime.quantisation.find_spec", lambda name: None)
    with pytest.raises(S2FTError, match="quantize='nf4' needs the package bitsandbytes"):
        merge_quantised(adapter, tmp_path / "out", BASE, "nf4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_files_are_merged_into_the_values_that_training_saw(quantize: str, tmp_path: Path) -> None:
    library("bitsandbytes")
    adapter, expected = trained(tmp_path / "adapter", quantize)
    arguments = ["merge", str(adapter), "--base", BASE, "--quantize", quantize, "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    assert not quantised_layers(merged)
    found = logits(merged, torch.arange(3, 40)[None])
    assert (found - expected).float().norm() < 0.03 * expected.float().norm()  # of what bf16 and int8 activations round
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_merged_model_that_is_quantised_again_says_what_is_lost(tmp_path: Path) -> None:
    library("bitsandbytes")
    adapter, _ = trained(tmp_path / "adapter", "nf4")
    lost = merge_quantised(adapter, tmp_path / "out", BASE, "nf4", requantize=True)
    again = load_model(str(tmp_path / "out"), torch.bfloat16)
    assert len(quantised_layers(again)) > len(lost) > 0
    assert all(0 < share < 2 for share in lost.values())
    with pytest.raises(S2FTError, match="quantised already"):
        merge_quantised(adapter, tmp_path / "more", str(tmp_path / "out"), "nf4")
