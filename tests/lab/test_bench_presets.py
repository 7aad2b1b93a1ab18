"""The options of the training benchmark, and the models that it measures."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from s2ft import S2FTError
from s2ft.cli.app import app
from s2ft.finetune import galore
from s2ft.lab.bench import bases, presets, training
from s2ft.lab.bench.contestants import ABLATION, CONTESTANTS, UPPER_HALF, Contestant
from s2ft.lab.bench.presets import PRESETS, Cell
from s2ft.lab.bench.training import bench_training, training_line
from s2ft.lab.shapes import EXPERTS
from s2ft.runtime.precision import choose_precision

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
}  # fmt: skip
TINY_GROUPED = {**TINY, "num_key_value_heads": 4}
MAIN, OTHER = Cell(2, 12, rounds=2, warm_up=1), Cell(1, 12, rounds=1, warm_up=1)
SHARE = 0.04


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 64 positions, in fp32."""
    path = tmp_path_factory.mktemp("models") / "mine"
    config = LlamaConfig(**TINY_GROUPED, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return str(path)


def measured(report):
    return [(row["method"], row.get("variant"), row["batch_size"], row["seq_len"]) for row in report.rows]


def test_a_model_of_ones_own_at_every_length_and_batch_by_the_methods_that_are_named(folder, monkeypatch):
    bases_of_rows = []
    frozen = training.frozen_base

    def kept(*args):
        bases_of_rows.append(frozen(*args))
        return bases_of_rows[-1]

    monkeypatch.setattr(training, "frozen_base", kept)
    quick = replace(PRESETS["cpu"], cells=[MAIN, OTHER])
    report = bench_training(
        quick, model=folder, length="8,12,8", batch="1, 2", methods="s2ft,floor,lora", budget="0.04", dtype="fp32"
    )
    cells = [(1, 8), (1, 12), (2, 8), (2, 12)]
    assert measured(report) == [(name, None, *cell) for cell in cells for name in ("floor", "lora", "s2ft")]
    assert {row["model"] for row in report.rows} == {"mine"}
    assert all(row["floor_ratio"] > 0 for row in report.rows)
    assert report.settings["models"] == {"mine": "own"}
    assert folder not in json.dumps(report.as_dict())
    assert [cell["rounds"] for cell in report.settings["cells"]] == [2, 1, 1, 1]  # the first as the preset's main one
    (base,) = bases_of_rows
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in base.state_dict().items())


def test_each_budget_is_a_row_and_the_others_are_as_large_as_the_usual_one(folder):
    quick = replace(PRESETS["cpu"], cells=[OTHER])
    report = bench_training(quick, model=folder, methods="s2ft,lora", budget="0.04,0.02,0.08")
    size = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    trained = {(row["method"], row.get("variant")): row["trainable"] / size for row in report.rows}
    assert list(trained) == [("lora", None), ("s2ft", None), ("s2ft", "2%"), ("s2ft", "8%")]
    for given, share in zip((0.04, 0.04, 0.02, 0.08), trained.values(), strict=True):
        assert 0.6 * given < share < 1.5 * given  # a tiny model has coarse ranks and heads
    assert training_line(report.rows[-1])["method"] == "s2ft 8%"
    assert (report.settings["budget"], report.settings["budgets"]) == (0.04, [0.04, 0.02, 0.08])
    assert presets.adjusted(quick, None, None, None, None, "0.005,0.01,0.02").budget == 0.01


def test_the_7b_preset_takes_the_same_options(folder):
    tiny = replace(PRESETS["7b"], models={"a": TINY, "b": TINY_GROUPED}, cells=[MAIN, OTHER], device="cpu")
    options = {"methods": "floor,s2ft,lora", "length": "12", "batch": "1,2", "budget": "0.04"}
    report = bench_training(tiny, **options)
    names = ["floor", "lora", "s2ft"]  # one after the other
    assert measured(report) == [(name, None, batch, 12) for _ in "ab" for name in names for batch in (1, 2)]
    assert [row["model"] for row in report.rows] == ["a"] * 6 + ["b"] * 6


