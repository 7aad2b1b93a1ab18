"""Real text: commonsense questions of LLM-Adapters, asked of a base model that has never read English.

    trained     boolq, obqa, arc-e, arc-c: their train.json files      asked: boolq, obqa, arc-e (there is a test.json)
    untrained   siqa (has the answers of obqa), winogrande (has others)
    majority    what always giving a task's most frequent right answer would score: the baseline here

Training and asking go through `s2ft train`'s trainer and `s2ft eval`'s prompts and reading of answers, which are written
greedily: four beams take five times as long here. The learning rate is tuned on the loss of held-out training examples:
accuracies near the baseline would be noise.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from s2ft.common.errors import S2FTError, raise_together
from s2ft.data.examples import data_digest, load_examples
from s2ft.data.folder import find_file, places
from s2ft.demo.skills import Example, Split, belongs
from s2ft.evaluate.comparison import Checked, check_scores, score
from s2ft.evaluate.questions import digest
from s2ft.evaluate.tasks import TASKS
from s2ft.lab.registry import TellShare
from s2ft.lab.study.contenders import TUNING_SEED, VANILLA, Contender, fit_examples, old_skills, scores_on, tests_of
from s2ft.lab.study.report import LOSS, StudyReport
from s2ft.lab.study.runs import Result, Runs
from s2ft.lab.study.summary import Row
from s2ft.lab.study.training import Tuned, Workload, base_tokenizer, fresh_base, response_loss, tokens_of
from s2ft.lab.study.tuning import best_rate

TRAINED = ("boolq", "obqa", "arc-e", "arc-c")  # tasks whose train.json is read
ASKED = {"trained tasks": ("boolq", "obqa", "arc-e"), "untrained tasks": ("siqa", "winogrande")}
LONGEST = 512  # bytes of prompt and answer; longer examples (passages of boolq, half of arc) are left out
BUDGET = 0.04
MAJORITY = "majority answer"
CONTENDERS = (
    Contender("full", "full"),
    Contender("lora", "lora", BUDGET),
    Contender("s2ft 4%", "s2ft", BUDGET),
    Contender("s2ft 4%, largest weights", "s2ft", BUDGET, "weight"),
)


@dataclass(frozen=True)
class CommonsenseSettings:
    """What the study does; the defaults are what was recorded."""

    seeds: int = 5
    contenders: tuple[Contender, ...] = CONTENDERS
    rates: Mapping[str, tuple[float, ...]] = field(  # of each method, tried first
        default_factory=lambda: {
            "full": (2e-3, 4e-3),
            "lora": (8e-3, 1.6e-2),
            "s2ft": (8e-3, 1.6e-2),
        }
    )
    workload: Workload = field(
        default_factory=lambda: Workload(steps=60, batch_size=8, train_examples=480, test_examples=100)
    )

    @property
    def runs(self) -> int:
        """The number of runs, if no grid of learning rates has to grow."""
        tuning = sum(len(self.rates[contender.method]) for contender in self.contenders)
        return tuning + self.seeds * (1 + len(self.contenders))


@dataclass(frozen=True)
class _Material:
    """The examples and the questions, with a digest of both."""

    examples: list[Example]
    checked: Checked
    digest: str

    def draw(self, split: Split, count: int, seed: int) -> list[Example]:
        """Examples of one side of the training files; another seed draws others."""
        side = [example for example in self.examples if belongs(example["prompt"], split)]
        return random.Random(f"{split}/{seed}").sample(side, min(count, len(side)))


def study_commonsense(
    folder: Path, settings: CommonsenseSettings | None = None, tell: TellShare | None = None, *, data: str
) -> StudyReport:
    """Runs the study, or what of it is not in `folder` yet.

    Args:
        data: A folder laid out like LLM-Adapters', with dataset/NAME/train.json and test.json.
        tell: Is told the share of the runs that are done.

    Raises:
        S2FTError: if files are missing or malformed, before anything is trained.
    """
    settings = settings or CommonsenseSettings()
    material = load_material(data, settings.workload.test_examples)
    runs = Runs(folder, settings.runs, tell)
    rates = {who.name: _rate(runs, who, settings, material) for who in settings.contenders}
    rows = [_row(MAJORITY, task, 0, share) for task, share in majority(material.checked).items()]
    trainable = {}
    for seed, who in product(range(settings.seeds), (VANILLA, *settings.contenders)):
        result = _run(runs, who, settings.workload, rates.get(who.name, 0.0), seed, material)
        rows += _rows(who.name, seed, result)
        trainable[who.name] = result["trainable"]
    found = {"learning_rate": rates, "trainable": trainable, "seconds": round(runs.seconds), "data": material.digest}
    shown = (*(task for tasks in ASKED.values() for task in tasks), "old", LOSS)
    return StudyReport({**asdict(settings), **found}, rows, ("method",), shown)


def load_material(data: str, limit: int) -> _Material:
    """The training examples that are short enough, and the first `limit` questions of each test.

    Raises:
        S2FTError: if a file is missing or malformed.
    """
    files = [training_file(task, data) for task in TRAINED]
    raise_together([file for file in files if isinstance(file, str)])
    examples = load_examples([str(file) for file in files])
    checked = check_scores([task for tasks in ASKED.values() for task in tasks], data, limit)
    kept = [example for example in examples if example["completion"].strip() and example_length(example) <= LONGEST]
    questions = [(question.prompt, question.gold) for _, asked in checked.questions for question in asked]
    return _Material(kept, checked, f"{data_digest(examples)[:16]}/{digest(questions)}")


def training_file(task: str, data: str) -> Path | str:
    """The file of a task's training examples, or what is wrong where there is none."""
    names = places(f"dataset/{TASKS[task].folder}/train.json")
    return find_file(data, names) or f"data={data!r} has no examples to train {task} on: there is no {names[-1]}"


