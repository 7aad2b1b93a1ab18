"""Two skills learned apart and then added up: how much of each is left?

    alone    ΔA or ΔB          sum    ΔA + ΔB          mean    (ΔA + ΔB) / 2

S²FT trains the second skill twice: on the channels of the first (the worst case), and avoiding them. LoRA's adapters are
combined by PEFT's `add_weighted_adapter`, in its exact way (`cat`: the factors side by side, hence the sum of the products).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from s2ft.demo.skills import STUDY_SKILLS, Example
from s2ft.lab.registry import TellShare
from s2ft.lab.study.contenders import Contender, fit, old_skills, scores_on, tests_of, tuned_rate
from s2ft.lab.study.report import StudyReport
from s2ft.lab.study.runs import Result, Runs
from s2ft.lab.study.summary import Row
from s2ft.lab.study.training import Workload, fresh_base
from s2ft.tuner.model import S2FTModel  # noqa: F401 - PEFT knows the method from here on

FUSIONS = {"sum": 1.0, "mean": 0.5}  # the weight of each adapter
COMBINATION = {"lora": "cat", "s2ft": "sum"}  # the names of the exact sum
VARIANTS = {"lora": ("lora",), "s2ft": ("s2ft, same channels", "s2ft, disjoint channels")}

Scores = dict[str, float]


@dataclass(frozen=True)
class FusionSettings:
    """What the study does; the defaults are what was recorded."""

    seeds: int = 5
    tasks: tuple[str, str] = ("river", "back")
    budget: float = 0.04
    rates: Mapping[str, tuple[float, ...]] = field(  # tried first
        default_factory=lambda: {"lora": (4e-3, 8e-3, 1.6e-2), "s2ft": (8e-3, 1.6e-2, 3.2e-2)}
    )
    workload: Workload = field(default_factory=Workload)

    @property
    def runs(self) -> int:
        """The number of runs, if no grid of learning rates has to grow."""
        return sum(2 * len(rates) + self.seeds for rates in self.rates.values())


def study_fusion(folder: Path, settings: FusionSettings | None = None, tell: TellShare | None = None) -> StudyReport:
    """Runs the study, or what of it is not in `folder` yet.

    Args:
        tell: Is told the share of the runs that are done.
    """
    settings = settings or FusionSettings()
    runs = Runs(folder, settings.runs, tell)
    contenders = [Contender(method, method, settings.budget) for method in settings.rates]
    rates = {
        who.method: {task: tuned_rate(runs, who, task, own, settings.workload) for task in settings.tasks}
        for who, own in zip(contenders, settings.rates.values(), strict=True)
    }
    rows: list[Row] = []
    for seed, who in product(range(settings.seeds), contenders):
        rows += _rows(seed, settings.tasks, _run(runs, who, settings, rates[who.method], seed))
    return StudyReport(
        {**asdict(settings), "learning_rate": rates, "seconds": round(runs.seconds)}, rows, ("method", "fusion")
    )


def _run(runs: Runs, who: Contender, settings: FusionSettings, rates: dict[str, float], seed: int) -> Result:
    tasks, workload = settings.tasks, settings.workload

    def run() -> Result:
        tests = tests_of({**{task: STUDY_SKILLS[task] for task in tasks}, **old_skills()}, workload, seed)
        return dict(_fuse_and_score(who, settings, rates, seed, tests))

    asked = {"fusing": asdict(who), "tasks": tasks, "rates": rates, "seed": seed, "recipe": asdict(workload)}
    return runs.result(asked, run)


def _fuse_and_score(
    who: Contender, settings: FusionSettings, rates: dict[str, float], seed: int, tests: dict[str, list[Example]]
) -> Iterator[tuple[str, dict[str, Scores]]]:
    """For each variant: fusion → scores; under a task's own name, those of its adapter alone."""
    first, second = settings.tasks
    with TemporaryDirectory() as folder:
        kept = Path(folder, "first")
        one = fit(who, first, settings.workload, rates[first], seed).model
        one.save_pretrained(str(kept))
        alone = {first: scores_on(one, tests)}
        for variant in VARIANTS[who.method]:
            avoid = [str(kept)] if "disjoint" in variant else []
            other = fit(who, second, settings.workload, rates[second], seed, avoid).model
            other.save_pretrained(str(Path(folder, variant)))
            fused = fuse_adapters([kept, Path(folder, variant)], who.method)
            yield variant, {**alone, second: scores_on(other, tests), **_fused_scores(fused, tests)}


def fuse_adapters(folders: list[Path], method: str, base: PreTrainedModel | None = None) -> PeftModel:
    """A base, the embedded one unless given, with an adapter for each of `FUSIONS`, made of the adapters in `folders`."""
    names = [f"part{number}" for number in range(len(folders))]
    model = PeftModel.from_pretrained(base or fresh_base(), folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name)
    for fusion, weight in FUSIONS.items():
        model.add_weighted_adapter(names, [weight] * len(names), fusion, combination_type=COMBINATION[method])
    return model


def _fused_scores(model: PeftModel, tests: dict[str, list[Example]]) -> dict[str, Scores]:
    scores: dict[str, Scores] = {}
    for fusion in FUSIONS:
        model.set_adapter(fusion)
        scores[fusion] = scores_on(model, tests)
    return scores


def _rows(seed: int, tasks: tuple[str, str], result: Result) -> Iterator[Row]:
    """Alone, each task is scored with its own adapter, and the old skills with both in turn."""
    for variant, scores in result.items():
        alone: dict[str, Any] = {task: scores[task][task] for task in tasks}
        alone |= {name: fmean(scores[task][name] for task in tasks) for name in old_skills()}
        for fusion, own in {"alone": alone, **{name: scores[name] for name in FUSIONS}}.items():
            values = {**{task: own[task] for task in tasks}, "old skills": fmean(own[name] for name in old_skills())}
            for task, score in values.items():
                yield {"method": variant, "fusion": fusion, "task": task, "seed": seed, "score": score}
