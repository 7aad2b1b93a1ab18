"""What all studies stand on: intervals, kept runs, splits, tuning, and contenders that train what they say."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from peft.tuners.lora import LoraLayer

from s2ft import S2FTError
from s2ft.demo.skills import FAR_SKILLS, NEAR_SKILLS, SKILLS, STUDY_SKILLS, belongs, split_of
from s2ft.finetune.trainer import DivergedError
from s2ft.format.config import S2FTConfig
from s2ft.lab.study import contenders, runs
from s2ft.lab.study.bars import bars_by_part, draw
from s2ft.lab.study.contenders import Contender, fit, train_and_score, tuned_rate
from s2ft.lab.study.report import HELD_OUT, LOSS, PERPLEXITY, StudyReport, cell
from s2ft.lab.study.runs import FILE, Runs
from s2ft.lab.study.selection import STRATEGIES, contender
from s2ft.lab.study.summary import interval, summarize
from s2ft.lab.study.training import Workload, calibration, fresh_base, tokens_of
from s2ft.lab.study.tuning import best_rate
from s2ft.selection.select import select

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Workload(steps=2, batch_size=4, train_examples=8, test_examples=4)


# Intervals


def student(freedom: int) -> float:
    """Half the interval of some values, in standard errors."""
    values = torch.rand(freedom + 1, dtype=torch.float64)
    low, high = interval(values.tolist())
    return (high - low) / 2 / float(values.std()) * math.sqrt(freedom + 1)


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_t_is_the_one_of_the_tables(freedom, t):
    assert student(freedom) == pytest.approx(t, abs=1e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 13, 40])
def test_share_within_t_is_the_integral_of_the_density(freedom):
    t = student(freedom)
    x = np.linspace(-t, t, 200_001)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-9)


def test_interval_of_five_values():
    assert interval([1, 2, 3, 4, 5]) == pytest.approx((3 - 1.96324, 3 + 1.96324), abs=1e-4)
    assert interval([0.5]) == (None, None)


def test_an_interval_holds_the_mean_95_times_in_100():
    samples = torch.randn(2000, 4, dtype=torch.float64) + 7
    held = sum(low <= 7 <= high for low, high in (interval(row) for row in samples.tolist()))
    assert 0.93 < held / 2000 < 0.97  # four standard errors


def test_summary_has_one_row_for_each_combination():
    rows = [
        {"strategy": s, "task": t, "seed": n, "score": n + len(s)} for s in ("R", "W+") for t in "ab" for n in (0, 2)
    ]
    summary = summarize(rows, ("strategy", "task"))
    assert [(row["strategy"], row["task"], row["mean"], row["seeds"]) for row in summary] == [
        ("R", "a", 2, 2),
        ("R", "b", 2, 2),
        ("W+", "a", 3, 2),
        ("W+", "b", 3, 2),
    ]
    assert summary[0]["high"] == pytest.approx(2 + 12.7062, abs=1e-3)


# Kept runs


def test_runs_are_done_once_and_again_when_a_setting_changes(tmp_path):
    done = []

    def ask(**settings):
        return Runs(tmp_path / "kept", 1).result(settings, lambda: done.append(settings) or {"score": len(done)})

    assert ask(seed=0, rate=0.1) == ask(rate=0.1, seed=0) == {"score": 1}
    assert ask(seed=1, rate=0.1) == {"score": 2}
    assert ask(seed=0, rate=0.2) == {"score": 3}
    assert len((tmp_path / "kept" / FILE).read_text().splitlines()) == len(done) == 3


def test_another_base_or_version_is_another_run(monkeypatch):
    first = runs.digest({"seed": 0})
    monkeypatch.setattr(runs, "_base_digest", lambda: "another")
    second = runs.digest({"seed": 0})
    monkeypatch.setattr(runs, "version", lambda name: "9")
    assert len({first, second, runs.digest({"seed": 0})}) == 3


def test_a_study_goes_on_where_it_was_interrupted(tmp_path):
    def study(fails_at):
        done = []
        kept = Runs(tmp_path, 4, told.append)
        for seed in range(4):
            if seed == fails_at:
                raise KeyboardInterrupt
            kept.result({"seed": seed}, lambda seed=seed: done.append(seed) or {})
        return done

    told: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        study(fails_at=2)
    assert study(fails_at=None) == [2, 3]
    assert told == [0.25, 0.5, 0.25, 0.5, 0.75, 1]


def test_a_folder_that_cannot_hold_runs_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(S2FTError, match=r"runs='.*file' is a file"):
        Runs(tmp_path / "file", 1)
    for line in ("{", "[]", '{"digest": "a"}'):
        (tmp_path / FILE).write_text('{"digest": "a", "settings": {}, "result": {}, "seconds": 1}\n' + line)
        with pytest.raises(S2FTError, match=r"runs\.jsonl:2: is no run"):
            Runs(tmp_path, 1)


# Splits and tuning


def test_fit_and_validation_part_the_training_side():
    prompts = [STUDY_SKILLS["back"].example(f"word{n}")["prompt"] for n in range(5000)]
    sides = {split: {p for p in prompts if belongs(p, split)} for split in ("train", "test", "fit", "validation")}
    assert sides["fit"] | sides["validation"] == sides["train"]
    assert not sides["fit"] & sides["validation"]
    assert not sides["train"] & sides["test"]
    assert 350 < len(sides["validation"]) < 550
    assert {split_of(p) for p in sides["test"]} == {"test"}


@pytest.mark.parametrize("task", ["back", "ends"])
def test_tuning_never_sees_the_tests(task, tmp_path, monkeypatch):
    asked, trained = [], []
    monkeypatch.setattr(contenders, "accuracy", lambda _, examples: asked.extend(examples) or 0.5)
    monkeypatch.setattr(contenders, "tokens_of", lambda examples: trained.extend(examples) or tokens_of(examples))
    who = Contender("lora", "lora", 0.04)
    kept = Runs(tmp_path, 2)
    tuned_rate(kept, who, task, (1e-3, 2e-3), TINY)
    assert len(asked) == kept.total * TINY.test_examples
    assert all(belongs(example["prompt"], "validation") for example in asked)
    assert len(trained) == kept.total * TINY.train_examples
    assert all(belongs(example["prompt"], "fit") for example in trained)


@pytest.mark.parametrize(
    ("peak", "tried", "best"),
    [
        (2, [1, 2, 4], 2),  # inside: done
        (16, [1, 2, 4, 8, 16, 32], 16),  # beyond the upper edge
        (0.25, [1, 2, 4, 0.5, 0.25, 0.125], 0.25),
        (1e6, [1, 2, 4, 8, 16, 32, 64], 64),  # no end of it
    ],
)
def test_the_grid_grows_until_the_best_rate_is_inside(peak, tried, best, tmp_path):
    asked = []

    def run(rate):
        asked.append(rate)
        return {"score": -abs(math.log(rate / peak))}

    runs = Runs(tmp_path, 3)
    assert best_rate(runs, [1, 2, 4], {"task": "a"}, run, lambda result: result["score"]) == best
    assert asked == tried
    assert runs.total == len(tried)


def test_of_equally_good_rates_the_lowest_is_taken(tmp_path):
    scores = {0.05: 0.2, 0.1: 0.2, 0.2: 0.9, 0.4: 0.9, 0.8: 0.7}
    best = best_rate(Runs(tmp_path, 3), [0.1, 0.2, 0.4], {}, lambda rate: {"a": scores[rate]}, lambda r: r["a"])
    assert best == 0.2


def test_a_rate_that_diverges_is_the_worst(tmp_path):
    def run(rate: float) -> dict[str, float]:
        if rate > 0.2:
            raise DivergedError("the loss is nan")
        return {"a": rate}

    assert best_rate(Runs(tmp_path, 2), [0.1, 0.2], {}, run, lambda result: result["a"]) == 0.2


@pytest.mark.parametrize("skills", [NEAR_SKILLS, FAR_SKILLS])
def test_shifted_skills_are_asked_in_their_own_words_and_right(skills):
    for name, skill in skills.items():
        example = skill.examples(1, seed=3, split="test")[0]
        word = example["prompt"].partition(": ")[2].strip()
        assert name.startswith(skill.name)
        answers = {"back": word[::-1][:3], "reverse": word[::-1], "sort": "".join(sorted(word)), "upper": word.upper()}
        assert example["completion"] == answers[skill.name]


# What is trained


def changed(tuned_model):
    """Projection weight → where it differs from the base's, after merging."""
    base = dict(fresh_base().named_parameters())
    merged = tuned_model.merge_and_unload() if hasattr(tuned_model, "merge_and_unload") else tuned_model
    return {name: weight != base[name] for name, weight in merged.named_parameters()}


