"""The page of a run: what it shows is what the card, the adapter and the model hold; it fetches nothing and runs nothing."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from matplotlib.image import imread
from peft import IA3Config, LoHaConfig, LoraConfig, MissConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from s2ft import read_adapter
from s2ft.data.tokens import IGNORED
from s2ft.evaluate.engines import Answer, TransformersEngine
from s2ft.finetune.samples import Samples
from s2ft.finetune.weights import layer_changes
from s2ft.report.run import run_page
from tiny_base import byte_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_shows_the_figures_of_the_card(finished, page) -> None:
    training, adapter = finished.card["training"], finished.card["adapter"]
    assert f"<dd>{training['final_loss']:.4g}</dd>" in page
    assert f"held-out loss, at step {training['best_step']}</dt><dd>{training['best_loss']:.4g}</dd>" in page
    assert f"({100 * adapter['share']:.2f}%)" in page
    assert finished.card["command"].replace("&", "&amp;") in page
    assert page.count("<polyline") == 2 + 1 + 2  # two losses, a rate, two projections


def test_it_fetches_nothing(page) -> None:
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", page) == []
    assert "url(" not in page
    assert "<script" not in page


def test_what_a_model_says_is_text(finished, page) -> None:
    assert "<b>" not in re.sub(r"<b>(base|tuned|in the data)</b>", "", page)
    assert "&lt;b&gt;" in page
    nasty = {
        **finished.card,
        "samples": [dict.fromkeys(("prompt", "base", "tuned", "wanted"), "<script>1</script>")],
    }
    assert "<script" not in run_page(nasty, finished.output)


def test_the_maps_are_opaque_where_channels_change(finished, page) -> None:
    adapter = read_adapter(finished.output)
    found = re.findall(r'src="data:image/png;base64,([^"]+)".*?alt="Map of the changed channels of ([\w.]+)"', page)
    assert {name for _, name in found} == {"self_attn.o_proj", "mlp.down_proj"}
    for data, name in found:
        shown = imread(io.BytesIO(base64.b64decode(data)))[..., 3] > 0  # [layers, channels]
        for layer, row in enumerate(shown):
            (indices,) = (s.indices for path, s in adapter.slices.items() if f"layers.{layer}.{name}" in path)
            assert set(np.flatnonzero(row)) == set(indices.tolist())


def test_what_each_layer_weighs_is_its_delta_against_the_weight(finished, base) -> None:
    deltas = load_file(finished.output / "adapter_model.safetensors")
    weights = AutoModelForCausalLM.from_pretrained(finished.card["options"]["model"]).state_dict()
    rows = {row["module"]: row for row in finished.card["layers"]}
    assert len(rows) == 4
    for module, row in rows.items():
        delta = deltas[f"base_model.model.{module}.s2ft_block.weight"].double()
        assert row["delta"] == pytest.approx(delta.square().sum().sqrt().item(), rel=1e-5)
        assert row["base"] == pytest.approx(weights[f"{module}.weight"].double().square().sum().sqrt().item(), rel=1e-5)
        assert str(row["layer"]) in module


def test_layers_that_lie_directly_in_a_block_have_one_line(finished, page) -> None:
    """As OPT's fc1: model.decoder.layers.3.fc1."""
    layers = [{**row, "module": f"layers.{row['layer']}.{row['module'][-9:]}"} for row in finished.card["layers"]]
    assert run_page({**finished.card, "layers": layers}, finished.output).count("<polyline") == page.count("<polyline")


OTHERS = {
    "lora": lambda: LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj"], init_lora_weights=False),
    "dora": lambda: LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False, use_dora=True),
    "loha": lambda: LoHaConfig(r=3, target_modules=["v_proj"], init_weights=False),
    "oft": lambda: OFTConfig(oft_block_size=4, r=0, target_modules=["v_proj"], init_weights=False),
    "miss": lambda: MissConfig(r=4, target_modules=["v_proj"], init_weights=False),
    "ia3": lambda: IA3Config(target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False),
}


@pytest.mark.parametrize("method", OTHERS)
def test_what_other_methods_change_is_what_the_layer_computes_besides(method: str) -> None:
    model = get_peft_model(tiny_model(), OTHERS[method]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.uniform_(0.5, 2)
    layers = [module for name, module in model.named_modules() if name.endswith("v_proj")]
    before = [layer.get_base_layer().weight.clone() for layer in layers]
    rows, ones = layer_changes(model.eval()), torch.eye(layers[0].in_features)
    wanted = [(layer(ones) - layer.get_base_layer()(ones)).double().norm().item() for layer in layers]
    assert min(wanted) > 1e-3
    assert [row["delta"] for row in rows] == pytest.approx(wanted, rel=1e-3)
    assert all(torch.equal(layer.get_base_layer().weight, was) for layer, was in zip(layers, before, strict=True))


def test_samples_are_greedy_answers_with_and_without_the_adapter(finished) -> None:
    samples, tokenizer = finished.card["samples"], finished.tokenizer
    assert len(samples) == 2
    assert samples[0]["base"] != samples[0]["tuned"]
    for sample in samples:
        assert re.fullmatch(r"<b>\d+</b> & more", sample["wanted"])
        ids = torch.tensor([tokenizer(sample["prompt"]).input_ids])
        how = {"max_new_tokens": 96, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        with finished.model.disable_adapter():
            base = finished.model.eval().generate(input_ids=ids, **how)[0, ids.shape[1] :]
        tuned = finished.model.generate(input_ids=ids, **how)[0, ids.shape[1] :]
        for name, wanted in (("base", base), ("tuned", tuned)):
            text = tokenizer.decode(wanted, skip_special_tokens=True)
            assert sample[name].removesuffix(" …") == text


def test_of_a_text_the_first_half_is_asked_and_what_fails_is_no_answer(monkeypatch) -> None:
    tokenizer, text = byte_tokenizer(), "abcdefg"
    ids = tokenizer(text).input_ids
    rows = [{"input_ids": ids, "labels": ids}, {"input_ids": ids, "labels": [IGNORED] * 2 + ids[2:]}]
    asked = Samples(Dataset.from_list(rows), tokenizer, 2)
    asked.ask_base(tiny_model())
    monkeypatch.setattr(TransformersEngine, "answers", lambda *_: [[(0, Answer(None, error="too long"))]])
    first, second = asked.compare(tiny_model())
    half = len(ids) - len(ids) // 2
    assert first["prompt"] == tokenizer.decode(ids[:half], skip_special_tokens=True)
    assert first["wanted"] == tokenizer.decode(ids[half:], skip_special_tokens=True)
    assert "Error" not in first["base"]
    assert first["tuned"] == "(no answer: too long)"
    assert second["prompt"] == tokenizer.decode(ids[:2], skip_special_tokens=True)
