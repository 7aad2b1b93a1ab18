"""The studies on a real model, tiny: a random model, data made here, a few steps."""

import json
import logging
import os
import signal
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from threading import Event
from time import monotonic, sleep

import pytest
import torch
from typer.testing import CliRunner

from llm_adapters import write_llm_adapters
from s2ft import S2FTError
from s2ft.cli.app import app
from s2ft.common.files import sole_writer
from s2ft.data.tokens import IGNORED
from s2ft.demo.skills import belongs
from s2ft.evaluate.answers import read_answers
from s2ft.evaluate.comparison import Checked, score
from s2ft.evaluate.tasks import DECODING, Decoding
from s2ft.finetune.train import train
from s2ft.lab.study import experiment, material, real
from s2ft.lab.study.bars import draw as draw_picture
from s2ft.lab.study.chains import VERSION, side_by_side
from s2ft.lab.study.commonsense import ASKED, TRAINED
from s2ft.lab.study.contenders import TUNING_SEED, Contender
from s2ft.lab.study.curves import RULE
from s2ft.lab.study.defaults import VARIANTS, DefaultsSettings, study_defaults
from s2ft.lab.study.experiment import Experiments
from s2ft.lab.study.material import (
    TESTS,
    draw,
    examples_digest,
    knowledge_digest,
    load_task,
    questions_digest,
    unseen_questions,
)
from s2ft.lab.study.real import RealSettings, study_real
from s2ft.lab.study.report import HELD_OUT, LOSS, PERPLEXITY
from s2ft.lab.study.runs import FILE, Runs
from s2ft.lab.study.training import Workload, tokenizer_of, tokens_of
from s2ft.lab.study.tuning import DIVERGED
from s2ft.lab.study.workers import Workers
from s2ft.runtime.models import load_model
from tiny_base import CHAT_TEMPLATE, byte_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

WORKLOAD = Workload(steps=2, batch_size=2, train_examples=4, test_examples=0)
S2FT = Contender("s2ft", "s2ft", 0.05, "weight")
SETTINGS = RealSettings(
    seeds=1,
    contenders={
        "arithmetic": (Contender("full", "full"), S2FT),
        "writing": (S2FT,),
        "commonsense": (S2FT,),
        "selection": (Contender("W−", "s2ft", 0.05, "weight", "smallest"),),
        "fusion": (S2FT,),
    },
    rates={"full": (1e-4,), "s2ft": (1e-3,)},
    workload=WORKLOAD,
)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr("s2ft.lab.study.tuning.STEPS", 0)
    monkeypatch.setitem(DECODING, "arithmetic", Decoding(1, 4))
    monkeypatch.setattr(experiment, "QUESTIONS", {"arithmetic": 1, "commonsense": 2})
    monkeypatch.setattr(experiment, "MOST_HELD_OUT", dict.fromkeys(experiment.MOST_HELD_OUT, 2))
    monkeypatch.setattr(experiment, "CHOICES", 2)
    monkeypatch.setattr(experiment, "documentation", lambda: "plain text " * 20)


@pytest.fixture
def model(tmp_path):
    base = tiny_model()
    base.config.max_position_embeddings = 4096
    base.save_pretrained(tmp_path / "model")
    byte_tokenizer(CHAT_TEMPLATE).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    tasks = {task for tasks in ASKED.values() for task in tasks} | set(TRAINED) | set(TESTS["arithmetic"])
    return write_llm_adapters(tmp_path / "data", tasks, problems=60)