@pytest.mark.parametrize(
    ("options", "cells"),
    [
        ({}, [(cell.batch_size, cell.seq_len) for cell in PRESETS["cpu"].cells]),
        ({"length": "32,64"}, [(4, 32), (4, 64)]),
        ({"batch": "8"}, [(8, 256)]),
        ({"length": "512,1024", "batch": "1,2"}, [(1, 512), (1, 1024), (2, 512), (2, 1024)]),
    ],
)
def test_the_size_that_is_not_given_is_the_presets(options, cells):
    given = {"model": None, "length": None, "batch": None, "methods": None, "budget": None, **options}
    found = presets.adjusted(PRESETS["cpu"], **given)
    assert [(cell.batch_size, cell.seq_len) for cell in found.cells] == cells
    assert (found.methods, found.ablation, found.budgets) == (None, True, (0.01,))


def test_a_model_goes_to_the_gpu_where_there_is_one_and_a_preset_where_it_says(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert presets.usual_preset("mine").device == ("cuda" if there else "cpu")
        assert presets.usual_preset(None) is PRESETS["cpu"]


@pytest.mark.parametrize("multiplies", [True, False])
def test_auto_is_what_the_device_multiplies_and_is_said(monkeypatch, caplog, multiplies):
    caplog.set_level("INFO", logger="s2ft")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies, raising=False)
    quick = replace(PRESETS["cpu"], models={"tiny": TINY}, cells=[OTHER], budgets=(SHARE,))
    settings = bench_training(quick, methods="floor").settings
    dtype, other = ("bf16", "fp32") if multiplies else ("fp32", "bf16")
    assert settings["dtype"] == dtype
    assert settings["dtype_reason"] == caplog.messages[0].removeprefix("dtype: ")
    assert settings["dtype_reason"].startswith(f"auto-detected: CPU with{'' if multiplies else 'out'} AVX512-BF16")
    assert (f"states {dtype};" in settings["dtypes"], other in settings["dtypes"]) == (True, multiplies)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)  # of no matter to a preset for CPUs
        assert choose_precision("auto", "cpu")[1] == settings["dtype_reason"]
    caplog.clear()
    assert bases.settle_dtype("bf16", "cpu") == (torch.bfloat16, "bf16, as asked")
    assert ("this CPU does not multiply bf16, so each step takes much longer than in fp32" in caplog.text) != multiplies


@pytest.mark.parametrize(
    ("preset", "given", "taken"), [("moe", "auto", "fp32"), ("moe", "bf16", "bf16"), ("cpu", "auto", "auto")]
)
def test_a_presets_dtype_is_taken_unless_another_is_asked_for(monkeypatch, preset, given, taken):
    asked = []
    settle = training.settle_dtype
    monkeypatch.setattr(training, "settle_dtype", lambda *args: (asked.append(args[0]), settle(*args))[1])
    tiny = replace(PRESETS[preset], models={"tiny": TINY_MIXTURE if preset == "moe" else TINY}, cells=[OTHER])
    bench_training(tiny, dtype=given, methods="floor")
    assert asked == [taken]


def test_in_fp32_all_is_fp32_and_there_is_no_autocast(monkeypatch):
    seen = set()
    step = Contestant.step

    def watched(self, batch):
        seen.update(parameter.dtype for parameter in self.model.parameters())
        return step(self, batch)

    monkeypatch.setattr(Contestant, "step", watched)
    quick = replace(PRESETS["cpu"], models={"tiny": TINY}, cells=[OTHER], budgets=(SHARE,))
    report = bench_training(quick, dtype="fp32")
    assert seen == {torch.float32}
    assert {row.get("variant") for row in report.rows} == {None, *UPPER_HALF, *ABLATION}


