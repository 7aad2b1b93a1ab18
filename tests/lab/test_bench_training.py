"""The training benchmark at tiny shapes: what it counts, and what it reports; how long anything takes is not asserted."""

import copy
import itertools
import json
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from s2ft import S2FTError
from s2ft.cli.app import app
from s2ft.finetune import galore
from s2ft.lab.bench import presets, training
from s2ft.lab.bench.contestants import ABLATION, AS_TRAINED, CONTESTANTS, UPPER_HALF, Contestant
from s2ft.lab.bench.presets import PRESETS, Cell
from s2ft.lab.bench.training import bench_training, training_line
from s2ft.lab.bench.training_plot import draw_training
from s2ft.runtime.memory import own_tensors, saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {
    "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
}  # fmt: skip
TINY_GROUPED = {**TINY, "num_key_value_heads": 4}
CELLS = [Cell(2, 12, rounds=2, warm_up=1), Cell(2, 6, rounds=1, warm_up=1), Cell(1, 12, rounds=1, warm_up=1)]
SHARE = 0.04
KEYS = {
    "method", "batch_size", "seq_len", "trainable", "step_ms", "step_ms_p20", "step_ms_p80", "floor_ratio", "saved_bytes",
    "peak_bytes", "step_bytes", "model",
}  # fmt: skip
INSTALLED = {name: run for name, run in CONTESTANTS.items() if name != "galore" or find_spec("galore_torch")}


@pytest.fixture(scope="module")
def cpu_report():
    return bench_training(replace(PRESETS["cpu"], models={"tiny": TINY}, cells=CELLS, budgets=(SHARE,)))


@pytest.fixture
def base():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_GROUPED), dtype=torch.bfloat16)
    return model.requires_grad_(False).train()


def ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(48, (batch, length))


# The contestants


@pytest.mark.parametrize("name", {**INSTALLED, **UPPER_HALF, **ABLATION})
def test_a_contestant_trains_what_it_says_and_leaves_a_frozen_plain_base(base, name):
    prepare = {**INSTALLED, **UPPER_HALF, **ABLATION}[name]
    count = round(SHARE * base.num_parameters())
    before, modules = copy.deepcopy(base.state_dict()), [type(module) for module in base.modules()]
    with prepare(base, count) as contestant:
        if contestant.optimizer is not None:
            for group in contestant.optimizer.param_groups:
                group["lr"] = 0.5  # so that bf16 moves
        trained = {n: p.detach().clone() for n, p in contestant.model.named_parameters() if p.requires_grad}
        for _ in range(3):
            contestant.step(ids())
        assert contestant.steps == 3
        moved = [n for n, p in contestant.model.named_parameters() if n in trained and not torch.equal(p, trained[n])]
        assert bool(moved) == (name != "floor")
        assert all(p.grad is None for p in contestant.model.parameters())
        if name not in ("floor", "full", "galore", "lisa"):
            assert abs(contestant.trainable - count) < 0.5 * count  # a tiny model has coarse ranks and heads
    assert [type(module) for module in base.modules()] == modules
    assert not any(parameter.requires_grad for parameter in base.parameters())
    if name not in ("full", "galore", "lisa"):
        assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())


@pytest.mark.parametrize("name", [name for name in ABLATION if not name.startswith(("indexed", "up"))])
def test_variants_of_one_selection_train_to_the_same(base, name):
    outputs, deltas = [], []
    batches = [ids() for _ in range(3)]
    for variant in (name, "indexed"):
        with ABLATION[variant](copy.deepcopy(base).float(), round(SHARE * base.num_parameters())) as contestant:
            contestant.optimizer.param_groups[0]["lr"] = 1e-2
            for batch in batches:
                contestant.step(batch)
            with torch.no_grad():
                outputs.append(contestant.model(input_ids=batches[0]).logits)
            deltas.append([p.detach().clone() for p in contestant.model.parameters() if p.requires_grad])
    assert all(delta.abs().max() > 1e-3 for delta in deltas[0])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-2, atol=1e-3)


def test_variants_are_laid_out_as_they_are_called(base):
    def placements(variant):
        with ABLATION[variant](copy.deepcopy(base), round(SHARE * base.num_parameters())) as contestant:
            layouts = [m.layout for m in contestant.model.modules() if getattr(m, "layout", None) is not None]
            lean = any(
                "forward" in vars(module)
                for module in contestant.model.modules()
                if "mlp" in type(module).__name__.lower()
            )
            return {p.how for p in layouts[0].placements if "down" in p.module} if layouts else None, lean

    assert placements("in place") == ({"contiguous"}, True)
    assert placements("in place, gathered") == ({"gathered"}, True)
    assert placements("in place, not lean") == ({"contiguous"}, False)
    assert placements("indexed, lean") == (None, True)
    assert placements("indexed") == (None, False)