def test_every_part_has_its_rows(model, data, tmp_path):
    told: list[float] = []
    report = study_real(tmp_path / "runs", SETTINGS, told.append, model=model, data=data)
    found = {(row["part"], row["method"]) for row in report.rows}
    assert found == {
        *(("arithmetic", name) for name in ("vanilla", "full", "s2ft")),
        *(("writing", name) for name in ("vanilla", "s2ft")),
        *(("commonsense", name) for name in ("vanilla", "s2ft")),
        ("selection", "W−"),
        *product(
            [f"fusion, {suite}" for suite in TESTS],
            [f"s2ft, {kind} channels: {how}" for kind in ("same", "disjoint") for how in ("alone", "sum", "mean")],
        ),
    }
    tasks = {
        part: {row["task"] for row in report.rows if (row["part"], row["method"]) == (part, "s2ft")}
        for part in ("arithmetic", "writing", "commonsense")
    }
    known = {f"{task}, by likelihood" for task in (*TESTS["commonsense"], "average")} | {PERPLEXITY}
    assert tasks["arithmetic"] == {HELD_OUT, LOSS, *known}
    assert tasks["writing"] == {HELD_OUT, LOSS, *TESTS["arithmetic"], "average"}
    assert tasks["commonsense"] == {HELD_OUT, LOSS, *TESTS["commonsense"], "average", *known}
    losses = {(row["part"], row["score"]) for row in report.rows if (row["method"], row["task"]) == ("s2ft", HELD_OUT)}
    assert len({score for part, score in losses if part in ("arithmetic", "writing")}) == 1, "the same training"
    assert {row["task"] for row in report.rows if row["part"].startswith("fusion")} == {HELD_OUT}
    assert told[-1] == 1
    assert report.settings["learning_rate"]["arithmetic"] == {"full": 1e-4, "s2ft": 1e-3}
    again = study_real(tmp_path / "runs", SETTINGS, model=model, data=data)  # from what was kept
    assert again.rows == report.rows


def test_a_part_of_the_real_study_is_chosen_by_name(model, data, tmp_path):
    assert RealSettings().restricted("fusion, arithmetic").parts == ("arithmetic", "fusion")
    assert RealSettings().restricted(None) == RealSettings()
    with pytest.raises(
        S2FTError, match=r"only: 'Arithmetic': must be among arithmetic, writing, commonsense, selection, fusion, kept"
    ):
        RealSettings().restricted("arithmetic,Arithmetic")
    report = study_real(tmp_path / "runs", SETTINGS, model=model, data=data, only="selection")
    assert {row["part"] for row in report.rows} == {"selection"}


def test_what_is_kept_of_the_parts_is_reported_without_a_run(model, data, tmp_path, monkeypatch):
    few = replace(SETTINGS, rates={"full": (1e-4,), "s2ft": (5e-4, 1e-3)})
    assert study_real(tmp_path / "runs", few, model=model, data=data, only="kept").rows == []
    whole = study_real(tmp_path / "runs", few, model=model, data=data, only="arithmetic")
    monkeypatch.setattr(Experiments, "__call__", lambda *_: 1 / 0)
    monkeypatch.setattr("s2ft.lab.study.tuning.STEPS", 2)  # a grid may have grown
    narrow = replace(few, seeds=3, rates={"full": (2e-4,), "s2ft": (5e-4,)})
    kept = study_real(tmp_path / "runs", narrow, model=model, data=data, only="kept")
    assert kept.rows == whole.rows
    assert kept.settings["learning_rate"]["arithmetic"] == whole.settings["learning_rate"]["arithmetic"]