def test_full_tuning_changes_every_weight():
    tuned = fit(Contender("full", "full"), "ends", TINY, 1e-3, 0)
    assert tuned.trainable == fresh_base().num_parameters()
    assert all(where.any() for where in changed(tuned.model).values())
    assert len(tuned.losses) == TINY.steps


@pytest.mark.parametrize("method", ["lora", "dora", "shira", "s2ft"])
def test_contenders_train_about_their_budget(method):
    tuned = fit(Contender(method, method, 0.04), "ends", TINY, 1e-3, 0)
    share = tuned.trainable / fresh_base().num_parameters()
    assert share == pytest.approx(0.04, rel=0.1)
    named = [name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad]
    assert {"lora": "lora_", "dora": "lora_magnitude", "shira": "shira_", "s2ft": "s2ft_"}[method] in " ".join(named)
    layers = [module for module in tuned.model.modules() if isinstance(module, LoraLayer)]
    assert {layer.use_dora["default"] for layer in layers} == ({method == "dora"} if "ora" in method else set())


def test_shira_changes_scattered_entries():
    where = changed(fit(Contender("shira", "shira", 0.04), "ends", TINY, 1e-2, 0).model)
    touched = where["model.layers.1.mlp.up_proj.weight"]
    assert 0 < touched.float().mean() < 0.1
    assert touched.any(0).float().mean() > 0.9  # nearly every row and column holds some
    assert touched.any(1).float().mean() > 0.9


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_train_the_channels_that_they_choose_and_no_others(name):
    who = contender(name, 0.04)
    tuned = fit(who, "ends", TINY, 1e-2, 3)
    examples = STUDY_SKILLS["ends"].examples(TINY.train_examples, 3, split="fit")
    config = S2FTConfig(budget=0.04, strategy=STRATEGIES[name][0], subset=STRATEGIES[name][1], seed=3)
    expected = select(fresh_base(), config, [calibration(tokens_of(examples), TINY.batch_size)]).slices
    for path, where in changed(tuned.model).items():
        columns = set(where.any(0).nonzero().flatten().tolist()) if where.dim() == 2 and where.any() else set()
        chosen = expected.get(path.removesuffix(".weight"))
        assert columns == (set() if chosen is None else set(chosen.indices.tolist())), path


