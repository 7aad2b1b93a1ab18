"""Do the defaults of `s2ft train` teach a real model as well as the best rate of a grid, and as well as LoRA at its best?

    style-200, style-50    chat in a fixed style (`demo/lighthouse.py`)      loss of held-out examples after
    arithmetic-1000        worked problems                                   `s2ft train` as a user calls it

For every contender, task and seed: each rate of one grid, and the rate of the rule. All contenders train as many parameters, in
as many steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from s2ft.lab.registry import TellShare
from s2ft.lab.study.chains import identity, trials
from s2ft.lab.study.report import HELD_OUT, StudyReport
from s2ft.lab.study.runs import Runs, Settings
from s2ft.lab.study.summary import Row
from s2ft.lab.study.tuning import DIVERGED

RULE = "rule"  # the rate that follows from method and run
GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TASKS = {"style-50": ("style", 50), "style-200": ("style", 200), "arithmetic-1000": ("arithmetic", 1000)}
CONTENDERS: Mapping[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "s2ft, random": {"strategy": "random"},
    "s2ft, weight": {"strategy": "weight"},
}


@dataclass(frozen=True)
class DefaultsSettings:
    """What the study does; the defaults are what was recorded."""

    seeds: int = 3
    tasks: tuple[str, ...] = tuple(TASKS)
    contenders: Mapping[str, dict[str, Any]] = field(default_factory=lambda: dict(CONTENDERS))  # name → options
    rates: tuple[float, ...] = GRID

    def asked(self) -> Iterator[tuple[str, str, float | None, int]]:
        """(task, contender, rate, seed) of each run; LoRA has no rule."""
        for seed, task, who in product(range(self.seeds), self.tasks, self.contenders):
            ruled = self.contenders[who].get("method", "s2ft") == "s2ft"
            for rate in (*self.rates, *([None] if ruled else [])):
                yield task, who, rate, seed


def study_defaults(
    folder: Path,
    settings: DefaultsSettings | None = None,
    tell: TellShare | None = None,
    *,
    model: str,
    data: str,
    workers: int = 1,
) -> StudyReport:
    """Runs the study, or what of it is not in `folder` yet.

    Args:
        tell: Is told the share of the runs that are done.
        model: A chat model's folder, GGUF file or name on the Hub.
        data: LLM-Adapters' folder.
        workers: Runs at a time, each in a process of its own.

    Raises:
        S2FTError: if model or data cannot be read, or `folder` holds runs of another version of the study.
    """
    settings = settings or DefaultsSettings()
    asked = list(settings.asked())
    runs = Runs(folder, len(asked), tell, identity(model))
    with trials(model, data, workers) as performer:
        results = runs.results([_settings(settings, *one) for one in asked], performer)
    rows: list[Row] = []
    for (task, who, rate, seed), result in zip(asked, results, strict=True):
        if DIVERGED not in result:
            shown = RULE if rate is None else f"{rate:g}"
            rows.append({"method": who, "rate": shown, "task": task, "seed": seed, "score": result["held_out"]})
    found = {"seconds": round(runs.seconds), "environments": runs.environments, "rules": _rules(asked, results)}
    return StudyReport({**asdict(settings), "measured": HELD_OUT, **found}, rows, ("method", "rate"))


def _settings(settings: DefaultsSettings, task: str, who: str, rate: float | None, seed: int) -> Settings:
    name, size = TASKS[task]
    options = {**settings.contenders[who], **({} if rate is None else {"learning_rate": rate})}
    return {"options": options, "task": name, "examples": size, "seed": seed}


def _rules(asked: list[tuple[str, str, float | None, int]], results: list[Any]) -> dict[str, float]:
    """What the rule's rate was."""
    return {
        f"{who} on {task}": result["learning_rate"]
        for (task, who, rate, _), result in zip(asked, results, strict=True)
        if rate is None and DIVERGED not in result
    }
