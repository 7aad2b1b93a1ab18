"""The table of gradients on quantised bases, and the training benchmark on one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from quantised import library
from s2ft import S2FTError
from s2ft.lab.bench import dense, quantised
from s2ft.lab.bench.packed import AWQ_ORDER, GROUP, write_packed
from s2ft.lab.bench.presets import PRESETS, Cell
from s2ft.lab.bench.quantised import bench_quantised, quantised_line
from s2ft.lab.bench.training import bench_training
from s2ft.layer.dequantise import values_of

TINY = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def bits(packed: torch.Tensor) -> torch.Tensor:  # [rows, n] int32 → [rows, n, 8]
    return (packed.to(torch.int64)[..., None] >> (4 * torch.arange(8))) & 15


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_weights_stand_for_the_nearest_of_16_levels(method: str, tmp_path: Path) -> None:
    """Against a reading of the format by itself, as its documentation has it."""
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    write_packed(model, tmp_path, method)
    stored, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.down_proj"
    assert f"{name}.weight" not in stored
    codes, zeros, scales = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    order = torch.tensor(AWQ_ORDER if method == "awq" else range(8)).argsort()
    if method == "awq":
        codes, zeros = bits(codes)[..., order].flatten(1), bits(zeros)[..., order].flatten(1)
    else:
        codes, zeros = bits(codes.T).flatten(1).T, bits(zeros).flatten(1) + 1
    found = (codes - zeros.repeat_interleave(GROUP, 0)) * scales.float().repeat_interleave(GROUP, 0)
    weight = model.get_submodule(name).weight.detach().T
    steps = scales.float().repeat_interleave(GROUP, 0)
    assert found.shape == weight.shape
    assert ((found - weight).abs() <= 0.51 * steps).all()


def test_a_row_says_why_it_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2ft.runtime.quantisation.find_spec", lambda name: None)
    rows = {row["quantisation"]: row for row in bench_quantised().rows}
    assert {"nf4", "int8", "torchao-int8", "gptq", "awq", "fp8", "hqq"} <= rows.keys()
    assert "needs the package bitsandbytes" in rows["nf4"]["reason"]
    assert "needs the package gptqmodel" in rows["awq"]["reason"]
    assert "/tmp" not in rows["gptq"]["reason"]
    assert all(row["gradient_error"] is None for row in rows.values() if row["reason"])
    assert quantised_line(rows["hqq"])[""] == "transformers does not load HQQ any more"


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_gradients_are_those_of_the_dequantised_model(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library(package)
    wanted = {name: way for name, way in quantised.QUANTISATIONS.items() if way.package == package}
    for name in ("METHODS", "REFUSED"):
        monkeypatch.setattr(quantised, name, {})
    monkeypatch.setattr(quantised, "QUANTISATIONS", wanted)
    for row in bench_quantised(seed=3).rows:
        assert row["gradient_error"] < 1e-5
        assert row["own_error"] < 1e-5
        assert row["slices"] == 14


def test_training_is_measured_on_a_quantised_base() -> None:
    library("bitsandbytes")
    preset = replace(PRESETS["cpu"], models={"tiny": TINY}, cells=[Cell(2, 12, rounds=2, warm_up=1)], budgets=(0.04,))
    report = bench_training(preset, quantize="nf4")
    rows = {row["method"]: row for row in report.rows if "variant" not in row}
    assert rows.keys() == {"floor", "qlora", "s2ft"}
    assert report.settings["quantize"] == "nf4"
    assert rows["s2ft"]["saved_bytes"] < rows["qlora"]["saved_bytes"]
    assert rows["floor"]["trainable"] == 0 < rows["s2ft"]["trainable"]


def test_an_unknown_quantisation_is_refused() -> None:
    with pytest.raises(S2FTError, match=r"quantize='int3' is unknown; choose from nf4"):
        bench_training("cpu", quantize="int3")


def test_a_slice_beside_the_layer_and_a_dense_one_compute_what_their_dequantised_weights_do() -> None:
    library("bitsandbytes")
    ways, x = dense.contestants("cpu", (192, 64), channels=24), torch.randn(5, 192)
    beside, rest = ways["beside"], ways["dense"]
    with torch.no_grad():
        beside.block("a").weight.normal_()
        expected = x @ (values_of(beside.base_layer) + beside.get_delta_weight("a")).T
        torch.testing.assert_close(dense.run(beside, x), expected, rtol=1e-5, atol=1e-5)
        expected = x @ torch.cat([values_of(rest.rest), rest.own], dim=1).T
        torch.testing.assert_close(dense.run(rest, x), expected, rtol=1e-5, atol=1e-5)
    row = dense.bench_dense({"o_proj": (192, 64)}, tokens=7, rounds=1, seconds=0, device="cpu").rows[0]
    assert row["beside_saved_bytes"] == row["dense_saved_bytes"] == 7 * row["channels"] * 4
    assert row["floor_saved_bytes"] == 0
    assert row["floor_held_bytes"] == 192 * 64 / 2  # half a byte each
    of_a_channel = 64 / 2 + 8  # in four bits; and its number
    assert row["beside_held_bytes"] - row["dense_held_bytes"] == row["channels"] * of_a_channel
    assert dense.dense_line(row)["saved bytes"] == "1.00"


def test_the_dense_slice_needs_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2ft.runtime.quantisation.find_spec", lambda name: None)
    with pytest.raises(S2FTError, match="needs the package bitsandbytes"):
        dense.bench_dense()