def test_a_base_has_no_dropout(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=32)).save_pretrained(tmp_path)
    LlamaForCausalLM(LlamaConfig(**TINY, attention_dropout=0.5)).save_pretrained(tmp_path / "llama")
    for folder in (tmp_path, tmp_path / "llama"):
        base, batch = bases.frozen_base(str(folder), "cpu", torch.float32, liger=False), torch.randint(48, (2, 12))
        assert base.training
        assert torch.equal(base(batch).logits, base(batch).logits)


WRONG = {
    "length": ("1,512", "length='1,512': give whole numbers from 2; several with commas between them"),
    "batch": ("0", "batch='0': give whole numbers from 1"),
    "budget": ("2", "budget='2': give shares of the parameters, above 0 up to 1"),
    "methods": ("", "methods='': give names of methods"),
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: value}, message) for name, (value, message) in WRONG.items()),
        ({"length": "8,x"}, "length='8,x': give whole numbers from 2"),
        ({"length": "65"}, "length=65 is more than the 64 positions of mine"),
        (
            {"methods": "floor,lore,x"},
            f"unknown: lore, x; choose from {', '.join(CONTESTANTS)}",
        ),
        ({"dtype": "fp16"}, "dtype='fp16' is unknown; choose from auto, bf16, fp32"),
        ({"budget": "1e-9"}, "budget=1e-09 of the .* rounds to zero; the smallest budget that trains one is"),
        (
            {"methods": "floor,lora", "budget": "0.04,0.02"},
            "budget='0.04,0.02': each but one is a row of S²FT's; add s2ft",
        ),
        ({"model": "./nowhere"}, "model='./nowhere' is not a folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(folder, monkeypatch, options, message):
    monkeypatch.setattr(training, "frozen_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(S2FTError, match=message):
        bench_training(**{"preset": "cpu", "model": folder, "length": "8", "budget": "0.04", **options})


def test_all_values_that_cannot_be_read_are_told_at_once():
    with pytest.raises(S2FTError, match="4 problems") as caught:
        bench_training(**{name: value for name, (value, _) in WRONG.items()})
    assert all(message in str(caught.value) for _, message in WRONG.values())


def test_a_named_method_whose_package_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(galore, "find_spec", lambda name: None)
    with pytest.raises(S2FTError, match=r"pip install 's2ft\[baselines\]'"):
        bench_training("cpu", methods="galore,floor")


def test_the_command_takes_a_model_and_says_its_dtype(folder, tmp_path):
    given = {"model": folder, "dtype": "fp32", "length": "8,12", "batch": "1", "methods": "floor,s2ft"}
    given |= {"budget": "0.04,0.08", "json": str(tmp_path / "a.json")}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(app, ["bench", "training", *words], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.exception
    assert "s2ft 8%" in result.output
    assert "dtype: fp32, as asked" in result.output
    read = json.loads((tmp_path / "a.json").read_text())
    assert len(read["rows"]) == 2 * 3
    assert read["settings"]["dtype"] == "fp32"


TINY_MIXTURE = {
    **EXPERTS, "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "num_experts": 4, "head_dim": 16,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "vocab_size": 48,
}  # fmt: skip


def test_experts_are_trained_by_s2ft_and_by_lora_of_the_same_size():
    report = bench_training(replace(PRESETS["moe"], models={"tiny": TINY_MIXTURE}, cells=[OTHER]), budget="0.05")
    rows = {(row["method"], row.get("variant")): row for row in report.rows}
    assert list(rows) == [("floor", None), ("lora", None), ("s2ft", None), ("s2ft", "indexed")]
    lora, ours = rows["lora", None], rows["s2ft", None]
    assert 0.7 < ours["trainable"] / lora["trainable"] < 1.4
    assert ours["saved_bytes"] < rows["s2ft", "indexed"]["saved_bytes"]
    assert "by target_parameters" in report.settings["lora"]
    with pytest.raises(S2FTError, match=r"methods='dora': unknown: dora; choose from floor, lora, s2ft"):
        bench_training("moe", methods="dora")
    with pytest.raises(S2FTError, match=r"trains stacked experts' down_proj, and .* has none"):
        bench_training(replace(PRESETS["moe"], models={"tiny": TINY}))