@pytest.mark.parametrize("coupled", [True, False])
def test_up_and_down_train_the_same_channels_or_others(base, coupled):
    variant = f"up and down, {'coupled' if coupled else 'independent'}"
    with ABLATION[variant](base, round(SHARE * base.num_parameters())) as contestant:
        slices = contestant.model.peft_config["default"].slices
    for layer in range(2):
        up, down = (slices[f"model.layers.{layer}.mlp.{name}"] for name in ("up_proj", "down_proj"))
        assert (up.removeprefix("out") == down.removeprefix("in")) == coupled


def test_what_is_trained_as_usual_is_fp32_and_the_base_comes_back(base):
    for name, prepare in AS_TRAINED.items():
        with prepare(base, round(SHARE * base.num_parameters())) as contestant:
            contestant.step(ids(2, 8))
            trained = {p.dtype for p in contestant.model.parameters() if p.requires_grad}
            assert trained == {torch.float32}, name
        assert {p.dtype for p in base.parameters()} == {torch.bfloat16}


def test_less_is_kept_for_the_upper_half_and_nothing_but_activations(base):
    kept = {}
    for name in ("floor", "s2ft", "last:50%"):
        with {**CONTESTANTS, **UPPER_HALF}[name](
            copy.deepcopy(base), round(SHARE * base.num_parameters())
        ) as contestant:
            batch = ids(4, 16)
            kept[name] = saved_bytes(lambda c=contestant, b=batch: c.body(b), own_tensors(contestant.model))
    assert kept["last:50%"] < 0.7 * kept["s2ft"]
    assert kept["s2ft"] < kept["floor"]


# The report


def test_the_cpu_preset_reports_every_method_at_every_cell_and_the_ablation_at_the_main_one(cpu_report):
    seen = [(row["method"], row.get("variant"), row["batch_size"], row["seq_len"]) for row in cpu_report.rows]
    sizes = [(cell.batch_size, cell.seq_len) for cell in CELLS]
    expected = [(name, None, *size) for size in sizes for name in INSTALLED]
    expected += [("s2ft", "last:50%", *size) for size in sizes]
    expected += [("s2ft", variant, 2, 12) for variant in ABLATION]
    usual = AS_TRAINED if cpu_report.settings["dtype"] == "bf16" else {}  # fp32 is what they are in already
    expected += [(method, "fp32, autocast", 2, 12) for method in usual]
    assert sorted(seen, key=str) == sorted(expected, key=str)
    for row in cpu_report.rows:
        assert set(row) - {"variant"} == KEYS
        assert 0 < row["step_ms_p20"] <= row["step_ms"] <= row["step_ms_p80"]
        assert row["peak_bytes"] is None
        assert row["saved_bytes"] > 0
        assert (row["trainable"] == 0) == (row["method"] == "floor")
    floors = {(row["batch_size"], row["seq_len"]): row for row in cpu_report.rows if row["method"] == "floor"}
    for row in cpu_report.rows:
        floor = floors[row["batch_size"], row["seq_len"]]
        if row.get("variant") in {*ABLATION, "fp32, autocast"}:
            assert row["floor_ratio"] > 0  # against the floor that took turns with them
        else:
            assert row["floor_ratio"] == pytest.approx(row["step_ms"] / floor["step_ms"])


def test_the_report_is_json_with_what_was_asked_of_it(cpu_report):
    read = json.loads(json.dumps(cpu_report.as_dict()))
    assert set(read) == {"environment", "settings", "rows"}
    assert read["settings"]["models"] == {"tiny": TINY}
    assert read["settings"]["main"] == {"batch_size": 2, "seq_len": 12, "rounds": 2, "warm_up": 1}


def test_methods_take_turns(monkeypatch):
    steps: list[tuple[str, int]] = []

    def noted(name):
        @contextmanager
        def prepare(base, parameters):
            class Noted(Contestant):
                def step(self, batch):
                    steps.append((name, batch.numel()))

            yield Noted(base)

        return prepare

    preset = replace(PRESETS["cpu"], models={"tiny": TINY}, cells=CELLS[:2], ablation=False)
    monkeypatch.setattr(training, "UPPER_HALF", {})
    done: list[float] = []
    bench_training(preset, contestants={name: noted(name) for name in "abc"}, tell=done.append)
    for start in range(0, len(steps), 3):
        assert sorted(name for name, _ in steps[start : start + 3]) == ["a", "b", "c"]
    peaks = 3  # a step of each more at every cell, for its memory
    assert [tokens for _, tokens in steps] == [24] * (9 + peaks) + [12] * (6 + peaks)
    assert done == sorted(done)
    assert done[-1] == 1


@contextmanager
def hungry(base, parameters):
    """Has memory for 12 tokens."""

    class Hungry(Contestant):
        def step(self, batch):
            if batch.numel() > 12:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().step(batch)

    with CONTESTANTS["s2ft"](base, parameters) as inner:
        yield Hungry(inner.model, inner.optimizer)


