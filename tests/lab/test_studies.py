"""The three studies, whole but tiny: rows, summaries, what is compared with what, and the command line."""

import json

import pytest
import torch
from typer.testing import CliRunner

from s2ft.cli.app import app
from s2ft.demo.skills import FAR_SKILLS, NEAR_SKILLS, OLD_SKILLS
from s2ft.format.slices import Slice
from s2ft.lab.study import fusion, generalization, selection, tuning
from s2ft.lab.study.contenders import Contender, fit
from s2ft.lab.study.report import LOSS
from s2ft.lab.study.training import Workload, fresh_base

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Workload(steps=2, batch_size=4, train_examples=8, test_examples=4)
SELECTION = selection.SelectionSettings(
    seeds=2, strategies=("R", "W−", "saliency+"), tasks=("river",), rates=(1e-3,), workload=TINY
)
FEW = (Contender("lora", "lora", 0.04), Contender("s2ft 4%", "s2ft", 0.04))
GENERALIZATION = generalization.GeneralizationSettings(
    seeds=2, contenders=FEW, rates={"lora": (1e-3, 2e-3), "s2ft": (1e-3,)}, workload=TINY
)
FUSION = fusion.FusionSettings(seeds=2, rates={"lora": (1e-2,), "s2ft": (1e-2,)}, workload=TINY)


@pytest.fixture(autouse=True)
def _short_grids(monkeypatch):
    monkeypatch.setattr(tuning, "STEPS", 1)


def test_selection_has_a_row_for_each_strategy_task_and_seed(tmp_path):
    told: list[float] = []
    report = selection.study_selection(tmp_path, SELECTION, told.append)
    names = [(row["strategy"], row["task"], row["seed"]) for row in report.rows]
    tasks = ("river", "old skills after river")
    assert sorted(names) == sorted((s, t, n) for s in ("none", *SELECTION.strategies) for t in tasks for n in (0, 1))
    assert all(0 <= row["score"] <= 1 for row in report.rows)
    assert set(report.settings["learning_rate"]["river"]) == set(SELECTION.strategies)  # one for each
    assert {row["seeds"] for row in report.summary} == {2}
    kept = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(told) == len(kept) >= SELECTION.runs
    assert told[-1] == 1
    reported = [entry["settings"] for entry in kept if "seed" in entry["settings"]]
    rates = report.settings["learning_rate"]["river"]
    assert all(own["rate"] == rates.get(own["contender"]["name"], 0) for own in reported)
    again = selection.study_selection(tmp_path, SELECTION)
    assert again.as_dict() == report.as_dict()


def test_strategies_train_equally_many_weights():
    counts = {fit(selection.contender(s, 0.04), "ends", TINY, 1e-3, 0).trainable for s in ("R", "W−", "G+", "LIFT+")}
    assert len(counts) == 1


def test_generalization_asks_every_kind_of_skill(tmp_path):
    report = generalization.study_generalization(tmp_path, GENERALIZATION)
    tasks = {"new: back", "near", "far", "old", *NEAR_SKILLS, *FAR_SKILLS, *OLD_SKILLS}
    by_method = {
        method: {row["task"] for row in report.rows if row["method"] == method} for method in ("vanilla", "lora")
    }
    assert by_method == {"vanilla": tasks, "lora": {*tasks, LOSS}}
    assert set(report.settings["learning_rate"]) == {"lora", "s2ft 4%"}
    assert report.settings["trainable"]["vanilla"] == 0 < report.settings["trainable"]["lora"]
    assert list(report.table()[0]) == [
        "method",
        "new: back",
        "near",
        "far",
        "old",
        LOSS,
    ]  # what a terminal has room for
    kept = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert GENERALIZATION.runs == 3 + 2 * 3
    assert len(kept) >= GENERALIZATION.runs


def test_near_and_far_are_the_means_of_their_skills(tmp_path):
    settings = generalization.GeneralizationSettings(seeds=1, contenders=(), workload=TINY)
    scores = {row["task"]: row["score"] for row in generalization.study_generalization(tmp_path, settings).rows}
    for kind, names in {"near": NEAR_SKILLS, "far": FAR_SKILLS, "old": OLD_SKILLS}.items():
        assert scores[kind] == pytest.approx(sum(scores[name] for name in names) / len(names))


@pytest.mark.slow
def test_fusion_compares_alone_with_fused(tmp_path):
    report = fusion.study_fusion(tmp_path, FUSION)
    variants = {"lora", "s2ft, same channels", "s2ft, disjoint channels"}
    names = {(row["method"], row["fusion"], row["task"]) for row in report.rows}
    assert names == {
        (v, f, t) for v in variants for f in ("alone", "sum", "mean") for t in ("river", "back", "old skills")
    }
    assert len(report.rows) == 2 * len(names)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) >= FUSION.runs


@pytest.mark.parametrize("method", ["lora", "s2ft"])
@pytest.mark.parametrize("name", fusion.FUSIONS)
def test_fused_weights_are_the_weighted_sum(method, name, tmp_path):
    who, folders = Contender(method, method, 0.04), [tmp_path / "a", tmp_path / "b"]
    for folder, task in zip(folders, ("river", "back"), strict=True):
        fit(who, task, TINY, 2e-2, 1).model.save_pretrained(folder)
    base = {key: value.double() for key, value in fresh_base().state_dict().items()}
    deltas = []
    for adapter in ("part0", "part1", name):
        model = fusion.fuse_adapters(folders, method)
        model.set_adapter(adapter)
        merged = model.merge_and_unload().state_dict()
        deltas.append({key: value.double() - base[key] for key, value in merged.items()})
    one, other, fused = deltas
    assert max(float(delta.abs().max()) for delta in one.values()) > 1e-3
    for key, delta in fused.items():
        expected = fusion.FUSIONS[name] * (one[key] + other[key])
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-6)


def test_channels_are_the_same_or_disjoint(tmp_path):
    who = Contender("s2ft", "s2ft", 0.04)
    first = fit(who, "river", TINY, 1e-3, 2).model
    first.save_pretrained(tmp_path)
    same, apart = (fit(who, "back", TINY, 1e-3, 2, avoid).model for avoid in ([], [str(tmp_path)]))
    slices = [
        {p: set(Slice.parse(t).indices) for p, t in m.peft_config["default"].slices.items()}
        for m in (first, same, apart)
    ]
    assert slices[0] == slices[1]
    assert slices[0].keys() & slices[2].keys()
    assert not any(slices[0].get(path, set()) & chosen for path, chosen in slices[2].items())


@pytest.mark.parametrize(("name", "module", "tiny"), [("selection", selection, SELECTION), ("fusion", fusion, FUSION)])
def test_the_command_prints_draws_and_writes(name, module, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = getattr(module, f"study_{name}")
    monkeypatch.setattr(module, f"study_{name}", lambda folder, settings, tell: study(folder, tiny, tell))
    result = CliRunner().invoke(app, ["study", name, "--json", "a.json", "--png", "a.png"])
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "a.json").read_text())
    assert list(facts) == ["environment", "settings", "rows", "summary"]
    assert "river" in result.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "runs" / f"study-{name}" / "runs.jsonl").exists()


def test_a_file_in_place_of_the_folder_is_refused_first(tmp_path):
    (tmp_path / "kept").write_text("")
    result = CliRunner().invoke(app, ["study", "selection", "--runs", str(tmp_path / "kept")])
    assert "is a file; name a folder" in str(result.exception)