def test_a_strategy_that_arithmetic_has_run_is_not_run_again(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(real, "STRATEGY", {S2FT: "W+"})
    shared = replace(SETTINGS, contenders={**SETTINGS.contenders, "arithmetic": (S2FT,), "selection": (S2FT,)})
    arithmetic = study_real(tmp_path / "runs", shared, model=model, data=data, only="arithmetic")
    kept = (tmp_path / "runs" / FILE).read_text()
    selection = study_real(tmp_path / "runs", shared, model=model, data=data, only="selection")
    both = study_real(tmp_path / "runs", shared, model=model, data=data, only="arithmetic,selection")
    assert both.settings["seconds"] == arithmetic.settings["seconds"], "a run that two parts ask for was made once"
    assert (tmp_path / "runs" / FILE).read_text() == kept
    losses = [row for row in arithmetic.rows if row["method"] == "s2ft" and row["task"] in (HELD_OUT, LOSS)]
    assert selection.rows == [{**row, "part": "selection", "method": "W+"} for row in losses]


def test_rates_are_tuned_on_examples_that_no_report_sees(data):
    examples = load_task("arithmetic", data)
    sides = {
        split: {row["prompt"] for row in draw(examples, split, 1000, 0)} for split in ("fit", "validation", "test")
    }
    assert sum(map(len, sides.values())) == len(set().union(*sides.values())) == len(examples)
    assert all(belongs(prompt, split) for split, prompts in sides.items() for prompt in prompts)
    assert TUNING_SEED not in range(SETTINGS.seeds)


def test_a_run_computes_in_fp32_where_the_machine_multiplies_bf16(model, data, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    found, measure = [], Experiments._measure

    def seen(self, tuned, task, measured):
        found.append({parameter.dtype for parameter in tuned.parameters()})
        return measure(self, tuned, task, measured)

    monkeypatch.setattr(Experiments, "_measure", seen)
    run = Experiments(model, data)
    trained = {"task": "style", "recipe": asdict(WORKLOAD), "seed": 0, "measured": "test", "rate": None}
    run({"contender": asdict(S2FT), **trained})
    run({"options": {"max_steps": 1}, "task": "style", "examples": 4, "seed": 0})
    assert found == [{torch.float32}] * 2


def test_the_held_out_loss_is_that_of_the_tuned_model(model, data):
    run = Experiments(model, data)
    settings = {"contender": asdict(S2FT), "task": "style", "recipe": asdict(WORKLOAD), "seed": 0, "measured": "test"}
    result = run({**settings, "rate": None})
    vanilla = run({**settings, "contender": asdict(real.VANILLA), "rate": 0.0})
    examples = [row for split in ("test", "validation") for row in draw(load_task("style", None), split, 2, 0)]
    base, losses = tiny_model().double(), []
    for row in tokens_of(examples, byte_tokenizer(CHAT_TEMPLATE)):
        scores = base(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1).detach()
        losses += [-float(scores[at, label]) for at, label in enumerate(row["labels"][1:]) if label != IGNORED]
    assert vanilla["held_out"] == pytest.approx(fmean(losses), rel=2e-2)  # bf16, where the machine has it
    assert result["held_out"] != vanilla["held_out"]
    assert result["trainable"] == pytest.approx(0.05 * tiny_model().num_parameters(), rel=0.1)
    assert 0 < result["rate"] <= 2e-2


def test_defaults_are_those_of_the_command(model, data, tmp_path):
    settings = DefaultsSettings(
        seeds=1,
        cases=("style-50",),
        contenders={"lora": {"method": "lora", "max_steps": 2}, "s2ft": {"budget": 0.05, "max_steps": 2}},
        rates=(1e-3,),
        variants={},
    )
    report = study_defaults(tmp_path / "runs", settings, model=model, data=data)
    assert [(row["method"], row["rate"]) for row in report.rows] == [
        ("lora", "0.001"),
        ("s2ft", "0.001"),
        ("s2ft", RULE),
    ]
    kept = [json.loads(line) for line in (tmp_path / "runs" / FILE).read_text().splitlines()]
    assert all(entry["result"]["steps"] == 2 for entry in kept)
    assert list(report.settings["rules"]) == ["s2ft on style-50"]


def test_what_is_kept_is_reported_and_drawn_without_a_run(model, data, tmp_path, monkeypatch):
    s2ft = {"budget": 0.05, "max_steps": 1}
    settings = DefaultsSettings(
        2,
        ("style-50",),
        {"s2ft": s2ft},
        rates=(1e-3, 2e-3),
        variants={"more": {**s2ft, "budget": 0.1}},
        variant_rates=(1e-3,),
    )
    study_defaults(tmp_path / "runs", replace(settings, seeds=1), model=model, data=data)
    (tmp_path / "runs" / FILE).write_text("".join((tmp_path / "runs" / FILE).read_text().splitlines(keepends=True)[1:]))
    monkeypatch.setattr(experiment, "train", None)
    report = study_defaults(tmp_path / "runs", settings, model=model, data=data, only="kept")
    assert [(row["method"], row["rate"], row["seed"]) for row in report.rows] == [
        ("s2ft", "0.002", 0),
        ("s2ft", RULE, 0),
        ("more", "0.001", 0),
    ]
    assert report.table()[0]["style-50"] == f"{report.rows[0]['score']:.3f} (1 of 2)", "a loss is no percentage"
    draw_picture(report, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_interrupted_is_not_kept(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "train", lambda options: replace(train(options), interrupted=True))
    contenders = {"s2ft": {"budget": 0.05, "max_steps": 1}}
    settings = DefaultsSettings(1, ("style-50",), contenders, rates=(1e-3,), variants={})
    with pytest.raises(KeyboardInterrupt):
        study_defaults(tmp_path / "runs", settings, model=model, data=data)
    assert not (tmp_path / "runs" / FILE).exists()


def test_part_of_the_defaults_study_is_chosen_by_name():
    few = DefaultsSettings(seeds=1).restricted("style-200, weight,style-50")
    assert {(case, who) for case, who, *_ in few.asked()} == {("style-50", "weight"), ("style-200", "weight")}
    assert few.runs == 2 * 6, "five rates and the rule's"
    varied = DefaultsSettings(seeds=1).restricted("style-50,variants")
    assert {who for _, who, *_ in varied.asked()} == set(VARIANTS)
    assert DefaultsSettings().restricted("lora").cases == DefaultsSettings().cases
    assert DefaultsSettings().restricted(None) == DefaultsSettings()
    with pytest.raises(S2FTError, match=r"only: 'dora': must be among style-50, .*, random, weight, variants"):
        DefaultsSettings().restricted("lora,dora")


def test_runs_on_other_data_are_other_runs(model, data, tmp_path):
    few = replace(
        SETTINGS, contenders={**SETTINGS.contenders, "arithmetic": (), "selection": SETTINGS.contenders["selection"]}
    )

    def kept() -> int:
        study_real(tmp_path / "runs", few, model=model, data=data, only="selection")
        return len((tmp_path / "runs" / FILE).read_text().splitlines())

    first = kept()
    assert kept() == first
    for file, more in (("ft-training_set/math_data.json", 2 * first), ("dataset/boolq/test.json", 2 * first)):
        path = Path(data, file)
        path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
        examples_digest.cache_clear()
        assert kept() == more, "a run that asks no question does not depend on them"


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("ft-training_set/math_data.json", ["test", "known", "written", "all"]),
        ("dataset/gsm8k/test.json", ["written", "all"]),
        ("dataset/boolq/test.json", ["known", "all"]),
        (None, ["known", "all"]),
    ],
)
def test_what_a_run_reads_is_part_of_its_identity(file, changed, data, monkeypatch):
    def digests() -> dict[str, str]:
        for cached in (examples_digest, unseen_questions, questions_digest, knowledge_digest):
            cached.cache_clear()
        study = real._Study(None, None, SETTINGS, data)
        return {name: study._digests("arithmetic", name) for name in experiment.MEASURED}

    before = digests()
    if file is None:  # Python's documentation differs between its versions
        monkeypatch.setattr(material, "documentation", lambda: "other text")
    else:
        path = Path(data, file)
        path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    after = digests()
    assert {name for name in before if before[name] != after[name]} - {"validation"} == {*changed}


def test_no_question_is_asked_that_a_training_could_have_read(model, data, monkeypatch):
    """LLM-Adapters' worked problems are four fifths of its tests."""
    path = Path(data, "dataset/gsm8k/test.json")
    questions = json.loads(path.read_text())
    problems = json.loads(Path(data, "ft-training_set/math_data.json").read_text())
    spaced = {**questions[0], "instruction": f"  {problems[3]['instruction'].replace('?', ' ?')} \n"}
    path.write_text(json.dumps([spaced, *questions]))
    unseen_questions.cache_clear()
    found = {task.name: questions for task, questions in unseen_questions("arithmetic", data).questions}["gsm8k"]
    assert [one.id for one in found] == [str(number + 1) for number in range(len(questions))]
    asked, ids = [], experiment.prompt_ids
    monkeypatch.setattr(experiment, "QUESTIONS", {"arithmetic": 2})
    monkeypatch.setattr(experiment, "prompt_ids", lambda tokenizer, one: asked.append(one) or ids(tokenizer, one))
    run = {"contender": asdict(real.VANILLA), "task": "arithmetic", "recipe": asdict(WORKLOAD), "seed": 0, "rate": 0.0}
    assert set(Experiments(model, data)({**run, "measured": "written"})["written"]) == {*TESTS["arithmetic"], "average"}
    assert len(asked) == 2 * len(TESTS["arithmetic"])
    assert [one.prompt for one in found[:2]] == [one for one in asked if one in [other.prompt for other in found]]


def test_tasks_in_common_batches_are_answered_as_each_alone(model, data, tmp_path, monkeypatch):
    """And each counts its own answers."""
    monkeypatch.setattr(experiment, "QUESTIONS", {"arithmetic": 5})
    monkeypatch.setattr(experiment, "BATCH", {"cpu": 7})
    texts: dict[str, list[str]] = {}

    def judged(task, text, gold):
        texts.setdefault(task.name, []).append(text)
        return {"correct": len(texts[task.name]) <= TESTS["arithmetic"].index(task.name)}

    monkeypatch.setattr(experiment, "score_row", judged)
    run = {"contender": asdict(real.VANILLA), "task": "arithmetic", "recipe": asdict(WORKLOAD), "seed": 0, "rate": 0.0}
    found = Experiments(model, data)({**run, "measured": "written"})["written"]
    questions = [(task, some[:5]) for task, some in unseen_questions("arithmetic", data).questions]
    base = load_model(model, torch.float32)
    score(base, tokenizer_of(base), Checked(questions), tmp_path, batch_size=1, beams=1)
    for task, some in questions:
        answers = read_answers(tmp_path / f"{task.name}.jsonl")
        assert texts[task.name] == [answers[one.id]["output"] for one in some]
        assert found[task.name] == pytest.approx(min(1, TESTS["arithmetic"].index(task.name) / len(some)))


def test_a_test_that_is_trained_on_as_a_whole_is_named(data):
    path = Path(data, "dataset/gsm8k/test.json")
    path.write_text(Path(data, "ft-training_set/math_data.json").read_text())
    unseen_questions.cache_clear()
    with pytest.raises(S2FTError, match="every question of gsm8k is trained on"):
        unseen_questions("arithmetic", data)


def test_parts_that_take_rates_of_others_count_their_tuning():
    whole = RealSettings()
    assert whole.restricted("writing").runs == 6 * 2 + 6 * 3 + 1
    assert whole.restricted("arithmetic,writing").runs == 6 * 2 + 2 * (6 * 3 + 1)
    assert whole.restricted("fusion").runs == 2 * 2 * 2 + 3 * 3


def test_a_report_of_nothing_is_not_written(model, data, tmp_path):
    words = ["study", "real", "--model", model, "--data", data, "--runs", str(tmp_path / "runs"), "--only", "kept"]
    found = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "r.json"), "--png", str(tmp_path / "r.png")])
    assert isinstance(found.exception, S2FTError)
    assert "holds no run of this model and data to report" in str(found.exception)
    assert not list(tmp_path.glob("r.*"))