@contextmanager
def starved(base, parameters):
    """Has no memory to begin with."""
    raise torch.OutOfMemoryError("CUDA out of memory")
    yield


@pytest.mark.slow
def test_the_7b_preset_runs_on_tiny_shapes_and_records_lacks_of_memory():
    models = {"llama2": TINY, "llama3": TINY_GROUPED}
    preset = replace(PRESETS["7b"], models=models, cells=CELLS, budgets=(SHARE,), device="cpu")
    report = bench_training(preset, contestants={**INSTALLED, "hungry": hungry, "starved": starved})
    names = [*INSTALLED, "hungry", "starved"]
    assert [row["model"] for row in report.rows] == [m for m in models for _ in range(3 * (len(names) + 1))]
    for row in report.rows:
        short = row["method"] == "starved" or (row["method"] == "hungry" and row["batch_size"] * row["seq_len"] > 12)
        assert row.get("out_of_memory", False) == short
        assert set(row) - {"variant", "out_of_memory"} == KEYS
        assert (row["step_ms"] is None) == (row["floor_ratio"] is None) == (row["saved_bytes"] is None) == short
    assert any(training_line(row)["ms"] == "no memory" for row in report.rows)
    json.dumps(report.as_dict())


def test_the_7b_preset_has_the_shapes_lengths_and_batches_that_it_names():
    preset = PRESETS["7b"]
    with torch.device("meta"):
        sizes = {
            name: AutoModelForCausalLM.from_config(LlamaConfig(**shape)).num_parameters()
            for name, shape in preset.models.items()
        }
    assert sizes == {"llama2-7b": 6_738_415_616, "llama3-8b": 8_030_261_248}  # as published
    assert {(c.batch_size, c.seq_len) for c in preset.cells} == set(itertools.product((1, 2, 4, 8), (512, 1024)))


def test_a_method_whose_package_is_missing_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(galore, "find_spec", lambda name: None)
    preset = replace(PRESETS["7b"], models={"tiny": TINY}, cells=CELLS[2:], budgets=(SHARE,), device="cpu")
    report = bench_training(preset, contestants={name: CONTESTANTS[name] for name in ("floor", "galore")})
    assert {row["method"] for row in report.rows} == {"floor", "s2ft"}
    assert "pip install 's2ft[baselines]'" in report.settings["left_out"]["galore"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_7b_preset_and_liger_are_refused(monkeypatch):
    with pytest.raises(S2FTError, match="llama2-7b, llama3-8b need a CUDA GPU, and there is none; take preset=cpu"):
        bench_training(PRESETS["7b"])
    monkeypatch.setattr(presets, "find_spec", lambda name: None)
    with pytest.raises(S2FTError, match="2 problems") as caught:
        bench_training(PRESETS["cpu"], liger=True)
    assert "do not run on a CPU" in str(caught.value)
    assert "pip install 's2ft[liger]'" in str(caught.value)


# Picture and command


def test_the_picture_has_a_panel_for_time_and_memory_against_each_size(cpu_report, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (drawn.append(self), save(self, *args, **options))
    )
    draw_training(cpu_report.rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    panels = drawn[0].axes
    assert [panel.get_xlabel() for panel in panels] == ["tokens in a sequence"] * 2 + ["sequences in a batch"] * 2
    assert [panel.get_ylabel() for panel in panels] == ["ms a step", "saved for backward, MB"] * 2
    expected = {
        row["seq_len"]: row["step_ms"]
        for row in cpu_report.rows
        if row["method"] == "lora" and row["batch_size"] == 2 and "variant" not in row
    }
    line = next(line for line in panels[0].lines if line.get_label() == "lora")
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == expected
    assert {line.get_label() for line in panels[0].lines} == {*INSTALLED, "s2ft last:50%"}


def test_the_picture_stands_lacks_of_memory(tmp_path):
    row = {
        "method": "full",
        "batch_size": 1,
        "seq_len": 8,
        "model": "m",
        "step_ms": None,
        "peak_bytes": None,
        "saved_bytes": None,
    }
    draw_training([row], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_the_command_prints_draws_and_writes(monkeypatch, tmp_path):
    tiny = replace(PRESETS["cpu"], models={"tiny": TINY}, cells=CELLS[1:], budgets=(SHARE,), ablation=False)
    monkeypatch.setitem(PRESETS, "cpu", tiny)
    rows, png = tmp_path / "a.json", tmp_path / "a.png"
    result = CliRunner().invoke(
        app, ["bench", "training", "--json", str(rows), "--png", str(png)], env={"COLUMNS": "160"}
    )
    assert result.exit_code == 0, result.exception
    assert "s2ft last:50%" in result.output
    assert "/ floor" in result.output
    assert len(json.loads(rows.read_text())["rows"]) == 2 * (len(INSTALLED) + 1)
    assert png.read_bytes().startswith(b"\x89PNG")
