"""What is learned, what carries over, and what is forgotten: S²FT beside full tuning, LoRA, DoRA and SHiRA.

    new      the skill that is trained, on prompts held out        near    the same skill on other lengths
    far      old skills on words of an unfamiliar kind             old     the old skills as the base model masters them

Every method gets the learning rate that is best for it on the validation split of the new skill; the tests are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from s2ft.demo.skills import FAR_SKILLS, NEAR_SKILLS, STUDY_SKILLS, Skill
from s2ft.lab.registry import TellShare
from s2ft.lab.study.contenders import VANILLA, Contender, old_skills, tests_of, train_and_score, tuned_rate
from s2ft.lab.study.report import LOSS, StudyReport
from s2ft.lab.study.runs import Result, Runs
from s2ft.lab.study.summary import Row
from s2ft.lab.study.training import Workload

EQUAL = 0.04  # the budget at which methods are compared
CONTENDERS = (
    Contender("full", "full"),
    Contender("lora", "lora", EQUAL),
    Contender("dora", "dora", EQUAL),
    Contender("shira", "shira", EQUAL),
    Contender("s2ft 2%", "s2ft", EQUAL / 2),
    Contender("s2ft 4%", "s2ft", EQUAL),
    Contender("s2ft 8%", "s2ft", EQUAL * 2),
)
RATES: dict[str, tuple[float, ...]] = {  # tried first
    "full": (1e-4, 2e-4, 4e-4),
    "lora": (2e-3, 4e-3, 8e-3),
    "dora": (2e-3, 4e-3, 8e-3),
    "shira": (4e-3, 8e-3, 1.6e-2),
    "s2ft": (4e-3, 8e-3, 1.6e-2),
}


@dataclass(frozen=True)
class GeneralizationSettings:
    """What the study does; the defaults are what was recorded."""

    seeds: int = 5
    task: str = "back"
    contenders: tuple[Contender, ...] = CONTENDERS
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: RATES)  # of each method
    workload: Workload = field(default_factory=Workload)

    @property
    def runs(self) -> int:
        """The number of runs, if no grid of learning rates has to grow."""
        tuning = sum(len(self.rates[contender.method]) for contender in self.contenders)
        return tuning + self.seeds * (1 + len(self.contenders))


def study_generalization(
    folder: Path, settings: GeneralizationSettings | None = None, tell: TellShare | None = None
) -> StudyReport:
    """Runs the study, or what of it is not in `folder` yet.

    Args:
        tell: Is told the share of the runs that are done.
    """
    settings = settings or GeneralizationSettings()
    runs = Runs(folder, settings.runs, tell)
    rates = {
        who.name: tuned_rate(runs, who, settings.task, settings.rates[who.method], settings.workload)
        for who in settings.contenders
    }
    rows: list[Row] = []
    trainable = {}
    for seed, who in product(range(settings.seeds), (VANILLA, *settings.contenders)):
        result = _run(runs, who, settings, rates.get(who.name, 0.0), seed)
        rows += _rows(who.name, seed, result, settings.task)
        trainable[who.name] = result["trainable"]
    found: dict[str, Any] = {"learning_rate": rates, "trainable": trainable, "seconds": round(runs.seconds)}
    shown = (f"new: {settings.task}", "near", "far", "old", LOSS)
    return StudyReport({**asdict(settings), **found}, rows, ("method",), shown)


def _run(runs: Runs, who: Contender, settings: GeneralizationSettings, rate: float, seed: int) -> Result:
    workload, task = settings.workload, settings.task

    def run() -> Result:
        return train_and_score(who, task, workload, rate, seed, tests_of(_skills(task), workload, seed))

    asked = {"contender": asdict(who), "task": task, "rate": rate, "seed": seed, "recipe": asdict(workload)}
    return runs.result({**asked, "tests": sorted(_skills(task))}, run)


def _skills(task: str) -> dict[str, Skill]:
    return {task: STUDY_SKILLS[task], **NEAR_SKILLS, **FAR_SKILLS, **old_skills()}


def _rows(method: str, seed: int, result: Result, task: str) -> list[Row]:
    scores = result["scores"]
    kinds = {f"new: {task}": (task,), "near": NEAR_SKILLS, "far": FAR_SKILLS, "old": old_skills()}
    values = {kind: fmean(scores[name] for name in names) for kind, names in kinds.items()}
    values |= {name: score for name, score in scores.items() if name != task}
    if result["loss"] is not None:
        values[LOSS] = result["loss"]
    return [{"method": method, "task": name, "seed": seed, "score": score} for name, score in values.items()]