def test_a_study_of_another_version_is_not_mixed_in(model, data, tmp_path, monkeypatch):
    few = replace(SETTINGS, parts=("selection",), seeds=1)
    study_real(tmp_path / "runs", few, model=model, data=data)
    monkeypatch.setattr("s2ft.lab.study.chains.VERSION", 99)
    with pytest.raises(S2FTError, match=rf"runs of version {VERSION} of the study, and this is version 99; name"):
        study_real(tmp_path / "runs", few, model=model, data=data)


def test_runs_in_other_processes_come_back_each_in_its_place_and_a_failure_ends_the_study(tmp_path):
    kept = Runs(tmp_path, 4, identity={"version": 1})
    with Workers(_squares, (10,), 2) as workers:
        asked = [{"seed": seed} for seed in (3, 1, 2)]
        assert kept.results(asked, workers) == [{"score": 19}, {"score": 11}, {"score": 14}]
        with pytest.raises(ZeroDivisionError):
            kept.results([{"seed": 0}, *({"seed": seed} for seed in range(4, 400))], workers)
    assert len((tmp_path / FILE).read_text().splitlines()) < 400
    assert Runs(tmp_path, 3, identity={"version": 1}).results(asked, _nothing)[0] == {"score": 19}


def test_the_first_chain_that_fails_is_told_at_once():
    started = Event()

    def fails():
        raise S2FTError("no memory")

    def waits():
        assert started.wait(60)
        return 1

    def told(*_):
        started.set()

    log = logging.getLogger("s2ft")
    log.addFilter(told)
    try:
        with pytest.raises(S2FTError, match="no memory"):
            side_by_side([waits, fails], Workers(_squares, (10,), 2))
    finally:
        log.removeFilter(told)
    assert started.is_set()
    assert side_by_side([lambda: 1, lambda: 2], Workers(_squares, (10,))) == [1, 2]