def test_vanilla_is_the_base(monkeypatch):
    monkeypatch.setattr(contenders, "fit", None)  # nothing is trained
    tests = {"upper": SKILLS["upper"].examples(5, 0, split="test")}
    result = train_and_score(Contender("none", "vanilla"), "ends", TINY, 0.0, 0, tests)
    assert result["scores"]["upper"] >= 0.8
    assert result["trainable"] == 0


def test_a_run_repeats_exactly():
    first, second = (fit(Contender("s2ft", "s2ft", 0.04), "river", TINY, 1e-2, 5) for _ in range(2))
    assert first.losses == second.losses
    assert fit(Contender("s2ft", "s2ft", 0.04), "river", TINY, 1e-2, 6).losses != first.losses


# Reports


def test_table_json_and_picture(tmp_path):
    rows = [
        {"method": m, "task": t, "seed": n, "score": n / 2} for m in ("a", "b") for t in ("x", LOSS) for n in (0, 1)
    ]
    report = StudyReport({}, rows[:-2], ("method",))
    assert report.table() == [
        {"method": "a", "x": "25.0 ± 317.7", LOSS: "0.250 ± 3.177"},
        {"method": "b", "x": "25.0 ± 317.7", LOSS: "–"},
    ]
    assert list(json.loads(json.dumps(report.as_dict()))) == ["environment", "settings", "rows", "summary"]
    draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert cell({"task": "x", "mean": 1.0, "low": None, "high": None}) == "100.0"


def test_a_mean_of_fewer_seeds_than_asked_for_says_so():
    rows = [
        {"method": name, "task": LOSS, "seed": seed, "score": 0.5}
        for name, seeds in (("a", 3), ("b", 1))
        for seed in range(seeds)
    ]
    one, other = StudyReport({"seeds": 3}, rows, ("method",)).table()
    assert (one[LOSS], other[LOSS]) == ("0.500 ± 0.000", "0.500 (1 of 3)"), "two of b diverged"


def test_parts_have_panels_of_their_own(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, png, **options: figures.append(figure))
    scores = [
        ("one", "vanilla", HELD_OUT, 9.0),
        ("one", "a", HELD_OUT, 1.0),
        ("one", "b", HELD_OUT, 2.0),
        ("one", "a", "x", 0.5),
        ("two", "c", PERPLEXITY, 3.0),
    ]
    rows = [{"part": part, "method": who, "task": task, "seed": 0, "score": score} for part, who, task, score in scores]
    for own in (rows, []):
        draw(StudyReport({}, own, ("part", "method"), picture=bars_by_part), tmp_path / "a.png")
    shown = [[axes.axison for axes in figure.axes] for figure in figures]
    assert shown == [[True, False, True, False, True, False], [False] * 3], "what was not measured is left out"
    loss, _, accuracies, *_ = figures[0].axes
    assert [name.get_text() for name in loss.get_yticklabels()] == ["a", "b"], "the base would squeeze the others"
    assert [bar.get_height() for bar in accuracies.patches] == [50]


def test_the_folder_of_runs_is_left_whole(tmp_path):
    kept = Runs(tmp_path / "a", 1)
    kept.result({}, dict)
    assert [path.name for path in Path(tmp_path / "a").iterdir()] == [FILE]