def example_length(example: Example) -> int:
    """Bytes of prompt and answer."""
    return len((example["prompt"] + example["completion"]).encode())


def majority(checked: Checked) -> dict[str, float]:
    """For each task, the share of its most frequent right answer."""
    shares = {}
    for task, questions in checked.questions:
        counts = Counter(question.gold for question in questions)
        shares[task.name] = counts.most_common(1)[0][1] / len(questions)
    return shares


def _rate(runs: Runs, who: Contender, settings: CommonsenseSettings, material: _Material) -> float:
    workload = settings.workload
    validation = tokens_of(material.draw("validation", workload.test_examples, TUNING_SEED))

    def run(rate: float) -> Result:
        tuned = _fit(who, workload, rate, TUNING_SEED, material)
        return {"validation_loss": response_loss(tuned.model, validation, workload.batch_size)}

    asked = {"tuning": asdict(who), "task": "commonsense", "recipe": asdict(workload), "data": material.digest}
    return best_rate(runs, settings.rates[who.method], asked, run, lambda result: -float(result["validation_loss"]))


def _run(runs: Runs, who: Contender, workload: Workload, rate: float, seed: int, material: _Material) -> Result:
    def run() -> Result:
        tuned = None if who == VANILLA else _fit(who, workload, rate, seed, material)
        model = fresh_base() if tuned is None else tuned.model
        scores = {**_accuracies(model, material.checked), **scores_on(model, tests_of(old_skills(), workload, seed))}
        counts = (
            {"trainable": 0, "loss": None}
            if tuned is None
            else {"trainable": tuned.trainable, "loss": tuned.final_loss}
        )
        return {**counts, "scores": scores}

    asked = {"contender": asdict(who), "task": "commonsense", "rate": rate, "seed": seed, "recipe": asdict(workload)}
    return runs.result({**asked, "data": material.digest}, run)


def _fit(who: Contender, workload: Workload, rate: float, seed: int, material: _Material) -> Tuned:
    return fit_examples(who, material.draw("fit", workload.train_examples, seed), workload, rate, seed)


def _accuracies(model: Any, checked: Checked) -> dict[str, float]:
    """The accuracy on each task.

    Raises:
        S2FTError: if an answer could not be produced: a study has no use for parts of a test.
    """
    with TemporaryDirectory() as folder:
        found = score(model, base_tokenizer(), checked, Path(folder), batch_size=32, beams=1)
    failed = {name: row["errors"] for name, row in found.items() if row["errors"]}
    if failed:
        raise S2FTError(f"answers could not be produced: {failed}")
    return {name: row["accuracy"] for name, row in found.items()}


def _rows(method: str, seed: int, result: Result) -> list[Row]:
    scores = result["scores"]
    values = {kind: fmean(scores[task] for task in tasks) for kind, tasks in {**ASKED, "old": old_skills()}.items()}
    values |= {task: scores[task] for tasks in ASKED.values() for task in tasks}
    if result["loss"] is not None:
        values[LOSS] = result["loss"]
    return [_row(method, task, seed, score) for task, score in values.items()]


def _row(method: str, task: str, seed: int, score: float) -> Row:
    return {"method": method, "task": task, "seed": seed, "score": score}
