"""Merging into quantised bases on files, against the live model."""

import copy
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from adapter_files import edit
from exported import save_adapter
from families import build, tokens
from live import logits, same
from quantised import Grid, library, stand_in
from s2ft import S2FTConfig, S2FTError
from s2ft.cli.app import app
from s2ft.layer.dequantise import dequantise, quantised_layers, values_of
from s2ft.runtime import merging, quantisation
from s2ft.runtime.merging import has_quantised_base, merge_quantised
from s2ft.runtime.models import load_model
from tiny_base import CHATML, CHATML_TOKENS, save_tiny_base

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


class Deserialize(ConversionOps):
    """As those by which transformers loads weights that bitsandbytes or torchao has stored: it has no way back."""

    def convert(self, input_dict: dict[str, Any], *_: object, **__: object) -> dict[str, Any]:
        return input_dict


def test_a_dequantised_model_is_saved_whatever_it_was_loaded_by(tmp_path: Path) -> None:
    model = stand_in(load_model(BASE, torch.float32))
    model._weight_conversions = [WeightConverter("weight", "weight", [Deserialize()])]
    wanted = {f"{path}.weight": values_of(layer) for path, layer in quantised_layers(model).items()}
    dequantise(model, torch.float32)
    model.save_pretrained(tmp_path / "plain")
    found = load_model(str(tmp_path / "plain"), torch.float32).state_dict()
    assert wanted
    assert all(torch.equal(found[name], values) for name, values in wanted.items())


class Packed(nn.Linear):
    """As bitsandbytes' layers in place of a Conv1D: [out, in], with a note of what was there."""

    source_cls = Conv1D

    def __init__(self, layer: Conv1D) -> None:
        super().__init__(layer.nx, layer.nf)
        self.weight = nn.Parameter(Grid(layer.weight.detach().T.contiguous()), requires_grad=False)
        self.bias = layer.bias


def test_what_stood_for_a_conv1d_is_one_again(tmp_path: Path) -> None:
    twin = build("gpt2", torch.float32)
    quantised = copy.deepcopy(twin)
    for path, layer in list(twin.named_modules()):
        if isinstance(layer, Conv1D):
            packed = Packed(layer)
            quantised.set_submodule(path, packed)
            layer.weight.data = packed.weight.dequantize().T.contiguous()
    config = {"ratios": {"q_proj": 0.5, "o_proj": 0.5, "down_proj": 0.3}, "seed": 0, "init_weights": False}
    torch.manual_seed(5)
    merged = get_peft_model(quantised, S2FTConfig(**config)).merge_and_unload()
    torch.manual_seed(5)
    wanted = get_peft_model(twin, S2FTConfig(**config)).merge_and_unload()
    assert same(dict(merged.state_dict()), dict(wanted.state_dict()))
    merged.save_pretrained(tmp_path / "merged")
    reloaded, x = load_model(str(tmp_path / "merged"), torch.float32).eval(), tokens(2, 7)
    assert torch.equal(logits(reloaded, x), logits(wanted, x))


def test_merged_values_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    save_tiny_base(base)
    load_model(str(base), torch.float16).save_pretrained(base)
    adapter = save_adapter(tmp_path / "adapter", base, {"down_proj": 0.5}, size=1e6)
    monkeypatch.setattr(merging, "load_model", lambda *given: stand_in(load_model(*given)))
    with pytest.raises(
        S2FTError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        merge_quantised(adapter, tmp_path / "out", None, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_unknown_quantisation_and_a_base_that_has_moved_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s2ft
) -> None:
    base, out = save_tiny_base(tmp_path / "base"), tmp_path / "out"
    adapter = save_adapter(tmp_path / "adapter", base, {"o_proj": 0.5})
    code, _, err = s2ft("merge", str(adapter), "--quantize", "nf5", "--output", str(out))
    assert code == 2, err
    assert "--quantize='nf5' is unknown; choose from nf4, fp4" in err
    monkeypatch.setattr(quantisation, "find_spec", lambda name: name)  # every package is there
    base.rename(tmp_path / "moved")
    code, _, err = s2ft("merge", str(adapter), "--quantize", "nf4", "--output", str(out))
    assert code == 2, err
    assert f"--base='{base}' is not a folder" in err
    assert "Traceback" not in err
    assert not out.exists()


def test_the_plain_model_that_is_quantised_again_lies_beside_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = trained(tmp_path / "adapter", None)
    read = []

    def load(name: str, dtype: torch.dtype, *_: object) -> nn.Module:  # as if it quantised, which needs a library
        read.append(Path(name))
        return load_model(name, dtype)

    monkeypatch.setattr(merging, "load_model", load)
    monkeypatch.setattr(merging, "check_quantisation", lambda *_: None)
    merge_quantised(adapter, tmp_path / "new" / "out", BASE, "nf4", requantize=True)
    assert read[0] == Path(BASE)
    assert read[1].is_relative_to(tmp_path / "new")
    assert not read[1].exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert (tmp_path / "new" / "out" / "model.safetensors").is_file()
    assert all(path.is_file() for path in (tmp_path / "new" / "out").iterdir())


@pytest.mark.parametrize(("base", "revision"), [(None, "0a1b"), ("org/model", "0a1b"), ("org/copy", None)])
def test_the_adapters_own_base_is_read_at_its_revision(
    base: str | None, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = trained(tmp_path / "adapter", None)
    edit(adapter, base_model_name_or_path="org/model", revision="0a1b")
    asked = []

    def download(name: str, file: str, revision: str | None = None) -> str:
        asked.append(("config.json", revision))
        return f"{BASE}/{file}"

    def watch(kind: Any) -> None:
        real = kind.from_pretrained

        def from_pretrained(name: str, *given: Any, **options: Any) -> Any:
            if not name.startswith("org/"):
                return real(name, *given, **options)
            asked.append((kind.__name__, options.pop("revision", None)))
            return real(BASE, *given, **options)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        watch(kind)
    assert not has_quantised_base(adapter, base)
    merge_quantised(adapter, tmp_path / "out", base, None)
    assert {what for what, _ in asked} == {"config.json", "AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}
    assert {found for _, found in asked} == {revision}


@pytest.mark.parametrize(("end", "ends"), [("<|im_end|>", [259, 1]), (None, 1)])
def test_the_noted_end_of_answers_is_named(end: str | None, ends: object, tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base", CHATML, CHATML_TOKENS)
    adapter = save_adapter(tmp_path / "adapter", base, {"o_proj": 0.5})
    (adapter / "run.json").write_text(json.dumps({"data": {"answer_end": end}}))
    merge_quantised(adapter, tmp_path / "out", None, None)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == ends
