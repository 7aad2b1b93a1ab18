"""Does it matter which channels are trained? The paper's strategies and two more, at one budget (S²FT paper, appendix D).

Each strategy trains the same number of heads and channels on the same examples in the same order; the choice differs, and with
it the learning rate, which is tuned for each strategy and task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean

from s2ft.demo.skills import STUDY_SKILLS
from s2ft.lab.registry import TellShare
from s2ft.lab.study.contenders import Contender, old_skills, tests_of, train_and_score, tuned_rate
from s2ft.lab.study.report import StudyReport
from s2ft.lab.study.runs import Result, Runs
from s2ft.lab.study.summary import Row
from s2ft.lab.study.training import Workload

SIGNS = (("+", "largest"), ("−", "smallest"))
LETTERS = (("W", "weight"), ("A", "activation"), ("S", "product"), ("G", "gradient"))
PAPERS: dict[str, tuple[str, str]] = {  # as the paper names them → strategy, subset
    "R": ("random", "largest"),
    **{f"{letter}{sign}": (strategy, subset) for letter, strategy in LETTERS for sign, subset in SIGNS},
}
STRATEGIES = {
    **PAPERS,
    "LIFT+": ("lift", "largest"),
    "saliency+": ("saliency", "largest"),
}

UNTUNED = Contender("none", "vanilla")


@dataclass(frozen=True)
class SelectionSettings:
    """What the study does; the defaults are what was recorded."""

    seeds: int = 5
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    tasks: tuple[str, ...] = ("river", "ends")
    budget: float = 0.04
    rates: tuple[float, ...] = (8e-3, 1.6e-2, 3.2e-2)  # tried first
    workload: Workload = field(default_factory=Workload)

    @property
    def runs(self) -> int:
        """The number of runs, if no grid of learning rates has to grow."""
        return len(self.tasks) * (len(self.rates) * len(self.strategies) + self.seeds * (1 + len(self.strategies)))


def study_selection(
    folder: Path, settings: SelectionSettings | None = None, tell: TellShare | None = None
) -> StudyReport:
    """Runs the study, or what of it is not in `folder` yet.

    Args:
        tell: Is told the share of the runs that are done.
    """
    settings = settings or SelectionSettings()
    runs = Runs(folder, settings.runs, tell)
    tuned = [contender(name, settings.budget) for name in settings.strategies]
    rates = {
        task: {who.name: tuned_rate(runs, who, task, settings.rates, settings.workload) for who in tuned}
        for task in settings.tasks
    }
    rows: list[Row] = []
    for seed, task, who in product(range(settings.seeds), settings.tasks, [UNTUNED, *tuned]):
        result = _run(runs, who, task, rates[task].get(who.name, 0.0), seed, settings.workload)
        rows += _rows(who.name, task, seed, result["scores"])
    return StudyReport(
        {**asdict(settings), "learning_rate": rates, "seconds": round(runs.seconds)}, rows, ("strategy",)
    )


def contender(strategy: str, budget: float) -> Contender:
    """S²FT with one of `STRATEGIES`."""
    return Contender(strategy, "s2ft", budget, *STRATEGIES[strategy])


def _run(runs: Runs, who: Contender, task: str, rate: float, seed: int, workload: Workload) -> Result:
    def run() -> Result:
        tests = tests_of({task: STUDY_SKILLS[task], **old_skills()}, workload, seed)
        return train_and_score(who, task, workload, rate, seed, tests)

    settings = {"contender": asdict(who), "task": task, "rate": rate, "seed": seed, "recipe": asdict(workload)}
    return runs.result(settings, run)


def _rows(strategy: str, task: str, seed: int, scores: Mapping[str, float]) -> list[Row]:
    old = fmean(scores[name] for name in old_skills())
    parts = {task: scores[task], f"old skills after {task}": old}
    return [{"strategy": strategy, "task": name, "seed": seed, "score": score} for name, score in parts.items()]
