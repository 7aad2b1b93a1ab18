"""Do the defaults of `s2ft train` teach a real model as well as the best rate of a grid, and as well as LoRA at its best?

    style-200, style-50    chat in a fixed style (`demo/lighthouse.py`)      loss of held-out examples after
    arithmetic-1000        worked problems                                   `s2ft train` as a user calls it

For every contender, case and seed: each rate of one grid, and the rate of the rule. Variants of S²FT (other projections,
budgets, allocations, warm-ups) take two rates and the rule's on one case. All but the budgets train about as many parameters
(LoRA on SmolLM2 36% more), in as many steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from s2ft.lab.registry import TellShare
from s2ft.lab.study.chains import experiments, identity, named
from s2ft.lab.study.curves import RULE, curves
from s2ft.lab.study.material import examples_digest
from s2ft.lab.study.report import HELD_OUT, StudyReport
from s2ft.lab.study.runs import Runs, Settings
from s2ft.lab.study.summary import Row
from s2ft.lab.study.tuning import DIVERGED

GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
FEW = (1e-3, 2e-3, None)  # for variants; None: the rule's


@dataclass(frozen=True)
class Case:
    """What is trained on: so many examples of a task (`material.py`)."""

    task: str
    examples: int
    options: Mapping[str, Any] = field(default_factory=dict)  # more of `s2ft train`'s


CASES = {
    "style-50": Case("style", 50),
    "style-200": Case("style", 200),
    # the 16 examples a step that the defaults come to, in one batch
    "arithmetic-1000": Case("arithmetic", 1000, {"batch_size": 16, "gradient_accumulation": 1}),
}
LORA = {"method": "lora", "lora_rank": 6, "lora_alpha": 12, "target_modules": "all-linear"}
WEIGHT = {"strategy": "weight", "layout": "in-place"}
CONTENDERS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "random": {"strategy": "random", "layout": "in-place"},
    "weight": WEIGHT,
}
VARIANTS: dict[
    str, dict[str, Any]
] = {  # about 1% of SmolLM2's parameters, as the default budget, unless named after another
    "no warm-up": {**WEIGHT, "warmup_steps": 0},
    "warm-up of half the run": {**WEIGHT, "warmup_steps": 75},
    "budget 0.5%": {**WEIGHT, "budget": 0.005},
    "budget 4%": {**WEIGHT, "budget": 0.04},
    "half to o, half to down": {
        **WEIGHT,
        "ratios": {"o_proj": 0.067573, "down_proj": 0.02534},
    },  # 12 blocks without a head
    "saliency": {**WEIGHT, "strategy": "saliency"},
    "global": {**WEIGHT, "allocation": "global"},
    "down": {**WEIGHT, "ratios": {"down_proj": 0.050673}},
    "up and down": {**WEIGHT, "ratios": dict.fromkeys(("up_proj", "down_proj"), 0.025347)},
    "gate, up, down": {**WEIGHT, "ratios": dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 0.016884)},
    "v, o, down": {**WEIGHT, "ratios": {"v_proj": 0.066667, "o_proj": 0.022222, "down_proj": 0.034006}},
    "o in every block": {**WEIGHT, "ratios": {"o_proj": 0.111111, "down_proj": 0.009006}},
    "all seven": {
        **WEIGHT,
        "ratios": {
            **dict.fromkeys(("q_proj", "o_proj"), 0.018519),
            **dict.fromkeys(("k_proj", "v_proj"), 0.055556),
            **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 0.007639),
        },
    },
}
ALL_VARIANTS, KEPT = "variants", "kept"
VARIED = "style-50"  # where variants are tried: a run of minutes

Asked = tuple[str, str, float | None, int]  # case, contender, rate (None: the rule's), seed


@dataclass(frozen=True)
class DefaultsSettings:
    """What the study does; the defaults are what was recorded."""

    seeds: int = 3
    cases: tuple[str, ...] = tuple(CASES)
    contenders: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: CONTENDERS)  # name → options
    rates: tuple[float, ...] = GRID
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: VARIANTS)  # on the case `VARIED`
    variant_rates: tuple[float | None, ...] = FEW
    kept: bool = False  # report what is kept, and run nothing

    @property
    def runs(self) -> int:
        """The number of runs."""
        return sum(1 for _ in self.asked())

    def asked(self) -> Iterator[Asked]:
        """Each run, seed by seed; LoRA has no rule."""
        for seed in range(self.seeds):
            for case, who in product(self.cases, self.contenders):
                ruled = self.contenders[who].get("method", "s2ft") == "s2ft"
                for rate in (*self.rates, *([None] if ruled else [])):
                    yield case, who, rate, seed
            if VARIED in self.cases:
                for who, rate in product(self.variants, self.variant_rates):
                    yield VARIED, who, rate, seed

    def options(self, who: str) -> Mapping[str, Any]:
        """Of a contender or variant."""
        return self.contenders.get(who) or self.variants[who]

    def restricted(self, only: str | None) -> DefaultsSettings:
        """To the cases and contenders named, with commas between them.

        "variants" is named like a contender. Where no case or no contender is named, all are taken. "kept" takes the runs that
        are in the folder, and runs nothing.

        Raises:
            S2FTError: if a name is neither.
        """
        contenders = (*self.contenders, ALL_VARIANTS)
        asked = named(only, (*self.cases, *contenders, KEPT))
        cases = [name for name in self.cases if name in asked] or self.cases
        wanted = [name for name in contenders if name in asked] or contenders
        return replace(
            self,
            cases=tuple(cases),
            contenders={name: options for name, options in self.contenders.items() if name in wanted},
            variants=self.variants if ALL_VARIANTS in wanted else {},
            kept=KEPT in asked,
        )


def study_defaults(
    folder: Path,
    settings: DefaultsSettings | None = None,
    tell: TellShare | None = None,
    *,
    model: str,
    data: str,
    workers: int = 1,
    only: str | None = None,
) -> StudyReport:
    """Runs the study, or what of it is not in `folder` yet; other arguments and errors are those of `study_real`.

    Args:
        only: The cases and contenders to run, as in `DefaultsSettings.restricted`; None: all.
    """
    settings = (settings or DefaultsSettings()).restricted(only)
    runs = Runs(folder, settings.runs, tell, identity(model))
    every = ((one, _settings(settings, one, data)) for one in settings.asked())
    asked = [(one, wanted) for one, wanted in every if not settings.kept or runs.has(wanted)]
    with experiments(model, data, workers, idle=settings.kept) as performer:
        results = runs.results([wanted for _, wanted in asked], performer)
    rows: list[Row] = []
    for ((case, who, rate, seed), _), result in zip(asked, results, strict=True):
        if DIVERGED not in result:
            shown = RULE if rate is None else f"{rate:g}"
            rows.append({"method": who, "rate": shown, "task": case, "seed": seed, "score": result["held_out"]})
    found = {
        "seconds": round(runs.seconds),
        "environments": runs.environments,
        "rules": _rules([one for one, _ in asked], results),
    }
    told = {**asdict(settings), "measured": HELD_OUT, **found}
    return StudyReport(told, rows, ("method", "rate"), picture=curves)


def _settings(settings: DefaultsSettings, asked: Asked, data: str) -> Settings:
    name, who, rate, seed = asked
    case = CASES[name]
    options = {**case.options, **settings.options(who), **({} if rate is None else {"learning_rate": rate})}
    common = {"task": case.task, "data": examples_digest(case.task, data)}
    return {**common, "options": options, "examples": case.examples, "seed": seed}


def _rules(asked: list[Asked], results: list[Any]) -> dict[str, float]:
    """What the rule's rate was."""
    return {
        f"{who} on {case}": result["learning_rate"]
        for (case, who, rate, _), result in zip(asked, results, strict=True)
        if rate is None and DIVERGED not in result
    }