def test_ctrl_c_begins_no_more_runs():
    ran = []

    def chain(number):
        ran.append(number)
        os.kill(os.getpid(), signal.SIGINT)
        sleep(5)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            side_by_side([partial(chain, number) for number in range(3)], Workers(_squares, (10,)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ran == [0]


def test_a_failure_leaves_what_other_chains_ask_for_undone(tmp_path):
    kept = Runs(tmp_path, 100, identity={"version": 1})
    many = [{"seed": seed} for seed in range(1, 100)]
    with Workers(_slow_squares, (10,), 2) as workers, pytest.raises(ZeroDivisionError):
        side_by_side([lambda: kept.results([{"seed": 0}], workers), lambda: kept.results(many, workers)], workers)
    assert len(_lines(tmp_path)) < len(many)


def test_after_a_failure_the_runs_under_way_are_kept_and_no_other_is_begun(tmp_path):
    """A process pool takes some calls ahead, which cannot be taken back; and what it finishes later is a result, too."""
    kept, began = Runs(tmp_path / "runs", 5, identity={"version": 1}), tmp_path / "began"
    began.mkdir()
    with Workers(_noting, (str(began),), 2) as workers, pytest.raises(ZeroDivisionError):
        kept.results([{"seed": seed} for seed in range(5)], workers)
    assert sorted(path.name for path in began.iterdir()) == ["0", "1"]
    assert [json.loads(line)["result"] for line in _lines(tmp_path / "runs")] == [{"score": 1}]


@pytest.mark.parametrize("count", [0, -2])
def test_no_workers_are_refused(count):
    with pytest.raises(S2FTError, match=f"workers={count}: must be 1 at least"):
        Workers(_squares, (10,), count)


def _noting(folder):
    def run(settings):
        Path(folder, str(settings["seed"])).touch()
        deadline = monotonic() + 60
        while not Path(folder, str(1 - settings["seed"])).exists():  # both are under way
            assert monotonic() < deadline
            sleep(0.01)
        if settings["seed"] == 0:
            return {"score": 1 // 0}
        sleep(1)
        return {"score": settings["seed"]}

    return run


def _lines(folder):
    return (folder / FILE).read_text().splitlines() if (folder / FILE).exists() else []


def test_chains_keep_their_runs_in_a_folder_that_the_command_has_locked(model, data, tmp_path):
    few = replace(SETTINGS, parts=("selection",))
    with sole_writer(tmp_path / "runs"):
        report = study_real(tmp_path / "runs", few, model=model, data=data)
    assert len(report.settings["environments"]) == 1


def test_a_training_that_diverges_has_no_rows(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(real, "experiments", lambda *_, **__: Workers(_diverging, ()))
    fused = replace(SETTINGS, parts=("selection", "fusion"))
    assert study_real(tmp_path / "runs", fused, model=model, data=data).rows == []


def test_missing_problems_are_named(data, tmp_path):
    with pytest.raises(S2FTError, match=r"has no worked problems: there is no .*ft-training_set/math_data\.json"):
        load_task("arithmetic", str(tmp_path))


def test_the_commands_ask_for_model_and_data():
    for study in ("real", "defaults"):
        found = CliRunner().invoke(app, ["study", study])
        assert found.exit_code == 2
        assert "--model" in found.output


def _squares(start):
    def perform(settings):
        1 / settings["seed"]
        return {"score": start + settings["seed"] ** 2}

    return perform


def _diverging():
    return lambda _: {DIVERGED: "NaN"}


def _slow_squares(start):
    perform = _squares(start)
    return lambda settings: [perform(settings), sleep(0.05)][0]


def _nothing(asked):
    assert not asked
    return []
